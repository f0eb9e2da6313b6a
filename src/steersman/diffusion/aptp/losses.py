r"""What the router and the experts are trained on.

    L = L_ddpm + λ_d ‖s - t‖² + λ_b mean_blocks ‖s_i - t_i‖² + λ_r L_res + λ_c L_cont + λ_s (-std R) + λ_m (1 - max R)

with s and t what the pruned and the whole network return (s_i, t_i their blocks), R the prompts' shares of the prunable
multiply-adds (``costs``), p' their target, and

    L_res  = |log(mean R / p')|                                                  (or its absolute or squared difference)
    L_cont = BCE( softmax(w wᵀ/τ), softmax(ẑ ẑᵀ/τ) )                              rows; w, ẑ: unit vectors (B, ·)
    L_ddpm = mean_i min(S_i, γ)/S_i ‖s_i - target_i‖²,        S = α²/σ²            (min-SNR; S + 1 for v-prediction)

L_cont makes prompts that mean similar things have similar architectures; it is the only loss whose gradient reaches the
predictor, since a prompt runs through its *code's* gates. It fades as cosines spread: at τ = 0.03 a softmax row is all
but one-hot where they differ by 0.3, and then there is nothing left to learn from.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import InputError

RESOURCE = ("log", "mae", "mse")
SNR_GAMMA = 5.0


def resource_loss(ratio: Tensor, target: float, kind: str = "log") -> Tensor:
    """L_res of a mean share of the multiply-adds: 0 at the target; ``log`` is symmetric in ratios to it."""
    if kind == "log":
        return (ratio / target).log().abs()
    if kind == "mae":
        return (ratio - target).abs()
    if kind == "mse":
        return (ratio - target).square()
    raise InputError("resource", kind, f"one of {', '.join(RESOURCE)}")


def contrastive_loss(
    z: Tensor, w: Tensor, temperature: float = 0.03, embedding_temperature: float | None = None
) -> Tensor:
    """L_cont of embeddings z (B, d) and architectures w (B, D); both are normalised.

    Args:
        temperature: of the architectures' similarities.
        embedding_temperature: of the embeddings'; None is the same.
    """
    τ = temperature if embedding_temperature is None else embedding_temperature
    w, z = F.normalize(w, dim=1), F.normalize(z.to(w), dim=1)
    ours = (w @ w.T / temperature).softmax(-1)
    theirs = (z @ z.T / τ).softmax(-1).detach()
    # A row's largest entry may round to 1, a little above in float32.
    return F.binary_cross_entropy(ours.clamp(0, 1), theirs.clamp(0, 1))


def snr_weights(snr: Tensor, prediction_type: str, gamma: float | None = SNR_GAMMA) -> Tensor:
    """Weights of the squared error at signal-to-noise ratios (B,); all 1 with ``gamma`` None.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023.
    """
    if gamma is None:
        return torch.ones_like(snr)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    S = snr + 1 if prediction_type == "v_prediction" else snr
    return S.clamp(max=gamma) / S


def denoising_loss(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """L_ddpm: weights (B,)."""
    return (weights * (output.float() - target.float()).square().flatten(1).mean(1)).mean()
