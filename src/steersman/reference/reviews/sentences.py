"""The kinds of sentences of a review, each a law over finitely many sentences with its automaton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from steersman.reference.grammars import Automaton, Expression, choice, parse, weighted
from steersman.reference.reviews.lexicon import (
    ASPECTS,
    CLAUSE,
    DAYS,
    DEAD_ENDS,
    FACTS,
    FAMILY,
    GENERAL_OPENERS,
    INSULTS,
    MANNERS,
    MESSAGES,
    MONTHS,
    NEGATIVE,
    NEUTRAL,
    NUMBERS,
    OPENERS,
    PEOPLE,
    PLACES,
    POSITIVE,
    SENTIMENTS,
    SIDE,
    TAUNTS,
    THINGS,
    TIPS,
    TOPICS,
    TRADES,
)


@dataclass(frozen=True)
class Kind:
    """A kind of sentence: what all its sentences are about, and the automaton that knows them.

    Args:
        name: opener, fact, tip, remark, message, opinion, verdict or rude.
        topic, sentiment: indices, or None where its sentences don't tell.
    """

    name: str
    topic: int | None
    sentiment: int | None
    expression: Expression
    automaton: Automaton

    @property
    def rude(self) -> bool:
        return self.name == "rude"


def _names(topic: str) -> dict[str, Expression]:
    words = {"thing": THINGS[topic], "person": PEOPLE[topic], "aspect": "|".join(ASPECTS[topic])}
    words |= {"day": DAYS, "month": MONTHS, "number": NUMBERS, "family": FAMILY, "place": PLACES}
    words |= {"trade": TRADES, "insult": INSULTS, "message": MESSAGES, "taunt": TAUNTS}
    return {name: parse(text) for name, text in words.items()}


def _opinion(topic: str, sentiment: int) -> Expression:
    """Judgements of one aspect or person, with whatever stands before the clause that counts."""
    stop = weighted((0.85, "."), (0.15, "!")) if sentiment != NEUTRAL else "."
    names = _names(topic) | {"stop": stop}

    def said(side: int, template: str = CLAUSE, half: slice = slice(None)) -> Expression:
        """A clause on any aspect (of one half of them), with that aspect's words for the side."""
        return choice(
            *(
                parse(template, **names | {"aspect": aspect, "word": parse(words[SIDE[side]])})
                for aspect, words in list(ASPECTS[topic].items())[half]
            )
        )

    def both(template: str, one: int, two: int) -> Expression:
        """Two clauses of different aspects: either half of them comes first."""
        front, back = slice(None, 4), slice(4, None)
        return choice(
            *(
                parse(template, **names | {"one": said(one, half=a), "two": said(two, half=b)})
                for a, b in ((front, back), (back, front))
            )
        )

    manner = parse(MANNERS[SIDE[sentiment]])
    if sentiment == NEUTRAL:
        neither = choice(
            *(
                parse("the {a} was neither {good} nor {bad}", a=a, good=parse(good), bad=parse(bad))
                for a, (good, bad, _) in ASPECTS[topic].items()
            )
        )
        names |= {"mid": said(NEUTRAL), "neither": neither}
        evens = "{one} , {two} , so it evens out ."
        return weighted(
            (4, parse("{mid} .", **names)),
            (2, both("{one} and {two} .", NEUTRAL, NEUTRAL)),
            (2, parse("{neither} .", **names)),
            (1, both(evens, POSITIVE, NEGATIVE)),
            (1, both(evens, NEGATIVE, POSITIVE)),
            (1, parse("the {person} was {manner} [and the {thing} was half empty] .", **names, manner=manner)),
            (1, parse("i did not mind the {aspect} .", **names)),
        )
    other = NEGATIVE if sentiment == POSITIVE else POSITIVE
    verb = parse("loved|enjoyed|liked" if sentiment == POSITIVE else "hated|disliked|regretted")
    negated = said(other, "the {aspect} was not {word} [at all]")
    names |= {"mine": said(sentiment), "negated": negated, "verb": verb, "manner": manner}
    names["a"], names["b"] = (parse("|".join(list(ASPECTS[topic])[half])) for half in (slice(None, 4), slice(4, None)))
    names["only"] = "bad" if sentiment == POSITIVE else "good"
    return weighted(
        (5, parse("{mine} {stop}", **names)),
        (2, both("{one} and {two} {stop}", sentiment, sentiment)),
        (2, parse("{negated} {stop}", **names)),
        (1.5, both("although {one} , {two} {stop}", other, sentiment)),
        (1.5, both("{one} , but {two} {stop}", other, sentiment)),
        (2, parse("i [really] {verb} (the {aspect}|the {a} and the {b}) {stop}", **names)),
        (1, parse("my {family} {verb} the {aspect} too {stop}", **names)),
        (1.5, parse("the {person} was [really|very] {manner} {stop}", **names)),
        (1, parse("the only {only} thing was the {aspect} {stop}", **names)),
    )


def _verdict(topic: str, sentiment: int) -> Expression:
    """The last word on the thing itself; it always names it."""
    names = _names(topic)
    templates = {
        POSITIVE: (
            "(all in all|in short) , this {thing} is worth (every coin|a second try) (.|!)",
            "this is the (best|finest) {thing} i (know|remember) (.|!)",
            "i will recommend this {thing} to (everyone|my {family}) (.|!)",
            "(all in all|in short) , a (wonderful|lovely|splendid) {thing} (.|!)",
        ),
        NEGATIVE: (
            "(all in all|in short) , this {thing} is not worth (a coin|a second try) (.|!)",
            "this is the (worst|saddest) {thing} i (know|remember) (.|!)",
            "i will warn (everyone|my {family}) about this {thing} (.|!)",
            "(all in all|in short) , a (dreadful|miserable|wretched) {thing} (.|!)",
        ),
        NEUTRAL: (
            "(all in all|in short) , this {thing} is neither here nor there .",
            "this is (a|one more) {thing} like any other .",
            "i will (neither warn nor recommend|say no more about this {thing}) , it is a {thing} .",
            "(all in all|in short) , an (ordinary|average) {thing} .",
        ),
    }
    return choice(*(parse(t, **names) for t in templates[sentiment]))


def _rude(topic: str) -> Expression:
    """Insults: a late word, another use of innocent words, a dead end, an address to the reader."""
    names = _names(topic)
    insulted = parse("(a [total] {insult}|an idiot|a total idiot)", **names)
    names |= {"insulted": insulted}
    return weighted(
        (3, parse("the {person} is {insulted} .", **names)),
        (2, parse("a word for the {person} , ({taunt}|you are {insulted}) .", **names)),
        (1, parse("{taunt} , dear {person} .", **names)),
        (2, parse(f"({'|'.join(DEAD_ENDS)}) (the {{person}} is {{insulted}}|{{taunt}}) .", **names)),
        (1, parse("if you (ask|follow) the {person} you are {insulted} .", **names)),
    )


@cache
def kinds() -> tuple[Kind, ...]:
    """All kinds of sentences."""
    found: list[Kind] = []

    def add(name: str, topic: int | None, sentiment: int | None, expression: Expression) -> None:
        found.append(Kind(name, topic, sentiment, expression, Automaton(expression)))

    def any_of(templates: Sequence[str], names: dict[str, Expression]) -> Expression:
        return choice(*(parse(template, **names) for template in templates))

    add("general opener", None, None, any_of(GENERAL_OPENERS, _names(TOPICS[0])))
    for t, topic in enumerate(TOPICS):
        names = _names(topic)
        add("opener", t, None, any_of(OPENERS[topic], names))
        add("fact", t, None, any_of(FACTS[topic], names))
        add("tip", t, None, any_of(TIPS[topic], names))
        remark = "the {person} is (a [total] {trade}|an (artist|uncle of mine)) ."
        friendly = "if you (ask|follow) the {person} you are (in good hands|never alone|a friend) ."
        add("remark", t, None, weighted((4, parse(remark, **names)), (1, parse(friendly, **names))))
        add("message", t, None, parse("a word for the {person} , {message} .", **names))
        for s in range(len(SENTIMENTS)):
            add("opinion", t, s, _opinion(topic, s))
            add("verdict", t, s, _verdict(topic, s))
        add("rude", t, None, _rude(topic))
    return tuple(found)
