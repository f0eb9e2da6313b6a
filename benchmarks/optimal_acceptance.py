"""Time of the best acceptance of n drafts: the dual's prefixes against a linear program, and large vocabularies alone.

The same number comes from scipy's HiGHS on the transport problem in its smallest exact form: for two drafts without
replacement the sets of two tokens (half a million at vocabulary 1000) and, for each, the mass with which either of its
tokens is accepted. At vocabulary 200 HiGHS ends, and both must agree; at 1000 it is stopped after ``--limit`` seconds,
and the ratio is a lower bound. Ours is timed before and after it, one row at a time; the median counts.

    python benchmarks/optimal_acceptance.py [--out optimal_acceptance.json] [--limit 60]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from scipy import optimize, sparse
from torch import Tensor

from steersman.language.multi_draft import acceptance, optimal_acceptance

SPREADS = {"flat": 1.0, "peaked": 5.0}  # of the logits
SMALL = (200, 1000)
LARGE = (32_000, 150_000)


def laws(size: int, spread: float) -> tuple[Tensor, Tensor]:
    """Target and draft, whose logits have correlation 0.8, (1, V) each."""
    g = torch.Generator().manual_seed(0)
    z, other = (torch.randn(1, size, generator=g, dtype=torch.float64) for _ in range(2))
    return (spread * z).softmax(-1), (spread * (0.8 * z + 0.6 * other)).softmax(-1)


def linear_program(p: Tensor, q: Tensor, limit: float) -> tuple[float | None, float]:
    """α* of two drafts without replacement by HiGHS (None: out of time), and its seconds with the set-up left out."""
    p_V, q_V = p[0].numpy(), q[0].numpy()
    size = len(p_V)
    i, j = np.triu_indices(size, 1)
    mass = q_V[i] * q_V[j] / (1 - q_V[i]) + q_V[j] * q_V[i] / (1 - q_V[j])
    sets, tokens = np.tile(np.arange(len(i)), 2), np.concatenate([i, j])
    columns, ones = np.arange(2 * len(i)), np.ones(2 * len(i))
    of_set = sparse.csr_array((ones, (sets, columns)), shape=(len(i), 2 * len(i)))
    of_token = sparse.csr_array((ones, (tokens, columns)), shape=(size, 2 * len(i)))
    A, b = sparse.vstack([of_set, of_token], format="csr"), np.concatenate([mass, p_V])
    start = time.perf_counter()
    found = optimize.linprog(-ones, A_ub=A, b_ub=b, method="highs", options={"time_limit": limit})
    seconds = time.perf_counter() - start
    return (-float(found.fun) if found.status == 0 else None), seconds


def timed(run: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    """Median seconds, and the result."""
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        value = float(run())
        spent.append(time.perf_counter() - start)
    return statistics.median(spent), value


def against_linear_program(size: int, spread: str, limit: float, rounds: int) -> dict[str, Any]:
    p, q = laws(size, SPREADS[spread])
    before, value = timed(lambda: optimal_acceptance(p, q, 2, "without"), rounds)
    theirs, seconds = linear_program(p, q, limit)
    after, _ = timed(lambda: optimal_acceptance(p, q, 2, "without"), rounds)
    ours = statistics.median([before, after])
    return {
        "vocabulary": size,
        "laws": spread,
        "sampler": "without",
        "n": 2,
        "seconds": {"steersman": ours, "linear program": seconds},
        "ended": theirs is not None,
        "difference": None if theirs is None else abs(theirs - value),
        "times_faster": seconds / ours,
    }


def alone(size: int, spread: str, rounds: int) -> list[dict[str, Any]]:
    p, q = laws(size, SPREADS[spread])
    runs: dict[str, Callable[[], Tensor]] = {
        f"bound, {sampler}, n={n}": partial(optimal_acceptance, p, q, n, sampler)
        for sampler, n in (("with", 4), ("greedy", 4), ("without", 2), ("without", 4))
    }
    runs |= {
        f"rate, {verifier}, n=4": partial(acceptance, p, q, 4, verifier)
        for verifier in ("rrs", "k-seq", "greedy", "rrsw")
    }
    return [
        {"vocabulary": size, "laws": spread, "what": name, "ms": 1e3 * timed(run, rounds)[0]}
        for name, run in runs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here, too")
    parser.add_argument("--limit", type=float, default=60, help="the most seconds of a linear program")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # HiGHS has one, too
    report = {
        "versions": {"torch": torch.__version__, "scipy": scipy.__version__},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "ratios": [
            against_linear_program(size, spread, arguments.limit, arguments.rounds)
            for size in SMALL
            for spread in SPREADS
        ],
        "alone": [row for size in LARGE for spread in SPREADS for row in alone(size, spread, arguments.rounds)],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
