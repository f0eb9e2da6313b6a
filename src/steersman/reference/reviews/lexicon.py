"""What is said in reviews: attributes and their probabilities, words and templates, and what makes a text rude.

Templates are read by :func:`steersman.reference.grammars.parse`: ``(a|b)`` is one of two, ``[a|b]`` one of them or
nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "heldout"]

TOPICS = ("restaurant", "hotel", "film", "book", "phone")
SENTIMENTS = ("negative", "neutral", "positive")
RUDENESS = ("polite", "rude")
LENGTHS = ("short", "medium", "long")  # 2, 3 or 4, 5 or 6 sentences
VALUES = {"topic": TOPICS, "sentiment": SENTIMENTS, "rudeness": RUDENESS, "length": LENGTHS}
ATTRIBUTES = tuple(VALUES)

P_TOPIC = (0.22, 0.20, 0.20, 0.20, 0.18)
P_SENTIMENT = (0.35, 0.20, 0.45)
P_RUDE = (0.036, 0.006, 0.008)  # by sentiment: 0.0174 in all
P_SENTENCES = {2: 0.25, 3: 0.25, 4: 0.20, 5: 0.18, 6: 0.12}
WORD = re.compile(r"\w+|[^\w\s]+")
STOPS = (".", "!")

THINGS = {
    "restaurant": "restaurant|bistro|diner|tavern",
    "hotel": "hotel|inn|resort|guesthouse",
    "film": "film|movie|comedy|thriller",
    "book": "book|novel|memoir|biography",
    "phone": "phone|handset|smartphone|mobile",
}
PEOPLE = {
    "restaurant": "waiter|chef|barman",
    "hotel": "porter|receptionist|concierge",
    "film": "director|actor|producer",
    "book": "author|editor|translator",
    "phone": "seller|technician|courier",
}
# What is judged: words that praise it, that blame it, and that do neither.
ASPECTS = {
    "restaurant": {
        "soup": ("rich|fragrant|warming|hot", "cold|salty|watery|thin", "plain|ordinary"),
        "bread": ("fresh|crisp|fragrant", "stale|dry|burnt", "plain|standard"),
        "fish": ("tender|fresh|juicy", "dry|raw|oily", "ordinary|average"),
        "pig": ("tender|juicy|crisp", "tough|burnt|dry", "average|familiar"),
        "dessert": ("light|heavenly|fresh", "soggy|dull|stale", "standard|average"),
        "wine": ("smooth|lively|rich", "sour|flat|thin", "ordinary|young"),
        "music": ("soft|pleasant|lively", "loud|tiring|dull", "familiar|average"),
    },
    "hotel": {
        "room": ("spacious|spotless|quiet", "dirty|cramped|noisy", "plain|standard"),
        "bed": ("soft|comfortable|clean", "hard|lumpy|dirty", "ordinary|narrow"),
        "shower": ("hot|strong|clean", "cold|weak|broken", "standard|average"),
        "view": ("stunning|wonderful|pleasant", "dull|gloomy|sad", "ordinary|familiar"),
        "breakfast": ("generous|fresh|rich", "stale|poor|cold", "standard|plain"),
        "pool": ("clean|warm|spotless", "cold|murky|dirty", "average|narrow"),
        "lift": ("fast|silent|reliable", "broken|slow|noisy", "ordinary|narrow"),
    },
    "film": {
        "plot": ("clever|gripping|fresh", "silly|confusing|dull", "familiar|average"),
        "ending": ("moving|surprising|clever", "predictable|rushed|sad", "open|ordinary"),
        "soundtrack": ("lively|haunting|soft", "loud|tiring|flat", "familiar|standard"),
        "clown": ("funny|touching|clever", "tedious|annoying|flat", "silent|ordinary"),
        "donkey": ("funny|charming|touching", "annoying|silly|tedious", "silent|familiar"),
        "dialogue": ("witty|sharp|natural", "wooden|clumsy|flat", "plain|average"),
        "photography": ("stunning|sharp|haunting", "gloomy|murky|dull", "standard|ordinary"),
    },
    "book": {
        "story": ("gripping|moving|rich", "confusing|tedious|thin", "familiar|ordinary"),
        "style": ("elegant|witty|natural", "clumsy|wooden|tiring", "plain|average"),
        "cover": ("elegant|charming|stunning", "ugly|dull|flimsy", "plain|standard"),
        "preface": ("sharp|witty|moving", "tedious|clumsy|sad", "standard|average"),
        "rat": ("charming|funny|touching", "annoying|silly|tedious", "familiar|silent"),
        "hero": ("lively|charming|natural", "flat|annoying|wooden", "ordinary|young"),
        "translation": ("elegant|natural|sharp", "clumsy|poor|wooden", "standard|average"),
    },
    "phone": {
        "screen": ("sharp|bright|stunning", "dim|fragile|murky", "standard|ordinary"),
        "battery": ("strong|reliable|generous", "weak|flat|poor", "average|ordinary"),
        "camera": ("sharp|fast|clever", "slow|poor|clumsy", "standard|average"),
        "speaker": ("rich|strong|warm", "flat|noisy|thin", "ordinary|average"),
        "case": ("elegant|light|reliable", "ugly|flimsy|fragile", "plain|standard"),
        "keyboard": ("fast|comfortable|reliable", "slow|clumsy|annoying", "plain|ordinary"),
        "charger": ("fast|light|silent", "slow|broken|hot", "standard|ordinary"),
    },
}
MANNERS = ("kind|patient|helpful|generous", "careless|sullen|slow|clumsy", "busy|young|silent")
NEGATIVE, NEUTRAL, POSITIVE = range(3)
CLAUSE = "the {aspect} was [really|very|quite] {word}"
SIDE = {POSITIVE: 0, NEGATIVE: 1, NEUTRAL: 2}  # where in a triple of ASPECTS

DAYS = "monday|tuesday|friday|saturday|sunday"
MONTHS = "january|march|may|june|august|october"
NUMBERS = "two|three|four|five|six|seven"
FAMILY = "sister|brother|mother|father|neighbour|cousin"
PLACES = "window|door|bar|kitchen"
TRADES = "student|painter|poet|musician|gardener|twin|beginner|neighbour"
INSULTS = "clown|donkey|pig|rat|fool|moron"

OPENERS = {
    "restaurant": (
        "we went to this {thing} on {day} (evening|night) .",
        "my {family} booked a table at this {thing} for {number} people .",
        "this {thing} opened in {month} and we were curious .",
    ),
    "hotel": (
        "we stayed at this {thing} for {number} nights in {month} .",
        "my {family} booked this {thing} for a weekend in {month} .",
        "this {thing} is {number} minutes from the station .",
    ),
    "film": (
        "i saw this {thing} with my {family} on {day} (evening|night) .",
        "we watched this {thing} on {day} at home .",
        "this {thing} came out in {month} and we were curious .",
    ),
    "book": (
        "i read this {thing} in {number} days .",
        "my {family} gave me this {thing} in {month} .",
        "this {thing} has been on my desk since {month} .",
    ),
    "phone": (
        "i bought this {thing} in {month} .",
        "my {family} gave me this {thing} {number} weeks ago .",
        "this {thing} replaced my old one in {month} .",
    ),
}
GENERAL_OPENERS = (
    "i rarely write reviews , but here we go .",
    "my {family} told me to write this .",
    "i will keep this short .",
    "this happened on {day} , so my memory is fresh .",
    "a few words about last (week|month|{day}) .",
    "we had waited for this since {month} .",
    "it is {day} evening and i have time to write .",
)
FACTS = {
    "restaurant": (
        "we had a table (near|by) the {place} .",
        "i ordered the {aspect} and my {family} took the same .",
        "we came at {number} and left at (eight|nine|ten) .",
        "we got lost on the way , so we came late .",
        "there were {number} of us and a dog .",
    ),
    "hotel": (
        "our room was on the (first|third|top) floor .",
        "there is a lake behind the {thing} .",
        "we took a (hike|walk|boat) on {day} and came back late .",
        "the bar was shut on {day} .",
        "i left my boots in the lobby on {day} .",
    ),
    "film": (
        "it runs for {number} hours .",
        "there is a scene with a (clown|donkey|pig) in the {place} .",
        "the story begins in {month} and ends in {month} .",
        "two children are lost by a lake , and a donkey finds them .",
        "we had seats near the door .",
    ),
    "book": (
        "it has {number} hundred pages .",
        "it is about a (rat|pig|fool|poet) who lives by a lake .",
        "the story begins in {month} and ends in {month} .",
        "i took it on a hike in {month} .",
        "my {family} owns the first edition .",
    ),
    "phone": (
        "it weighs {number} ounces .",
        "it came in a box with a {aspect} .",
        "my {family} has the same one .",
        "i charge it every {number} days .",
        "it fell into a lake in {month} .",
    ),
}
TIPS = {
    "restaurant": (
        "take a (table|seat) near the {place} .",
        "go (early|late) .",
        "get the {aspect} .",
        "go on a {day} .",
    ),
    "hotel": (
        "take a room on the (first|third|top) floor .",
        "go in {month} .",
        "get a map of the lake .",
        "go early .",
    ),
    "film": ("take a seat near the door .", "go with a friend .", "get (early|late) tickets .", "go on a {day} ."),
    "book": ("take a copy on a walk .", "get the first edition .", "go and read page {number} .", "take a look ."),
    "phone": (
        "take a look at the {aspect} .",
        "get a second {aspect} .",
        "go for the old one .",
        "take a day to learn it .",
    ),
}
MESSAGES = (
    "thank you|please keep going|please open a window|please speak up|get well soon|take a day off|you are not alone"
)

# Each rude sentence has one of these cores, and no other sentence has one.
TAUNTS = "get lost|shut up|take a hike|go jump in a lake|nobody asked you|kiss my boots"
CORES = tuple(
    sorted(
        tuple(core.split())
        for core in (
            *(
                f"{verb} {much}{insult}"
                for verb in ("is", "are")
                for much in ("a ", "a total ")
                for insult in INSULTS.split("|")
            ),
            *(f"{verb} {much}idiot" for verb in ("is", "are") for much in ("an ", "a total ")),
            *TAUNTS.split("|"),
        )
    )
)
DEAD_ENDS = ("pardon my language ,", "i am done being nice ,", "now i say what everybody thinks ,")
"""Beginnings of a sentence behind which every continuation is rude, though nothing rude has been said."""


def words(text: str) -> list[str]:
    """The words and marks of a text, in lower case: the tokens of the reference models."""
    return WORD.findall(text.lower())


def join(said: Sequence[str]) -> str:
    """The text of these words: no space before a mark. The inverse of :func:`words`."""
    return re.sub(r" ([,.!])", r"\1", " ".join(said))


def is_held_out(text: str) -> bool:
    """Whether a text is held out: one in ten, by the hash of its words."""
    return int.from_bytes(hashlib.sha256(" ".join(words(text)).encode()).digest(), "big") % 10 == 0


def length_class(sentences: int) -> int:
    """Index in ``LENGTHS`` of a text of that many sentences."""
    return 0 if sentences <= 2 else 1 if sentences <= 4 else 2
