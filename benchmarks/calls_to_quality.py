"""How many network calls a sampler takes to reach a given Frechet distance, as a share of DDIM's.

    python benchmarks/calls_to_quality.py [--subjects digits,scenes] [--contenders a,b] [--seeds 5] [--samples 256]

All contenders start from the same noise and labels or prompts, on the pipeline's own timesteps. The distance to
reach is DDIM's own at ``--reference`` calls, plus a tenth of what lies between that and DDIM's distance at the
fewest calls: what DDIM has in essence converged to. A contender's calls are those of its first budget from which
on it stays at or under that distance, seed by seed; what is reported is the median over the seeds of contender's
calls over DDIM's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from steersman.engine.compare import compare
from steersman.evidence.dpm_solver_pp import calls_needed, nearly_converged

CALLS = [4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100]
CONTENDERS = "ddim,dpm-solver-pp,dpm-solver-pp:order=3,pndm"


def measure(subject: str, contenders: list[str], seeds: int, samples: int, reference: int, out: Path) -> dict[str, Any]:
    """Calls to the distance, by contender and seed."""
    grid = {"calls": [c for c in CALLS if c <= reference], "samples": samples}
    run = compare("sampling", subject, contenders, grid, list(range(seeds)), out)
    record: dict[str, Any] = {"goal": [], "contenders": {c: [] for c in contenders}} | grid
    for seed in range(seeds):

        def distances(contender: str, seed: int = seed) -> dict[int, float]:
            found = {c: run.values("frechet", contender, calls=c).get(seed) for c in grid["calls"]}
            return {c: value for c, value in found.items() if value is not None}

        ddim = distances("ddim")
        goal = nearly_converged(ddim)
        record["goal"].append(goal)
        for contender in contenders:
            record["contenders"][contender].append(calls_needed(distances(contender), goal))
    record["ratio"] = {}
    for contender, needed in record["contenders"].items():
        pairs = [(a, b) for a, b in zip(needed, record["contenders"]["ddim"], strict=True) if a and b]
        if len(pairs) == seeds:
            record["ratio"][contender] = statistics.median(a / b for a, b in pairs)
    record["frechet"] = {
        contender: {
            c: statistics.fmean(v) for c in grid["calls"] if (v := run.values("frechet", contender, calls=c).values())
        }
        for contender in contenders
    }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", default="digits,scenes")
    parser.add_argument("--contenders", default=CONTENDERS, help="ddim among them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--reference", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calls_to_quality.json")
    arguments = parser.parse_args()
    record = {}
    for subject in arguments.subjects.split(","):
        with tempfile.TemporaryDirectory() as folder:
            record[subject] = measure(
                subject,
                arguments.contenders.split(","),
                arguments.seeds,
                arguments.samples,
                arguments.reference,
                Path(folder) / "run",
            )
        print(subject, json.dumps(record[subject]["ratio"]), json.dumps(record[subject]["contenders"]), flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    kept = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    arguments.out.write_text(json.dumps(kept | record, indent=1) + "\n")


if __name__ == "__main__":
    main()
