from __future__ import annotations

from pathlib import Path

import pytest

from steersman.engine.comparison import Comparison
from tests.report.toy import comparison_of, rows_of


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Four contenders at three budgets over eight seeds; one row failed, one contender can't run at 5 calls."""
    contenders = ["ddim", "heun:churn=0.5", "plms", "euler"]
    rows = rows_of(contenders)
    for row in rows:
        if row.contender.startswith("heun") and row.setting["calls"] == 5:
            row.status, row.figures, row.error = "inapplicable", {}, "Heun needs an even number of calls"
        if row.contender == "euler" and row.setting["calls"] == 20 and row.seed == 3:
            row.status, row.figures, row.error = "failed", {}, "the network returned NaN at step 7"
    return comparison_of(rows, contenders, tmp_path)
