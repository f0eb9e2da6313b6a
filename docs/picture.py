"""Draw the README's picture from a run folder of ``steersman compare sampling``."""

from __future__ import annotations

import sys
from pathlib import Path

from steersman.engine.comparison import Comparison
from steersman.report.plots import overview, save

if __name__ == "__main__":
    comparison = Comparison.load(sys.argv[1])
    exhibits = comparison.bench.exhibits(comparison)
    target = Path(__file__).parent / "images" / "demo.png"
    save(lambda theme: overview(comparison, exhibits, theme), target)
