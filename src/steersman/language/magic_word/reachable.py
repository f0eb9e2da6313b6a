r"""The reachable set R^k(x0): every token that some prompt of at most k tokens makes the model's top choice.

    R^k(x0) = { argmax P(. | u + x0) : |u| <= k },       R^0 in R^1 in R^2 in ...

Exact by brute force: |A|^k rows over the alphabet A. Beyond that, forward exploration collects arg maxes: stored
prompts are mutated along the gradient of a loss that pushes mass away from what is reached,

    L(u) = 1/|R| sum_{v in R} log P(v | u + x0) + H( P(. | u + x0) restricted to the tokens not in R )

(minus the cross-entropy to the uniform law on R, plus the entropy of the rest, so that one unreached token gathers
it), and every arg max of every candidate that is scored joins the set. What it finds is a subset of R^k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.errors import InputError
from steersman.language.magic_word.search import warm_start
from steersman.language.magic_word.system import State, System, whole

MOST = 2_000_000
"""Rows that an exhaustive search makes at most."""


@dataclass(frozen=True)
class ReachableSet:
    """Tokens with the first prompt found that makes each the top choice.

    Args:
        prompts: token -> shortest prompt found.
        k: longest prompt allowed.
        exact: whether every prompt was tried (the set is then R^k, else a subset of it).
        forwards: rows that were read.
    """

    prompts: Mapping[int, tuple[int, ...]]
    k: int
    exact: bool
    forwards: int

    def within(self, k: int) -> frozenset[int]:
        """Tokens reached with at most k tokens."""
        return frozenset(token for token, prompt in self.prompts.items() if len(prompt) <= k)

    def __len__(self) -> int:
        return len(self.prompts)

    def __contains__(self, token: object) -> bool:
        return token in self.prompts


def reachable_set(
    system: System,
    x0: str | Sequence[int],
    k: int = 1,
    *,
    exhaustive: bool | None = None,
    starts: int = 100,
    iterations: int = 34,
    candidates: int = 768,
    k_sub: int = 128,
    seed: int = 0,
) -> ReachableSet:
    """R^k(x0), exactly where brute force is short enough, else a subset of it by forward exploration.

    Args:
        system: the model, and the alphabet of prompts.
        x0: imposed text or token ids.
        k: longest prompt, at least 0.
        exhaustive: True brute force, False forward exploration behind k = 1 (which is always brute force); None
            chooses by the number of prompts.
        starts: random prompts that forward exploration begins with, of each length.
        iterations, candidates, k_sub: of forward exploration at each length, as in :class:`GCG`.
        seed: of forward exploration.

    Raises:
        InputError: a number out of range, or more than 2,000,000 prompts to try.
    """
    whole("k", k, 0, 1000)
    for name, value in (("starts", starts), ("iterations", iterations), ("candidates", candidates), ("k_sub", k_sub)):
        whole(name, value, 1)
    state, allowed = State(system, x0), system.allowed
    state.check(k)
    size = len(allowed)
    rows = sum(size**length for length in range(1, k + 1))
    if exhaustive is None:
        exhaustive = rows <= 100_000
    if exhaustive and rows > MOST:
        raise InputError("k", k, f"smaller: brute force over {size} ids takes {rows} rows (at most {MOST})")
    before = system.forwards
    found: dict[int, tuple[int, ...]] = {int(state.next_token().argmax()): ()}
    for length in range(1, k + 1):
        if exhaustive or length == 1:
            for first in range(0, size**length, 8192):
                index = torch.arange(first, min(first + 8192, size**length), device=allowed.device)
                digits = [index // size**place % size for place in reversed(range(length))]
                _collect(found, state, allowed[torch.stack(digits, 1)])
        else:
            generator = torch.Generator().manual_seed(seed * 1000 + length)
            _explore(found, state, length, starts, iterations, candidates, min(k_sub, size), generator)
    return ReachableSet(found, k, exhaustive or k <= 1, system.forwards - before)


def _collect(found: dict[int, tuple[int, ...]], state: State, prompts: Tensor) -> None:
    """Every new arg max joins, with its first prompt; a single fresh row has to confirm it."""
    tops = state.tops(prompts)
    known = torch.tensor(list(found), device=tops.device)
    for row in (~torch.isin(tops, known)).nonzero()[:, 0].tolist():
        token = int(tops[row])
        if token not in found:
            prompt = tuple(prompts[row].tolist())
            if state.verified(prompt, (token,)):
                found[token] = prompt


def _explore(
    found: dict[int, tuple[int, ...]],
    state: State,
    length: int,
    starts: int,
    iterations: int,
    candidates: int,
    k_sub: int,
    generator: torch.Generator,
) -> None:
    allowed = state.system.allowed
    device = allowed.device
    _collect(found, state, allowed[torch.randint(len(allowed), (starts, length), generator=generator).to(device)])
    for _ in range(iterations):
        stored = list(found.values())
        pick = stored[int(torch.randint(len(stored), (1,), generator=generator))]
        u = warm_start(pick, length, allowed, generator)
        reached = torch.zeros(state.system.rows, dtype=torch.bool, device=device)
        reached[list(found)] = True

        def loss(logits: Tensor, reached: Tensor = reached) -> Tensor:
            log_p = logits[0].log_softmax(-1)[: len(reached)]
            rest = log_p[~reached].log_softmax(-1)
            return log_p[reached].mean() - (rest.exp() * rest).sum()

        best_ids = allowed[state.gradient(u, loss)[:, allowed].topk(k_sub, largest=False).indices]
        position = torch.randint(length, (candidates,), generator=generator).to(device)
        choice = torch.randint(k_sub, (candidates,), generator=generator).to(device)
        prompts = u.repeat(candidates, 1)
        prompts.scatter_(1, position[:, None], best_ids[position, choice][:, None])
        _collect(found, state, prompts)
