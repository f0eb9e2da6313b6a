r"""Multiply-adds of a gated network.

Every layer that is gated has gates on one side only, so the multiply-adds of an architecture are, with m_g those of
the layers beside the width group g, f_b the ungated rest of block b and f the rest of the network,

    M(u, v) = f + Σ_b v_b (f_b + Σ_{g in b} m_g mean(u_g)) + Σ_{g outside} m_g mean(u_g).

What gates can take away at all is M(1) - f, the *prunable* part, and an architecture's share of it

    R = (M(u, v) - f) / (M(1) - f).

A budget p on the total, M <= p M(1), is the share p' = 1 - (1 - p) M(1) / (M(1) - f) of the prunable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from steersman.diffusion.aptp.gates import GateLayout
from steersman.errors import InputError


def example_inputs(unet: Any, text_length: int = 77, rows: int = 1) -> dict[str, Any]:
    """Arguments that the network can be called with, all zeros."""
    config, like = unet.config, {"device": unet.device, "dtype": unet.dtype}
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    width_of_text = config.cross_attention_dim
    width_of_text = width_of_text if isinstance(width_of_text, int) else width_of_text[0]
    inputs: dict[str, Any] = {
        "sample": torch.zeros(rows, config.in_channels, height, width, **like),
        "timestep": torch.zeros(rows, device=unet.device, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(rows, text_length, width_of_text, **like),
    }
    if config.addition_embed_type == "text_time":
        times = 6
        pooled = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(rows, pooled, **like),
            "time_ids": torch.zeros(rows, times, **like),
        }
    return inputs


@torch.no_grad()
def counted(unet: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-adds of one call by the path of the module: convolutions, linear layers, products of attention.

    Args:
        unet: any network of such layers.
        inputs: keyword arguments of the call, of one row.
    """
    found: dict[str, int] = {}

    def hook_of(path: str) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if isinstance(module, nn.Conv2d):
                work = math.prod(module.kernel_size) * module.in_channels // module.groups * output[0].numel()
            elif isinstance(module, nn.Linear):
                work = module.in_features * output.numel()
            else:
                x = arguments[0] if arguments else keywords["hidden_states"]
                given = arguments[1] if len(arguments) > 1 else keywords.get("encoder_hidden_states")
                work = 2 * x.shape[1] * (x if given is None else given).shape[1] * module.to_q.out_features
            found[path] = found.get(path, 0) + work

        return hook

    kinds = (nn.Conv2d, nn.Linear, Attention)
    hooks = [
        module.register_forward_hook(hook_of(path), with_kwargs=True)
        for path, module in unet.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        unet(**inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return found


class MultiplyAdds:
    """M and R of gates, differentiable, for one row at the network's own size.

    Args:
        unet: the whole network, a ``UNet2DConditionModel``.
        layout: its gates.
        text_length: tokens of a prompt.

    Attributes:
        total: M(1).
        prunable: M(1) - f.
        least: M of the least legal architecture: no block that can be skipped, one gate in every other width group.
    """

    def __init__(self, unet: Any, layout: GateLayout, text_length: int = 77) -> None:
        work = counted(unet, example_inputs(unet, text_length))
        self.layout = layout
        self.total = float(sum(work.values()))
        beside: list[float] = []
        for group in layout.widths:
            paths = _beside(group.path, group.kind)
            beside.append(float(sum(n for path, n in work.items() if path in paths)))
        rest = [sum(n for path, n in work.items() if path.startswith(f"{d.path}.")) for d in layout.depths]
        for group, n in zip(layout.widths, beside, strict=True):
            if group.depth is not None:
                rest[group.depth] -= int(n)
        self.beside = torch.tensor(beside, dtype=torch.float64)
        self.rest = torch.tensor(rest, dtype=torch.float64)
        self._depth = torch.tensor([-1 if g.depth is None else g.depth for g in layout.widths])
        self.prunable = float(self.beside.sum() + self.rest.sum())
        self.fixed = self.total - self.prunable
        outside = [n / g.width for g, n in zip(layout.widths, beside, strict=True) if g.depth is None]
        self.least = self.fixed + sum(outside)

    def __call__(self, gates: Tensor) -> Tensor:
        """M, (N,), of gates (N, D)."""
        return self.fixed + self.prunable * self.ratio(gates)

    def ratio(self, gates: Tensor) -> Tensor:
        """R, (N,), of gates (N, D)."""
        layout = self.layout
        beside, rest = self.beside.to(gates), self.rest.to(gates)
        width, depth = gates[:, : layout.n_width], gates[:, layout.n_width :]
        mean = torch.zeros(len(gates), len(layout.widths), dtype=gates.dtype, device=gates.device)
        mean = mean.index_add(1, layout.group.to(gates.device), width)
        mean = mean / torch.tensor([g.width for g in layout.widths], device=gates.device)
        # Behind the last depth gate stands a 1, for groups outside of all blocks (whose index is -1).
        v = torch.cat([depth, torch.ones_like(gates[:, :1])], 1)[:, self._depth.to(gates.device)]
        return ((v * mean) @ beside + depth @ rest) / self.prunable

    def shares(self) -> Tensor:
        """Of each gate, (D,): the share of all prunable multiply-adds that it takes away alone."""
        width = (self.beside / torch.tensor([g.width for g in self.layout.widths]))[self.layout.group]
        depth = self.rest.clone()
        for n, group in zip(self.beside, self.layout.widths, strict=True):
            if group.depth is not None:
                depth[group.depth] += n
        return torch.cat([width, depth]) / self.prunable

    def target(self, budget: float) -> float:
        """p' of a budget p on the total.

        Raises:
            InputError: a budget that no legal architecture meets, or above 1.
        """
        low = self.least / self.total
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not low <= budget <= 1:
            raise InputError("budget", budget, f"a share of the multiply-adds from {low:.3f} (the least) to 1")
        return 1 - (1 - budget) * self.total / self.prunable


def _beside(path: str, kind: str) -> set[str]:
    """The modules whose work is in proportion to a width group's gates that are on."""
    parent = path.rsplit(".", 2 if kind in ("heads", "ff") else 1)[0]
    if kind == "norm":
        return {f"{parent}.{name}" for name in ("conv1", "time_emb_proj", "conv2")}
    if kind == "heads":  # the products of attention are counted at the attention itself
        return {parent, *(f"{parent}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))}
    return {f"{parent}.net.0.proj", f"{parent}.net.2"}
