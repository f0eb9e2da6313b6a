r"""``reviews``: short texts from a grammar, with known topic, sentiment, rudeness and length, and small models of them.

A review is two to six sentences, all in lower case:

    we went to this bistro on friday evening. although the soup was cold, the fish was really tender.
    a word for the chef, please keep going. all in all, this bistro is worth every coin.

Its law is a mixture over topic t, sentiment s, rudeness r, number of sentences n and, if it is rude, the place j >= 2
of its one rude sentence. Given these the sentences are independent,

    P(x) = Σ_{t,s,r,n,j} P(t) P(s) P(r|s) P(n) P(j|r,n) Π_i P(x_i | role_i(n, j), t, s)

with four roles: the first sentence, those in the middle, the rude one, and the last that isn't rude, which always
names topic and sentiment. Every P(x_i | ...) is a finite automaton (:mod:`steersman.reference.grammars`), so that the
probability of a text, of a beginning, of each next word, and of each attribute given a beginning are exact.

**What is hard on purpose.** The last clause decides the sentiment: *although the soup was cold* opens praise, *not
cold* is praise, *the only bad thing was* is praise. Under 2 % of the texts are rude, and often the last word of a
sentence decides it (*the porter is a student*, *the porter is a clown*). Most words of insults are innocent elsewhere
(a film has a clown, a menu a pig), and some insults have no other words at all (*get lost*). A few openings of a
sentence (*pardon my language,*) are dead ends: nothing rude has been said, and whatever follows will be. A verdict
(*all in all, ...*) is the last that a polite review says, so going on behind it is a dead end too.

:func:`attributes` reads any text, also one outside the grammar, sentence by sentence. A text is held out if the
SHA-256 of its words says so, one in ten.
"""

from steersman.reference.reviews.beginnings import Prompt, prompts
from steersman.reference.reviews.law import (
    Review,
    draws,
    fingerprint,
    log_probability,
    next_words,
    posterior,
    risk,
    texts,
    trace,
)
from steersman.reference.reviews.lexicon import (
    ATTRIBUTES,
    CORES,
    DEAD_ENDS,
    INSULTS,
    LENGTHS,
    RUDENESS,
    SENTIMENTS,
    TOPICS,
    VALUES,
    Split,
    is_held_out,
    join,
    words,
)
from steersman.reference.reviews.models import CODES, codes, language_model, tokenizer, value_model
from steersman.reference.reviews.reading import Attributes, attributes, has_core
from steersman.reference.reviews.sentences import Kind, kinds

__all__ = [
    "ATTRIBUTES",
    "CODES",
    "CORES",
    "DEAD_ENDS",
    "INSULTS",
    "LENGTHS",
    "RUDENESS",
    "SENTIMENTS",
    "TOPICS",
    "VALUES",
    "Attributes",
    "Kind",
    "Prompt",
    "Review",
    "Split",
    "attributes",
    "codes",
    "draws",
    "fingerprint",
    "has_core",
    "is_held_out",
    "join",
    "kinds",
    "language_model",
    "log_probability",
    "next_words",
    "posterior",
    "prompts",
    "risk",
    "texts",
    "tokenizer",
    "trace",
    "value_model",
    "words",
]
