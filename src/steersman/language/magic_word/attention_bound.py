r"""What one attention head can put out, whatever the k control tokens in front of x0 are.

A head over control rows U (k, d) and imposed rows X (M, d), q = X W_q, k = [U; X] W_k, v = [U; X] W_v:

    y_i = sum_j exp(q_i k_j s) v_j / (D_i + D_u)
    D_i = sum_{j in X} exp(q_i k_j s),    D_u = sum_{j in U} exp(q_i k_j s)

with s = 1 / sqrt(d_k), and j <= i for a causal head. With yhat_i the row for X alone, y_i is a mixture

    y_i = w yhat_i + (1 - w) v,    w = D_i / (D_i + D_u),    v in the convex hull of the control values

If |u_j| <= M_u and |x_j| <= M_x, and s_q, s_k, s_v are the largest singular values of the weights, then
|v| <= s_v M_u and

    k e^-alpha <= D_u <= k e^alpha,    alpha = s s_q s_k M_u M_x,
    1 - w <= beta_i = k e^alpha / (D_i + k e^alpha),

so the component of y_i orthogonal to yhat_i is at most beta_i s_v M_u: a wanted row with more is unreachable. (A second
form: if <y*_i, yhat_i> <= 0 and |y*_i - w_min yhat_i| > s_v M_u with w_min = 1 - beta_i, then y*_i is unreachable.)

X is known, so |q_i| may stand for s_q M_x, which is tighter and also right for heads with biases; the keys and values
of unknown controls are then at most s_k M_u + |b_k| and s_v M_u + |b_v| long. Rotary embeddings turn queries and keys,
which keeps their lengths. exp(alpha) overflows for real heads: everything is computed as

    beta_i = sigmoid(log k + alpha - log D_i)

and a bound with beta > 0.999 is *vacuous*: it says no more than |v| <= s_v M_u does.

The bound speaks of one head and given rows X. In the first layer of a model with rotary positions these are the rows of
x0 whatever the prompt; in deeper layers a prompt changes X as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.errors import InputError
from steersman.language.magic_word.system import State, System, whole

VACUOUS = 0.999


@dataclass(frozen=True)
class Head:
    """One attention head.

    Args:
        w_q, w_k, w_v: (d, d_k), (d, d_k), (d, d_v).
        b_q, b_k, b_v: biases, or None.
        scale: s; None is 1 / sqrt(d_k).
        causal: whether row i sees the imposed rows j <= i only (and all controls, which stand in front).
        frequencies: of rotary positions, or None; (d_rotated / 2,).
        stretch: what rotary positions multiply queries and keys by.
    """

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    b_q: Tensor | None = None
    b_k: Tensor | None = None
    b_v: Tensor | None = None
    scale: float | None = None
    causal: bool = True
    frequencies: Tensor | None = None
    stretch: float = 1.0

    @property
    def s(self) -> float:
        return self.w_q.shape[1] ** -0.5 if self.scale is None else self.scale

    def double(self) -> Head:
        """The same head in float64."""
        tensors: dict[str, Any] = {n: value.double() for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def turned(self, rows: Tensor, first: int) -> Tensor:
        """Queries or keys (..., n, d_k) at positions first, first + 1, ..."""
        if self.frequencies is None:
            return rows
        n, half = rows.shape[-2], len(self.frequencies)
        angle = torch.arange(first, first + n, device=rows.device, dtype=rows.dtype)[:, None] * self.frequencies
        cos, sin = self.stretch * angle.cos(), self.stretch * angle.sin()
        a, b, rest = rows[..., :half], rows[..., half : 2 * half], rows[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def __call__(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """Output rows of the imposed rows, (..., M, d_v).

        Args:
            x: X, (M, d).
            u: U, (..., k, d); None: no controls.
        """
        if u is None:
            u = x[:0]
        k, m = u.shape[-2], len(x)
        q = self.turned(_affine(x, self.w_q, self.b_q), k)
        keys = torch.cat(
            [
                self.turned(_affine(u, self.w_k, self.b_k), 0),
                self.turned(_affine(x, self.w_k, self.b_k), k).expand(*u.shape[:-2], -1, -1),
            ],
            -2,
        )
        values = torch.cat(
            [_affine(u, self.w_v, self.b_v), _affine(x, self.w_v, self.b_v).expand(*u.shape[:-2], -1, -1)], -2
        )
        scores = q @ keys.mT * self.s
        if self.causal:
            hidden = torch.ones(m, m, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(torch.nn.functional.pad(hidden, (k, 0)), -math.inf)
        return scores.softmax(-1) @ values


def _affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w if b is None else x @ w + b


@dataclass(frozen=True)
class HeadBound:
    """The bound for each imposed row i.

    Args:
        y_hat: output rows for X alone, (M, d_v).
        alpha, log_d, beta: as in the module's text, (M,).
        reach: the largest length of a control value, s_v M_u (+ |b_v|).
    """

    y_hat: Tensor
    alpha: Tensor
    log_d: Tensor
    beta: Tensor
    reach: float

    @property
    def bound(self) -> Tensor:
        """Largest component orthogonal to y_hat that any k controls can bring about, (M,)."""
        return self.beta * self.reach

    @property
    def vacuous(self) -> Tensor:
        """Whether beta > 0.999: the bound says nothing beyond the length of control values, (M,)."""
        return self.beta > VACUOUS

    def orthogonal(self, y: Tensor) -> Tensor:
        """Length of the component of rows (..., M, d_v) that is orthogonal to y_hat, (..., M)."""
        square = self.y_hat.square().sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
        return (y - (y * self.y_hat).sum(-1, keepdim=True) / square * self.y_hat).norm(dim=-1)

    def unreachable(self, wanted: Tensor, form: Literal["orthogonal", "draft"] = "orthogonal") -> Tensor:
        """Whether each wanted row (M, d_v) is proved unreachable by the form named, (M,)."""
        if form == "orthogonal":
            return self.orthogonal(wanted) > self.bound
        against = (wanted * self.y_hat).sum(-1) <= 0
        return against & ((wanted - (1 - self.beta)[:, None] * self.y_hat).norm(dim=-1) > self.reach)


def attention_bound(
    head: Head,
    x: Tensor,
    k: int,
    m_u: float,
    *,
    m_x: float | None = None,
    controls: Tensor | None = None,
) -> HeadBound:
    """The bound for k control rows no longer than ``m_u``.

    Args:
        head: the head; computed in the precision of its weights (float64 is best).
        x: X, imposed rows after the layer's norm, (M, d).
        k: number of controls, at least 0.
        m_u: M_u, the longest that a control row can be, after the layer's norm.
        m_x: M_x: uses s_q M_x for |q_i|, as the theorem is stated. None: |q_i| itself.
        controls: U, where the controls are known: their own keys and values bound, (k, d).

    Raises:
        InputError: a number out of range; ``m_x`` for a head with a bias of queries.
    """
    whole("k", k, 0)
    if not isinstance(m_u, (int, float)) or not 0 <= m_u < math.inf:
        raise InputError("m_u", m_u, "a finite number of at least 0")
    q = head.turned(_affine(x, head.w_q, head.b_q), 0)
    keys = head.turned(_affine(x, head.w_k, head.b_k), 0)
    scores = q @ keys.mT * head.s
    if head.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    log_d = scores.logsumexp(-1)
    length = q.norm(dim=-1)
    if m_x is not None:
        if head.b_q is not None:
            raise InputError("m_x", m_x, "None for a head with biases: |q_i| itself counts")
        length = torch.full_like(length, head.stretch * _largest(head.w_q) * m_x)
    if controls is not None:
        key = float(_affine(controls, head.w_k, head.b_k).norm(dim=-1).max()) if len(controls) else 0.0
        reach = float(_affine(controls, head.w_v, head.b_v).norm(dim=-1).max()) if len(controls) else 0.0
    else:
        key = _largest(head.w_k) * m_u + (0.0 if head.b_k is None else float(head.b_k.norm()))
        reach = _largest(head.w_v) * m_u + (0.0 if head.b_v is None else float(head.b_v.norm()))
    alpha = head.s * length * key * head.stretch
    beta = torch.sigmoid((math.log(k) if k else -math.inf) + alpha - log_d)
    return HeadBound(head(x), alpha, log_d, beta, reach)


def _largest(w: Tensor) -> float:
    return float(torch.linalg.matrix_norm(w, 2))


def best_attack(
    head: Head, x: Tensor, k: int, m_u: float, *, row: int = -1, steps: int = 200, restarts: int = 8, seed: int = 0
) -> tuple[float, Tensor]:
    """The largest orthogonal component that gradient ascent on U finds, |u_j| <= M_u: a lower end for the bound.

    Args:
        head, x, k, m_u: as in :func:`attention_bound`, k at least 1.
        row: the imposed row that is attacked; the last one by default, from which the next token is read.
        steps, restarts: of Adam, all restarts in one batch, projected on the ball after each step.
        seed: of the starts.

    Returns:
        The component's length and U, (k, d).
    """
    for name, value in (("k", k), ("steps", steps), ("restarts", restarts)):
        whole(name, value, 1)
    base = attention_bound(head, x, 0, 0.0)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(restarts, k, x.shape[1], generator=generator, dtype=torch.float64).to(x)
    u = (m_u * u / u.norm(dim=-1, keepdim=True)).requires_grad_()
    adam = torch.optim.Adam([u], lr=0.1 * m_u / math.sqrt(x.shape[1]))
    best, found = -1.0, u.detach()[0]
    with torch.enable_grad():
        for _ in range(steps + 1):
            component = base.orthogonal(head(x, u))[:, row]
            lengths = component.detach()
            at = int(lengths.argmax())
            if float(lengths[at]) > best:
                best, found = float(lengths[at]), u.detach()[at].clone()
            adam.zero_grad()
            (-component.sum()).backward()
            adam.step()
            with torch.no_grad():
                u.mul_((m_u / u.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0))
    return best, found


# ------------------------------------------------------------------ heads of a model


@dataclass(frozen=True)
class Layer:
    """The heads of one layer, the rows that they read of x0, and the longest row that its norm can give.

    Args:
        heads: in the model's order, float64.
        x: (M, d), float64.
        m_u: M_u. In the first layer of a model with rotary positions the longest row of an allowed token, else what
            the norm's weights allow for any input.
    """

    heads: tuple[Head, ...]
    x: Tensor
    m_u: float


def model_layer(system: System, x0: str | Sequence[int], layer: int = 0) -> Layer:
    """Heads and rows of one layer of a model of the Llama kind (Mistral, Qwen2, ...) or of GPT-2.

    Raises:
        InputError: no such layer, or attention of another form (norms on queries, soft caps, ALiBi, recurrence).
    """
    model = system.model
    body = getattr(model, "model", None) or getattr(model, "transformer", None)
    layers = getattr(body, "layers", None) or getattr(body, "h", None)
    kind = type(model).__name__
    if layers is None:
        raise InputError("model", kind, "of the Llama kind or GPT-2 (its layers are not known)")
    whole("layer", layer, 0, len(layers) - 1)
    block = layers[layer]
    attention, norm = getattr(block, "self_attn", None), getattr(block, "input_layernorm", None)
    config = model.config
    if attention is not None and hasattr(attention, "q_proj") and norm is not None:
        odd = [n for n in ("q_norm", "k_norm", "sinks") if getattr(attention, n, None) is not None]
        odd += [n for n in ("attn_logit_softcapping", "clip_qkv") if getattr(config, n, None) is not None]
        rotary = getattr(body, "rotary_emb", None)
        if odd or rotary is None:
            raise InputError("model", kind, f"one whose heads are plain ({', '.join(odd) or 'no rotary positions'})")
        reader = attention.q_proj
        heads = _llama_heads(attention, rotary, int(attention.head_dim))
    elif getattr(block, "attn", None) is not None and hasattr(block.attn, "c_attn") and hasattr(block, "ln_1"):
        reader, norm = block.attn.c_attn, block.ln_1
        heads = _gpt2_heads(block.attn)
    else:
        raise InputError("model", kind, "of the Llama kind or GPT-2 (its attention is of another form)")
    state = State(system, x0)
    read: list[Tensor] = []
    hook = reader.register_forward_pre_hook(lambda module, given: read.append(given[0].detach()))
    try:
        with torch.no_grad():
            empty = torch.empty(1, 0, dtype=torch.long, device=system.device)
            system.logits(state.rows(empty))
    finally:
        hook.remove()
    if layer == 0 and heads[0].frequencies is not None:
        with torch.no_grad():
            m_u = float(norm(system.table[system.allowed]).double().norm(dim=-1).max())
    else:
        m_u = _norm_bound(norm)
    return Layer(tuple(head.double() for head in heads), read[0][0].double(), m_u)


def _norm_bound(norm: Any) -> float:
    """max |norm(x)| over all x: g * x / rms(x) is at most max|g| sqrt(d), and a bias adds its length."""
    weight = norm.weight.detach().double()
    if "Gemma" in type(norm).__name__:
        weight = 1 + weight
    bias = getattr(norm, "bias", None)
    shift = 0.0 if bias is None else float(bias.detach().double().norm())
    return float(weight.abs().max()) * math.sqrt(len(weight)) + shift


def _llama_heads(attention: Any, rotary: Any, size: int) -> list[Head]:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    w_q, w_k, w_v = (p.weight.detach().view(-1, size, p.weight.shape[1]).transpose(1, 2) for p in projections)
    b_q, b_k, b_v = (None if p.bias is None else p.bias.detach().view(-1, size) for p in projections)
    groups = len(w_q) // len(w_k)
    return [
        Head(
            w_q[h],
            w_k[h // groups],
            w_v[h // groups],
            None if b_q is None else b_q[h],
            None if b_k is None else b_k[h // groups],
            None if b_v is None else b_v[h // groups],
            float(attention.scaling),
            frequencies=rotary.inv_freq.detach(),
            stretch=float(getattr(rotary, "attention_scaling", 1.0)),
        )
        for h in range(len(w_q))
    ]


def _gpt2_heads(attention: Any) -> list[Head]:
    d, size = attention.embed_dim, attention.head_dim
    weights = attention.c_attn.weight.detach().split(d, dim=1)
    biases = attention.c_attn.bias.detach().split(d)
    scale = size**-0.5 if attention.scale_attn_weights else 1.0
    if attention.scale_attn_by_inverse_layer_idx:
        scale /= attention.layer_idx + 1
    heads = []
    for first in range(0, d, size):
        part = slice(first, first + size)
        w_q, w_k, w_v = (w[:, part] for w in weights)
        b_q, b_k, b_v = (b[part] for b in biases)
        heads.append(Head(w_q, w_k, w_v, b_q, b_k, b_v, scale))
    return heads


def attention_table(
    system: System,
    x0: str | Sequence[int],
    lengths: Sequence[int] = (1, 2, 4, 8),
    layers: Sequence[int] | None = None,
    *,
    steps: int = 200,
    restarts: int = 4,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For every head of the layers (None: the first) and every k: the bound for x0's last row, and the best attack.

    Returns:
        Records with layer, head, k, alpha, log_d, beta, reach, bound, attack, ratio (attack / bound) and vacuous.
    """
    table = []
    for layer in layers if layers is not None else (0,):
        found = model_layer(system, x0, layer)
        for number, head in enumerate(found.heads):
            for k in lengths:
                bound = attention_bound(head, found.x, k, found.m_u)
                attack, _ = best_attack(head, found.x, k, found.m_u, steps=steps, restarts=restarts, seed=seed)
                limit = float(bound.bound[-1])
                table.append(
                    {
                        "layer": layer,
                        "head": number,
                        "k": k,
                        "alpha": float(bound.alpha[-1]),
                        "log_d": float(bound.log_d[-1]),
                        "beta": float(bound.beta[-1]),
                        "reach": bound.reach,
                        "bound": limit,
                        "attack": attack,
                        "ratio": attack / limit if limit else math.nan,
                        "vacuous": bool(bound.vacuous[-1]),
                    }
                )
    return table
