"""CFG++: the paper's update rules, what they are equal to, stock pipelines, inversion, and inverse problems."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from steersman import catalog
from steersman.diffusion.cfg_pp import (
    CFGPP,
    AveragePool,
    Blur,
    Branches,
    CFGPlusPlus,
    DDIMCFGPPInverseScheduler,
    DDIMCFGPPScheduler,
    DDIMInversion,
    DPMSolver2SAncestral,
    DPMSolver2SAncestralCFGPPScheduler,
    DPMSolverPPCFGPPScheduler,
    EulerAncestralCFGPPScheduler,
    EulerCFGPPScheduler,
    LinearOperator,
    Mask,
    apply,
    edit,
    equivalent_scales,
    guided,
    invert,
    mean_equivalent_scale,
    moves,
    restore,
    sample,
    twin,
)
from steersman.diffusion.classical import DDIM, DDIMScheduler, EulerScheduler, HeunScheduler
from steersman.diffusion.dpm_solver_pp import DPMSolverPP, DPMSolverPPScheduler
from steersman.diffusion.guidance import Moment
from steersman.diffusion.installing import installed, load_steered, save_steered
from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.diffusion.pndm import PNDMScheduler
from steersman.diffusion.scheduler import alphas_cumprod, spaced
from steersman.diffusion.solver import DiscreteVP, Prediction, Step, gaussian, integrate, plan, take
from steersman.diffusion.time_grids import laid_out
from steersman.errors import InputError
from tests.diffusion import tiny
from tests.diffusion.test_guidance import modular, modular_draw  # noqa: F401

TABLE = alphas_cumprod(1000, 0.00085, 0.012, "scaled_linear")
P = DiscreteVP(TABLE)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MU_C, MU_U, S2 = 1.3, -0.4, 0.25
DTYPES = (torch.float32, torch.float64)
SOLVERS = {
    "ddim": CFGPP(DDIM(P)),
    "euler-ancestral": CFGPP(DDIM(P, 1.0)),
    "2s": CFGPP(DPMSolver2SAncestral(P)),
    "2m": CFGPP(DPMSolverPP(P)),
    "2m-mixed": CFGPP(DPMSolverPP(P), "mixed"),
}


def uncond_eps(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x + math.sin(0.01 * t)) + 0.2 * x.mean(-1, keepdim=True)


def cond_eps(x: torch.Tensor, t: float) -> torch.Tensor:
    return uncond_eps(x, t) + 0.5 * torch.cos(x + 0.003 * t)


def ratio(t: float) -> float:
    return P.sigma(t) / P.alpha(t)


def both(scale: float, cond=cond_eps, uncond=uncond_eps, kind: str = "epsilon"):
    """A denoiser whose prediction is guided with ``scale`` and carries the unconditional one."""

    def predict(x, t):
        a, s = P.alpha(t), P.sigma(t)
        c, u = cond(x, t), uncond(x, t)
        plain = Prediction.read(kind, u, x, a, s)
        return Prediction.read(kind, guided(c, u, scale), x, a, s, plain)

    return predict


def alone(eps):
    """A denoiser of one branch."""
    return lambda x, t: Prediction(x, P.alpha(t), P.sigma(t), eps=eps(x, t))


def noise(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


GRID = spaced("leading", 10, 1000)


# ------------------------------------------------------------------ the published rules


def gaussian_D(x: float, r: float, mu: float) -> float:
    """The ideal estimate of x_0 ~ N(mu, s^2) from y = x_0 + r n."""
    return (S2 * x + r * r * mu) / (S2 + r * r)


def published(name: str, y: float, ratios: list[float], scale: float, draws: list[float]) -> float:
    """The paper's updates on scalars y = x / alpha, as its pseudocode has them, for the Gaussian law."""
    old, h_last, n = None, 0.0, iter(draws)
    for r, s in pairwise(ratios):
        D_u = gaussian_D(y, r, MU_U)
        D = D_u + scale * (gaussian_D(y, r, MU_C) - D_u)
        d = (y - D_u) / r
        up = min(s, math.sqrt(s * s * (r * r - s * s) / (r * r)))
        down = math.sqrt(s * s - up * up)
        if s == 0:
            y = D
        elif name == "ddim":
            y = D + s * d
        elif name == "euler-ancestral":
            y = D + down * d + up * next(n)
        elif name == "2s":
            t, t_next = -math.log(r), -math.log(down)
            h = t_next - t
            middle = math.exp(-(t + 0.5 * h))
            y_m = middle / r * y - math.expm1(-0.5 * h) * D_u
            D_u = gaussian_D(y_m, middle, MU_U)
            D = D_u + scale * (gaussian_D(y_m, middle, MU_C) - D_u)
            y = D - math.exp(-h) * D_u + down / r * y + up * next(n)
        else:
            h = math.log(r / s)
            if old is None:
                y = D + s * d
            else:
                difference = (D if name == "2m-mixed" else D_u) - old
                y = D - math.exp(-h) * D_u - math.expm1(-h) * difference / (2 * h_last / h) + math.exp(-h) * y
            old, h_last = D_u, h
    return y


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_each_solver_is_the_published_rule_on_gaussian_data(name, scale):
    times = list(laid_out("karras", P, 12, P.start)) if name.startswith("2m") else GRID
    ratios = [ratio(t) if t >= 0 else 0.0 for t in times]

    def eps(mu):
        return lambda x, t: (x / P.alpha(t) - gaussian_D(x / P.alpha(t), ratio(t), mu)) / ratio(t)

    x = noise(1, 1)
    draws = [float(gaussian(x, rng)) for rng in [generator()] for _ in range(len(times))]
    found = integrate(SOLVERS[name], both(scale, eps(MU_C), eps(MU_U)), x, times, generator()).x
    expected = published(name, float(x) / P.alpha(times[0]), ratios, scale, draws)
    assert float(found) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_at_scale_zero_it_is_the_host_solver_without_condition(name, dtype):
    x = noise(3, 5, dtype=dtype)
    solver = SOLVERS[name]
    ours = integrate(solver, both(0.0), x, GRID, generator())
    theirs = integrate(solver.host, alone(uncond_eps), x, GRID, generator())
    assert torch.equal(ours.x, theirs.x) and ours.calls == theirs.calls


@pytest.mark.parametrize("name", SOLVERS)
def test_equal_branches_leave_nothing_to_scale(name):
    x = noise(3, 5)
    runs = [integrate(SOLVERS[name], both(s, uncond_eps), x, GRID, generator()).x for s in (0.0, 0.3, 1.0)]
    assert (runs[1] - runs[0]).abs().max() <= 1e-6 and (runs[2] - runs[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", SOLVERS)
def test_other_kinds_of_prediction_give_the_same(name, kind):
    def converted(eps):
        def output(x, t):
            a, s, e = P.alpha(t), P.sigma(t), eps(x, t)
            return (e - s * x) / a if kind == "v_prediction" else (x - s * e) / a

        return output

    x = noise(2, 4)
    expected = integrate(SOLVERS[name], both(0.6), x, GRID, generator()).x
    found = integrate(
        SOLVERS[name], both(0.6, converted(cond_eps), converted(uncond_eps), kind), x, GRID, generator()
    ).x
    assert torch.allclose(found, expected, atol=1e-9)


def test_the_last_step_ends_at_the_guided_estimate():
    for solver in SOLVERS.values():
        x = noise(2, 3)
        pred = both(0.6)(x, 0.0)
        step = Step(9, 10, 0.0, -1.0, (0.0,))
        after, _ = solver.stage(0, x, pred, step, solver.init(x), lambda like: torch.full_like(like, 1e6))
        assert torch.equal(after, pred.x0)


@pytest.mark.parametrize("name", ["euler-ancestral", "2s"])
def test_ancestral_noise_has_the_mean_and_variance_of_the_rule(name):
    solver, n = SOLVERS[name], 100_000
    t, s, scale = 501.0, 451.0, 0.6
    (step,) = plan(solver, (t, s))
    x = torch.full((n, 1), 0.7, dtype=torch.float64)
    state, at, rng = solver.init(x), x, generator()
    for k, time in enumerate(step.stages):
        at, state = solver.stage(k, at, both(scale)(at, time), step, state, lambda like: gaussian(like, rng))
    up = ratio(s) * math.sqrt(1 - (ratio(s) / ratio(t)) ** 2)
    down = math.sqrt(ratio(s) ** 2 - up**2)
    calm = CFGPP(DDIM(P) if name == "euler-ancestral" else DPMSolver2SAncestral(P, 0.0))
    y = at / P.alpha(s)
    if name == "euler-ancestral":
        pred = both(scale)(x[:1], t)
        mean = float(pred.x0 + down * pred.uncond.eps)
    else:
        assert step.stages == (t, s)  # the middle of r_t and r_down is r_s
        middle = both(scale)(at[:1], s)  # not used: the mean is that of the run without its noise
        assert middle.x.shape == (1, 1)
        state, point = solver.init(x[:1]), x[:1]
        for k, time in enumerate(step.stages):
            point, state = solver.stage(k, point, both(scale)(point, time), step, state, torch.zeros_like)
        mean = float(point / P.alpha(s))
    assert calm.process is P
    assert abs(float(y.mean()) - mean) < 4 * up / math.sqrt(n)
    assert abs(float(y.var()) - up**2) < 4 * up**2 * math.sqrt(2 / n)


def test_without_noise_euler_ancestral_is_euler():
    x = noise(2, 3)
    a = integrate(CFGPP(DDIM(P, 0.0)), both(0.6), x, GRID, generator(1)).x
    b = integrate(CFGPP(DDIM(P)), both(0.6), x, GRID, generator(2)).x
    assert torch.equal(a, b)


def test_each_row_draws_from_its_own_generator():
    x = noise(3, 2)
    whole = integrate(SOLVERS["2s"], both(0.6), x, GRID, [generator(i) for i in range(3)]).x
    alone_ = integrate(SOLVERS["2s"], both(0.6), x[2:], GRID, [generator(2)]).x
    assert torch.allclose(whole[2:], alone_, atol=1e-12)


# ------------------------------------------------------------------ equivalence with ordinary guidance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("steps", [10, 50])
def test_first_order_is_ordinary_guidance_of_a_scale_for_each_step(dtype, tolerance, steps):
    times = spaced("leading", steps, 1000)
    scales = equivalent_scales(0.6, [ratio(t) for t in times[:-1]] + [0.0])
    by_time = dict(zip(times, scales, strict=False))
    x = noise(2, 4, dtype=dtype)

    def cfg(x, t):
        return Prediction(x, P.alpha(t), P.sigma(t), eps=guided(cond_eps(x, t), uncond_eps(x, t), by_time[t]))

    ours = integrate(CFGPP(DDIM(P)), both(0.6), x, times).x
    theirs = integrate(DDIM(P), cfg, x, times).x
    assert (ours - theirs).abs().max() <= tolerance


def test_flow_matching_is_the_rule_with_its_own_noise():
    """x_next = (1 - s) D_lambda + s n_u, with D = x - sigma v and n_u = x + (1 - sigma) v_u, is Euler with omega_i."""
    sigmas = np.linspace(1.0, 0.0, 9)
    scales = equivalent_scales(0.6, [*(s / (1 - s) if s < 1 else math.inf for s in sigmas)])
    expected = [0.6 * s * (1 - r) / (s - r) for s, r in pairwise(sigmas)]
    assert np.allclose(scales, expected, rtol=1e-13)
    x = y = noise(2, 4)
    for (sigma, after), omega in zip(pairwise(sigmas), scales, strict=True):
        v_c, v_u = cond_eps(x, sigma), uncond_eps(x, sigma)
        D = x - sigma * (v_u + 0.6 * (v_c - v_u))
        x = (1 - after) * D + after * (x + (1 - sigma) * v_u)
        w_c, w_u = cond_eps(y, sigma), uncond_eps(y, sigma)
        y = y + (after - sigma) * (w_u + omega * (w_c - w_u))
    assert (x - y).abs().max() <= 1e-10


def test_the_mean_equivalent_scale_grows_with_the_steps():
    """1.6, 3.0, 7.2 and 14.1 for 10, 20, 50 and 100 steps of Stable Diffusion's schedule, at lambda = 0.6."""
    means = {}
    for n in (10, 20, 50, 100):
        scheduler = DDIMCFGPPScheduler(**SD)
        scheduler.set_timesteps(n)
        means[n] = mean_equivalent_scale(0.6, scheduler)
    assert means == pytest.approx({10: 1.6, 20: 3.0, 50: 7.2, 100: 14.1}, abs=0.06)
    assert 1.9 <= means[100] / means[50] <= 2.1


def slope(errors: dict[int, float]) -> float:
    return -np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]


@pytest.mark.parametrize(
    ("host", "order", "slack"),
    [(DDIM(P), 1, 0.15), (DPMSolverPP(P, lower_order_final=False), 2, 0.25), (DPMSolver2SAncestral(P, 0.0), 2, 0.25)],
)
def test_order_of_convergence_at_scale_zero(host, order, slack):
    """Up to the network's last noise level: the jump from there to 0 has an error of its own."""
    start, end = P.time_at(-2.0), P.time_at(2.0)

    def eps(x, t):
        a, s = P.alpha(t), P.sigma(t)
        return s * (x - a * MU_U) / (a * a * S2 + s * s)

    x = noise(8, 1)

    def spread(t):
        return math.sqrt(P.alpha(t) ** 2 * S2 + P.sigma(t) ** 2)

    exact = P.alpha(end) * MU_U + spread(end) / spread(start) * (x - P.alpha(start) * MU_U)
    errors = {}
    for n in (16, 32, 64, 128, 256):
        times = [start, *(P.time_at(v) for v in np.linspace(-2.0, 2.0, n + 1)[1:-1]), end]
        found = integrate(CFGPP(host), both(0.0, cond_eps, eps), x, times).x
        errors[n] = float((found - exact).abs().max())
    assert slope(errors) == pytest.approx(order, abs=slack)


def test_erratum_a_mixed_history_compares_unlike_things():
    """The second-order term of a step after an unguided one: D_u - D_u,old falls with the step, the other does not."""

    def term(history, n):
        lambdas = np.linspace(0.0, 1.0, n + 1)
        times = [*(P.time_at(v) for v in lambdas[:3]), -1.0]
        first, second = CFGPP(DPMSolverPP(P, order=1)), CFGPP(DPMSolverPP(P, lower_order_final=False), history)
        steps, x = plan(second, times), noise(4, 3)
        x, state = second.stage(0, x, both(0.0)(x, times[0]), steps[0], second.init(x), torch.randn_like)
        pred = both(0.6)(x, times[1])
        with_history, _ = second.stage(0, x, pred, steps[1], state, torch.randn_like)
        without, _ = first.stage(0, x, pred, steps[1], first.init(x), torch.randn_like)
        return float((with_history - without).abs().max()) * n  # the factor -expm1(-h) taken out

    assert term("uncond", 64) < 0.2 * term("uncond", 8)
    assert term("mixed", 512) > 0.9 * term("mixed", 64) > 5 * term("uncond", 64)


# ------------------------------------------------------------------ schedulers

SCHEDULERS = (
    DDIMCFGPPScheduler,
    EulerCFGPPScheduler,
    EulerAncestralCFGPPScheduler,
    DPMSolver2SAncestralCFGPPScheduler,
    DPMSolverPPCFGPPScheduler,
)


def run(scheduler, steps: int, scale: float = 0.6, dtype=torch.float64, x=None):
    """A scheduler through its steps with the two branches above."""
    scheduler.set_timesteps(steps)
    x = noise(3, 4, dtype=dtype) if x is None else x
    rng = generator()
    for t in scheduler.timesteps:
        c, u = cond_eps(x, float(t)), uncond_eps(x, float(t))
        scheduler.uncond_output = u
        x = scheduler.step(guided(c, u, scale), t, x, generator=rng).prev_sample
    return x


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_is_its_solver(kind):
    scheduler = kind(**SD)
    found = run(scheduler, 8)
    times = [*dict.fromkeys(s.step.t for s in scheduler.slots), scheduler.slots[-1].step.s]
    expected = integrate(scheduler._make_solver(), both(0.6), noise(3, 4), times, generator()).x
    assert torch.allclose(found, expected, atol=1e-10)
    assert scheduler.slots[-1].sigma > 0.0 and scheduler._solver.process.final == 1.0


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_without_the_second_output_says_so(kind):
    scheduler = kind(**SD)
    scheduler.set_timesteps(4)
    with pytest.raises(InputError, match="without the condition: install CFGPlusPlus"):
        scheduler.step(noise(1, 2), scheduler.timesteps[0], noise(1, 2))


def test_the_end_is_clean_unless_told_otherwise(tmp_path):
    there = diffusers.DDIMScheduler(set_alpha_to_one=False, **SD).config
    assert DDIMCFGPPScheduler.from_config(there).config.set_alpha_to_one is True
    DDIMCFGPPScheduler.from_config(there, set_alpha_to_one=False).save_pretrained(tmp_path)
    assert DDIMCFGPPScheduler.from_pretrained(tmp_path).config.set_alpha_to_one is False


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_particles_are_reindexed_with_their_state(kind):
    order = torch.tensor([2, 0, 2])
    finals = []
    for when in (None, 3):
        scheduler = kind(**SD, **({"eta": 0.0} if "eta" in kind(**SD).config else {}))
        scheduler.set_timesteps(6)
        x = noise(3, 4) if when is not None else noise(3, 4)[order]
        for i, t in enumerate(scheduler.timesteps):
            if i == when:
                x = x[order]
                scheduler.take(order)
            c, u = cond_eps(x, float(t)), uncond_eps(x, float(t))
            scheduler.uncond_output = u
            x = scheduler.step(guided(c, u, 0.6), t, x).prev_sample
        finals.append(x)
    assert torch.allclose(*finals, atol=1e-12)


def test_a_step_that_is_edited_in_the_middle_goes_on_with_both_outputs():
    """A run that begins within a 2S step goes there by CFG++'s first order, not by plain guidance."""
    scheduler = DPMSolver2SAncestralCFGPPScheduler(**SD, eta=0.0)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(1)
    slot, x = scheduler.slots[1], noise(2, 3)
    c, u = cond_eps(x, slot.t), uncond_eps(x, slot.t)
    scheduler.uncond_output = u
    found = scheduler.step(guided(c, u, 0.6), slot.t, x).prev_sample
    pred = both(0.6)(x, slot.t)
    expected = P.alpha(slot.next) * pred.x0 + P.sigma(slot.next) * pred.uncond.eps
    assert torch.allclose(found, expected, atol=1e-10)


def test_clipping_is_of_the_estimate_and_leaves_the_noise_alone():
    """diffusers' DDIM at lambda = 0: x_0 is clipped, eps is the network's."""
    theirs = diffusers.DDIMScheduler(clip_sample=True, set_alpha_to_one=True, **SD)
    ours = DDIMCFGPPScheduler.from_config(theirs.config)
    theirs.set_timesteps(10)
    x = noise(3, 4, dtype=torch.float64)
    y = x
    for t in theirs.timesteps:
        y = theirs.step(uncond_eps(y, float(t)), t, y).prev_sample
    assert torch.allclose(run(ours, 10, 0.0, x=x), y, atol=1e-5)


@pytest.mark.parametrize(
    "theirs",
    [
        diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **SD),
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **SD),
        diffusers.EulerDiscreteScheduler(**SD),
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SD),
        diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **SD),
        diffusers.EulerAncestralDiscreteScheduler(**SD),
        diffusers.DPMSolverMultistepScheduler(**SD),
        diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing", **SD),
        diffusers.DPMSolverMultistepScheduler(solver_order=1, algorithm_type="dpmsolver++", **SD),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.config.get('timestep_spacing')}",
)
def test_the_twin_of_a_diffusers_scheduler_is_it_at_scale_zero(theirs):
    """On the same levels, from the same noise, both without condition."""
    ours = twin(theirs)
    theirs.set_timesteps(10)
    x = noise(3, 4, dtype=torch.float64)
    found = run(ours, 10, 0.0, x=x)
    start = 1.0 if theirs.init_noise_sigma == 1.0 else math.sqrt(float(theirs.sigmas[0]) ** 2 + 1)
    y, rng = x * start, generator()
    for t in theirs.timesteps:
        out = uncond_eps(theirs.scale_model_input(y, t), float(t))
        extra = {"generator": rng} if "Ancestral" in type(theirs).__name__ else {}
        y = theirs.step(out, t, y, **extra).prev_sample
    assert torch.allclose(found, y, atol=2e-3 if "Euler" in type(theirs).__name__ else 2e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(),
        HeunScheduler(),
        DPMSolverPPScheduler(order=3),
        DPMSolverPPScheduler(method="singlestep"),
        DPMSolverPPScheduler(algorithm_type="sde-dpmsolver++"),
        DPMSolverPPScheduler(solver_type="heun"),
        diffusers.PNDMScheduler(),
        diffusers.UniPCMultistepScheduler(),
        diffusers.HeunDiscreteScheduler(),
        diffusers.DPMSolverSinglestepScheduler(),
        diffusers.DPMSolverMultistepScheduler(solver_order=3),
        diffusers.LCMScheduler(),
        diffusers.FlowMatchHeunDiscreteScheduler(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_solver_without_a_rule_is_refused_and_those_with_one_named(scheduler):
    with pytest.raises(InputError, match="one with a CFG\\+\\+ rule: DDIM, Euler, Euler ancestral, DPM-Solver"):
        twin(scheduler)
    with pytest.raises(InputError, match="CFG\\+\\+ rule"):
        CFGPlusPlus().bind(scheduler)


def test_settings_that_twins_can_not_have_are_refused():
    with pytest.raises(InputError, match=r"sigma_max=3\.0 is not allowed: it must be None"):
        twin(diffusers.EulerDiscreteScheduler(sigma_max=3.0))
    with pytest.raises(InputError, match="order=3 is not allowed: it must be 1 or 2"):
        DPMSolverPPCFGPPScheduler(order=3)
    with pytest.raises(InputError, match="history='old' is not allowed"):
        CFGPlusPlus(history="old")
    with pytest.raises(InputError, match="only DPM-Solver"):
        CFGPP(DDIM(P), "mixed")
    with pytest.raises(InputError, match=r"eta=1\.5 is not allowed"):
        DPMSolver2SAncestralCFGPPScheduler(eta=1.5)
    with pytest.raises(InputError, match="did you mean 'karras'"):
        EulerCFGPPScheduler(grid="karas")
    with pytest.raises(InputError, match="prediction_type"):
        twin(diffusers.DDIMScheduler(prediction_type="flow"))


# ------------------------------------------------------------------ pipelines


def digits_like() -> ClassConditionalPipeline:
    pipe = tiny.unconditional(num_class_embeds=4)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SD)
    made = ClassConditionalPipeline(pipe.unet, scheduler, null_label=3)
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe, **more):
    latents = noise(2, 1, 8, 8, dtype=torch.float32)
    arguments = {"labels": [0, 2], "guidance_scale": 3.0, "latents": latents, "num_inference_steps": 6}
    return pipe(**arguments | more, output_type="latent", generator=generator()).images


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SD),
        diffusers.EulerDiscreteScheduler(**SD),
        diffusers.EulerAncestralDiscreteScheduler(**SD),
        diffusers.DPMSolverMultistepScheduler(**SD),
        DDIMScheduler(**SD),
        EulerScheduler(**SD),
        DPMSolverPPScheduler(**SD),
        DPMSolverPPScheduler(order=1, grid="logsnr", **SD),
        DPMSolver2SAncestralCFGPPScheduler(**SD),
    ],
    ids=lambda s: type(s).__name__,
)
def test_installed_it_is_the_solver_on_the_networks_two_outputs(scheduler):
    pipe = digits_like()
    pipe.scheduler = scheduler
    with CFGPlusPlus(0.6).install(pipe):
        assert pipe.scheduler is not scheduler or isinstance(scheduler, DPMSolver2SAncestralCFGPPScheduler)
        found = drawn(pipe)
        assert torch.equal(found, drawn(pipe, guidance_scale=1.5))  # whatever the pipeline's own scale
        solver = pipe.scheduler._make_solver()
        times = [*dict.fromkeys(s.step.t for s in pipe.scheduler.slots), -1.0]
    assert pipe.scheduler is scheduler
    p = solver.process

    @torch.no_grad()
    def denoise(x, t):
        out = pipe.unet(torch.cat([x, x]), torch.tensor(t), class_labels=torch.tensor([3, 3, 0, 2])).sample
        u, c = out.chunk(2)
        plain = Prediction(x, p.alpha(t), p.sigma(t), eps=u)
        return Prediction(x, p.alpha(t), p.sigma(t), eps=guided(c, u, 0.6), uncond=plain)

    expected = integrate(solver, denoise, noise(2, 1, 8, 8, dtype=torch.float32), times, generator()).x
    assert torch.allclose(found, expected, atol=1e-4)


def test_stable_diffusion_through_the_twin_and_by_a_scale_for_each_step():
    """Both ways to CFG++ in a stock pipeline: a scheduler of both outputs, and ordinary guidance with omega_i."""
    pipe = tiny.stable_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    latents = noise(1, 4, 8, 8, dtype=torch.float32)
    asked = {
        **tiny.EMBEDS,
        "latents": latents,
        "num_inference_steps": 5,
        "output_type": "latent",
        "guidance_scale": 7.5,
    }
    method = CFGPlusPlus(0.6)
    with method.install(pipe):
        found = pipe(**asked).images
        pipe.scheduler = DDIMScheduler.from_config(method._own.config)  # by the user, while it is installed
        by_scales = pipe(**asked).images
        assigned = pipe.scheduler
    assert pipe.scheduler is assigned  # what the user has assigned stays
    assert (found - by_scales).abs().max() <= 1e-5
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(
        InputError, match=r"scheduler='PNDMScheduler' is not allowed: it must be one with a CFG\+\+ rule"
    ):
        CFGPlusPlus().install(pipe)
    with CFGPlusPlus().install(tiny.sdxl()) as method:
        xl = method._pipe(**tiny.XL_EMBEDS, height=16, width=16, num_inference_steps=2, output_type="latent").images
    assert bool(xl.isfinite().all())


def test_at_scale_one_both_branches_are_still_evaluated():
    """Distilled models: the estimate is the conditional one, the noise is not."""
    pipe, rows = digits_like(), []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    with CFGPlusPlus(1.0).install(pipe):
        guided_one = drawn(pipe)
    hook.remove()
    assert rows == [4] * 6
    assert not torch.allclose(guided_one, drawn(pipe, guidance_scale=1.0), atol=1e-3)
    guider = CFGPlusPlus(1.0).bind(diffusers.EulerDiscreteScheduler(**SD))
    guider._scheduler.set_timesteps(4)
    for i, t in enumerate(guider._scheduler.timesteps):
        guider.set_state(i, 4, t)
        assert guider.num_conditions == 2


def test_reference_steps_keep_the_mean_scale():
    scheduler = DDIMCFGPPScheduler(**SD)
    scheduler.set_timesteps(10)
    method = CFGPlusPlus(0.6, reference_steps=50)
    method.begin(Moment(0, 10, 901.0, None, scheduler))
    assert method._effective == pytest.approx(2.7, abs=0.05)
    assert mean_equivalent_scale(method._effective, scheduler) == pytest.approx(7.2, abs=0.06)
    plain = CFGPlusPlus(0.6)
    plain.begin(Moment(0, 10, 901.0, None, scheduler))
    assert plain._effective == 0.6


def flow_pipeline() -> diffusers.StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny._vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_flow_matching_pipeline_follows_the_flow_rule():
    pipe = flow_pipeline()
    latents = noise(1, 4, 8, 8, dtype=torch.float32)
    with CFGPlusPlus(0.6).install(pipe):
        assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
        found = pipe(
            **tiny.XL_EMBEDS,
            latents=latents,
            num_inference_steps=5,
            output_type="latent",
            guidance_scale=4.0,
        ).images
    x, e = latents, tiny.XL_EMBEDS
    hidden = torch.cat([e["negative_prompt_embeds"], e["prompt_embeds"]])
    pooled = torch.cat([e["negative_pooled_prompt_embeds"], e["pooled_prompt_embeds"]])
    for sigma, after in pairwise(pipe.scheduler.sigmas):
        with torch.no_grad():
            out = pipe.transformer(
                hidden_states=torch.cat([x, x]),
                timestep=(sigma * 1000).expand(2),
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
            ).sample
        v_u, v_c = out.chunk(2)
        D, n_u = x - sigma * (v_u + 0.6 * (v_c - v_u)), x + (1 - sigma) * v_u
        x = (1 - after) * D + after * n_u
    assert torch.allclose(found, x, atol=1e-5)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(InputError, match="flow-matching Euler"):
        CFGPlusPlus().install(pipe)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(InputError, match="reference_steps=50 is not allowed: it must be None"):
        CFGPlusPlus(reference_steps=50).install(pipe)


@pytest.mark.parametrize("kind", ["ours", "euler", "ddim"])
def test_as_a_modular_guider(kind, tmp_path):
    """The loop of modular pipelines: set_state, two calls, forward, step; saved and loaded in between."""
    scheduler = {
        "ours": DPMSolverPPCFGPPScheduler(**SD),
        "euler": diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD),
        "ddim": diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **SD),
    }[kind]
    CFGPlusPlus(0.4).save_pretrained(tmp_path)
    guider = CFGPlusPlus.from_pretrained(tmp_path)
    assert guider.scale == 0.4
    guider.bind(scheduler)
    scheduler.set_timesteps(8)
    start = noise(2, 4, dtype=torch.float32)
    x = start * (math.sqrt(float(scheduler.sigmas[0]) ** 2 + 1) if kind == "euler" else 1.0)
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(i, 8, t)
        z = scheduler.scale_model_input(x, t)
        pred = guider.forward(cond_eps(z, float(t)), uncond_eps(z, float(t))).pred
        x = scheduler.step(pred, t, x).prev_sample
    assert torch.allclose(x, run(twin(scheduler), 8, 0.4, torch.float32, start), atol=1e-4)


def test_a_guider_that_knows_no_scheduler_says_so():
    with pytest.raises(InputError, match=r"guider.bind\(pipe.scheduler\)"):
        CFGPlusPlus().set_state(0, 4, torch.tensor(999))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (7.5, "is this a CFG scale"),
        (-0.1, "a number from 0 to 1"),
        (math.nan, "a number from 0 to 1"),
        (True, "a number from 0 to 1"),
        ("0.6", "a number from 0 to 1"),
    ],
)
def test_a_scale_outside_its_range_is_refused(scale, message):
    with pytest.raises(InputError, match=message):
        CFGPlusPlus(scale)
    if scale in (7.5, -0.1):
        assert CFGPlusPlus(scale, allow_extrapolation=True).scale == scale


def test_pipelines_without_two_branches_are_refused():
    pipe = digits_like()
    with CFGPlusPlus().install(pipe), pytest.raises(InputError, match=r"guidance_scale=1\.0 is not allowed"):
        drawn(pipe, guidance_scale=1.0)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    with pytest.raises(InputError, match="reference_steps=0 is not allowed"):
        CFGPlusPlus(reference_steps=0)


class GaussianNetwork(diffusers.ModelMixin, diffusers.ConfigMixin):
    """The ideal noise estimate for N(mu_label, s^2) in each pixel, with the interface of a class-conditional U-Net."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, sample_size=4, in_channels=1, out_channels=1, num_class_embeds=2):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, class_labels=None, return_dict=True):
        a, s = P.alpha(float(t)), P.sigma(float(t))
        mu = torch.tensor([MU_C, MU_U], dtype=x.dtype)[class_labels][:, None, None, None]
        out = s * (x - a * mu) / (a * a * S2 + s * s)
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=out) if return_dict else (out,)


def gaussian_pipeline() -> ClassConditionalPipeline:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **SD)
    pipe = ClassConditionalPipeline(GaussianNetwork(), scheduler, null_label=1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------ inversion and editing


def upward(solver, denoiser, x, times):
    """The inversion of sampling's plan."""
    for step in reversed(plan(solver, times)):
        x, _ = solver.stage(0, x, denoiser(x, step.t), step, (), torch.randn_like)
    return x


@pytest.mark.parametrize("mode", ["cfg++", "cfg"])
def test_sampling_undoes_inversion_where_the_noise_depends_on_time_alone(mode):
    fixed = {t: (noise(2, 3, seed=int(t)), noise(2, 3, seed=int(t) + 1)) for t in GRID[:-1]}
    pair = {"cond": lambda x, t: fixed[t][0], "uncond": lambda x, t: fixed[t][1]}

    def denoise(x, t):
        pred = both(0.6 if mode == "cfg++" else 3.0, **pair)(x, t)
        return pred if mode == "cfg++" else Prediction(x, pred.alpha, pred.sigma, eps=pred.eps)

    x = noise(2, 3, seed=99)
    z = upward(DDIMInversion(P), denoise, x, GRID)
    back = integrate(CFGPP(DDIM(P)) if mode == "cfg++" else DDIM(P), denoise, z, GRID).x
    assert (back - x).abs().max() <= 1e-10
    assert (z - x).abs().max() > 0.5


def test_inversion_is_ordinary_inversion_with_a_scale_for_each_step():
    scales = dict(zip(GRID, equivalent_scales(0.6, [ratio(t) for t in GRID[:-1]] + [0.0]), strict=False))

    def cfg(x, t):
        return Prediction(x, P.alpha(t), P.sigma(t), eps=guided(cond_eps(x, t), uncond_eps(x, t), scales[t]))

    x = noise(2, 3)
    assert (upward(DDIMInversion(P), both(0.6), x, GRID) - upward(DDIMInversion(P), cfg, x, GRID)).abs().max() <= 1e-10


def test_one_step_of_inversion_is_the_rule():
    t, s, x = GRID[3], GRID[4], noise(2, 3)
    e_u, e = uncond_eps(x, t), guided(cond_eps(x, t), uncond_eps(x, t), 0.6)
    clean = (x - P.sigma(s) * e_u) / P.alpha(s)
    after, _ = DDIMInversion(P).stage(0, x, both(0.6)(x, t), Step(3, 10, t, s, (t,)), (), torch.randn_like)
    assert torch.allclose(after, P.alpha(t) * clean + P.sigma(t) * e, atol=1e-12)


def test_the_inverse_scheduler_rises_over_the_times_of_sampling():
    up, down = (
        kind.from_config(diffusers.DDIMScheduler(**SD).config)
        for kind in (DDIMCFGPPInverseScheduler, DDIMCFGPPScheduler)
    )
    up.set_timesteps(7)
    down.set_timesteps(7)
    assert up.timesteps.tolist() == down.timesteps.tolist()[::-1]
    x = y = noise(2, 3)
    for t in up.timesteps:
        c, u = cond_eps(x, float(t)), uncond_eps(x, float(t))
        up.uncond_output = u
        x = up.step(guided(c, u, 0.6), t, x).prev_sample
    times = [*down.timesteps.double().tolist(), -1.0]
    assert torch.allclose(x, upward(DDIMInversion(P), both(0.6), y, times), atol=1e-12)


@pytest.mark.parametrize("mode", ["cfg++", "cfg", "npi"])
def test_images_come_back_from_their_inversion(mode):
    """The better the more steps there are, with the ideal network of Gaussian data."""
    pipe, errors = gaussian_pipeline(), []
    images = MU_C + math.sqrt(S2) * noise(2, 1, 4, 4, seed=5)
    for steps in (20, 160):
        scale = {"cfg++": 2.0 / steps, "cfg": 2.0, "npi": None}[mode]  # one strength at both numbers of steps
        asked = {"mode": mode, "scale": scale, "num_inference_steps": steps, "labels": 0}
        z = invert(pipe, images, **asked)
        errors.append(float((sample(pipe, z, **asked) - images).abs().mean()))
    assert errors[1] < 0.5 * errors[0] and errors[0] < 0.5
    assert type(pipe.scheduler) is diffusers.DDIMScheduler and not getattr(pipe, "_steersman_installed", [])


def test_editing_is_inversion_and_sampling_with_another_condition():
    pipe = digits_like()
    images = noise(2, 1, 8, 8, dtype=torch.float32, seed=5).clamp(-1, 1)
    found = edit(pipe, images, {"labels": 0}, {"labels": 2}, num_inference_steps=6)
    z = invert(pipe, images, labels=0, num_inference_steps=6)
    assert torch.equal(found, sample(pipe, z, labels=2, num_inference_steps=6))
    assert not torch.allclose(found, sample(pipe, z, labels=0, num_inference_steps=6), atol=1e-3)


def test_inversion_refuses_what_it_can_not_do():
    pipe = digits_like()
    images = torch.zeros(1, 1, 8, 8)
    for settings, message in (
        ({"mode": "null"}, "mode='null' is not allowed: it must be one of cfg, cfg"),
        ({"scale": 7.5}, "is this a CFG scale"),
        ({"mode": "npi", "scale": 3.0}, "scale=3.0 is not allowed: it must be left out"),
        ({"mode": "cfg", "scale": 0.5}, "a number from 1"),
    ):
        with pytest.raises(InputError, match=message):
            invert(pipe, images, labels=0, **settings)
    for bad, message in (
        (torch.zeros(1, 3, 8, 8), "of the network's size"),
        (torch.full((1, 1, 8, 8), math.nan), "finite"),
        ([1, 2], "numbers of shape"),
    ):
        with pytest.raises(InputError, match=message):
            invert(pipe, bad, labels=0)
    with CFGPlusPlus().install(pipe), pytest.raises(InputError, match="without installed methods"):
        invert(pipe, images, labels=0)
    for call in (lambda p: invert(p, images), lambda p: restore(p, images, AveragePool(2))):
        with pytest.raises(InputError, match=r"StableDiffusion3Pipeline' .* a pipeline with a unet"):
            call(flow_pipeline())


# ------------------------------------------------------------------ inverse problems

OPERATORS = {
    "super-resolution": AveragePool(2),
    "gaussian": Blur.gaussian(5, 1.2),
    "motion": Blur.motion(5, 30.0),
    "inpainting": Mask((torch.arange(64).reshape(8, 8) % 3 > 0).double()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_linear_and_know_their_transpose(name):
    A = OPERATORS[name]
    a, b = noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    assert torch.allclose(A(2 * a - 3 * b), 2 * A(a) - 3 * A(b), atol=1e-12)
    y = noise(*A(a).shape, seed=2)
    left, right = (A(a) * y).sum(), (a * A.transpose(y, a.shape)).sum()
    assert float(left) == pytest.approx(float(right), abs=1e-10)
    one = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    if name != "inpainting":
        assert torch.allclose(A(one), torch.ones_like(A(one)), atol=1e-12)  # what is even stays so


def test_what_operators_do():
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(AveragePool(2)(x)[0, 0, 0], torch.tensor([4.5, 6.5, 8.5, 10.5]))
    assert torch.equal(Mask(torch.eye(8))(x)[0, 0].diag(), x[0, 0].diag())
    along = Blur.motion(5, 0.0).kernel
    assert float(along[2].sum()) == pytest.approx(1.0) and float(along[0].abs().sum()) == 0.0
    assert torch.allclose(Blur.motion(5, 90.0).kernel, along.T, atol=1e-12)
    bell = Blur.gaussian(5, 1.0).kernel
    assert float(bell[2, 3] / bell[2, 2]) == pytest.approx(math.exp(-0.5))


def test_without_step_sizes_restoring_is_sampling():
    pipe = digits_like()
    latents = noise(2, 1, 8, 8, dtype=torch.float32)
    y = AveragePool(2)(torch.zeros(2, 1, 8, 8))
    found = restore(pipe, y, AveragePool(2), eta=0.0, gamma=0.0, num_inference_steps=6, latents=latents, labels=[0, 2])
    pipe.scheduler = DDIMCFGPPScheduler.from_config(pipe.scheduler.config)
    with CFGPlusPlus(0.6).install(pipe):
        assert torch.equal(found, drawn(pipe))
    latent = tiny.stable_diffusion()
    start = noise(1, 4, 8, 8, dtype=torch.float32)
    pixels = {"num_inference_steps": 3, "latents": start, **tiny.EMBEDS}
    y = torch.zeros(1, 3, 8, 8)
    found = restore(latent, y, AveragePool(2), eta=0.0, gamma=0.0, **pixels)
    latent.scheduler = DDIMCFGPPScheduler.from_config(latent.scheduler.config)
    with CFGPlusPlus(0.6).install(latent):
        z = latent(**pixels, output_type="latent", guidance_scale=2.0).images
    with torch.no_grad():
        assert torch.equal(found, latent.vae.decode(z / latent.vae.config.scaling_factor).sample)


def test_a_restoring_chain_is_its_closed_form_on_gaussian_data():
    """grad_z ||r|| = -J^T A^T r / ||r||, with r = y - A x_0 and J the scalar d x_0 / d z of the ideal network."""
    pipe, A, eta = gaussian_pipeline(), AveragePool(2), 0.3
    y, x = noise(2, 1, 2, 2, seed=3), noise(2, 1, 4, 4)
    found = restore(pipe, y, A, eta=eta, num_inference_steps=10, latents=x, labels=0)
    for t, s in pairwise(GRID):
        a, sig = P.alpha(t), P.sigma(t)
        v = a * a * S2 + sig * sig
        e_u, e_c = sig * (x - a * MU_U) / v, sig * (x - a * MU_C) / v
        x_0 = (x - sig * (e_u + 0.6 * (e_c - e_u))) / a
        J = (1 - sig * sig / v) / a
        r = y - A(x_0)
        grad = -J * A.transpose(r, x.shape) / r.flatten(1).norm(dim=1)[:, None, None, None]
        x = P.alpha(s) * x_0 + P.sigma(s) * e_u - eta * grad
    assert torch.allclose(found, x, atol=1e-10)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_residual_falls_along_the_chain(name):
    pipe, A = gaussian_pipeline(), OPERATORS[name] if name != "inpainting" else Mask(torch.eye(4).double())
    if isinstance(A, Blur):
        A = Blur(A.kernel[1:-1, 1:-1] / A.kernel[1:-1, 1:-1].sum())
    truth = MU_C + math.sqrt(S2) * noise(8, 1, 4, 4, seed=4)
    y, x = A(truth), noise(8, 1, 4, 4)
    settings = {"scale": 0.1, "num_inference_steps": 50, "latents": x, "labels": 0}
    ends = [restore(pipe, y, A, eta=eta, **settings) for eta in (0.0, 0.5)]
    without, with_ = (float((y - A(end)).flatten(1).norm(dim=1).mean()) for end in ends)
    assert with_ < 0.75 * without


def test_restoring_latents_goes_through_both_terms():
    pipe = tiny.stable_diffusion()
    A, start = AveragePool(2), noise(1, 4, 8, 8, dtype=torch.float32)
    y = torch.zeros(1, 3, 4, 4)
    with torch.no_grad():
        y = A(pipe.vae.decode(noise(1, 4, 8, 8, dtype=torch.float32, seed=8)).sample)
    settings = {"num_inference_steps": 4, "latents": start, **tiny.EMBEDS}
    ends = {
        (eta, gamma): restore(pipe, y, A, eta=eta, gamma=gamma, **settings)
        for eta, gamma in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5))
    }
    for key in ((0.5, 0.0), (0.0, 0.5)):
        assert not torch.allclose(ends[key], ends[0.0, 0.0], atol=1e-4)
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_restoring_refuses_what_it_can_not_do():
    pipe = digits_like()
    y = torch.zeros(1, 1, 4, 4)
    for settings, message in (
        ({"mode": "npi"}, "mode='npi' is not allowed: it must be cfg"),
        ({"eta": -1.0}, "eta=-1.0 is not allowed"),
        ({"gamma": math.inf}, "gamma=inf is not allowed"),
        ({"scale": 7.5}, "is this a CFG scale"),
    ):
        with pytest.raises(InputError, match=message):
            restore(pipe, y, AveragePool(2), labels=0, **settings)
    with pytest.raises(InputError, match="of the shape that the operator makes of images"):
        restore(pipe, torch.zeros(1, 1, 3, 3), AveragePool(2), labels=0, num_inference_steps=2)
    for make, message in (
        (lambda: AveragePool(1), "factor=1 is not allowed"),
        (lambda: AveragePool(3)(torch.zeros(1, 1, 8, 8)), "multiples of factor=3"),
        (lambda: Blur(torch.zeros(2, 2)), "square, with an odd side"),
        (lambda: Blur.gaussian(4), "size=4 is not allowed"),
        (lambda: Blur.gaussian(5, 0.0), "sigma=0.0 is not allowed"),
        (lambda: Blur.gaussian(17)(torch.zeros(1, 1, 8, 8)), "sides above 8"),
        (lambda: Mask(torch.full((2, 2), 0.5)), "zeros \\(lost\\) and ones"),
        (lambda: Mask(torch.ones(3, 3))(torch.zeros(1, 1, 8, 8)), "images that the mask"),
        (lambda: AveragePool(2)(torch.zeros(8, 8)), "images of shape"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_the_networks_branches_are_those_the_pipeline_asks_for():
    pipe = digits_like()
    branches = Branches(pipe, 2, labels=[0, 2])
    x, t = noise(2, 1, 8, 8, dtype=torch.float32), torch.tensor(500)
    with torch.no_grad():
        cond, uncond = branches(x, t)
        assert torch.allclose(cond, pipe.unet(x, t, class_labels=torch.tensor([0, 2])).sample, atol=1e-6)
        assert torch.allclose(uncond, pipe.unet(x, t, class_labels=torch.tensor([3, 3])).sample, atol=1e-6)
    assert isinstance(AveragePool(2), LinearOperator)


# ------------------------------------------------------------------ with other methods


def test_over_dpm_solver_pp_in_scenes_with_particles_reindexed_in_the_middle():
    """CFG++ over DPM-Solver++(2M) in a text-to-image pipeline; its history follows the particles."""
    from steersman.reference import scenes

    pipe = scenes.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverPPScheduler.from_config(pipe.scheduler.config)
    captions = ["a small red circle in the center on a white background"] * 3
    latents = noise(3, 4, 16, 16, dtype=torch.float32)[:, : pipe.unet.config.in_channels]
    asked = {"latents": latents, "num_inference_steps": 6, "output_type": "latent", "guidance_scale": 2.0}
    order = torch.tensor([2, 0, 2])

    def swap(pipe, i, t, tensors):
        if i == 2:
            pipe.scheduler.take(order)
            return {"latents": tensors["latents"][order]}
        return {}

    with CFGPlusPlus(0.6).install(pipe):
        assert isinstance(pipe.scheduler, DPMSolverPPCFGPPScheduler) and pipe.scheduler.config.order == 2
        plain = pipe(captions, **asked).images
        swapped = pipe(captions, **asked, callback_on_step_end=swap).images
    assert torch.allclose(swapped, plain[order], atol=1e-4)
    assert isinstance(pipe.scheduler, DPMSolverPPScheduler)


def test_states_are_reindexed_at_every_call():
    solver = SOLVERS["2m"]
    x, order = noise(3, 4), torch.tensor([1, 1, 0])
    steps = plan(solver, GRID)
    state, moved, at = solver.init(x), None, x
    for i, step in enumerate(steps):
        if i == 4:
            moved = (at[order], take(state, order))
        at, state = solver.stage(0, at, both(0.6)(at, step.t), step, state, torch.randn_like)
        if moved is not None:
            y, own = moved
            moved = solver.stage(0, y, both(0.6)(y, step.t), step, own, torch.randn_like)
    assert torch.allclose(moved[0], at[order], atol=1e-12)


# ------------------------------------------------------------------ errata of the authors' code


def test_erratum_the_karras_grid_ends_at_the_lowest_level():
    scheduler = EulerCFGPPScheduler(grid="karras", **SD)
    scheduler.set_timesteps(10)
    assert scheduler.slots[-1].t == 0.0
    roots = [(s.sigma / s.alpha) ** (1 / 7) for s in scheduler.slots]
    assert np.allclose(np.diff(roots), np.diff(roots)[0], atol=1e-9)
    theirs = (roots[0] + np.arange(10) / 10 * (roots[-1] - roots[0])) ** 7
    assert theirs[-1] > 2 * ratio(0.0)


def test_erratum_levels_are_those_of_the_timestep():
    for scheduler in (DDIMCFGPPScheduler(**SD), EulerCFGPPScheduler(grid="karras", **SD)):
        scheduler.set_timesteps(10)
        for t, slot in zip(scheduler.timesteps.tolist(), scheduler.slots, strict=True):
            assert slot.alpha == pytest.approx(P.alpha(t), abs=1e-6)
            if t == int(t) > 0:
                assert abs(slot.alpha - P.alpha(t - 1)) > 1e-5  # the level that a table shifted by one gives


# ------------------------------------------------------------------ apply, saving


def test_saved_with_a_pipeline_and_loaded(tmp_path):
    pipe = digits_like()
    expected = None
    with CFGPlusPlus(0.4, reference_steps=20).install(pipe):
        expected = drawn(pipe)
        save_steered(pipe, tmp_path)
        assert torch.equal(drawn(pipe), expected)
    again = load_steered(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again), expected)
    (method,) = installed(again)
    assert method.reference_steps == 20
    method.uninstall()
    assert type(again.scheduler) is diffusers.DDIMScheduler


def test_a_pipeline_with_its_scheduler_is_saved_and_loaded(tmp_path):
    pipe = digits_like()
    pipe.scheduler = DPMSolverPPCFGPPScheduler.from_config(pipe.scheduler.config, history="mixed")
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is DPMSolverPPCFGPPScheduler and again.scheduler.config.history == "mixed"


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder, and an array of images."""
    digits_like().save_pretrained(tmp_path / "pipe")
    np.save(tmp_path / "images.npy", torch.rand(3, 8, 8, generator=generator()).numpy())
    return tmp_path


def test_apply_edits_inverts_and_restores(folder):
    (folder / "labels.txt").write_text("0\n1\n2\n")
    shared = {"seed": 0, "steps": 3, "log": lambda line: None}
    facts = {}
    for mode, more in (
        ("edit", {"source": "0", "target": "2"}),
        ("invert", {"source": str(folder / "labels.txt")}),
        ("restore", {"source": "1", "degrade": True, "operator": "motion-blur"}),
    ):
        out = folder / mode
        out.mkdir()
        facts[mode] = apply(folder / "pipe", folder / "images.npy", out, mode=mode, **shared, **more)
        assert len(list((out / "images").glob("*.png"))) == facts[mode]["images"] == 3
        assert CFGPlusPlus.from_pretrained(out).scale == 0.6
    assert "psnr" in facts["invert"] and "psnr" in facts["restore"] and "psnr" not in facts["edit"]
    assert load_file(folder / "invert" / "latents.safetensors")["latents"].shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mode": "edit", "source": "0"},
            "target=None is not allowed: it must be a class's number.* what they shall show",
        ),
        ({"mode": "edit", "source": "9", "target": "1"}, "source='9' is not allowed: it must be a class from 0 to 2"),
        ({"mode": "invert", "source": "nowhere.txt"}, "a file that can be read"),
        ({"mode": "invert", "source": "nowhere.jsonl"}, r"source='nowhere.jsonl' .* can be read"),
        ({"mode": "restore", "source": "0", "operator": "inpainting"}, "mask=None is not allowed"),
        ({"mode": "restore", "source": "0", "operator": "inpainting", "mask": "none.png"}, "mask='none.png'"),
        ({"mode": "edit", "source": "0", "target": "1", "size": 0}, "size=0 is not allowed"),
    ],
)
def test_apply_refuses_what_it_can_not_do(folder, settings, message):
    (folder / "out").mkdir()
    with pytest.raises(InputError, match=message):
        apply(folder / "pipe", folder / "images.npy", folder / "out", steps=2, **settings)


def test_the_cards_example_runs():
    text = catalog.card("cfg-pp").text.partition("## Use\n")[2]
    found: dict = {}
    exec(text.partition("```python\n")[2].partition("```")[0], found)
    assert found["edited"].shape == found["restored"].shape == (2, 1, 8, 8)


# ------------------------------------------------------------------ hosts at their edges


def test_in_a_modular_pipeline(modular):  # noqa: F811
    """Euler with the scale of each step, and the CFG++ scheduler of Euler: one result."""
    guider = CFGPlusPlus(0.6).bind(modular.scheduler)
    modular.update_components(guider=guider)
    by_scales = modular_draw(modular)
    own = modular.scheduler
    modular.update_components(scheduler=EulerCFGPPScheduler.from_config(own.config))
    guider.bind(modular.scheduler)
    found = modular_draw(modular)
    modular.update_components(scheduler=own)
    assert torch.allclose(found, by_scales, atol=1e-3) and bool(found.abs().max() > 0.1)


@pytest.mark.parametrize("kind", [DDIMCFGPPScheduler, DPMSolver2SAncestralCFGPPScheduler, DPMSolverPPCFGPPScheduler])
def test_image_to_image(kind):
    """A run that begins late, for 2S in the middle of a step."""
    source = tiny.stable_diffusion()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**source.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    image = torch.rand(1, 3, 16, 16, generator=generator())
    asked = {"image": image, "num_inference_steps": 6, "output_type": "latent", **tiny.EMBEDS}
    ends = []
    with CFGPlusPlus(0.6).install(pipe):
        for strength in (0.4, 0.5):
            ends.append(pipe(**asked, strength=strength, guidance_scale=2.0, generator=generator()).images)
    assert all(bool(end.isfinite().all()) for end in ends) and not torch.equal(*ends)


def test_a_start_without_signal():
    """v-prediction with zero terminal SNR: the first step is taken in x, where r is infinite."""
    for kind in (DDIMCFGPPScheduler, DPMSolverPPCFGPPScheduler, DPMSolver2SAncestralCFGPPScheduler):
        settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        scheduler = kind(**SD, **settings)
        scheduler.set_timesteps(6)
        t, x = scheduler.timesteps[0], noise(2, 3)
        slot = scheduler.slots[0]
        assert slot.alpha == 0.0
        v_c, v_u = cond_eps(x, float(t)), uncond_eps(x, float(t))
        scheduler.uncond_output = v_u
        after = scheduler.step(guided(v_c, v_u, 0.6), t, x, generator=generator()).prev_sample
        process = scheduler._solver.process
        a, s = process.alpha(slot.step.s), process.sigma(slot.step.s)
        mean = -a * guided(v_c, v_u, 0.6)  # x_0 = -v where alpha = 0, and eps = x
        if kind is not DPMSolver2SAncestralCFGPPScheduler:
            assert torch.allclose(after, mean + s * x, atol=1e-10)
        assert bool(after.isfinite().all())
    ddim = diffusers.DDIMScheduler(clip_sample=False, **SD, **settings)
    ddim.set_timesteps(5)
    assert equivalent_scales(0.6, (math.inf, 1.0)) == [0.6]
    assert moves(ddim)[0].start == math.inf


def test_in_half_precision_estimates_are_mixed_in_float32():
    c, u = noise(1, 4, dtype=torch.float16), noise(1, 4, dtype=torch.float16, seed=1)
    assert guided(c, u, 0.6).dtype == torch.float16
    assert torch.equal(guided(c, u, 0.6), (u.float() + 0.6 * (c.float() - u.float())).half())
    assert torch.equal(guided(c, u, 1.0), c) and torch.equal(guided(c, u, 0.0), u)
    pipe = digits_like().to(dtype=torch.bfloat16)
    with CFGPlusPlus(0.6).install(pipe):
        found = drawn(pipe, latents=noise(2, 1, 8, 8, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
