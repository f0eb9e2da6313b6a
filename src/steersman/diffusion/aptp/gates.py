r"""What can be pruned from a ``UNet2DConditionModel``, and gates on it.

An architecture is a vector of gates in [0, 1]: a *width gate* for every attention head, every GroupNorm group of
channels between the two convolutions of a residual block, and every group of hidden units of a feed-forward layer;
and a *depth gate* for every block whose input can take the place of its output. With hidden channels h, a block f and
its input x,

    h <- u ⊙ h          (u: width gates, each over its channels)
    y  = (1 - v) x + v f(x)                                        (v: depth gate)

Width gates act where the hidden channels enter the block's second layer, behind normalisation and activation: there
a channel at 0 is a channel that is not there, so the masked network is the cut one. (Before the GroupNorm it would not
be: a group of zeros leaves it as its bias, and a soft gate on a whole group is normalised away, so that only the
multiply-adds would ever see it.) Residual streams keep their width.

Gates come from logits a, one for each, by a relaxation with Gumbel noise G = -log(-log(U)),

    u = σ((a + G + b) / T),        T = 0.4, b = 3,

where a group whose gates are all below ½ has ½ added to its first. Depth gates are *ordered*: with p = softmax(a) over
the n of them,

    c_j = Σ_{i <= n+1-j} p_i,      1 = c_1 >= c_2 >= ... >= c_n = p_1,      v = σ((logit(c) + G + b) / T)

and c_j belongs to the j-th block of a fixed order, in which the blocks near the network's ends come first. A hard gate
is 1 from ½ on, with the gradient of the soft one (straight through). Without a draw, G is its median -log(log 2): then
a hard gate is on if and only if it is on in at least half of the draws.

A. Ganjdanesh, R. Shirkavand, S. Gao, H. Huang, "Not All Prompts Are Made Equal: Prompt-based Pruning of Text-to-Image
Diffusion Models", ICLR 2025, arXiv:2406.12042, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU, LinearActivation, SwiGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from steersman.errors import InputError

TEMPERATURE, OFFSET = 0.4, 3.0
MEDIAN = -math.log(math.log(2))
"""Of the Gumbel law: the noise of an evaluation without a draw."""
KNOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D")
GATED, PLAIN = (GEGLU, SwiGLU), (GELU, ApproximateGELU, LinearActivation)
"""First layers of a feed-forward: with a second half of units that gates the first, and without."""


# ------------------------------------------------------------------ relaxations


def gumbel(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """G = -log(-log(U)), U uniform and kept in [1e-20, 1 - 1e-7], so that float32 stays finite; on the CPU."""
    return -(-torch.rand(tuple(shape), generator=generator).clamp(1e-20, 1 - 1e-7).log()).log()


def relaxed(logits: Tensor, noise: Tensor | float, temperature: float = TEMPERATURE, offset: float = OFFSET) -> Tensor:
    """σ((a + G + b)/T)."""
    return torch.sigmoid((logits + noise + offset) / temperature)


def ordered(logits: Tensor) -> Tensor:
    """logit(c) of the ordered relaxation, (N, n) from depth logits (N, n): falling along the last axis."""
    c = logits.softmax(-1).cumsum(-1).flip(-1)
    return (c + 1e-6).log() - torch.log1p(1e-6 - c)


def hard(gates: Tensor) -> Tensor:
    """1 where a soft gate is at least ½, else 0; the gradient is the soft gate's."""
    return (gates >= 0.5).to(gates) + (gates - gates.detach())  # in this order it is exactly 0 or 1


def depth_order(count: int) -> list[int]:
    """The blocks in the order in which they are kept: two from the end, two from the start, and so on inwards."""
    left, order, end = list(range(count)), [], True
    while left:
        for _ in range(min(2, len(left))):
            order.append(left.pop(-1 if end else 0))
        end = not end
    return order


# ------------------------------------------------------------------ the layout


@dataclass(frozen=True)
class WidthGroup:
    """Gates on the hidden channels of one layer.

    Args:
        path: of the module whose input they multiply.
        kind: ``heads``, ``norm`` (channel groups of a residual block) or ``ff``.
        width: number of gates.
        channels: that they share, ``channels / width`` each.
        depth: the depth gate of the block that they are in, by its place in the layout; None outside of all.
    """

    path: str
    kind: Literal["heads", "norm", "ff"]
    width: int
    channels: int
    depth: int | None


@dataclass(frozen=True)
class DepthGate:
    """A block that can be skipped.

    Args:
        path: of the block.
        channels: the first channels of its input take its output's place (in the upward half the input holds the
            skip connection behind them).
    """

    path: str
    channels: int


class GateLayout:
    """Which gates a network has: all width groups in the network's order, then all depth gates.

    Args:
        unet: of the block types of Stable Diffusion 1, 2 and XL.
        ff_groups: gates of a feed-forward layer, at most; the largest divisor of its units.

    Raises:
        InputError: a network with parts that are not known; the sentence lists them.
    """

    def __init__(self, unet: UNet2DConditionModel, ff_groups: int = 32) -> None:
        if not isinstance(unet, UNet2DConditionModel):
            raise InputError("unet", type(unet).__name__, "a UNet2DConditionModel")
        if isinstance(ff_groups, bool) or not isinstance(ff_groups, int) or ff_groups < 1:
            raise InputError("ff_groups", ff_groups, "a whole number from 1")
        network: Any = unet
        unknown = _unknown(network)
        if unknown:
            allowed = "made of ResnetBlock2D and Transformer2DModel with plain attention, as Stable Diffusion is"
            raise InputError("unet", unknown, allowed)
        self.ff_groups = ff_groups
        widths: list[WidthGroup] = []
        depths: list[DepthGate] = []
        for path, block, through in _blocks(network):
            depth = None
            if through is not None:
                depth = len(depths)
                depths.append(DepthGate(path, through))
            if isinstance(block, ResnetBlock2D):
                norm: Any = block.norm2
                widths.append(WidthGroup(f"{path}.conv2", "norm", norm.num_groups, norm.num_channels, depth))
                continue
            for i, layer in enumerate(block.transformer_blocks):
                inner = f"{path}.transformer_blocks.{i}"
                for name in ("attn1", "attn2"):
                    attention = getattr(layer, name)
                    if attention is not None:
                        out = f"{inner}.{name}.to_out.0"
                        widths.append(WidthGroup(out, "heads", attention.heads, attention.inner_dim, depth))
                units = layer.ff.net[2].in_features
                groups = max(k for k in range(1, min(ff_groups, units) + 1) if units % k == 0)
                widths.append(WidthGroup(f"{inner}.ff.net.2", "ff", groups, units, depth))
        self.widths, self.depths = tuple(widths), tuple(depths)
        self.order = depth_order(len(depths))
        ends = torch.tensor([g.width for g in widths]).cumsum(0).tolist()
        self.slices = tuple(slice(end - g.width, end) for end, g in zip(ends, widths, strict=True))
        self.n_width, self.size = ends[-1], ends[-1] + len(depths)
        group = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor([g.width for g in widths]))
        self.group = group
        """Of each width gate, the place of its group."""
        self.depth = torch.tensor([-1 if g.depth is None else g.depth for g in widths])[group]
        """Of each width gate, the depth gate of its block; -1 without."""

    def ones(self, count: int = 1) -> Tensor:
        """The whole network, (count, D)."""
        return torch.ones(count, self.size)

    def margins(self, logits: Tensor, noise: Tensor | float = MEDIAN, offset: float = OFFSET) -> Tensor:
        """What the sigmoid gets, times T: (N, D) in the layout's order, from logits (N, D)."""
        a, c = logits[:, : self.n_width], ordered(logits[:, self.n_width :])
        if isinstance(noise, Tensor):
            a, c = a + noise[:, : self.n_width], c + noise[:, self.n_width :]
        else:
            a, c = a + noise, c + noise
        placed = torch.empty_like(c)
        placed[:, self.order] = c
        return torch.cat([a, placed], 1) + offset

    def soft(
        self,
        logits: Tensor,
        noise: Tensor | float = MEDIAN,
        temperature: float = TEMPERATURE,
        offset: float = OFFSET,
    ) -> Tensor:
        """Soft gates (N, D) of logits (N, D), a gate at least of every width group from ½ on."""
        return self.legal(torch.sigmoid(self.margins(logits, noise, offset) / temperature))

    def legal(self, gates: Tensor) -> Tensor:
        """Gates (N, D) with ½ added to the first of each width group that is all below ½."""
        on = (gates[:, : self.n_width] >= 0.5).to(gates)
        group = self.group.to(gates.device)
        count = torch.zeros(len(gates), len(self.widths), dtype=gates.dtype, device=gates.device)
        count.index_add_(1, group, on)
        bump = torch.zeros_like(gates)
        first = torch.tensor([s.start for s in self.slices], device=gates.device)
        bump[:, first] = 0.5 * (count == 0).to(gates)
        return gates + bump

    def check(self, gates: Any, hard_only: bool = False) -> Tensor:
        """Gates (N, D), or (D,), as (N, D).

        Raises:
            InputError: another shape, numbers outside [0, 1], or a width group without any gate that is on.
        """
        g = gates if isinstance(gates, Tensor) else torch.as_tensor(gates, dtype=torch.float32)
        g = g[None] if g.ndim == 1 else g
        if g.ndim != 2 or g.shape[1] != self.size or not len(g):
            raise InputError("gates", tuple(g.shape), f"of shape (N, {self.size})")
        if not bool(((g >= 0) & (g <= 1)).all()):
            raise InputError("gates", f"from {float(g.min()):.3g} to {float(g.max()):.3g}", "from 0 to 1")
        if hard_only:
            if not bool(((g == 0) | (g == 1)).all()):
                raise InputError("gates", "soft", "0 or 1")
            for group, part in zip(self.widths, self.slices, strict=True):
                if not bool(g[:, part].any(1).all()):
                    raise InputError("gates", f"none on in {group.path}", "with at least one on in every width group")
        return g


def _unknown(unet: Any) -> list[str]:
    """Parts that gates are not known for."""
    found = []
    blocks = [*unet.down_blocks, *unet.up_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    for block in blocks:
        if type(block).__name__ not in KNOWN:
            found.append(type(block).__name__)
            continue
        for resnet in block.resnets:
            if not isinstance(resnet, ResnetBlock2D) or not isinstance(resnet.norm2, nn.GroupNorm):
                found.append(f"{type(resnet).__name__} in {type(block).__name__}")
        for attention in getattr(block, "attentions", None) or ():
            if not isinstance(attention, Transformer2DModel):
                found.append(f"{type(attention).__name__} in {type(block).__name__}")
                continue
            for layer in attention.transformer_blocks:
                found += _unknown_layers(layer)
    return sorted(set(found))


def _unknown_layers(layer: Any) -> list[str]:
    if type(layer) is not BasicTransformerBlock:
        return [type(layer).__name__]
    found = []
    if getattr(layer, "fuser", None) is not None:
        found.append("gated self-attention (GLIGEN)")
    if not isinstance(layer.ff.net[0], GATED + PLAIN):
        found.append(f"feed-forward of {type(layer.ff.net[0]).__name__}")
    for attention in (layer.attn1, layer.attn2):
        extra = ("norm_q", "norm_k", "add_k_proj", "spatial_norm", "group_norm")
        if attention is not None and any(getattr(attention, name, None) is not None for name in extra):
            found.append("attention with norms or added projections")
        if attention is not None and getattr(attention, "fused_projections", False):
            found.append("attention with fused projections")
    return found


def _blocks(unet: Any) -> Iterator[tuple[str, Any, int | None]]:
    """(path, block, channels of its input that can take its output's place or None), in the network's order."""
    hidden = unet.conv_in.out_channels
    parts = [(f"down_blocks.{i}", block, False) for i, block in enumerate(unet.down_blocks)]
    if unet.mid_block is not None:
        parts.append(("mid_block", unet.mid_block, False))
    parts += [(f"up_blocks.{i}", block, True) for i, block in enumerate(unet.up_blocks)]
    for path, block, upward in parts:
        attentions = list(getattr(block, "attentions", None) or ())
        # A middle block opens with a residual block of its own.
        behind = 1 if path == "mid_block" else 0
        for j, resnet in enumerate(block.resnets):
            same = hidden == resnet.out_channels and not (resnet.up or resnet.down)
            if not upward:
                same = same and resnet.in_channels == resnet.out_channels
            yield f"{path}.resnets.{j}", resnet, hidden if same else None
            hidden = resnet.out_channels
            # down and up: attention j follows residual block j; middle: attention j lies between j and j + 1
            if j < len(attentions) and (not behind or j < len(block.resnets) - 1):
                yield f"{path}.attentions.{j}", attentions[j], hidden


# ------------------------------------------------------------------ gates on the network


@contextmanager
def gated(unet: nn.Module, layout: GateLayout, gates: Tensor) -> Iterator[None]:
    """Within, the network's blocks are gated.

    Args:
        unet: of the layout.
        layout: its gates.
        gates: (1, D) for all rows of a batch, or (N, D) for batches of N rows, or of 2N: under classifier-free guidance
            row i and row N + i are of one prompt. Differentiable.
    """
    g = layout.check(gates)
    hooks = []
    try:
        for group, part in zip(layout.widths, layout.slices, strict=True):
            hooks.append(unet.get_submodule(group.path).register_forward_pre_hook(_width_hook(group, g[:, part])))
        for i, depth in enumerate(layout.depths):
            hook = _depth_hook(depth, g[:, layout.n_width + i])
            hooks.append(unet.get_submodule(depth.path).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _rows(gates: Tensor, x: Tensor) -> Tensor:
    """One row of gates for each of x."""
    if len(gates) not in (1, len(x)):
        if len(x) % len(gates):
            raise InputError("gates", f"{len(gates)} rows", f"one, or as many as divide the batch of {len(x)}")
        gates = gates.repeat(len(x) // len(gates), *[1] * (gates.ndim - 1))
    return gates.to(x.device, x.dtype)


def _width_hook(group: WidthGroup, gates: Tensor) -> Any:
    each = group.channels // group.width

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        u = _rows(gates, x).repeat_interleave(each, 1)
        return (x * (u[:, :, None, None] if x.ndim == 4 else u[:, None]), *rest)

    return hook


def _depth_hook(depth: DepthGate, gates: Tensor) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        x: Any = arguments[0] if arguments else keywords.get("hidden_states", keywords.get("input_tensor"))
        y = output if isinstance(output, Tensor) else output[0]
        v = _rows(gates, y)[:, None, None, None]
        mixed = (1 - v) * x[:, : depth.channels] + v * y
        if isinstance(output, Tensor):
            return mixed
        return (mixed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=mixed)

    return hook
