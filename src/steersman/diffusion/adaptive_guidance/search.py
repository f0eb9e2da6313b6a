r"""Policy search: which branch to evaluate at which step, by gradient descent through the sampler.

A step may be one of some options, each a scale: 0 the unconditional branch, 1 the conditional one (one call each), or
guidance with some s (two). With probabilities softmax(a_t / T) over the options o of step t the soft step is linear in
the two predictions, so that a mixture of options is guidance with the mean scale:

    eps_t = sum_o p_{t,o} [eps_u + s_o (eps_c - eps_u)] = eps_u + (sum_o p_{t,o} s_o) (eps_c - eps_u)

The whole chain from x_N is unrolled, and with the network frozen a minimises

    E |x_0(a) - x_0^CFG|^2 + lambda max(0, sum_t sum_o p_{t,o} cost_o - budget)

where the first term is per element. The policy is the option with the largest a_t at each step, within the budget.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steersman.diffusion.adaptive_guidance.guidance import GuidancePolicy, check_scale, checked_steps, cost_of
from steersman.diffusion.adaptive_guidance.trajectories import Asked, Runs
from steersman.diffusion.guidance import COND_FIRST, _sample, network_of
from steersman.errors import InputError

Gradient = Literal["network", "schedule"]


class Chain:
    """A pipeline's guided run, unrolled: the end of the run as a function of each step's scale.

    It is recorded from a run of the pipeline: the noise, what the network is told beside the sample, and the end.

    Args:
        runs: of the pipeline.
        rows: the prompts of this run.
        gradient: ``network``: through the network, whose activations are computed again for it; ``schedule``: only
            through the scheduler's coefficients, as if predictions did not depend on x.

    Attributes:
        start, end: noise, and what plain guidance makes of it.

    Raises:
        InputError: a pipeline whose run is more than network and scheduler (inpainting), or a stochastic scheduler.
    """

    def __init__(self, runs: Runs, rows: range, gradient: Gradient = "network") -> None:
        pipe = runs.pipe
        self.network, self.gradient = network_of(pipe), gradient
        self.scheduler, self.steps = pipe.scheduler, runs.steps
        self.cond_first = type(pipe).__name__ in COND_FIRST
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        starts: list[Tensor] = []
        own = pipe.scheduler.step

        def before(module: Any, args: Any, kwargs: Any) -> None:
            self.calls.append((args, dict(kwargs)))

        @functools.wraps(own)  # pipelines look at the signature
        def step(output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            starts.append(sample.detach().clone() if not starts else sample)
            return own(output, t, sample, *args, **kwargs)

        hook = self.network.register_forward_pre_hook(before, with_kwargs=True)
        pipe.scheduler.step = step
        try:
            self.end = runs(rows).to(next(self.network.parameters(), torch.zeros(0)).device)
        finally:
            hook.remove()
            del pipe.scheduler.step
        self.start = starts[0]
        first = _sample(*self.calls[0])
        if len(first) != 2 * len(self.start) or first.shape[1:] != self.start.shape[1:]:
            allowed = "one that evaluates two branches of the sample, and nothing beside it"
            raise InputError("pipe", type(pipe).__name__, allowed)
        self.n = len(self.calls)
        with torch.no_grad():
            repeated = self(torch.full((self.n,), runs.scale))
        off = (repeated.double() - self.end.double()).abs().max()
        if not off < 1e-2 * self.end.double().abs().max():
            allowed = "a deterministic one, for policy search (its run can't be repeated)"
            raise InputError("scheduler", type(self.scheduler).__name__, allowed)

    def __call__(self, scales: Tensor) -> Tensor:
        """The end of the run with guidance of ``scales`` (n,), differentiable in them."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps, device=self.start.device)
        x, C = self.start, self.start.shape[1]
        for i, t in enumerate(scheduler.timesteps):
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            if self.gradient == "schedule":
                both = both.detach()
            out = (
                checkpoint(self._predict, both, i, use_reentrant=False)
                if both.requires_grad
                else self._predict(both, i)
            )
            first, second = out[:, :C].chunk(2)
            cond, uncond = (first, second) if self.cond_first else (second, first)
            x = scheduler.step(uncond + scales[i].to(out) * (cond - uncond), t, x, return_dict=False)[0]
        return x

    def _predict(self, x: Tensor, i: int) -> Tensor:
        args, kwargs = self.calls[i]
        if args:
            args = (x, *args[1:])
        else:
            kwargs = kwargs | {"sample" if "sample" in kwargs else "hidden_states": x}
        out = self.network(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out.sample


@dataclass(frozen=True)
class SearchedPolicy:
    """What a search found.

    Attributes:
        scales: the policy, a scale for each call.
        probabilities: of the options at each call, (n, options), at temperature 1.
        options: the scales that there were to choose from.
        cost, budget: rows of the network for a sample.
        loss: mean squared distance, per element, to classifier-free guidance on held-out noise.
        conditional_loss: the same of the condition alone.
        restarts: for each value of lambda (in conditional losses): the cost and held-out loss of its policy.
    """

    scales: list[float]
    probabilities: Tensor
    options: list[float]
    cost: int
    budget: float
    loss: float
    conditional_loss: float
    restarts: list[dict[str, float]]

    def guidance(self) -> GuidancePolicy:
        """The policy, to install."""
        return GuidancePolicy(self.scales)


def search_policy(
    pipe: Any,
    asked: Asked,
    *,
    scale: float = 7.5,
    steps: int = 20,
    budget: float | None = None,
    options: Sequence[float] | None = None,
    iterations: int = 300,
    learning_rate: float = 1e-2,
    temperatures: tuple[float, float] = (1.0, 0.1),
    weights: Sequence[float] = (0.1, 1.0, 10.0),
    gradient: Gradient = "network",
    seed: int = 0,
    batch: int = 16,
    log: Callable[[str], None] | None = None,
    **arguments: Any,
) -> SearchedPolicy:
    """Search for the policy that comes closest to classifier-free guidance within a budget of calls.

    The outcome depends strongly on lambda, so there is a restart for each of ``weights``; of their policies the one
    that is closest on held-out noise is kept.

    Args:
        pipe: a classic pipeline with a deterministic scheduler, which the policy is for.
        asked: prompts or labels to search with.
        scale: s of the guidance to come close to.
        steps: of the scheduler.
        budget: rows of the network for a sample; by default three quarters of guidance's.
        options: scales to choose from; by default 0, 1, s/2, s, 2s.
        iterations, learning_rate: of Adam, from uniform probabilities.
        temperatures: of the softmax, first and last; it falls geometrically.
        weights: lambda of each restart, in losses of the condition alone per call.
        gradient: see :class:`Chain`; ``schedule`` takes a third of the time and memory.
        seed: of the noise, and of the batches' order.
        batch: prompts of one iteration.
        log: gets a line now and then.
        arguments: more of the pipeline's call.

    Raises:
        InputError: an argument out of range, a budget that no policy meets, or a pipeline that can't be unrolled.
    """
    check_scale(scale)
    checked_steps("iterations", iterations)
    if gradient not in get_args(Gradient):
        raise InputError("gradient", gradient, f"one of {', '.join(get_args(Gradient))}")
    scales = [0.0, 1.0, scale / 2, scale, 2 * scale] if options is None else [float(o) for o in options]
    if len(set(scales)) < 2 or not all(map(math.isfinite, scales)) or not {0.0, 1.0} & set(scales):
        raise InputError("options", options, "at least two different scales, 0 or 1 among them")
    for name, values in (("temperatures", temperatures), ("weights", weights), ("learning_rate", (learning_rate,))):
        if not values or not all(math.isfinite(v) and v > 0 for v in values):
            raise InputError(name, values, "finite numbers above 0")
    network = network_of(pipe)
    flags = [(p, p.requires_grad) for p in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval().requires_grad_(False)
        fitted, fresh = (
            [Chain(runs, rows, gradient) for rows in runs]
            for runs in (Runs(pipe, asked, scale, steps, seed + offset, batch, arguments) for offset in (0, 1))
        )
        n = fitted[0].n
        limit = 1.5 * n if budget is None else float(budget)
        if not n <= limit <= 2 * n:
            raise InputError("budget", budget, f"from {n} to {2 * n}, rows of the network for a sample")
        alone = _loss(fresh, [1.0] * n)
        unit = max(alone, 1e-12)
        found = []
        for k, weight in enumerate(weights):
            logits = _descend(
                fitted, scales, limit, weight * unit, iterations, learning_rate, temperatures, seed + k, log
            )
            policy = best_within(logits, scales, limit)
            loss = _loss(fresh, policy)
            found.append((loss, policy, logits, {"weight": weight, "cost": sum(map(cost_of, policy)), "loss": loss}))
            if log is not None:
                log(f"lambda {weight:g}: loss {loss:.4g} with {found[-1][3]['cost']} rows ({alone:.4g} with {n})")
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
    loss, policy, logits, _ = min(found, key=lambda item: item[0])
    cost = sum(map(cost_of, policy))
    restarts = [record for *_, record in found]
    return SearchedPolicy(policy, logits.softmax(1), scales, cost, limit, loss, alone, restarts)


def soft_loss(chain: Chain, weights: Tensor, scales: Sequence[float]) -> Tensor:
    """Mean squared distance, per element, of the mixture with ``weights`` (n, options) to plain guidance."""
    mean = weights @ torch.tensor(scales, dtype=weights.dtype)
    return (chain(mean) - chain.end).square().mean()


def excess(weights: Tensor, scales: Sequence[float], budget: float) -> Tensor:
    """max(0, sum_t sum_o p_{t,o} cost_o - budget)."""
    costs = torch.tensor([float(cost_of(s)) for s in scales], dtype=weights.dtype)
    return ((weights @ costs).sum() - budget).clamp(min=0)


def best_within(logits: Tensor, scales: Sequence[float], budget: float) -> list[float]:
    """The policy of largest sum of logits whose cost is within ``budget``: argmax, if that is.

    Costs are 1 or 2: the steps that lose least by their best option of cost 1 give way.
    """
    dear = torch.tensor([cost_of(s) == 2 for s in scales])
    best, cheap = logits.argmax(1), logits.masked_fill(dear, -math.inf).argmax(1)
    rows = torch.arange(len(logits))
    lost = torch.where(dear[best], logits[rows, best] - logits[rows, cheap], math.inf)
    over = int(dear[best].sum()) - math.floor(budget - len(logits))
    if over > 0:
        least = lost.argsort(stable=True)[:over]
        best[least] = cheap[least]
    return [float(scales[o]) for o in best.tolist()]


def _descend(
    chains: Sequence[Chain],
    scales: Sequence[float],
    budget: float,
    cost: float,
    iterations: int,
    rate: float,
    temperatures: tuple[float, float],
    seed: int,
    log: Callable[[str], None] | None,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(chains[0].n, len(scales), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=rate)
    high, low = temperatures
    for step in range(iterations):
        temperature = high * (low / high) ** (step / max(iterations - 1, 1))
        chain = chains[int(torch.randint(len(chains), (), generator=generator))]
        weights = (logits / temperature).softmax(1)
        with torch.enable_grad():
            loss = soft_loss(chain, weights, scales) + cost * excess(weights, scales, budget)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if log is not None and (step + 1) % max(iterations // 5, 1) == 0:
            log(f"iteration {step + 1}/{iterations}: loss {float(loss.detach()):.4g}")
    return logits.detach()


@torch.no_grad()
def _loss(chains: Sequence[Chain], policy: Sequence[float]) -> float:
    scales = torch.tensor(policy)
    return sum(float((chain(scales) - chain.end).square().mean()) for chain in chains) / len(chains)
