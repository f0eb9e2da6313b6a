r"""Adapters that know the guidance scale: what is added to a block of a frozen network.

An adapter gives A in y = B(x) + A(x; omega, t, c), where B is a frozen block, x its tokens (B, N, d_x), omega the
guidance scale, tau(t) the network's own embedding of the time, and c its condition: the network's embedding y of a
class label, or prompt tokens c_1, ..., c_L. With s(omega) of width d the scale's code,

    attention        A = W_o softmax(q k^T / sqrt(d)) v,    q = W_q x,  k = W_k E,  v = W_v E
                     E = [s(omega); P_t tau(t); P_y y; P_c c_1, ..., P_c c_L] + positions
    additive         A = W_o LayerNorm(ReLU(W_1 e)),        the same for all tokens
    mlp_gate         A = sigmoid(g [W x; e]) W_o MLP([W x; e])
    learned_pos_emb  A = W_o [e; s'(i)],                    i the token's index
    e                = s(m omega) + P_t tau(t) + P_y y + P_c mean_l c_l

and s(omega) = LayerNorm(MLP(cos 2 pi (f omega + phi))) with f ~ N(0, 1) and phi ~ U(0, 1) drawn once. W_o starts at 0,
so that a network with fresh adapters is the network.

C. Perez Jensen, S. Sadat, "Efficient Distillation of Classifier-Free Guidance using Adapters", TMLR 2025,
arXiv:2503.07274, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from steersman.diffusion.agd.injection import AGDConfig

MAX_TOKENS = 250
"""Positions that the attention adapter tells apart."""


@dataclass
class Conditions:
    """What adapters are told at a call of the network.

    Args:
        omega: guidance scale, (B,) or (1,) for all rows.
        tau: embedded time, (B, d_t) or (1, d_t); None if no adapter uses it.
        label: embedded class, (B, d_y), or None.
        prompt: prompt tokens (B, L, d_c), or None.
        key: what the code of omega, label and prompt may be kept by; None keeps none.
    """

    omega: Tensor
    tau: Tensor | None = None
    label: Tensor | None = None
    prompt: Tensor | None = None
    key: tuple[object, ...] | None = None


def linear(d_in: int, d_out: int, bias: bool = True, gain: float = 1.0) -> nn.Linear:
    """Xavier's uniform weights, no offset."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def zeros(d_in: int, d_out: int) -> nn.Linear:
    """An output projection that starts at 0."""
    layer = nn.Linear(d_in, d_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ScalarEncoder(nn.Module):
    """s(a) = LayerNorm(MLP(cos 2 pi (f a + phi))), numbers (B,) to (B, d).

    The frequencies f and phases phi are random and *fixed*: they are buffers, and saved.

    Args:
        d: width; the MLP's hidden layer has 4 d.
        inner_norm: a LayerNorm after the MLP's ReLU, too (in the additive form).
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, d: int, inner_norm: bool = False) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(d))
        self.register_buffer("phases", torch.rand(d))
        gain = math.sqrt(2)
        inner = nn.LayerNorm(4 * d) if inner_norm else nn.Identity()
        self.mlp = nn.Sequential(linear(d, 4 * d, gain=gain), nn.ReLU(), inner, linear(4 * d, d, gain=gain))
        self.norm = nn.LayerNorm(d)

    def forward(self, a: Tensor) -> Tensor:
        # f a in single precision or better: in half precision the phase of a scale of 10 is off by whole percents.
        wide = torch.promote_types(self.frequencies.dtype, torch.float32)
        angle = self.frequencies.to(wide) * a.to(wide)[:, None] + self.phases.to(wide)
        return self.norm(self.mlp(torch.cos(2 * math.pi * angle).to(self.phases.dtype)))


def positions(d: int) -> Tensor:
    """Sinusoids (250, d): [sin(p theta_i) | cos(p theta_i)], theta_i = 1e4^(-2i/d)."""
    theta = 1e4 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(MAX_TOKENS, dtype=torch.float64)[:, None] * theta
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


class Adapter(nn.Module):
    """What the forms share: codes of omega, time and condition.

    ``static(c)`` is what no step of a run changes (omega and the condition); ``forward(x, c)`` gives A, (B or 1, N or
    1, d_out), and keeps the static part by ``c.key`` where no gradient is asked for.

    Args:
        config: of the adapters.
        d_in, d_out: widths of the block's input and output.
        d_time, d_label, d_prompt: widths of the conditions; None for those that are not used.
        factor: omega is multiplied by it.
    """

    inner_norm = False

    def __init__(
        self,
        config: AGDConfig,
        d_in: int,
        d_out: int,
        d_time: int | None,
        d_label: int | None,
        d_prompt: int | None,
    ) -> None:
        super().__init__()
        assert config.hidden_dim is not None
        d = config.hidden_dim
        self.d, self.factor = d, config.cfg_mult
        self.scale = ScalarEncoder(d, self.inner_norm)
        self.time = None if d_time is None else linear(d_time, d)
        self.label = None if d_label is None else linear(d_label, d)
        self.prompt = None if d_prompt is None else linear(d_prompt, d)
        self._kept: tuple[tuple[object, ...], object] | None = None

    def kept(self, c: Conditions) -> object:
        """``static(c)``, from the call before if that was of the same scale and condition."""
        if c.key is None or torch.is_grad_enabled():
            self.forget()
            return self.static(c)
        if self._kept is None or not _same(self._kept[0], c.key):
            self._kept = c.key, self.static(c)
        return self._kept[1]

    def forget(self) -> None:
        """Keep nothing of the calls before."""
        self._kept = None

    def static(self, c: Conditions) -> object:
        """The part of e that no step changes: s(m omega) + P_y y + P_c mean_l c_l."""
        e = self.scale(self.factor * c.omega)
        if self.label is not None and c.label is not None:
            e = e + self.label(c.label)
        if self.prompt is not None and c.prompt is not None:
            e = e + self.prompt(c.prompt.mean(1))
        return e

    def code(self, c: Conditions) -> Tensor:
        """e, (B or 1, d)."""
        e = self.kept(c)
        assert isinstance(e, Tensor)
        return e if self.time is None else e + self.time(c.tau)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        raise NotImplementedError


def _same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    """Whether two keys hold the same objects (numbers by value)."""
    return len(a) == len(b) and all(
        p is q or (not isinstance(p, Tensor) and not isinstance(q, Tensor) and p == q)
        for p, q in zip(a, b, strict=True)
    )


class AttentionAdapter(Adapter):
    """Cross-attention of the block's tokens to those of scale, time and condition."""

    positions: Tensor

    def __init__(
        self,
        config: AGDConfig,
        d_in: int,
        d_out: int,
        d_time: int | None,
        d_label: int | None,
        d_prompt: int | None,
    ) -> None:
        super().__init__(config, d_in, d_out, d_time, d_label, d_prompt)
        d = self.d
        self.heads, self.dropout = config.num_heads, config.dropout
        width = d if config.scale_by == "hidden_dim" else d // config.num_heads
        self.softness = width**-0.5
        self.q, self.k, self.v = (linear(n, d, bias=False) for n in (d_in, d, d))
        self.out = zeros(d, d_out)
        self.register_buffer("positions", positions(d), persistent=False)

    def static(self, c: Conditions) -> tuple[Tensor, Tensor]:
        """k and v of all tokens but the time's."""
        rows = [self.scale(self.factor * c.omega)[:, None]]
        at = [0]
        if self.label is not None and c.label is not None:
            rows.append(self.label(c.label)[:, None])
            at.append(1 + (self.time is not None))
        if self.prompt is not None and c.prompt is not None:
            rows.append(self.prompt(c.prompt))
            start = 1 + (self.time is not None) + (self.label is not None)
            at.extend(range(start, start + c.prompt.shape[1]))
        B = max(len(part) for part in rows)
        E = torch.cat([part.expand(B, -1, -1) for part in rows], dim=1) + self.positions[at]
        return self.k(E), self.v(E)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        kept = self.kept(c)
        assert isinstance(kept, tuple)
        k, v = kept
        if self.time is not None:
            E = (self.time(c.tau) + self.positions[1])[:, None]
            B = max(len(E), len(k))
            # The order of keys does not matter: each has its position.
            k = torch.cat([k.expand(B, -1, -1), self.k(E).expand(B, -1, -1)], dim=1)
            v = torch.cat([v.expand(B, -1, -1), self.v(E).expand(B, -1, -1)], dim=1)
        q = self.q(x)
        q, k, v = (_split(part.expand(len(x), -1, -1), self.heads) for part in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.softness)
        return self.out(a.transpose(1, 2).flatten(2))


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, d) to (B, heads, N, d / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class AdditiveAdapter(Adapter):
    """One vector for all tokens, of scale, time and condition."""

    inner_norm = True

    def __init__(
        self,
        config: AGDConfig,
        d_in: int,
        d_out: int,
        d_time: int | None,
        d_label: int | None,
        d_prompt: int | None,
    ) -> None:
        super().__init__(config, d_in, d_out, d_time, d_label, d_prompt)
        drop = nn.Dropout(config.dropout)
        self.hidden = nn.Sequential(linear(self.d, self.d, gain=math.sqrt(2)), nn.ReLU(), drop, nn.LayerNorm(self.d))
        self.out = zeros(self.d, d_out)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        return self.drop(self.out(self.hidden(self.code(c))))[:, None]


class MLPGateAdapter(Adapter):
    """An MLP of token and code, through a gate."""

    def __init__(
        self,
        config: AGDConfig,
        d_in: int,
        d_out: int,
        d_time: int | None,
        d_label: int | None,
        d_prompt: int | None,
    ) -> None:
        super().__init__(config, d_in, d_out, d_time, d_label, d_prompt)
        d, gain = self.d, math.sqrt(2)
        self.inner = linear(d_in, d)
        self.gate = linear(2 * d, 1)
        self.mlp = nn.Sequential(linear(2 * d, 2 * d, gain=gain), nn.ReLU(), linear(2 * d, d, gain=gain))
        self.drop = nn.Dropout(config.dropout)
        self.out = zeros(d, d_out)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        h = self.inner(x)
        h = torch.cat([h, self.code(c)[:, None].expand(len(h), h.shape[1], -1)], dim=2)
        return torch.sigmoid(self.gate(h)) * self.out(self.drop(self.mlp(h)))


class PositionAdapter(Adapter):
    """A vector for each token's index, of scale, time and condition."""

    def __init__(
        self,
        config: AGDConfig,
        d_in: int,
        d_out: int,
        d_time: int | None,
        d_label: int | None,
        d_prompt: int | None,
    ) -> None:
        super().__init__(config, d_in, d_out, d_time, d_label, d_prompt)
        self.index = ScalarEncoder(self.d)
        self.drop = nn.Dropout(config.dropout)
        self.out = zeros(2 * self.d, d_out)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        i = self.index(torch.arange(x.shape[1], device=x.device))[None]
        e = self.code(c)[:, None]
        B, N = len(e), x.shape[1]
        return self.out(self.drop(torch.cat([e.expand(B, N, -1), i.expand(B, N, -1)], dim=2)))


class LowRankAdapter(nn.Module):
    """LoRA on a linear layer, A = W_o W_i x: the baseline that adapters are compared with.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3, with alpha = rank. It is blind to
    omega, which :class:`ScaleEmbedding` tells the network instead.
    """

    def __init__(self, rank: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d_in, rank, bias=False)
        nn.init.kaiming_uniform_(self.inner.weight, a=math.sqrt(5))
        self.out = nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        return self.out(self.inner(x))


class ScaleEmbedding(nn.Module):
    """W_o s(omega), added to the network's time embedding: how guidance-distilled networks are told the scale.

    Meng et al., "On Distillation of Guided Diffusion Models", CVPR 2023, section 3.1.
    """

    def __init__(self, d: int, d_out: int, factor: float = 1.0) -> None:
        super().__init__()
        self.scale, self.factor = ScalarEncoder(d), factor
        self.out = zeros(d, d_out)

    def forward(self, x: Tensor, c: Conditions) -> Tensor:
        return self.out(self.scale(self.factor * c.omega))


FORMS: dict[str, type[Adapter]] = {
    "attention": AttentionAdapter,
    "additive": AdditiveAdapter,
    "mlp_gate": MLPGateAdapter,
    "learned_pos_emb": PositionAdapter,
}
