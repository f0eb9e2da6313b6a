r"""Semi-discrete optimal transport: a continuous law of noise onto finitely many points.

Let μ be a law on R^d with a density and y_1, ..., y_M points with weights ν_i. The Brenier potential

    u_h(x) = max_i (<x, y_i> + h_i),        W_i(h) = {x: i attains the maximum},        T(x) = y_i on W_i

is convex, and T, its gradient, is the optimal map for the quadratic cost between μ and its image. The
heights h that give every point its weight, μ(W_i(h)) = ν_i, minimise the convex energy

    E(h) = E_{x~μ} u_h(x) - Σ_i ν_i h_i,        ∂E/∂h_i = μ(W_i(h)) - ν_i,

and are unique up to a constant (here: mean 0). In terms of costs T(x) = argmin_i ½|x - y_i|² - ψ_i with
ψ_i = h_i + ½|y_i|². Masses are counted on draws from μ; n draws leave the noise Σ ν_i (1 - ν_i) / n in |w - ν|².

Second derivatives live on the facets between cells. With the two best points i, j of a draw x and the gap
γ = u_h(x) - (<x, y_j> + h_j) between them, E's Hessian is the graph Laplacian

    ∇²E(h) = E_{x~μ} [δ(γ) (e_i - e_j)(e_i - e_j)^T],        δ(γ) ≈ exp(-γ/γ̄)/γ̄,        γ̄ = E γ,

so that one pass over the draws gives gradient and curvature.

Gu, Luo, Sun & Yau, "Variational principles for Minkowski type problems, discrete optimal transport, and discrete
Monge-Ampère equations", Asian J. Math. 2016; Kitagawa, Mérigot & Thibert, "Convergence of a Newton algorithm for
semi-discrete optimal transport", JEMS 2019; Li et al., "DPM-OT", ICCV 2023 (``solver="adam"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from steersman.errors import InputError

Source = Literal["gaussian", "uniform"]
SOURCES: tuple[str, ...] = get_args(Source)
Method = Literal["newton", "adam"]
METHODS: tuple[str, ...] = get_args(Method)
Progress = Callable[[int, float, int], None]
"""Called with the iteration, the estimate of the residual and the draws so far."""

DRAWS = 10
"""Draws of an iteration, in multiples of M: the least that sees each cell."""
LEAST = 8192
"""... and at least so many."""
TILE = 1 << 23
"""Scores that are held at once."""
REDRAWS = 100


# ------------------------------------------------------------------ the source law


def draw(
    source: str,
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws from μ: ``gaussian`` N(0, I), or ``uniform`` on the unit cube [0, 1]^d."""
    if source not in SOURCES:
        raise InputError("source", source, f"one of {', '.join(SOURCES)}")
    law = torch.randn if source == "gaussian" else torch.rand
    where = device if generator is None else generator.device
    return law(shape, generator=generator, dtype=dtype, device=where).to(device)


# ------------------------------------------------------------------ the map


def leaders(x: Tensor, bank: Tensor, h: Tensor, k: int = 1, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of <x, y_i> + h_i, largest first, and their indices; ties go to the lowest index.

    Args:
        x: (B, d). bank: (M, d). h: (M,).
        k: from 1 to M.
        chunk: points of the bank in one matrix product; None for what fits ``TILE`` scores.

    Returns:
        values and indices, (B, k).
    """
    chunk = min(chunk or max(TILE // max(len(x), 1), 1024), len(bank))
    best = index = None
    for start in range(0, len(bank), chunk):
        part = slice(start, start + chunk)
        scores = torch.addmm(h[part], x, bank[part].T)
        if k == 1:
            value, i = scores.max(1, keepdim=True)
        else:
            value, i = scores.topk(min(k, scores.shape[1]), 1)
        i = i + start
        if best is None or index is None:
            best, index = value, i
        elif k == 1:
            better = value > best
            best, index = torch.where(better, value, best), torch.where(better, i, index)
        else:
            both, places = torch.cat([best, value], 1), torch.cat([index, i], 1)
            order = torch.argsort(both, dim=1, descending=True, stable=True)[:, :k]
            best, index = both.gather(1, order), places.gather(1, order)
    assert best is not None and index is not None
    return best, index


@dataclass(frozen=True)
class SemiDiscreteMap:
    """T(x) = y_i with i = argmax_i (<x, y_i> + h_i), as :func:`fit` found it.

    Args:
        bank: y, (M, d).
        h: heights (M,), float64, mean 0.
        weights: ν, (M,), float64, sum 1.
        source: the law μ that the map was fitted for: gaussian, uniform, or points (a fixed set).
        angles: for k = 2, 3, ...: the smallest and the largest angle between the facet of a draw's cell and
            those of its next k - 1, over the fit's draws; (K - 1, 2). See :meth:`singular`.
        masses: w, (M,): shares of the cells among ``checked`` draws that the fit did not use.
        residual: sqrt(Σ (w_i - ν_i)² / ν_i) without the draws' own noise: for equal weights the root mean
            square relative error of the cells' masses.
        iterations, draws: of the fit.
        converged: the residual is below the tolerance, and no cell is empty.
    """

    bank: Tensor
    h: Tensor
    weights: Tensor
    source: str
    angles: Tensor
    masses: Tensor
    checked: int
    residual: float
    iterations: int = 0
    draws: int = 0
    converged: bool = True
    history: tuple[float, ...] = field(default=(), repr=False)

    @property
    def worst(self) -> float:
        """max |w_i / ν_i - 1|, with the noise of the ``checked`` draws in it."""
        return float((self.masses / self.weights - 1).abs().max())

    @property
    def empty(self) -> int:
        """Cells that no draw fell into."""
        return int((self.masses == 0).sum())

    def transport(self, x: Tensor, chunk: int | None = None) -> Tensor:
        """Index (B,) of T(x) for draws ``x`` (B, d) of the source law.

        Computed in float64; what it returns does not depend on ``chunk``.
        """
        return self._leaders(x, 1, chunk)[1][:, 0]

    def potential(self, x: Tensor) -> Tensor:
        """u_h(x), (B,)."""
        return self._leaders(x, 1)[0][:, 0]

    def singular(self, x: Tensor, topk: int, threshold: float) -> Tensor:
        """Whether each of ``x`` (B, d) lies near a fold of the potential, where T jumps between far points.

        The facet of y_i has the normal n_i = (y_i, -1)/|(y_i, -1)|. With θ_ij = arccos <n_i, n_j>, scaled to
        [0, 1] by the least and the largest angle among the fit's draws, x is singular if θ between its cell
        and one of the next topk - 1 is above ``threshold``.

        Args:
            topk: from 2 to what the fit recorded (:attr:`angles`).
            threshold: from 0 to 1.
        """
        low, high = self._range(topk)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise InputError("threshold", threshold, "a number from 0 to 1")
        index = self._leaders(x, topk)[1]
        theta = facet_angles(self.bank, index)
        return ((theta - low) > threshold * (high - low)).any(1)

    def sample(
        self, x: Tensor, generator: torch.Generator | None = None, topk: int = 1, threshold: float = 0.7
    ) -> tuple[Tensor, Tensor]:
        """(x, index): draws off the singular set and where the map takes them; ``topk=1`` keeps every draw.

        A draw on the singular set is replaced by a new one, at most 100 times: there are as many outputs as
        draws, in their order, and whether a draw is singular does not depend on the rest of the batch.

        Raises:
            InputError: after 100 redraws some are still singular.
        """
        if topk == 1:
            return x, self.transport(x)
        x = x.clone()
        bad = self.singular(x, topk, threshold)
        for _ in range(REDRAWS):
            if not bool(bad.any()):
                return x, self.transport(x)
            fresh = draw(self.source, (int(bad.sum()), x.shape[1]), generator, x.dtype, x.device)
            x[bad] = fresh
            again = bad.clone()
            again[bad] = self.singular(fresh, topk, threshold)
            bad = again
        if bool(bad.any()):
            share = float(bad.double().mean())
            raise InputError("threshold", threshold, f"larger: {share:.1%} of the draws are singular after 100 redraws")
        return x, self.transport(x)

    def _range(self, topk: int) -> tuple[float, float]:
        if isinstance(topk, bool) or not isinstance(topk, int) or not 2 <= topk <= len(self.angles) + 1:
            most = len(self.angles) + 1
            raise InputError(
                "topk", topk, f"a whole number from 1 to {most}" if most > 1 else "1 (fit recorded no more)"
            )
        low, high = self.angles[topk - 2].tolist()
        return low, high

    def _leaders(self, x: Tensor, k: int, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        if x.ndim != 2 or x.shape[1] != self.bank.shape[1] or not x.is_floating_point():
            raise InputError("x", tuple(x.shape), f"floating-point draws of shape (B, {self.bank.shape[1]})")
        if not bool(x.isfinite().all()):
            raise InputError("x", "draws", "finite")
        bank, h = self.bank.double(), self.h.double()
        rows = max(TILE // max(len(bank), 1), 1024) if chunk is None else max(len(x), 1)
        parts = [leaders(part, bank, h, k, chunk) for part in x.to(bank.device).double().split(rows)]
        return torch.cat([v for v, _ in parts]), torch.cat([i for _, i in parts])


def facet_angles(bank: Tensor, index: Tensor) -> Tensor:
    """θ between the facet of each row's first point and those of its others, (B, k - 1), in radians."""
    y = bank.double()[index]
    length = (y.square().sum(2) + 1).sqrt()
    inner = (y[:, :1] * y[:, 1:]).sum(2) + 1
    return torch.arccos((inner / (length[:, :1] * length[:, 1:])).clamp(-1, 1))


def energy(x: Tensor, bank: Tensor, h: Tensor, weights: Tensor) -> Tensor:
    """E(h) with the draws ``x`` (n, d) in place of μ: mean u_h(x) - <ν, h>."""
    return leaders(x, bank, h)[0].mean() - weights @ h


def cell_masses(x: Tensor, bank: Tensor, h: Tensor) -> Tensor:
    """w_i: shares of the draws ``x`` (n, d) in each cell, (M,), float64."""
    return torch.bincount(leaders(x, bank, h)[1][:, 0], minlength=len(bank)).double() / len(x)


# ------------------------------------------------------------------ the fit


def fit(
    bank: Tensor,
    weights: Tensor | None = None,
    *,
    source: Source | Tensor = "gaussian",
    method: Method = "newton",
    tolerance: float = 0.05,
    max_iterations: int = 1000,
    learning_rate: float = 0.1,
    batch_size: int = 4096,
    topk: int = 8,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> SemiDiscreteMap:
    """Heights h that give each point of ``bank`` its share of the source law.

    Everything is in units of the bank's own spread (mean |<x, y - ȳ>| over draws), so that a multiple of the bank
    has the same multiple of h. Two methods:

    ``newton``: three stages. Heights that are right for a blurred maximum, E = ε log Σ exp((<x, y_i> + h_i)/ε),
    by h += ε log(ν/w) while ε halves down to the gap between neighbours; then damped Newton steps on the Laplacian
    of the module's text, with ever more draws when they stall; then steps of gain 3/(2k), whose end
    averages all draws.

    ``adam``: the published one, on the gradient w - ν alone, m = .9 m + .1 g, v = .999 v + .001 g²,
    h -= η m/(sqrt(v) + 1e-8), keeping the h at which |g| was least; after 50 iterations without gain (at most three
    times) twice the draws and 0.8 η. η is in units of the bank's spread. It needs many more draws: see
    ``benchmarks/semidiscrete_transport.py``.

    Args:
        bank: y, (M, d): finite, distinct points.
        weights: ν above 0, (M,), scaled to sum 1; None for equal ones.
        source: μ: gaussian, uniform, or a fixed set of points (n, d).
        method: newton or adam.
        tolerance: the residual that is asked for, see :class:`SemiDiscreteMap`; above 0. It takes M/tolerance²
            draws to know the masses so well.
        max_iterations: over all stages; what was reached by then is returned, with ``converged`` False.
        learning_rate: η of adam, above 0.
        batch_size: draws of one matrix product.
        topk: how many neighbours to record angles for, see :meth:`SemiDiscreteMap.singular`.
        generator: for the draws; on the bank's device, or a CPU one.
        progress: called after each iteration.

    Raises:
        InputError: an empty bank, NaN, duplicate points (their cells are one), or an argument out of range.
    """
    ν = _checked(bank, weights)
    for name, value in (("tolerance", tolerance), ("learning_rate", learning_rate)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(name, value, "a finite number above 0")
    for name, count in (("max_iterations", max_iterations), ("batch_size", batch_size), ("topk", topk)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(name, count, "a whole number from 1")
    if method not in METHODS:
        raise InputError("method", method, f"one of {', '.join(METHODS)}")
    state = _Fit(bank, ν, source, batch_size, generator)
    run = state.newton if method == "newton" else state.adam
    run(tolerance, max_iterations, learning_rate, progress)
    return state.result(tolerance, min(topk, len(bank)))


def _checked(bank: Tensor, weights: Tensor | None) -> Tensor:
    if not isinstance(bank, Tensor) or bank.ndim != 2 or 0 in bank.shape or not bank.is_floating_point():
        shape = tuple(bank.shape) if isinstance(bank, Tensor) else type(bank).__name__
        raise InputError("bank", shape, "floating-point points of shape (M, d), at least one")
    if not bool(bank.isfinite().all()):
        raise InputError("bank", "points", "finite (there are NaN or infinities)")
    twice = duplicates(bank)
    if twice:
        raise InputError(
            "bank", f"{twice} duplicates among {len(bank)} points", "of distinct points (two equal ones have one cell)"
        )
    if weights is None:
        return torch.full((len(bank),), 1 / len(bank), dtype=torch.float64, device=bank.device)
    ν = torch.as_tensor(weights, dtype=torch.float64, device=bank.device)
    if ν.shape != (len(bank),) or not bool((ν.isfinite() & (ν > 0)).all()):
        raise InputError("weights", tuple(ν.shape), f"{len(bank)} finite numbers above 0, one for each point")
    return ν / ν.sum()


def duplicates(points: Tensor) -> int:
    """How many of ``points`` (M, ...) equal an earlier one."""
    array = np.ascontiguousarray(points.detach().flatten(1).cpu().numpy() + 0.0)
    rows = array.view(np.dtype((np.void, array.dtype.itemsize * array.shape[1]))).ravel()
    return len(rows) - len(np.unique(rows))


@dataclass
class _Count:
    """What one set of draws says at one h: masses, and the Laplacian's edges (i, j, weight)."""

    h: Tensor
    w: Tensor
    n: int
    edges: tuple[Tensor, Tensor, Tensor] | None = None
    gap: float = 0.0


class _Fit:
    """A fit in progress, in units of the bank's spread s: <x, y_i> + h_i = s (<x - c, z_i> + h'_i) + what i leaves."""

    def __init__(
        self, bank: Tensor, ν: Tensor, source: Source | Tensor, batch: int, generator: torch.Generator | None
    ) -> None:
        self.bank, self.ν, self.batch, self.generator = bank, ν, batch, generator
        self.M, self.d = bank.shape
        self.points: Tensor | None = None
        if isinstance(source, Tensor):
            if source.ndim != 2 or source.shape[1] != self.d or not len(source) or not bool(source.isfinite().all()):
                raise InputError("source", tuple(source.shape), f"finite points of shape (n, {self.d})")
            self.points, self.law = source.to(bank.device).double(), "points"
            self.centre = self.points.mean(0)
        elif source in SOURCES:
            self.law = source
            self.centre = torch.full((self.d,), 0.0 if source == "gaussian" else 0.5).to(bank.device).double()
        else:
            raise InputError("source", source, f"one of {', '.join(SOURCES)}, or points (n, {self.d})")
        y = bank.double()
        self.y = y - y.mean(0)
        self.dtype = torch.float64 if self.points is not None else torch.float32
        x = self.draws(max(1024, 2 * LEAST // self.d)).double()
        self.scale = float((x @ self.y.T).abs().mean()) or 1.0
        self.z = (self.y / self.scale).to(self.dtype)
        self.h = torch.zeros(self.M, dtype=torch.float64, device=bank.device)
        self.iterations = self.used = 0
        self.history: list[float] = []

    def checks(self, tolerance: float) -> int:
        """Draws that tell a residual of the tolerance from none: its square has the noise sqrt(2 M)/n."""
        return int(max(100 * self.M, min(4 * math.sqrt(2 * self.M) / tolerance**2, 1e7)))

    # -------------------------------------------------------------- draws

    def draws(self, n: int) -> Tensor:
        """x - c for ``n`` draws; all of a fixed set."""
        if self.points is not None:
            return (self.points - self.centre).to(self.dtype)
        x = draw(self.law, (n, self.d), self.generator, self.dtype, self.bank.device)
        return x if self.law == "gaussian" else x - 0.5

    def batches(self, n: int) -> list[int]:
        return [n] if self.points is not None else [self.batch] * -(-n // self.batch)

    def count(self, h: Tensor, n: int, curvature: bool = False) -> _Count:
        """Masses at ``h`` on about ``n`` new draws, and (if asked) where the facets are."""
        w = torch.zeros(self.M, dtype=torch.float64, device=h.device)
        first, second, gaps, total = [], [], [], 0
        height = h.to(self.dtype)
        for size in self.batches(n):
            x = self.draws(size)
            total += len(x)
            if curvature and self.M > 1:
                value, index = _best_two(x, self.z, height)
                first.append(index[:, 0])
                second.append(index[:, 1])
                gaps.append((value[:, 0] - value[:, 1]).double())
                index = index[:, :1]
            else:
                _, index = leaders(x, self.z, height)
            w += torch.bincount(index[:, 0], minlength=self.M)
        self.used += total
        if not gaps:
            return _Count(h, w / total, total)
        γ = torch.cat(gaps)
        mean = float(γ.mean())
        δ = torch.exp(-γ / mean) / (mean * total)
        return _Count(h, w / total, total, (torch.cat(first), torch.cat(second), δ), mean)

    def excess(self, c: _Count) -> float:
        """The squared residual: Σ (w_i - ν_i)²/ν_i less what noise alone makes of it."""
        noise = 0.0 if self.points is not None else (self.M - 1) / c.n
        return float(((c.w - self.ν).square() / self.ν).sum()) - noise

    def tell(self, excess: float, progress: Progress | None) -> None:
        self.iterations += 1
        residual = math.sqrt(max(excess, 0.0))
        self.history.append(residual)
        if progress is not None:
            progress(self.iterations, residual, self.used)

    # -------------------------------------------------------------- Newton's method

    def newton(self, tolerance: float, limit: int, _: float, progress: Progress | None) -> None:
        if self.M == 1:
            return
        self.blurred(limit, progress)
        n, enough = max(DRAWS * self.M, LEAST), self.M / tolerance**2
        settled = max(
            0.5 * self.M / n, 0.25 * tolerance**2
        )  # where a step's prediction of the masses is near the truth
        at = self.count(self.h, n, curvature=True)
        recent, gain, stalls = [at], 1.0, 0
        while self.iterations < limit and self.excess(at) > settled:
            there = self.count(at.h - gain * self.newton_step(recent, at.w - self.ν), n, curvature=True)
            self.tell(self.excess(there), progress)
            if self.excess(there) < self.excess(at):
                at, recent, gain, stalls = there, [*recent[-3:], there], min(1.0, 2 * gain), 0
                continue
            gain, stalls = gain / 2, stalls + 1
            if stalls == 4:
                if n >= enough:
                    break
                n, gain, stalls = 2 * n, 0.25, 0
                at = self.count(at.h, n, curvature=True)
                recent = [*recent[-3:], at]
        self.h = at.h - at.h.mean()
        if self.excess(at) <= settled:
            self.averaged(at, recent, n, tolerance, limit, progress)

    def averaged(
        self, at: _Count, recent: list[_Count], n: int, tolerance: float, limit: int, progress: Progress | None
    ) -> None:
        """Steps of gain 3/(2k), in effect an average over all their draws: 3/2 M/tolerance², or more if need be."""
        h, k, draws, enough = at.h, 6, 0, 1.5 * self.M / tolerance**2
        while self.iterations < limit:
            h = h - 1.5 / k * self.newton_step(recent, at.w - self.ν)
            if draws >= enough and k >= 12:
                if self.excess(self.count(h, self.checks(tolerance))) <= tolerance**2:
                    break
                enough = 1.5 * draws
            at = self.count(h, n, curvature=True)
            recent = [*recent[-3:], at]
            draws, k = draws + at.n, k + 1
            self.tell(self.excess(at), progress)
        self.h = h - h.mean()

    def newton_step(self, recent: list[_Count], g: Tensor) -> Tensor:
        """The solution of ∇²E s = g on the facets of the ``recent`` draws, by conjugate gradients."""
        edges = [c.edges for c in recent if c.edges is not None]
        i, j = torch.cat([e[0] for e in edges]), torch.cat([e[1] for e in edges])
        δ = torch.cat([e[2] for e in edges]) / len(edges)
        both = torch.stack([torch.cat([i, j]), torch.cat([j, i])])
        adjacency = torch.sparse_coo_tensor(both, torch.cat([δ, δ]), (self.M, self.M), check_invariants=False)
        adjacency = adjacency.coalesce()
        degree = torch.zeros_like(g).index_add(0, both[0], torch.cat([δ, δ]))
        # A little on the diagonal: cells without a facet in the draws would move without bound.
        diagonal = degree + 1e-3 * degree.mean()
        s, r = torch.zeros_like(g), g
        p = q = r / diagonal
        rq, stop = r @ q, 1e-3 * float(g.norm())
        for _ in range(300):
            if float(r.norm()) <= stop:
                break
            a = diagonal * p - torch.mv(adjacency, p)
            step = rq / (p @ a)
            s, r = s + step * p, r - step * a
            q = r / diagonal
            before, rq = rq, r @ q
            p = q + (rq / before) * p
        return s

    def blurred(self, limit: int, progress: Progress | None) -> None:
        """h += ε log(ν/w) for the blurred maximum, as ε halves from the bank's spread to the gap between neighbours."""
        n = max(2 * self.M, LEAST)
        rows = max(1, min(self.batch, TILE // self.M))
        ε = 2.0  # in units of the spread
        while self.iterations < limit:
            for _ in range(2):
                w = torch.zeros_like(self.h)
                drawn = 0
                while drawn < n:
                    x = self.draws(rows)
                    for part in x.split(rows):
                        scores = torch.addmm(self.h.to(self.dtype), part, self.z.T)
                        w += torch.softmax(scores / ε, 1).sum(0).double()
                    drawn += len(x)
                self.used += drawn
                w = w / w.sum()
                self.h = self.h + ε * (self.ν.log() - w.clamp_min(1e-30).log())
                self.h = self.h - self.h.mean()
                self.tell(float(((w - self.ν).square() / self.ν).sum()), progress)
            value, _ = _best_two(self.draws(self.batch), self.z, self.h.to(self.dtype))
            if ε < 0.5 * float((value[:, 0] - value[:, 1]).mean()) or ε < 1e-6:
                return
            ε = ε / 2

    # -------------------------------------------------------------- the published method

    def adam(self, tolerance: float, limit: int, rate: float, progress: Progress | None) -> None:
        n = max(DRAWS * self.M, self.batch)
        h, m, v = self.h, torch.zeros_like(self.h), torch.zeros_like(self.h)
        kept, least, idle, doublings = h, math.inf, 0, 0
        while self.iterations < limit:
            at = self.count(h, n)
            g = at.w - self.ν
            self.tell(self.excess(at), progress)
            if float(g.norm()) < least:
                kept, least, idle = h, float(g.norm()), 0
                if self.excess(at) < tolerance**2 and bool((at.w > 0).all()):
                    break
            else:
                idle += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
            h = h - rate * m / (v.sqrt() + 1e-8)
            h = h - h.mean()
            if idle >= 50 and doublings < 3:
                n, rate, least, idle, doublings = 2 * n, 0.8 * rate, math.inf, 0, doublings + 1
        self.h = kept - kept.mean()

    # -------------------------------------------------------------- what comes out

    def result(self, tolerance: float, topk: int) -> SemiDiscreteMap:
        """The map in the user's coordinates, checked on draws that the fit did not use."""
        used = self.used
        at = self.count(self.h, self.checks(tolerance))
        residual = math.sqrt(max(self.excess(at), 0.0))
        x = self.draws(max(DRAWS * self.M, LEAST)).double()[: 4 * LEAST]
        h = self.scale * self.h
        angles = torch.zeros(0, 2, dtype=torch.float64)
        if topk > 1:
            θ = facet_angles(self.bank, leaders(x, self.y, h, topk)[1]).cpu()
            low, high = θ.min(0).values.cummin(0).values, θ.max(0).values.cummax(0).values
            angles = torch.stack([low, high], 1)
        h = h - self.y @ self.centre  # <x - c, y> + h = <x, y> + (h - <c, y>)
        return SemiDiscreteMap(
            bank=self.bank,
            h=h - h.mean(),
            weights=self.ν,
            source=self.law,
            angles=angles,
            masses=at.w,
            checked=at.n,
            residual=residual,
            iterations=self.iterations,
            draws=used,
            converged=residual <= 1.25 * tolerance and bool((at.w > 0).all()),
            history=tuple(self.history),
        )


def _best_two(x: Tensor, bank: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`leaders` for k = 2 by two passes of max, which beats ``topk`` where all scores fit."""
    if len(x) * len(bank) > 4 * TILE:
        return leaders(x, bank, h, 2)
    scores = torch.addmm(h, x, bank.T)
    value, index = scores.max(1, keepdim=True)
    scores.scatter_(1, index, -math.inf)
    value2, index2 = scores.max(1, keepdim=True)
    return torch.cat([value, value2], 1), torch.cat([index, index2], 1)
