"""Time of a semi-discrete fit: ours against POT's ``solve_semidiscrete`` at equal accuracy, on the same banks.

Accuracy is the root mean square relative error of the cells' masses, counted for every solver by one function on
draws that no solver has seen, the same for all. POT's batch and step size are the best of fifteen choices in as much
time as ours takes. Then its draws double until its error is at most ours, or a run takes half of ``--limit`` seconds;
its time is that of the last run alone. Projection is left off, as its potentials have no known bound. Runs alternate
(A B A B) and medians are compared; where POT stays less accurate, the ratio is too kind to it. ``adam`` is the
published solver of DPM-OT after 300 iterations, for context.

    python benchmarks/semidiscrete_transport.py [--out semidiscrete_transport.json] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ot
import torch
from ot.semidiscrete import solve_semidiscrete
from torch import Tensor

from steersman.math.semidiscrete import fit, leaders

CASES = {"plane": (256, 2), "images": (256, 64)}
RATES, BATCHES = (0.01, 0.1, 1.0, 10.0, 100.0), (32, 256, 2048)


def bank(count: int, d: int) -> Tensor:
    """A mixture of eight Gaussians with noise on it, float32."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(8, d, generator=g)
    return centres[torch.arange(count) % 8] + 0.8 * torch.randn(count, d, generator=g)


def residual(y: Tensor, h: Tensor, draws: int = 400_000) -> float:
    """Root mean square relative error of the masses, less what the draws' noise makes of it."""
    g, hits = torch.Generator().manual_seed(12345), torch.zeros(len(y), dtype=torch.float64)
    for _ in range(draws // 4096):
        x = torch.randn(4096, y.shape[1], generator=g)
        hits += torch.bincount(leaders(x, y, h.to(y.dtype))[1][:, 0], minlength=len(y))
    n = float(hits.sum())
    excess = (hits / n * len(y) - 1).square().mean() - (len(y) - 1) / n
    return math.sqrt(max(float(excess), 0.0))


def with_pot(y: Tensor, draws: int, batch: int, rate: float, seed: int) -> Tensor:
    """POT's potential g for the cost |x - y|², as heights: h = (g - |y|²)/2."""
    torch.manual_seed(seed)
    lr0 = rate * math.sqrt(len(y) * batch)  # 1 is POT's default
    g = solve_semidiscrete(y, "normal", max_iter=max(draws // batch, 1), batch_size=batch, lr0=lr0)
    return 0.5 * (g - y.square().sum(1))


def timed(run: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> tuple[float, Tensor]:
    start = time.perf_counter()
    h = run(*arguments, **keywords)
    return time.perf_counter() - start, h


def measure(name: str, rounds: int, limit: float) -> dict[str, Any]:
    y = bank(*CASES[name])

    def ours(seed: int, **more: Any) -> Tensor:
        return fit(y, tolerance=0.1, generator=torch.Generator().manual_seed(seed), **more).h

    seconds, h = timed(ours, 0)
    wanted = max(residual(y, h), 0.02)
    # The best batch and step size, with as many draws as take about as long as ours.
    tried: dict[tuple[int, float], tuple[float, int]] = {}
    for batch in BATCHES:
        probe, _ = timed(with_pot, y, 50 * batch, batch, 1.0, 0)
        draws = max(int(seconds / probe * 50) * batch, 50 * batch)
        for rate in RATES:
            tried[batch, rate] = residual(y, with_pot(y, draws, batch, rate, 0)), draws
    batch, rate = min(tried, key=lambda choice: tried[choice][0])
    reached, draws = tried[batch, rate]
    spent = 0.0
    while reached > wanted and spent < limit / 2:
        draws *= 2
        spent, found = timed(with_pot, y, draws, batch, rate, 0)
        reached = residual(y, found)
    times: dict[str, list[float]] = {"steersman": [], "POT": []}
    errors: dict[str, list[float]] = {"steersman": [], "POT": []}
    for seed in range(1, rounds + 1):
        for side, (taken, found) in (
            ("steersman", timed(ours, seed)),
            ("POT", timed(with_pot, y, draws, batch, rate, seed)),
        ):
            times[side].append(taken)
            errors[side].append(residual(y, found))
    medians = {side: statistics.median(values) for side, values in times.items()}
    adam, found = timed(ours, 0, method="adam", max_iterations=300)
    return {
        "bank": name,
        "points": len(y),
        "dimensions": y.shape[1],
        "seconds": medians,
        "residual": {side: statistics.median(values) for side, values in errors.items()},
        "ratio": medians["steersman"] / medians["POT"],
        "equal_accuracy": reached <= wanted,
        "pot": {"draws": draws, "batch": batch, "rate": rate, "residual_when_chosen": tried[batch, rate][0]},
        "adam": {"seconds": adam, "residual": residual(y, found), "iterations": 300},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here, too")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each solver")
    parser.add_argument("--limit", type=float, default=60, help="the most seconds of a run of POT's")
    arguments = parser.parse_args()
    report = {
        "versions": {"torch": torch.__version__, "POT": ot.__version__},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "results": [measure(name, arguments.rounds, arguments.limit) for name in CASES],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
