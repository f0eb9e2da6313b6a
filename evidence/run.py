"""Judge methods' claims anew and write ``evidence/results/<id>.json``: the only writer of that folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from steersman import catalog
from steersman.evidence.study import SCALES, run_evidence
from steersman.report.html import write_report
from steersman.report.terminal import LiveProgress, print_verdicts

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help="ids (default: every method with evidence)")
    parser.add_argument("--scale", choices=SCALES, default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a temporary folder)")
    arguments = parser.parse_args()
    names = arguments.methods or [card.id for card in catalog.cards().values() if "evidence" in card.verbs]
    for name in names:
        method = catalog.card(name).id
        out = arguments.out / method if arguments.out else None
        record, comparisons = run_evidence(method, arguments.scale, arguments.seed, out, progress=LiveProgress())
        suffix = "" if arguments.scale == "quick" else f".{arguments.scale}"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{method}{suffix}.json").write_text(json.dumps(record, indent=1) + "\n")
        if out is not None:
            for study, comparison in comparisons.items():
                write_report(comparison, out / study / "report.html", comparison.bench.exhibits(comparison))
        print_verdicts(record)


if __name__ == "__main__":
    main()
