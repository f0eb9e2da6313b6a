r"""The rounds of PEARL as a state machine, without models, devices or randomness.

Let y be the verified text and *rest* the drafted tokens behind it that are not verified yet. In one round, at the same
time,

* the draft model writes z_1, ..., z_g behind y + rest,
* the target gives its laws P_0, ..., P_k at the k + 1 = len(rest) + 1 places behind y, y + rest_1, ..., y + rest.

Then check = rest + [z_1] is verified in order, with fresh uniforms u_i and the laws q_i that its tokens came from:

    n = first i with u_i q_i(check_i) >= P_i(check_i)
    none:  y += check;                            rest = z_2, ..., z_g
    n:     y += check[:n] + [t ~ (P_n - q_n)_+];  rest = []

With an empty rest only z_1 is verified (*pre-verify*: the target works while the draft writes); otherwise the draft
writes on while the target verifies (*post-verify*). Each can be left out:

=========  ==========  ===========  ==================================================================================
variant    pre-verify  post-verify  a round
=========  ==========  ===========  ==================================================================================
full       yes         yes          as above
no-pre     no          yes          with an empty rest the draft writes alone, and all of it waits for the next round
no-post    yes         no           with a rest the target verifies alone, and adds a token of its own
sd         no          no           both: plain speculative decoding, in two half rounds
target     -           -            the target writes one token
draft      -           -            the draft writes one token, which nobody verifies
=========  ==========  ===========  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from steersman.errors import InputError, nearest

# variant: (verify while the draft writes its first block, write on while a block is verified)
STRATEGIES = MappingProxyType(
    {"full": (True, True), "no-pre": (False, True), "no-post": (True, False), "sd": (False, False)}
)
VARIANTS = (*STRATEGIES, "target", "draft")


@dataclass(frozen=True)
class Verdict:
    """What the verifying side decides in a round.

    Args:
        accepted: tokens of the check that were accepted.
        token: the token drawn behind them, or none.
        kept: tokens that the text grows by.
        stop: whether it ends with them.
        gamma: tokens of the next block.
    """

    accepted: int
    token: int | None
    kept: int
    stop: bool
    gamma: int


@dataclass
class Rounds:
    """What is to be done in the next round, and what its outcome makes of the text.

    Args:
        variant: one of ``VARIANTS``.
        rest: drafted tokens behind the verified text that are not verified yet.

    Raises:
        InputError: an unknown variant.
    """

    variant: str = "full"
    rest: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError("variant", self.variant, nearest(str(self.variant), VARIANTS))

    def plan(self, gamma: int) -> tuple[int, bool]:
        """How many tokens the draft model writes, and whether the target gives its laws."""
        if self.variant in ("target", "draft"):
            return int(self.variant == "draft"), self.variant == "target"
        pre, post = STRATEGIES[self.variant]
        return (gamma if post else 0, True) if self.rest else (gamma, pre)

    def check(self, written: Sequence[int], scored: bool) -> list[int]:
        """The tokens that this round verifies.

        Args:
            written: z, what the draft model has written.
            scored: whether the target gave its laws.
        """
        return [*self.rest, *written[:1]] if scored else []

    def draws(self, written: Sequence[int], accepted: int, scored: bool) -> bool:
        """Whether the target's side draws the token behind the accepted ones: after a rejection, or with nothing
        drafted behind a wholly accepted check."""
        return scored and (accepted < len(self.check(written, scored)) or not written)

    def verified(self, written: Sequence[int], accepted: int, token: int | None, scored: bool) -> list[int]:
        """The tokens that are verified after this round.

        Args:
            accepted: how many tokens of the check were accepted.
            token: the token drawn behind them, where :meth:`draws` asks for one.
        """
        if self.variant == "draft":
            return list(written)
        check = self.check(written, scored)
        return [*check[:accepted], token] if token is not None else check

    def advance(self, written: Sequence[int], accepted: int, token: int | None, scored: bool) -> list[int]:
        """Go on to the next round; gives :meth:`verified`."""
        found = self.verified(written, accepted, token, scored)
        if self.variant == "draft" or token is not None:
            self.rest = []
        else:
            self.rest = list(written[1:] if scored else written)
        return found


def accept(check: Sequence[int], q: Sequence[float], p: Callable[[int], float], uniforms: Sequence[float]) -> int:
    """The number of tokens before the first i with u_i q_i(check_i) >= p_i(check_i).

    Written without a division, and so that u = 0 doesn't let a token pass that the target never says.

    Args:
        check: the tokens to verify.
        q: the probability that each was drawn with.
        p: ``p(i)`` is the target's probability of ``check[i]``, asked for in order up to the first rejection.
        uniforms: fresh draws from [0, 1), one a token. A draw that has judged a token before is biased by having
            let the text come here.
    """
    for i, (chance, u) in enumerate(zip(q, uniforms, strict=True)):
        if u * chance >= p(i):
            return i
    return len(check)


def expected_tokens(a: float, gamma: int) -> float:
    r"""Tokens that a round of PEARL adds in the long run, when each drafted token is accepted independently.

    .. math:: R(a, \gamma) = \frac{1 - a^\gamma}{(1 - a)(1 + a - a^\gamma)}

    A round takes the longer of gamma draft steps and one forward of the target. R grows from 1 (a = 0) to gamma
    (a = 1). (The Markov chain has two states: an accepted first token leads to post-verify, which is left by a
    rejection. With b = a^gamma the share of rounds in post-verify is a / (1 + a - b), and such a round adds
    (1 - b) / (1 - a) tokens; the others add one.)

    Args:
        a: probability that a drafted token is accepted, from 0 to 1.
        gamma: tokens of a block, at least 1.

    Raises:
        InputError: an argument out of range.
    """
    if isinstance(a, bool) or not isinstance(a, (int, float)) or not 0 <= a <= 1:
        raise InputError("a", a, "a number from 0 to 1")
    if isinstance(gamma, bool) or not isinstance(gamma, int) or gamma < 1:
        raise InputError("gamma", gamma, "a whole number of at least 1")
    run = sum(a**i for i in range(gamma))  # (1 - a^gamma) / (1 - a)
    return run / (1 + a - a**gamma)
