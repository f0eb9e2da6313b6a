r"""Searches for a short prompt u in front of x0 behind which y is the model's top choice.

    greedy back generation      u <- v* u,   v* = argmin_v CE(y | v + u + x0)              |V| rows a token
    GCG                         G = d CE / d onehot(u)                                     (k, V)
                                S_i = the k_sub ids with the most negative G_i
                                B candidates: u with one uniform position i set to a uniform id of S_i
                                u <- the candidate of least CE                             T times
    back-off                    k = 1, 2, 3 by greedy back generation, then k = 4, 6, 8, 10 by GCG, each warm-started
                                from the prompt before; the first k that reaches y ends it

The logits of every candidate are there anyway, so with ``success="any"`` each of them is tested; the published search
(``success="argmin"``) tests the arg min of a scan, and of GCG the last prompt after all T iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from steersman.errors import InputError
from steersman.language.magic_word.system import Objective, whole

Success = Literal["any", "argmin"]
Accept = Literal["improve", "always"]


@dataclass
class Found:
    """What a search ends with.

    Args:
        prompt: the prompt that reaches y, or else the one of least loss among those that the lengths ended with.
        loss: its CE.
        reached: whether it reaches y, confirmed by a fresh pass.
        losses: by prompt length, the CE after each step of the search at this length.
        last: the prompt of the length tried last, from which a longer search starts.
    """

    prompt: tuple[int, ...]
    loss: float
    reached: bool
    losses: dict[int, list[float]] = field(default_factory=dict)
    last: tuple[int, ...] = ()

    def then(self, run: Found) -> Found:
        """The better of what was found and of a later run: one that reaches y, or has a lower loss."""
        better = run if run.reached or run.loss < self.loss else self
        losses = self.losses | {k: self.losses.get(k, []) + values for k, values in run.losses.items()}
        return Found(better.prompt, better.loss, better.reached, losses, run.last)


class Search(Protocol):
    """A search: spends what the objective affords, longest prompt ``longest``."""

    @property
    def longest(self) -> int: ...

    def cost(self, allowed: int) -> int | None:
        """Forward passes that its schedule takes at most, for an alphabet of ``allowed`` ids; None: no end."""

    def search(self, objective: Objective, generator: Generator) -> Found: ...


class Greedy:
    """Greedy back generation: u <- argmin_v CE(y | v + u + x0) in front of u, until y is reached.

    Args:
        longest: the longest prompt, at least 1.
        success: ``any`` tests every candidate; ``argmin`` the arg min only, as published.

    References:
        Bhargava et al. (2023), section 5.1, greedy back-generation.
    """

    def __init__(self, longest: int = 3, success: Success = "any") -> None:
        self.longest, self.success = whole("longest", longest, 1, 1000), _choice("success", success, Success)

    def cost(self, allowed: int) -> int:
        return self.longest * allowed

    def search(self, objective: Objective, generator: Generator) -> Found:
        allowed = objective.allowed
        u = allowed[:0]
        found = Found((), float("inf"), False)
        while len(u) < self.longest and objective.affords(len(allowed)):
            loss, reached = objective.scan(u)
            best = int(loss.argmin())
            if self.success == "argmin":
                reached = reached & (torch.arange(len(loss), device=loss.device) == best)
            prompts = torch.cat([allowed[:, None], u.expand(len(allowed), -1)], 1)
            hit = objective.first_verified(prompts, loss, reached)
            at = best if hit is None else hit
            u = prompts[at]
            value, prompt = float(loss[at]), tuple(u.tolist())
            found = found.then(Found(prompt, value, hit is not None, {len(u): [value]}, prompt))
            if found.reached:
                break
        return found


class GCG:
    """Greedy coordinate gradient on prompts of each length in turn, warm-started from the one before.

    Warm start: the previous prompt as the last tokens, random ones in front; of a longer one the last k. A budget is
    shared: each length has what is left over the number of lengths to come, so that the longest is searched as well.
    What ``iterations`` leave of it goes into new rounds of all lengths from random prompts; the best of all is kept.

    Args:
        lengths: prompt lengths, ascending.
        iterations: T.
        candidates: B.
        k_sub: ids a position, those of the most negative gradient (all allowed ones where there are fewer).
        success: ``any`` or ``argmin``, see the module's text.
        accept: ``improve`` keeps the best prompt so far; ``always`` takes the best candidate also where it is
            worse than the current prompt, as published.

    References:
        Andy Zou, Zifan Wang, Nicholas Carlini, Milad Nasr, J. Zico Kolter, Matt Fredrikson. Universal and
        Transferable Adversarial Attacks on Aligned Language Models. arXiv:2307.15043, 2023, algorithm 1.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (1, 2, 3, 4, 6, 8, 10),
        iterations: int = 34,
        candidates: int = 768,
        k_sub: int = 128,
        success: Success = "any",
        accept: Accept = "improve",
    ) -> None:
        self.lengths = _ascending(lengths)
        self.iterations = whole("iterations", iterations, 1)
        self.candidates, self.k_sub = whole("candidates", candidates, 1), whole("k_sub", k_sub, 1)
        self.success, self.accept = _choice("success", success, Success), _choice("accept", accept, Accept)

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    def cost(self, allowed: int) -> int:
        return len(self.lengths) * (1 + self.iterations * (self.candidates + 3))

    def search(self, objective: Objective, generator: Generator, start: Sequence[int] = ()) -> Found:
        before, best, step = tuple(start), Found((), float("inf"), False), self.candidates + 3
        while True:
            for i, length in enumerate(self.lengths):
                share = None
                if objective.budget is not None:
                    share = (objective.budget - objective.passes) // (len(self.lengths) - i)
                    if share < 1 + step:  # not one iteration: the longer lengths get it
                        continue
                u = warm_start(before, length, objective.allowed, generator)
                best = best.then(self.run(objective, u, generator, share))
                if best.reached:
                    return best
                before = best.last
            if objective.budget is None or not objective.affords(1 + step):
                return best
            before = ()

    def run(self, objective: Objective, u: Tensor, generator: Generator, share: int | None = None) -> Found:
        """GCG at the length of ``u``, in at most ``share`` forward passes."""
        allowed, k = objective.allowed, len(u)
        end = math.inf if share is None else objective.passes + share
        k_sub = min(self.k_sub, len(allowed))
        loss, reached = objective.scores(u[None])
        current, losses = float(loss[0]), [float(loss[0])]
        hit = self.success == "any" and objective.first_verified(u[None], loss, reached) is not None
        for _ in range(self.iterations):
            if hit or objective.passes + self.candidates + 3 > end:
                break
            best_ids = allowed[objective.gradient(u)[:, allowed].topk(k_sub, largest=False).indices]  # (k, k_sub)
            position = torch.randint(k, (self.candidates,), generator=generator).to(u.device)
            choice = torch.randint(k_sub, (self.candidates,), generator=generator).to(u.device)
            prompts = u.repeat(self.candidates, 1)
            prompts.scatter_(1, position[:, None], best_ids[position, choice][:, None])
            loss, reached = objective.scores(prompts)
            best = int(loss.argmin())
            if self.success == "any":
                found = objective.first_verified(prompts, loss, reached)
                if found is not None:
                    best, hit = found, True
            if hit or self.accept == "always" or float(loss[best]) < current:
                u, current = prompts[best], float(loss[best])
            losses.append(current)
        if self.success == "argmin":
            hit = objective.state.verified(u.tolist(), objective.y)
        prompt = tuple(u.tolist())
        return Found(prompt, current, hit, {k: losses}, prompt)


class BackOff:
    """The back-off search: short prompts by greedy back generation, longer ones by GCG, the shortest that works.

        k = 1, ..., greedy:  u <- argmin_v CE(y | v + u + x0) in front of u
        k in lengths:        GCG of length k, started with the previous prompt as its last tokens

    Args:
        greedy: how far greedy back generation goes.
        lengths, iterations, candidates, k_sub, accept: of :class:`GCG`.
        success: of both.

    References:
        Aman Bhargava, Cameron Witkowski, Manav Shah, Matt Thomson. What's the Magic Word? A Control Theory of
        LLM Prompting. arXiv:2310.04444, 2023, algorithm 1.
    """

    def __init__(
        self,
        greedy: int = 3,
        lengths: Sequence[int] = (4, 6, 8, 10),
        iterations: int = 34,
        candidates: int = 768,
        k_sub: int = 128,
        success: Success = "any",
        accept: Accept = "improve",
    ) -> None:
        self.greedy = Greedy(greedy, success)
        self.gcg = None
        if tuple(lengths):
            self.gcg = GCG(lengths, iterations, candidates, k_sub, success, accept)
            if self.gcg.lengths[0] <= greedy:
                raise InputError("lengths", list(lengths), f"longer than greedy={greedy}")

    @property
    def longest(self) -> int:
        return self.greedy.longest if self.gcg is None else self.gcg.longest

    def cost(self, allowed: int) -> int:
        return self.greedy.cost(allowed) + (0 if self.gcg is None else self.gcg.cost(allowed))

    def search(self, objective: Objective, generator: Generator) -> Found:
        found = self.greedy.search(objective, generator)
        if found.reached or self.gcg is None:
            return found
        return found.then(self.gcg.search(objective, generator, found.last))


class RandomPrompts:
    """Uniform random prompts of each length in turn: what the searches have to beat at equal cost.

    Args:
        lengths: prompt lengths, ascending.
        passes: prompts of all lengths together, where the objective has no budget.
    """

    def __init__(self, lengths: Sequence[int] = (1, 2, 3, 4, 6, 8, 10), passes: int = 10_000) -> None:
        self.lengths = _ascending(lengths)
        self.passes = whole("passes", passes, len(self.lengths))

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    def cost(self, allowed: int) -> int:
        return self.passes

    def search(self, objective: Objective, generator: Generator) -> Found:
        allowed = objective.allowed
        best = Found((), float("inf"), False)
        for i, length in enumerate(self.lengths):
            left = (self.passes if objective.budget is None else objective.budget) - objective.passes
            share = max(0, left) // (len(self.lengths) - i)
            while share > 0:
                n = min(share, 1024)
                prompts = allowed[torch.randint(len(allowed), (n, length), generator=generator).to(allowed.device)]
                loss, reached = objective.scores(prompts)
                share -= n
                hit = objective.first_verified(prompts, loss, reached)
                at = int(loss.argmin()) if hit is None else hit
                if hit is not None or float(loss[at]) < best.loss:
                    best = Found(tuple(prompts[at].tolist()), float(loss[at]), hit is not None)
                if best.reached:
                    return best
        return best


def warm_start(before: Sequence[int], length: int, allowed: Tensor, generator: Generator) -> Tensor:
    """The previous prompt as the last tokens, random allowed ids in front; of a longer one the last ``length``."""
    kept = torch.tensor(before, dtype=torch.long, device=allowed.device)[-length:]
    drawn = torch.randint(len(allowed), (length - len(kept),), generator=generator).to(allowed.device)
    return torch.cat([allowed[drawn], kept])


def _ascending(lengths: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(whole("lengths", k, 1, 1000) for k in lengths)
    if not checked or list(checked) != sorted(set(checked)):
        raise InputError("lengths", list(lengths), "prompt lengths in ascending order, at least one")
    return checked


def _choice(name: str, value: str, options: object) -> str:
    allowed = options.__args__  # type: ignore[attr-defined]
    if value not in allowed:
        raise InputError(name, value, f"one of {', '.join(allowed)}")
    return value
