"""Draw the figure of DPM-Solver++'s card: which third order is nearer, at how many calls and under what guidance.

    python docs/third_order.py

Error against calls on the ring of Gaussians, whose guided network is known exactly: root mean square distance
from a trajectory of 1500 calls, in float64, on the grid of lambda from timestep 999 to 0.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from steersman.diffusion.dpm_solver_pp import DPMSolverPP
from steersman.diffusion.scheduler import alphas_cumprod
from steersman.diffusion.solver import DiscreteVP, Prediction, integrate
from steersman.diffusion.time_grids import levels
from steersman.reference import gaussians
from steersman.report.theme import LIGHT, MARKERS

PROCESS = DiscreteVP(alphas_cumprod())
LAW = gaussians.mixture("gaussians:ring")
CALLS = (5, 7, 10, 15, 20, 30, 50, 80, 120, 200, 320, 500)
SOLVERS = {
    "order 1 (DDIM)": DPMSolverPP(PROCESS, 1),
    "order 2": DPMSolverPP(PROCESS, 2),
    "order 3 as published": DPMSolverPP(PROCESS, 3),
    "order 3, whole D₂": DPMSolverPP(PROCESS, 3, compat=False),
}


def ends(solver: DPMSolverPP, calls: int, guidance: float, x: Tensor, labels: Tensor) -> Tensor:
    """Where ``solver`` takes the noise ``x`` in so many calls; without guidance for the whole mixture."""
    null = torch.full_like(labels, LAW.modes)
    asked = labels if guidance > 1.0 else null

    def predict(x: Tensor, t: float) -> Prediction:
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        uncond, cond = (LAW.eps(x, alpha, sigma, label) for label in (null, asked))
        return Prediction(x, alpha, sigma, eps=uncond + guidance * (cond - uncond))

    return integrate(solver, predict, x, levels("logsnr", PROCESS, calls + 1, 999.0)).x


def draw() -> Figure:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    labels = torch.arange(500) % LAW.modes
    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    figure.patch.set_facecolor(LIGHT["page"])
    panels = figure.subplots(1, 2, sharey=True)
    reference = DPMSolverPP(PROCESS, 3, "singlestep", solver_type="heun", compat=False, lower_order_final=False)
    for axes, guidance in zip(panels, (1.0, 8.0), strict=True):
        true = ends(reference, 1500, guidance, x, labels)
        for place, (name, solver) in enumerate(SOLVERS.items()):
            errors = [(ends(solver, n, guidance, x, labels) - true).square().mean().sqrt().item() for n in CALLS]
            axes.plot(CALLS, errors, color=LIGHT[f"c{place}"], marker=MARKERS[place], markersize=5, label=name)
        axes.set(xscale="log", yscale="log", xlabel="network calls", ylim=(1e-7, 10))
        axes.set_title("no guidance" if guidance == 1.0 else f"guidance {guidance:g}", color=LIGHT["ink"], fontsize=11)
        axes.set_xticks([5, 10, 20, 50, 100, 200, 500], ["5", "10", "20", "50", "100", "200", "500"])
        axes.minorticks_off()
        axes.grid(color=LIGHT["line"], linewidth=0.6)
    panels[0].set_ylabel("root mean square distance from the trajectory")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    target = Path(__file__).parent / "images" / "third-order.svg"
    with matplotlib.rc_context({"svg.hashsalt": "steersman", "svg.fonttype": "none", "font.family": "sans-serif"}):
        draw().savefig(target, metadata={"Date": None})
    print(target)
