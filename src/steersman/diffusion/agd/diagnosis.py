r"""How much of guidance adapters give, where it counts: at the states that their own sampling visits.

    missed = E |out_{theta, psi}(x_t, t, c, omega) - target|² / E |out_c - target|²
    target = out_u + omega (out_c - out_u)

over the states x_t of sampling *with the adapters*. The conditional network misses all of it (1), guidance none (0). On
the teacher's trajectories the error of adapters that were trained there would be small by construction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steersman.diffusion.agd.injection import _bound
from steersman.diffusion.agd.installing import AGD
from steersman.diffusion.agd.trajectories import _flat, _nested, call, latent_shape
from steersman.diffusion.guidance import network_of
from steersman.errors import InputError


@torch.no_grad()
def missed_guidance(
    pipe: Any,
    agd: AGD,
    conditions: Any,
    *,
    num_inference_steps: int = 20,
    negative_prompt: str | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """The share of guidance's correction that adapters miss along their own trajectories: the module's ``missed``.

    Args:
        pipe: a classic pipeline with an unconditional branch.
        agd: at the scale that is asked about, above 1; on no pipeline, and afterwards, too.
        conditions: prompts or labels, one a sample.
        num_inference_steps: of the pipeline's sampler.
        negative_prompt: of the teacher.
        generator: of the noise.
    """
    if agd.guidance_scale <= 1:
        raise InputError("guidance_scale", agd.guidance_scale, "above 1: there is nothing to miss")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    network, rows = network_of(pipe), len(conditions)
    noise = torch.randn(rows, *latent_shape(pipe), generator=generator)
    first = type(pipe).__name__ == "DiTPipeline"
    halves: list[dict[str, Any]] = []

    def given(module: Any, args: Any, kwargs: Any) -> None:
        found = _bound(module, args, kwargs)
        for conditional in (True, False):
            half = slice(0, rows) if conditional == first else slice(rows, 2 * rows)
            halves.append(_nested(dict(_flat(found, 2 * rows, half))))

    hook = network.register_forward_pre_hook(given, with_kwargs=True)
    try:
        call(pipe, conditions, noise, 1, negative_prompt, generator)
    finally:
        hook.remove()
    seen: list[tuple[Tensor, Any, Tensor]] = []

    def visited(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found = _bound(module, args, kwargs)
        x = found["sample"] if "sample" in found else found["hidden_states"]
        seen.append((x, found["timestep"], output[0] if isinstance(output, tuple) else output.sample))

    with agd.install(pipe):
        hook = network.register_forward_hook(visited, with_kwargs=True)
        try:
            call(pipe, conditions, noise, num_inference_steps, None, generator, guidance_scale=1.0)
        finally:
            hook.remove()
    missed = whole = 0.0
    for x, t, out in seen:
        cond, uncond = (network(x, timestep=t, **_on(half, x), return_dict=False)[0] for half in halves[:2])
        C = min(x.shape[1], out.shape[1])
        target = uncond[:, :C] + agd.guidance_scale * (cond[:, :C] - uncond[:, :C])
        missed += float((out[:, :C] - target).double().square().sum())
        whole += float((cond[:, :C] - target).double().square().sum())
    return missed / whole


def _on(condition: dict[str, Any], x: Tensor) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(item) for name, item in value.items()}
        return value.to(x.device, x.dtype if value.is_floating_point() else None)

    return {name: moved(value) for name, value in condition.items()}
