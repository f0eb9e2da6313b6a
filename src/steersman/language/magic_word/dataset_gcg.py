r"""One prompt for a whole data set: stochastic GCG.

    G = mean over g random pairs of  d CE(y | u + x0) / d onehot(u)
    u <- the candidate of least  1/n sum_pairs CE(y | u + x0)        (candidates as in GCG, from G)

A candidate is scored on all n pairs: B n rows, batched over candidates and over states of one length alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.errors import InputError
from steersman.language.magic_word.finding import Pair, states_of
from steersman.language.magic_word.search import Accept, _choice
from steersman.language.magic_word.system import State, System, whole


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt for many pairs: an adversarial string, found by search.

    Args:
        prompt: token ids.
        text: the same as text.
        loss: mean CE over the pairs.
        reached: share of the pairs whose y is the top choice behind it, each confirmed by a fresh pass.
        losses: mean CE after each iteration.
    """

    prompt: tuple[int, ...]
    text: str
    loss: float
    reached: float
    losses: tuple[float, ...]


def dataset_gcg(
    system: System,
    pairs: Iterable[Pair | Sequence[Any]],
    k: int = 4,
    *,
    grad_batch: int = 10,
    iterations: int = 34,
    candidates: int = 768,
    k_sub: int = 128,
    accept: Accept = "improve",
    multi_token: bool = False,
    start: Sequence[int] | None = None,
    seed: int = 0,
) -> SharedPrompt:
    """The prompt of k tokens of least mean cross-entropy over ``pairs``, by stochastic GCG.

    Args:
        system: the model, and what prompts may contain.
        pairs: ``(x0, y)``, text or token ids.
        k: tokens of the prompt.
        grad_batch: g, pairs whose gradients are averaged in one iteration (at most all).
        iterations, candidates, k_sub, accept: as in :class:`GCG`.
        multi_token: whether answers may have several tokens.
        start: prompt to begin with; None: random.
        seed: of the draws.

    Raises:
        InputError: an argument out of range, or a pair that is not allowed.
    """
    whole("k", k, 1, 1000)
    for name, value in (("grad_batch", grad_batch), ("iterations", iterations), ("candidates", candidates)):
        whole(name, value, 1)
    _choice("accept", accept, Accept)
    flat = [(state, y) for state, answers in states_of(system, pairs, multi_token) for y, _ in answers]
    for state, y in flat:
        state.check(k, len(y))
    generator = torch.Generator().manual_seed(seed)
    allowed = system.allowed
    k_sub = min(whole("k_sub", k_sub, 1), len(allowed))
    if start is None:
        u = allowed[torch.randint(len(allowed), (k,), generator=generator).to(allowed.device)]
    else:
        u = torch.tensor(system.encode(start, "start"), device=allowed.device)
        if len(u) != k:
            raise InputError("start", start, f"a prompt of k={k} tokens")
    current = float(mean_loss(system, flat, u[None])[0])
    losses = [current]
    for _ in range(iterations):
        chosen = torch.randperm(len(flat), generator=generator)[:grad_batch].tolist()
        gradient = torch.stack([_gradient(flat[i], u) for i in chosen]).mean(0)
        best_ids = allowed[gradient[:, allowed].topk(k_sub, largest=False).indices]
        position = torch.randint(k, (candidates,), generator=generator).to(u.device)
        choice = torch.randint(k_sub, (candidates,), generator=generator).to(u.device)
        prompts = u.repeat(candidates, 1)
        prompts.scatter_(1, position[:, None], best_ids[position, choice][:, None])
        loss = mean_loss(system, flat, prompts)
        best = int(loss.argmin())
        if accept == "always" or float(loss[best]) < current:
            u, current = prompts[best], float(loss[best])
        losses.append(current)
    prompt = tuple(u.tolist())
    hits = sum(state.verified(prompt, y) for state, y in flat)
    return SharedPrompt(prompt, system.decode(prompt), current, hits / len(flat), tuple(losses))


def _gradient(pair: tuple[State, tuple[int, ...]], u: Tensor) -> Tensor:
    state, y = pair
    wanted = torch.tensor(y, device=u.device)
    return state.gradient(u, lambda logits: F.cross_entropy(logits, wanted), y[:-1])


def mean_loss(system: System, pairs: Sequence[tuple[State, tuple[int, ...]]], prompts: Tensor) -> Tensor:
    """1/n sum over pairs of CE(y | u + x0), for every prompt, (N,).

    Pairs of one shape (tokens of x0 and of y) share their batches: rows are (prompt, pair), prompt-major.
    """
    shapes: dict[tuple[int, int], list[tuple[State, tuple[int, ...]]]] = {}
    for state, y in pairs:
        shapes.setdefault((len(state.right), len(y)), []).append((state, y))
    total = torch.zeros(len(prompts), device=prompts.device)
    for (right, answer), group in shapes.items():
        tails = torch.tensor([[*state.right, *y[:-1]] for state, y in group], device=prompts.device)
        wanted = torch.tensor([y for _, y in group], device=prompts.device)
        left = torch.tensor(group[0][0].left, dtype=torch.long, device=prompts.device)
        n, pairs_here = len(prompts), len(group)
        size = system.split(len(left) + prompts.shape[1] + right + answer - 1, answer)
        losses = []
        with torch.inference_mode():
            for index in torch.arange(n * pairs_here, device=prompts.device).split(size):
                of_prompt, of_pair = index // pairs_here, index % pairs_here
                ids = torch.cat([left.expand(len(index), -1), prompts[of_prompt], tails[of_pair]], 1)
                logits = system.logits(ids, answer).float()
                losses.append(F.cross_entropy(logits.mT, wanted[of_pair], reduction="none").mean(1))
        total += torch.cat(losses).view(n, pairs_here).sum(1)
    return total / len(pairs)
