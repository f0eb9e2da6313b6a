r"""What networks predict, and what follows from it at a level (ᾱ, β̄).

Of I_0, I_res = I_in - I_0 and ε any two, or one beside the input, fix the others:

    I_t = I_0 + ᾱ I_res + β̄ ε,
    SM-Res-N:  Î_0 = I_t - ᾱ Î_res - β̄ ε̂
    SM-Res:    Î_0 = I_in - Î_res,    ε̂ = (I_t - I_in - (ᾱ - 1) Î_res) / β̄
    SM-N:      Î_0 = (I_t - ᾱ I_in - β̄ ε̂) / (1 - ᾱ),    Î_res = I_in - Î_0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steersman.diffusion.rddm.levels import Level
from steersman.errors import InputError, nearest

PredictionKind = Literal[
    "res_noise", "res", "epsilon", "x0_noise", "res_add_noise", "x0_add_noise", "sample", "v_prediction"
]
KINDS: tuple[str, ...] = get_args(PredictionKind)
HEADS = {"res": 1, "epsilon": 1, "sample": 1, "v_prediction": 1}  # all others have two
FLOOR = 1e-6
"""1 - ᾱ is at least this in SM-N, whose Î_0 at the start is then whatever clipping makes of it."""


def heads(kind: str) -> int:
    """How many images a network of this kind gives.

    Raises:
        InputError: another kind.
    """
    if kind not in KINDS:
        raise InputError("prediction_type", kind, nearest(str(kind), KINDS))
    return HEADS.get(kind, 2)


class Estimate(NamedTuple):
    """Î_0, Î_res and ε̂; ε̂ is None where it can't be told, because there is no noise."""

    x0: Tensor
    res: Tensor
    eps: Tensor | None


def targets(kind: str, target: Tensor, residual: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """What the heads of a network are trained on.

        res_noise     (I_res, ε)          x0_noise      (I_0, ε)
        res           (I_res,)            res_add_noise (I_res, I_res + ε)
        epsilon       (ε,)                x0_add_noise  (I_0, I_0 + ε)          sample  (I_0,)

    Raises:
        InputError: a kind that is not trained here (``v_prediction`` comes with converted networks).
    """
    found = {
        "res_noise": (residual, noise),
        "res": (residual,),
        "epsilon": (noise,),
        "x0_noise": (target, noise),
        "res_add_noise": (residual, residual + noise),
        "x0_add_noise": (target, target + noise),
        "sample": (target,),
    }
    if kind not in found:
        raise InputError("prediction_type", kind, nearest(str(kind), found))
    return found[kind]


def residual_of_noise(eps: Tensor, x: Tensor, x_in: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    """Î_res that goes with ε̂, of an Î_0 clipped to [-1, 1]: without the clip, 1 - ᾱ -> 0 would leave nothing else."""
    rest = (1 - alpha).clamp_min(FLOOR) if isinstance(alpha, Tensor) else max(1 - alpha, FLOOR)
    return x_in - ((x - alpha * x_in - beta * eps) / rest).clamp(-1, 1)


def noise_of_residual(res: Tensor, x: Tensor, x_in: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    """ε̂ that goes with Î_res; β̄ must not be 0."""
    return (x - x_in + (1 - alpha) * res) / beta


def estimate(
    kind: str,
    outputs: Sequence[Tensor],
    x: Tensor,
    x_in: Tensor | float,
    level: Level,
    *,
    clip: float | None = 1.0,
    clip_residual: float | None = 2.0,
    rest: float | None = None,
) -> Estimate:
    """Î_0, Î_res and ε̂ of what a network gave.

    The order of clipping is the published one: ε̂ of SM-Res is made from the clipped Î_res, and no ε̂ is made
    again after Î_0 was clipped.

    Args:
        kind: see :func:`targets`; ``v_prediction`` = (1 - ᾱ) ε - β̄ I_0, of converted networks.
        outputs: one tensor a head, of the shape of ``x``.
        x: I_t.
        x_in: I_in; 0 for generation.
        level: (ᾱ, β̄) of ``x``.
        clip: Î_0 to ± this; None leaves it.
        clip_residual: Î_res to ± this; residuals of images in [-1, 1] reach ±2.
        rest: 1 - ᾱ that Î_res is divided by in SM-N; None is that of ``level``.
    """
    alpha, beta = level
    first, second = outputs[0], outputs[-1]

    def bounded(value: Tensor, by: float | None) -> Tensor:
        return value if by is None else value.clamp(-by, by)

    if kind in ("res_noise", "res_add_noise"):
        eps = second if kind == "res_noise" else second - first
        res = bounded(first, clip_residual)
        return Estimate(bounded(x - alpha * res - beta * eps, clip), res, eps)
    if kind in ("x0_noise", "x0_add_noise"):
        eps = second if kind == "x0_noise" else second - first
        return Estimate(bounded(first, clip), bounded(x_in - first, clip_residual), eps)
    if kind in ("res", "sample"):
        res = bounded(first if kind == "res" else x_in - first, clip_residual)
        made = None if beta == 0 else (x - x_in + (1 - alpha) * res) / beta
        return Estimate(bounded(x_in - res, clip), res, made)
    if kind == "v_prediction":
        x0 = bounded(torch.add((1 - alpha) * x, first, alpha=-beta), clip)
        return Estimate(x0, bounded(x_in - x0, clip_residual), torch.add((1 - alpha) * first, x, alpha=beta))
    eps = first
    if rest is None:
        x0 = bounded((x - alpha * x_in - beta * eps) / max(1 - alpha, FLOOR), clip)
        return Estimate(x0, bounded(x_in - x0, clip_residual), eps)
    # On a path that differs from the trained one (see RDDMScheduler.residual_from).
    res = bounded((x - x_in - beta * eps) / -max(rest, FLOOR), clip_residual)
    return Estimate(bounded(x - alpha * res - beta * eps, clip), res, eps)
