r"""Which way each weight is rounded, learnt block by block (an option; the method itself rounds to nearest).

AdaRound (Nagel et al. 2020) lets a weight go to the level below or above it,

    q = clip(floor(w / Δ) + h(V)),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1),

and learns V from the block's output in full precision (BRECQ, Li et al. 2021),

    min_V  |block_q(x_q) - block(x)|^2 + λ Σ (1 - |2 h(V) - 1|^β),

with β falling from 20 to 2, so that every h ends at 0 or 1; the first fifth of the iterations has no second term.
Meanwhile QDrop (Wei et al. 2022) leaves a random half of the activations, and of the block's inputs, as they are, and
learns the activations' Δ, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from steersman.diffusion.ptq4dm.calibration import CalibrationSet
from steersman.diffusion.ptq4dm.layers import Call, QuantisedLayer

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention", "TimestepEmbedding", "FeedForward")
"""What is reconstructed as one; layers that are in none of these are blocks of their own."""
ITEMS, BATCH = 256, 32
RATE, STEP_RATE, WEIGHT, BETA, WARMUP = 1e-3, 4e-5, 0.01, (20.0, 2.0), 0.2


def soft(V: Tensor) -> Tensor:
    """h(V)."""
    return (1.2 * torch.sigmoid(V) - 0.1).clamp(0, 1)


def beta_at(progress: float) -> float:
    """β after ``progress`` of the iterations that follow the warm-up, falling evenly."""
    high, low = BETA
    return low + (high - low) * max(1 - progress, 0.0)


class _Rounding(nn.Module):
    """V of one layer, which starts where h(V) is the weight's own fraction."""

    def __init__(self, layer: QuantisedLayer) -> None:
        super().__init__()
        assert layer.scale is not None
        w = layer.layer.weight.detach().float()
        steps = w / layer.scale.reshape(-1, *[1] * (w.ndim - 1))
        self.below, self.top = steps.floor(), 2 ** (layer.weight_bits - 1) - 1
        rest = (steps - self.below).clamp(1e-4, 1 - 1e-4)
        self.V = nn.Parameter(-torch.log(1.2 / (rest + 0.1) - 1))

    def integers(self, h: Tensor) -> Tensor:
        return (self.below + h).clamp(-self.top - 1, self.top)


def blocks(net: nn.Module, layers: Mapping[str, QuantisedLayer]) -> dict[str, list[str]]:
    """Names of the blocks, and of the layers in each: the largest module of a kind in ``BLOCKS`` around a layer."""
    modules = dict(net.named_modules())
    found: dict[str, list[str]] = {}
    for name in layers:
        pieces = name.split(".")
        above = [".".join(pieces[:i]) for i in range(1, len(pieces))]
        around = next((a for a in above if type(modules[a]).__name__ in BLOCKS), name)
        found.setdefault(around, []).append(name)
    return found


def reconstruct(
    net: nn.Module,
    found: CalibrationSet,
    layers: Mapping[str, QuantisedLayer],
    call: Call,
    iterations: int,
    qdrop: float,
    generator: torch.Generator,
    say: Callable[[str], None],
) -> None:
    """Learn the rounding of all layers' weights, in place, block after block in the order of the network.

    Args:
        net: with its quantised layers in place, whose ranges are set.
        found: the calibration set; 256 of its items are used.
        layers: by name, in the order in which the network calls them.
        call: what they share.
        iterations: of each block, with 32 items each.
        qdrop: share of values that are left as they are.
        generator: for batches.
        say: gets a line a block.
    """
    rows = torch.randperm(len(found), generator=generator)[:ITEMS].tolist()
    device = next(net.parameters()).device
    modules = dict(net.named_modules())
    batch = found.rows(rows, device)
    flags = [(p, p.requires_grad) for p in net.parameters()]
    net.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            for block, members in blocks(net, layers).items():
                own = [layers[name] for name in members if layers[name].integers is not None]
                if not own:
                    continue
                exact = _seen(net, modules[block], batch, call, "float")
                inputs = _seen(net, modules[block], batch, call, "quantise")
                before, after = _learn(modules[block], own, exact, inputs, call, iterations, qdrop, generator)
                say(f"rounding of {block}: error {before:.3g}, then {after:.3g}")
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@torch.no_grad()
def _seen(net: nn.Module, block: nn.Module, batch: dict[str, Any], call: Call, mode: Any) -> tuple[Any, Any, Tensor]:
    """A block's arguments and output in a call of the network."""
    seen: list[Any] = []

    def watch(module: nn.Module, positional: Any, named: Any, output: Any) -> None:
        seen.append((positional, named, output[0] if isinstance(output, tuple) else output))

    hook = block.register_forward_hook(watch, with_kwargs=True)
    call.mode = mode
    try:
        net(**batch)
    finally:
        hook.remove()
        call.mode = "quantise"
    return seen[0]


def _learn(
    block: nn.Module,
    layers: list[QuantisedLayer],
    exact: tuple[Any, Any, Tensor],
    inputs: tuple[Any, Any, Tensor],
    call: Call,
    iterations: int,
    qdrop: float,
    generator: torch.Generator,
) -> tuple[float, float]:
    """The block's mean squared error before and after; what was there before stays if it was better."""
    target = exact[2]
    count = len(target)
    roundings = [_Rounding(layer) for layer in layers]
    activations = [layer.activation for layer in layers if layer.activation is not None]

    def error() -> float:
        with torch.no_grad():
            return float(F.mse_loss(_out(block(*inputs[0], **inputs[1])), target))

    before, starts = error(), [layer.integers for layer in layers]
    ranges = [dict(act.ranges) for act in activations]
    steps = [step for act in activations if (step := act.learn()) is not None]
    groups: list[dict[str, Any]] = [{"params": [r.V for r in roundings], "lr": RATE}]
    optimizer = torch.optim.Adam([*groups, {"params": steps, "lr": STEP_RATE}] if steps else groups)
    for act in activations:
        act.dropped = qdrop
    for i in range(iterations):
        index = torch.randint(count, (min(BATCH, count),), generator=generator).to(target.device)
        for layer, rounding in zip(layers, roundings, strict=True):
            layer.weight = layer.dequantised(rounding.integers(soft(rounding.V)))
        positional = _mixed(exact[0], inputs[0], index, count, qdrop)
        named = _mixed(exact[1], inputs[1], index, count, qdrop)
        with torch.enable_grad():
            y = _out(block(*positional, **named))
            # Per item, summed over what an item has, as in BRECQ.
            loss = (y - target[index]).square().flatten(1).sum(1).mean()
            if i >= WARMUP * iterations:
                β = beta_at((i / iterations - WARMUP) / (1 - WARMUP))
                for rounding in roundings:
                    loss = loss + WEIGHT * (1 - (2 * soft(rounding.V) - 1).abs().pow(β)).sum()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if len(optimizer.param_groups) > 1:
            optimizer.param_groups[1]["lr"] = STEP_RATE * 0.5 * (1 + math.cos(math.pi * (i + 1) / iterations))
    for act in activations:
        act.dropped = None
        act.learnt()
    for layer, rounding in zip(layers, roundings, strict=True):
        layer.set_integers(rounding.integers((soft(rounding.V.detach()) >= 0.5).float()).to(torch.int8))
    after = error()
    if after > before:  # too few iterations: rounding to nearest was better
        for layer, integers in zip(layers, starts, strict=True):
            layer.set_integers(integers)  # type: ignore[arg-type]
        for act, own in zip(activations, ranges, strict=True):
            act.ranges = own
        after = before
    return before, after


def _out(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _mixed(exact: Any, inputs: Any, index: Tensor, count: int, share: float) -> Any:
    """Rows of the quantised network's arguments, a random ``share`` of whose values are the exact ones."""

    def mixed(a: Any, b: Any) -> Any:
        if not isinstance(b, Tensor):
            return b
        rows = b.ndim > 0 and len(b) == count
        # Contiguous: the derivative of PyTorch 2.13's GroupNorm crashes on channels-last tensors.
        a, b = (a[index].contiguous(), b[index].contiguous()) if rows else (a, b)
        return torch.where(torch.rand_like(b) < share, a, b) if b.is_floating_point() else b

    return tree_map(mixed, exact, inputs)
