r"""From gates to a smaller network: pruned parts are cut out, not masked.

    residual block:  rows of conv1 and time_emb_proj, groups of norm2, columns of conv2
    attention:       rows of to_q, to_k, to_v, columns of to_out, a head each
    feed-forward:    rows of the first layer (both halves, where one gates the other), columns of the second
    skipped block:   nothing is left, its input goes through

A GroupNorm keeps the size of its groups and loses whole ones. The configuration of a ``UNet2DConditionModel`` can't
say any of this, so a pruned network is saved with lists of what was kept, and rebuilt by the same surgery.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from steersman.diffusion.aptp.gates import GATED, GateLayout, WidthGroup
from steersman.errors import InputError

KEPT = "kept.json"


class SkippedResnet(nn.Module):
    """In the place of a residual block: the first channels of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, input_tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return input_tensor[:, : self.channels]


class SkippedTransformer(nn.Module):
    """In the place of a transformer: its input."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (hidden_states,)


def cut(unet: Any, layout: GateLayout, gates: Tensor, copied: bool = True) -> Any:
    """The network of one architecture: equal to ``unet`` under these gates, and smaller.

    Args:
        unet: the whole network, a ``UNet2DConditionModel``.
        layout: its gates.
        gates: (D,), each 0 or 1, at least one on in every width group.
        copied: leave ``unet`` as it is.
    """
    g = layout.check(gates, hard_only=True)[0].bool()
    if copied:
        unet = copy.deepcopy(unet)
    depth = g[layout.n_width :]
    for on, gate in zip(depth.tolist(), layout.depths, strict=True):
        if not on:
            block = unet.get_submodule(gate.path)
            transformer = hasattr(block, "transformer_blocks")
            _replace(unet, gate.path, SkippedTransformer() if transformer else SkippedResnet(gate.channels))
    for group, part in zip(layout.widths, layout.slices, strict=True):
        if group.depth is not None and not bool(depth[group.depth]):
            continue
        on = g[part]
        if not bool(on.all()):
            _cut_group(unet, group, on)
    return unet


def _cut_group(unet: nn.Module, group: WidthGroup, on: Tensor) -> None:
    each = group.channels // group.width
    keep = on.repeat_interleave(each).nonzero()[:, 0]
    if group.kind == "norm":
        block: Any = unet.get_submodule(group.path.rpartition(".")[0])
        block.conv1 = _conv(block.conv1, rows=keep)
        if block.time_emb_proj is not None:
            # scale and shift, where there are both, are of the same channels
            twice = block.time_emb_proj.out_features // group.channels
            block.time_emb_proj = _linear(block.time_emb_proj, rows=_halves(keep, group.channels, twice))
        old = block.norm2
        block.norm2 = nn.GroupNorm(int(on.sum()), len(keep), old.eps, old.affine).to(block.conv1.weight)
        if old.affine:
            block.norm2.weight.data, block.norm2.bias.data = old.weight.data[keep], old.bias.data[keep]
        block.conv2 = _conv(block.conv2, columns=keep)
    elif group.kind == "heads":
        attention: Any = unet.get_submodule(group.path.rsplit(".", 2)[0])
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, _linear(getattr(attention, name), rows=keep))
        attention.to_out[0] = _linear(attention.to_out[0], columns=keep)
        attention.heads = attention.sliceable_head_dim = int(on.sum())
        attention.inner_dim = attention.inner_kv_dim = len(keep)
    else:
        net: Any = unet.get_submodule(group.path.rsplit(".", 1)[0])
        twice = 2 if isinstance(net[0], GATED) else 1
        net[0].proj = _linear(net[0].proj, rows=_halves(keep, group.channels, twice))
        net[2] = _linear(net[2], columns=keep)


def _halves(keep: Tensor, channels: int, count: int) -> Tensor:
    return torch.cat([keep + i * channels for i in range(count)])


def _linear(old: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    weight, bias = old.weight.data, None if old.bias is None else old.bias.data
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(new, old, weight, bias)


def _conv(old: nn.Conv2d, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Conv2d:
    weight, bias = old.weight.data, None if old.bias is None else old.bias.data
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    new: Any = nn.utils.skip_init(
        nn.Conv2d,
        weight.shape[1],
        weight.shape[0],
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        bias=bias is not None,
    )
    return _filled(new, old, weight, bias)


def _filled(new: Any, old: Any, weight: Tensor, bias: Tensor | None) -> Any:
    new.weight = nn.Parameter(weight.clone(), requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.clone(), requires_grad=old.bias.requires_grad)
    return new.train(old.training)


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = new


# ------------------------------------------------------------------ files


def save_pruned(unet: Any, layout: GateLayout, gates: Tensor, folder: str | Path) -> None:
    """A network that :func:`cut` made: ``config.json``, weights as safetensors, and ``kept.json``.

    ``kept.json`` has by path the indices of each width group's kept elements, and the blocks that are skipped.
    """
    folder = Path(folder)
    g = layout.check(gates, hard_only=True)[0].bool()
    unet.save_pretrained(folder)
    depth = g[layout.n_width :].tolist()
    record = {
        "format": 1,
        "ff_groups": layout.ff_groups,
        "kept": {
            group.path: g[part].nonzero()[:, 0].tolist()
            for group, part in zip(layout.widths, layout.slices, strict=True)
        },
        "skipped": [d.path for d, on in zip(layout.depths, depth, strict=True) if not on],
    }
    (folder / KEPT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def moved(unet: Any, like: Any) -> Any:
    """The network on the device and of the type of a tensor or another network."""
    if unet.dtype != like.dtype:  # diffusers warns of casts, also of those that change nothing
        unet = unet.to(like.dtype)
    return unet.to(like.device)


def load_pruned(folder: str | Path) -> tuple[Any, Tensor]:
    """The network that :func:`save_pruned` wrote, in evaluation mode, and its gates (D,).

    Raises:
        InputError: no such folder, or files that don't belong together.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        config: Any = UNet2DConditionModel.load_config(str(folder))
        unet: Any = UNet2DConditionModel.from_config(config)
        layout = GateLayout(unet, record["ff_groups"])
        gates = torch.zeros(layout.size)
        for group, part in zip(layout.widths, layout.slices, strict=True):
            gates[part][record["kept"][group.path]] = 1
        skipped = set(record["skipped"])
        gates[layout.n_width :] = torch.tensor([float(d.path not in skipped) for d in layout.depths])
        unet = cut(unet, layout, gates, copied=False)
        state = load_file(folder / "diffusion_pytorch_model.safetensors")
        unet.load_state_dict(state)
        return moved(unet, next(iter(state.values()))).eval(), gates
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError("folder", str(folder), f"a pruned network that can be read ({reason})") from error
