r"""Convolutions and linear layers with quantised weights and activations, simulated or in integers.

    y = conv(x̂, ŵ) + b,    ŵ_o = q_o Δ_o  (a Δ for each output channel),    x̂ = (q - z) Δ  (one for the tensor)

Both factors are integers times constants, so the sum can be taken in integers,

    y_o = Δ Δ_o Σ q_o (q - z) + b_o,

which processors do in 8 bits faster than in floating point. *Simulated* execution rounds values to their levels and
multiplies them in floating point; *int8* execution runs oneDNN's integer kernels. They differ in the rounding of
the sums only. What comes between the layers (normalisation, SiLU, softmax, sums, attention) stays in floating point.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steersman.diffusion.ptq4dm.quantisers import (
    Metric,
    Side,
    affine,
    codes,
    quantise,
    search,
    search_affine,
)
from steersman.errors import InputError

Placement = Literal["input", "output"]
Scheme = Literal["symmetric", "asymmetric"]
Execution = Literal["simulated", "int8"]

SEARCHED = 2**14
"""Values of an activation, evenly spaced, that its range is searched on (its largest value is that of all)."""
MOMENTUM = 0.9
"""Of the running range: range ← 0.9 range + 0.1 (range of this batch)."""

SHAPE = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding")


class Call:
    """What a network's layers share about the call in progress.

    Attributes:
        mode: ``quantise``; ``observe`` (ranges are updated with the call's values, which are then quantised);
            ``float`` (the layers as they were).
        timestep: as the network was told it: a number, or a tensor of one number or one a row; or None.
    """

    def __init__(self) -> None:
        self.mode: Literal["quantise", "observe", "float"] = "quantise"
        self._times: list[float] = []
        self.timestep = None

    @property
    def timestep(self) -> Any:
        return self._timestep

    @timestep.setter
    def timestep(self, told: Any) -> None:
        self._timestep, self._times = told, []

    @property
    def times(self) -> list[float]:
        """The timestep's numbers. Reading them waits for the device, so all layers share what the first one read."""
        if not self._times:
            self._times = numbers(self.timestep)
        return self._times


def numbers(timestep: Any) -> list[float]:
    """A timestep's numbers, one or one a row, in float32's precision."""
    told = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep)
    return told.float().flatten().tolist()


class Activation:
    r"""The quantiser of one tensor: its range, by running mean over batches.

    .. math:: r \leftarrow 0.9\, r + 0.1\, r_{\text{batch}}, \qquad \text{the first batch sets it}

    A tensor without negative (or positive) values in the first batch has a one-sided range, and keeps it.

    Args:
        bits: b.
        metric: of the search for each batch's range.
        scheme: symmetric about 0, or with a zero point that is searched for, too.
        by_timestep: a range for each timestep that was seen; between them the nearest one's.
    """

    def __init__(
        self, bits: int, metric: Metric = "l2.4", scheme: Scheme = "symmetric", by_timestep: bool = False
    ) -> None:
        self.bits, self.metric, self.scheme, self.by_timestep = bits, metric, scheme, by_timestep
        self.sides: dict[float, Side] = {}
        self.ranges: dict[float, tuple[float, float]] = {}
        self.batches: dict[float, int] = {}
        self.dropped: float | None = None
        """QDrop: the share of values that stay as they are, while rounding is being learnt."""
        self.step: Tensor | None = None
        """Δ while it is being learnt."""

    def key(self, timestep: Any) -> float:
        """Which range a batch's is: that of its one timestep, or the only one."""
        if not self.by_timestep:
            return 0.0
        times = {*numbers(timestep)}
        if len(times) != 1:
            raise ValueError("ranges by timestep are set by batches of one timestep")
        return times.pop()

    @torch.no_grad()
    def observe(self, x: Tensor, timestep: Any = None) -> None:
        """Update the range with a batch."""
        low, high = float(x.min()), float(x.max())
        key = self.key(timestep)
        side = self.sides.setdefault(key, "positive" if low >= 0 else "negative" if high <= 0 else "both")
        flat = x.flatten()
        if len(flat) > SEARCHED:
            at = torch.linspace(0, len(flat) - 1, SEARCHED - 2, dtype=torch.float64, device=x.device).round().long()
            flat = torch.cat([flat[at], flat.new_tensor([low, high])])
        flat = flat.float()
        if self.scheme == "asymmetric":
            new = search_affine(flat, self.bits)
        else:
            if side != "both":  # what a later batch has on the other side is clipped
                flat = flat.clamp(min=0) if side == "positive" else flat.clamp(max=0)
            r = float(search(flat[None], self.bits, self.metric, side))
            new = {"both": (-r, r), "positive": (0.0, r), "negative": (-r, 0.0)}[side]
        if key in self.ranges:
            old = self.ranges[key]
            new = tuple(MOMENTUM * a + (1 - MOMENTUM) * b for a, b in zip(old, new, strict=True))  # type: ignore[assignment]
        self.ranges[key] = new
        self.batches[key] = self.batches.get(key, 0) + 1

    def levels(self, timestep: Any = None) -> tuple[float, int]:
        """(Δ, z) at a timestep."""
        if not self.by_timestep:
            return affine(*self.ranges[0.0], self.bits)
        t = numbers(timestep)[0]
        nearest = min(self.ranges, key=lambda known: abs(known - t))
        return affine(*self.ranges[nearest], self.bits)

    def __call__(self, x: Tensor, timestep: Any = None) -> Tensor:
        """x̂, differentiable by straight-through estimation."""
        if self.by_timestep:
            times = numbers(timestep)
            levels = {t: self.levels(t) for t in {*times}}
            if len({*levels.values()}) > 1:
                return self._rows(x, [levels[t] for t in times])
            timestep = times[0]
        delta, zero = self.levels(timestep)
        if self.dropped is not None:
            kept = torch.rand_like(x) < self.dropped
            return torch.where(kept, x, self._fake(x, delta, zero))
        return self._fake(x, delta, zero)

    def learn(self) -> nn.Parameter | None:
        """Δ as a parameter, to be learnt; None where there are several."""
        if self.by_timestep:
            return None
        self.step = nn.Parameter(torch.tensor(self.levels()[0]))
        return self.step

    def learnt(self) -> None:
        """Take the range of the Δ that was learnt."""
        if self.step is not None:
            low, high = self.ranges[0.0]
            ratio = max(float(self.step.detach()), 1e-12) / self.levels()[0]
            self.ranges[0.0], self.step = (low * ratio, high * ratio), None

    def _fake(self, x: Tensor, delta: float, zero: int) -> Tensor:
        if self.step is not None:
            v = x / self.step
            q = (v + (v.round() - v).detach() + zero).clamp(0, 2**self.bits - 1)
            return (q - zero) * self.step
        y = torch.fake_quantize_per_tensor_affine(x.float(), delta, zero, 0, 2**self.bits - 1)
        return y.to(x.dtype)

    def _rows(self, x: Tensor, rows: list[tuple[float, int]]) -> Tensor:
        each = len(x) // len(rows)  # a layer may have several rows for each of the network's
        shape = (-1, *[1] * (x.ndim - 1))
        delta = torch.tensor([row[0] for row in rows], device=x.device).repeat_interleave(each).reshape(shape)
        zero = torch.tensor([row[1] for row in rows], device=x.device).repeat_interleave(each).reshape(shape)
        y = quantise(x.float(), delta, zero, self.bits).to(x.dtype)
        return x + (y - x).detach() if x.requires_grad else y


class QuantisedLayer(nn.Module):
    """A Conv2d or Linear layer with quantised weights, and its activation quantiser.

    Args:
        layer: the layer in floating point; it is kept as it is, to be put back.
        weight_bits: of the weights; 32 leaves them.
        activation: the quantiser of its input or output, or None.
        placement: which of the two.
        call: what the network's layers share.
        found: integers and steps found before, (codes, scale); None searches for them.
        metric: of that search.
    """

    integers: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        weight_bits: int,
        activation: Activation | None,
        placement: Placement,
        call: Call,
        found: tuple[Tensor, Tensor] | None = None,
        metric: Metric = "l2.4",
    ) -> None:
        super().__init__()
        # Not a submodule: its weights are no part of this one's.
        object.__setattr__(self, "layer", layer)
        self.weight_bits, self.activation, self.placement, self.call = weight_bits, activation, placement, call
        self.execution: Execution = "simulated"
        self.bias = layer.bias
        if weight_bits == 32:
            self.register_buffer("integers", None)
            self.register_buffer("scale", None)
            self.register_buffer("weight", layer.weight.detach(), persistent=False)
            return
        integers, scale = quantised_weight(layer.weight, weight_bits, metric) if found is None else found
        self.register_buffer("integers", integers.to(layer.weight.device))
        self.register_buffer("scale", scale.to(layer.weight.device))
        self.register_buffer("weight", None, persistent=False)
        self.set_integers(self.integers)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # What a layer is like, for whoever asks.
        return getattr(self.layer, name) if name in SHAPE else super().__getattr__(name)

    def set_integers(self, integers: Tensor) -> None:
        """Take other integers for the weights."""
        assert self.scale is not None
        self.integers = integers
        self.weight = self.dequantised(integers).to(self.layer.weight.dtype)
        self._zeros = torch.zeros(len(integers), dtype=torch.int64)
        self._packed: dict[int, Tensor] = {}

    def dequantised(self, integers: Tensor) -> Tensor:
        """ŵ = q Δ."""
        assert self.scale is not None
        return integers * self.scale.reshape(-1, *[1] * (integers.ndim - 1))

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        mode, act = self.call.mode, self.activation
        if mode == "float":
            return self.layer(x)
        t = self.call.times if act is not None and act.by_timestep else None
        if act is None or self.placement == "output":
            y = self._product(x)
            if act is None:
                return y
            if mode == "observe":
                act.observe(y, t)
            return act(y, t)
        if mode == "observe":
            act.observe(x, t)
        if self.execution == "int8" and self.integers is not None:
            return self._int8(x, *act.levels(t))
        return self._product(act(x, t))

    def _product(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return self._layer_of(x, self.weight)

    def _layer_of(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.bias)
        return self.layer._conv_forward(x, weight, self.bias)

    # -------------------------------------------------------------- integers

    def _int8(self, x: Tensor, delta: float, zero: int) -> Tensor:
        assert self.integers is not None and self.scale is not None
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError("execution", "int8", "simulated where gradients are taken: integers have none")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            kind = f"on {x.device.type} in {str(x.dtype)[6:]}"
            raise InputError("execution", "int8", f"simulated {kind}: the integer kernels are the CPU's, float32")
        q = bytes_of(x, delta, zero)
        onednn, layer = torch.ops.onednn, self.layer
        end: Any = 1.0, 0, torch.float32, "none", [], ""  # no quantisation of the result, nothing fused behind it
        if isinstance(layer, nn.Linear):
            if zero not in self._packed:
                self._packed[zero] = onednn.qlinear_prepack(self.integers, None)
            packed = self._packed[zero]
            rows = q.reshape(-1, q.shape[-1])
            y = onednn.qlinear_pointwise(rows, delta, zero, packed, self.scale, self._zeros, self.bias, *end)
            return y.reshape(*x.shape[:-1], -1)
        plan = list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
        if zero not in self._packed:
            self._packed[zero] = onednn.qconv_prepack(self.integers, self.scale, delta, zero, *plan, None)
        packed = self._packed[zero]
        return onednn.qconv_pointwise(q, delta, zero, packed, self.scale, self._zeros, self.bias, *plan, *end)


def bytes_of(x: Tensor, delta: float, zero: int) -> Tensor:
    """The codes of 8 bits, as fake_quantize finds them: by the product with the reciprocal, in float32.

    In one pass where PyTorch still has the (deprecated) operator for it, which takes half the time.
    """
    if hasattr(torch, "quantize_per_tensor"):
        return torch.quantize_per_tensor(x, delta, zero, torch.quint8).int_repr()
    return (x * float(np.float32(1) / np.float32(delta))).round_().add_(zero).clamp_(0, 255).to(torch.uint8)


def quantised_weight(weight: Tensor, bits: int, metric: Metric = "l2.4") -> tuple[Tensor, Tensor]:
    """Integers q - z (int8, of the weight's shape) and steps Δ (float32, one an output channel) of a weight."""
    w = weight.detach().float().flatten(1)
    r = search(w, bits, metric)
    delta = torch.where(r > 0, 2 * r / (2**bits - 1), 1.0)
    zero = 2 ** (bits - 1)
    q = codes(w, delta[:, None], zero, bits) - zero
    return q.reshape(weight.shape).to(torch.int8), delta


def pack(integers: Tensor, bits: int) -> Tensor:
    """Signed integers of ``bits`` bits each, as bytes."""
    unsigned = (integers.cpu().numpy().astype(np.int16).ravel() + 2 ** (bits - 1)).astype(np.uint8)
    planes = np.unpackbits(unsigned[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes.ravel()))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack`."""
    count = int(np.prod(shape))
    planes = np.unpackbits(packed.numpy())[: count * bits].reshape(count, bits)
    whole = np.zeros((count, 8), np.uint8)
    whole[:, 8 - bits :] = planes
    unsigned = np.packbits(whole, axis=1)[:, 0].astype(np.int16)
    return torch.from_numpy((unsigned - 2 ** (bits - 1)).astype(np.int8)).reshape(shape)


def check_int8(network: nn.Module) -> None:
    """Refuse int8 execution where it would not be what was simulated.

    Raises:
        InputError: no kernels, another device or precision, or kernels that saturate.
    """
    weights = [p for p in network.parameters() if p.is_floating_point()]
    device = {p.device.type for p in weights}
    if device != {"cpu"} or {p.dtype for p in weights} != {torch.float32}:
        kind = f"on {', '.join(sorted(device))} in {', '.join(sorted({str(p.dtype)[6:] for p in weights}))}"
        raise InputError(
            "execution", "int8", f"simulated for a network {kind}: the integer kernels are the CPU's, float32"
        )
    if not kernels():
        raise InputError("execution", "int8", "simulated: this PyTorch has no exact int8 kernels for this processor")


@cache
def kernels() -> bool:
    """Whether oneDNN's integer products are there, and exact for the largest values.

    Processors without VNNI add pairs of 8-bit products in 16 bits, which overflow.
    """
    call = Call()
    layer = nn.Conv2d(64, 8, 1, bias=False)
    act = Activation(8)
    act.ranges = {0.0: (-127.5, 127.5)}
    try:
        integers = torch.full(layer.weight.shape, 127, dtype=torch.int8)
        quantised = QuantisedLayer(layer, 8, act, "input", call, (integers, torch.ones(8)))
        quantised.execution = "int8"
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once: bytes_of has another way
            y = quantised(torch.full((1, 64, 2, 2), 127.0))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((y == 64 * 127 * 127).all())
