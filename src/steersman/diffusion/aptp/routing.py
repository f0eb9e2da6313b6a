r"""From prompts to architectures: predictor, codebook, transport, router.

A prompt's embedding z goes through the *architecture predictor* e = W z + c, one linear head for each width group and
one for all depth gates. K learned architectures a^(1..K) are the *codebook*. Both are logits of gates (see ``gates``),
and are compared by their gates,

    w = [ width gates of blocks without depth gate, hard | of the others: soft width × soft depth | depth gates, hard ]

each times 1/sqrt(width of its group), so that every group and every depth gate counts alike, and normalised:
S = w(e) w(a)ᵀ, cosines (B, K).
In training a prompt gets a code by entropic transport to codes of equal mass, Q = exp(S/ε)ᵀ alternately scaled to rows
of sum 1/K and columns of sum 1/B (Sinkhorn), and then the argmax of its column; in use by the argmax of S.

Nothing pulls prompts and codes towards each other, so the argmax of S need not use the codes equally. ``potentials``
are offsets of the codes with which it does.

Here neither codes nor prompts draw noise in use, so a prompt's expert depends on the prompt alone. The authors' code
keeps the codes' gates of the last training step, and draws the prompts' noise anew from seed 0 in each batch: equal
prompts in two rows have different gates there. ``official_noise`` reproduces that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steersman.diffusion.aptp.costs import MultiplyAdds
from steersman.diffusion.aptp.gates import OFFSET, TEMPERATURE, GateLayout, gumbel, hard
from steersman.errors import InputError

EPSILON, ITERATIONS = 0.05, 3
SHARP = 0.01
"""ε of the offsets that balance an argmax, in standard deviations."""
CLOSE = 0.002
"""Share of all multiply-adds by which a budget may be undercut."""


def sinkhorn(similarity: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """Weights (B, K) of the entropic transport of B prompts onto K codes; each prompt's sum to 1.

    Args:
        similarity: S, (B, K); in half precision exp(1/ε) = exp(20) overflows, so at least float32 is used.
        epsilon: of the entropy, above 0.
        iterations: row and column scalings; 3 balance the codes only roughly.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise InputError("similarity", tuple(similarity.shape), "of shape (prompts, codes)")
    if not epsilon > 0:
        raise InputError("epsilon", epsilon, "a number above 0")
    S = similarity if similarity.dtype in (torch.float32, torch.float64) else similarity.float()
    B, K = S.shape
    # The largest entry as 1: scaling all of Q changes nothing, and nothing overflows at small ε.
    Q = ((S - S.max()) / epsilon).exp().T
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / (K * Q.sum(1, keepdim=True))
        Q = Q / (B * Q.sum(0, keepdim=True))
    return (B * Q).T


def potentials(similarity: Tensor, sharpness: float = SHARP, iterations: int = 500) -> Tensor:
    """Offsets f (K,) of the codes with which the argmax of S + f is balanced over these prompts.

    They are the dual variables of the transport at an ε that is small against the codes' differences, where its weights
    are all but an assignment. Unlike the transport they can be used on one prompt at a time. (Ours, not the paper's.)

    Args:
        similarity: S, (B, K).
        sharpness: ε in standard deviations of a prompt's similarities.
        iterations: row and column scalings.
    """
    S = similarity.double()
    B, K = S.shape
    if K == 1:
        return torch.zeros_like(similarity[0])
    epsilon = sharpness * max(float((S - S.mean(1, keepdim=True)).std()), 1e-9)
    S = S / epsilon
    row = torch.zeros(B, 1, dtype=torch.float64, device=S.device)
    code = torch.zeros(1, K, dtype=torch.float64, device=S.device)
    for _ in range(iterations):
        code = -math.log(K) - torch.logsumexp(S + row, 0, keepdim=True)
        row = -math.log(B) - torch.logsumexp(S + code, 1, keepdim=True)
    return (epsilon * (code - code.mean()))[0].to(similarity)


class Router(nn.Module):
    """Predictor and codebook, and the K hard architectures that were made of it.

    Args:
        layout: the gates.
        dimensions: of an embedding.
        experts: K.
        by_macs: let gates count by their group's (or block's) share of the multiply-adds in comparisons, too.
        costs: needed with ``by_macs``.
        temperature, offset: T and b.
        generator: of the first weights, on the CPU.
    """

    scale: Tensor
    potentials: Tensor
    architectures: Tensor
    drawn: Tensor
    alive: Tensor
    usage: Tensor

    def __init__(
        self,
        layout: GateLayout,
        dimensions: int,
        experts: int,
        *,
        by_macs: bool = False,
        costs: MultiplyAdds | None = None,
        temperature: float = TEMPERATURE,
        offset: float = OFFSET,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dimensions", dimensions), ("experts", experts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(name, value, "a whole number from 1")
        self.layout, self.temperature, self.offset = layout, temperature, offset
        D = layout.size
        self.predictor = nn.utils.skip_init(nn.Linear, dimensions, D)
        nn.init.zeros_(self.predictor.bias)
        parts = [*layout.slices, *([slice(layout.n_width, D)] if layout.depths else [])]
        for part in parts:  # a head of its own each
            nn.init.orthogonal_(self.predictor.weight.data[part], generator=generator)
        self.codebook = nn.Parameter(nn.init.orthogonal_(torch.empty(experts, D), generator=generator))
        widths = torch.tensor([float(g.width) for g in layout.widths])[layout.group]
        scale = torch.cat([widths.rsqrt(), torch.ones(len(layout.depths))])
        if by_macs:
            assert costs is not None
            shares = costs.shares().float()
            scale = scale * torch.cat([widths * shares[: layout.n_width], shares[layout.n_width :]])
        self.register_buffer("scale", scale)
        self.register_buffer("potentials", torch.zeros(experts))
        self.register_buffer("architectures", torch.ones(experts, D))
        self.register_buffer("drawn", torch.ones(experts, D))
        self.register_buffer("alive", torch.ones(experts, dtype=torch.bool))
        self.register_buffer("usage", torch.full((experts,), 1 / experts))

    @property
    def experts(self) -> int:
        """K."""
        return len(self.codebook)

    def soft(self, logits: Tensor, generator: torch.Generator | bool | None = False) -> Tensor:
        """Soft gates of logits (N, D), with noise of a generator (None: torch's own), or, False, without a draw."""
        if isinstance(generator, bool):
            return self.layout.soft(logits, temperature=self.temperature, offset=self.offset)
        noise = gumbel(logits.shape, generator).to(logits)
        return self.layout.soft(logits, noise, self.temperature, self.offset)

    def comparable(self, gates: Tensor) -> Tensor:
        """w, (N, D), unit vectors, of soft gates (N, D)."""
        layout = self.layout
        width, depth = gates[:, : layout.n_width], gates[:, layout.n_width :]
        inside = layout.depth.to(gates.device)
        joint = width * torch.cat([depth, torch.ones_like(gates[:, :1])], 1)[:, inside]
        w = torch.cat([torch.where(inside >= 0, joint, hard(width)), hard(depth)], 1)
        return F.normalize(w * self.scale.to(gates), dim=1)

    def logits(self, z: Tensor) -> Tensor:
        """e, (B, D), of embeddings (B, d)."""
        if z.ndim != 2 or z.shape[1] != self.predictor.in_features:
            raise InputError("embeddings", tuple(z.shape), f"of shape (prompts, {self.predictor.in_features})")
        return self.predictor(z.to(self.predictor.weight))

    @torch.no_grad()
    def similarity(self, z: Tensor, official_noise: bool = False) -> Tensor:
        """S, (B, K), as used outside of training."""
        e = self.logits(z)
        if official_noise:
            # Each group's draw begins at seed 0 again, with a row for each row of the batch.
            sizes = [g.width for g in self.layout.widths] + [len(self.layout.depths)]
            noise = [gumbel((len(e), n), torch.Generator().manual_seed(0)) for n in sizes]
            u = self.layout.soft(e, torch.cat(noise, 1).to(e), self.temperature, self.offset)
            return self.comparable(u) @ self.comparable(self.drawn).T
        return self.comparable(self.soft(e)) @ self.comparable(self.soft(self.codebook)).T

    @torch.no_grad()
    def route(self, z: Tensor, official_noise: bool = False) -> Tensor:
        """Which expert each prompt goes to, (B,).

        Prompts whose code has no expert go to the nearest that has one, with a warning.
        """
        S = self.similarity(z, official_noise) + self.potentials
        best = S.argmax(1)
        lost = ~self.alive[best]
        if bool(lost.any()):
            warnings.warn(
                f"{int(lost.sum())} of {len(S)} prompts belong to experts that no training prompt was given to "
                f"({', '.join(map(str, best[lost].unique().tolist()))}); they go to the nearest other expert",
                stacklevel=2,
            )
            best = S.masked_fill(~self.alive, -torch.inf).argmax(1)
        return best


# ------------------------------------------------------------------ architectures within a budget


@torch.no_grad()
def within_budget(
    margins: Tensor, costs: MultiplyAdds, budget: float, usage: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Hard architectures (K, D) whose multiply-adds, weighted by usage, are those of a budget.

    Soft gates in training meet a budget on average only, and their hard ones do not. Here all gates begin on, and are
    put off in the order of their margins (how far a gate's logit with the median noise lies above 0): one threshold
    for all codes. A gate that would take more away than is left to take stays on, so that the budget is met
    as nearly as the smallest gates allow; in every width group the last one stays on.

    Args:
        margins: (K, D); ``-inf`` goes first, ``inf`` never.
        costs: of the network.
        budget: p, a share of all multiply-adds.
        usage: share of the prompts that each code has, (K,); None is equal shares.
    """
    layout, (K, D) = costs.layout, margins.shape
    costs.target(budget)  # refuses what can't be reached
    share = torch.full((K,), 1 / K, dtype=torch.float64) if usage is None else torch.as_tensor(usage).double().cpu()
    share = share / share.sum()
    m = margins.double().cpu().clone()
    for part in layout.slices:
        m[torch.arange(K), part.start + m[:, part].argmax(1)] = torch.inf
    gates = layout.ones(K).double()
    left = share @ costs(gates) - budget * costs.total
    order = m.flatten().argsort(stable=True).tolist()
    each = costs(gates)
    for i in order:
        k, j = divmod(i, D)
        if left <= 0 or m[k, j] == torch.inf:
            break
        if share[k] == 0:  # nobody uses it: it costs nothing, and is thrown away
            continue
        gates[k, j] = 0
        now = costs(gates[k : k + 1])[0]
        saved = share[k] * (each[k] - now)
        if saved > left + CLOSE * costs.total:
            gates[k, j] = 1
            continue
        each[k], left = now, left - saved
    return gates.float()


def magnitudes(unet: Any, layout: GateLayout) -> Tensor:
    """For magnitude pruning: the root mean square weight of each gate's part, (D,); blocks are never skipped (inf).

    Over a gate's weights in the layers before and behind it, relative to the mean over its group, as layers of
    different widths have weights of different sizes.
    """
    found = torch.full((layout.size,), torch.inf)
    for group, part in zip(layout.widths, layout.slices, strict=True):
        each = group.channels // group.width
        second = unet.get_submodule(group.path).weight.detach().float().transpose(0, 1).flatten(1)
        if group.kind == "norm":
            first = [unet.get_submodule(group.path.rpartition(".")[0]).conv1]
        elif group.kind == "heads":
            attention = unet.get_submodule(group.path.rsplit(".", 2)[0])
            first = [attention.to_q, attention.to_k, attention.to_v]
        else:
            first = [unet.get_submodule(group.path.rsplit(".", 1)[0])[0].proj]
        rows = [second]
        for layer in first:
            weight = layer.weight.detach().float().flatten(1)
            rows += list(weight.split(group.channels))
        squares = torch.cat([r.square().mean(1)[:, None] for r in rows], 1).mean(1)
        size = squares.view(group.width, each).mean(1).sqrt()
        found[part] = (size / size.mean()).cpu()
    return found
