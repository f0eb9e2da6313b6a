"""Restorers of scikit-image's that have no network, for the bench ``restoration``.

A parameter that is left out is the one of a small grid with the least squared error on training crops: the tuning
that a network has by its training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steersman.errors import Inapplicable, InputError
from steersman.reference import photographs


@dataclass(frozen=True)
class Classical:
    """A restorer of single images.

    Args:
        restore: an image (C, H, W), its mask and a parameter to an image.
        grid: parameters to choose among; empty where there is none.
        parameter: that the user gave.
        tasks: that it is made for; empty for all.
    """

    restore: Callable[[np.ndarray, np.ndarray | None, float], np.ndarray]
    grid: tuple[float, ...] = ()
    parameter: float | None = None
    tasks: tuple[str, ...] = ()

    def on(self, x: Tensor, mask: Tensor | None, parameter: float) -> Tensor:
        found = []
        for i, image in enumerate(x.numpy()):
            hole = None if mask is None else mask[i, 0].numpy() > 0.5
            found.append(np.clip(self.restore(image, hole, parameter), 0, 1))
        return torch.from_numpy(np.stack(found)).float()

    def chosen(self, target: Tensor, x: Tensor, mask: Tensor | None) -> float:
        """The parameter with the least squared error on (a part of) training crops (n, C, H, W)."""
        if self.parameter is not None or not self.grid:
            return self.parameter or 0.0
        part = slice(0, 24)
        y, x = target[part], x[part]
        mask = None if mask is None else mask[part]
        return min(self.grid, key=lambda p: float((self.on(x, mask, p) - y).square().mean()))


def identity() -> Classical:
    """The input itself."""
    return Classical(lambda x, hole, _: x)


def tv(weight: float | None = None) -> Classical:
    """Total variation (Chambolle 2004); ``weight`` above 0."""
    _above_0("weight", weight)

    def restore(x: np.ndarray, hole: np.ndarray | None, weight: float) -> np.ndarray:
        from skimage.restoration import denoise_tv_chambolle

        return denoise_tv_chambolle(x, weight=weight, channel_axis=0)

    return Classical(restore, (0.01, 0.03, 0.1, 0.2, 0.3), weight)


def wiener(balance: float | None = None) -> Classical:
    """Wiener's filter, told the true blur; ``balance`` above 0 weighs smoothness."""
    _above_0("balance", balance)
    kernel = photographs.blur_kernel().numpy()

    def restore(x: np.ndarray, hole: np.ndarray | None, balance: float) -> np.ndarray:
        from skimage.restoration import wiener as deconvolve

        reach = len(kernel)
        padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
        sharp = [deconvolve(channel, kernel, balance, clip=False) for channel in padded]
        return np.stack(sharp)[:, reach:-reach, reach:-reach]

    return Classical(restore, (0.001, 0.01, 0.03, 0.1, 0.3), balance, ("deblurring",))


def biharmonic() -> Classical:
    """The smooth function that meets the rim of the hole (biharmonic equation)."""

    def restore(x: np.ndarray, hole: np.ndarray | None, _: float) -> np.ndarray:
        from skimage.restoration import inpaint_biharmonic

        if hole is None:
            raise Inapplicable("biharmonic fills holes, and there is no mask")
        return inpaint_biharmonic(x, hole, channel_axis=0)

    return Classical(restore)


def gamma(power: float | None = None) -> Classical:
    """The darkening undone by its true gain and a power; ``power`` above 0."""
    _above_0("power", power)

    def restore(x: np.ndarray, hole: np.ndarray | None, power: float) -> np.ndarray:
        return np.clip(x / 0.25, 0, 1) ** power

    return Classical(restore, (0.4, 0.5, 0.67, 0.8, 1.0), power, ("low-light",))


def _above_0(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
        raise InputError(name, value, "a number above 0, or left out for the best on training crops")
