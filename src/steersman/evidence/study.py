"""Evidence: a method's claims, judged on comparisons that the one engine ran.

A method's evidence file has ``studies(scale, seed)`` (named comparisons) and ``CLAIMS``. Running it gives
one JSON record, the same for every method.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steersman import catalog
from steersman.catalog import Card
from steersman.engine.bench import Bench
from steersman.engine.claims import Claim, judge
from steersman.engine.compare import Progress, compare, machine, versions
from steersman.engine.comparison import Comparison
from steersman.engine.rows import plain
from steersman.errors import InputError

SCALES = ("quick", "full", "gpu")


@dataclass(frozen=True)
class Study:
    """One comparison that claims are judged on.

    Args:
        bench: a bench's id, or a bench.
        contenders: texts, as on the command line.
        subject: None is the bench's reference subject.
        grid: settings, as in ``compare``.
        seeds: how many; they start at the evidence's own seed.
    """

    bench: str | Bench[Any, Any]
    contenders: tuple[str, ...]
    subject: str | None = None
    grid: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5


def run_evidence(
    method: str,
    scale: str = "quick",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Mapping[str, Comparison]]:
    """Run a method's studies and judge its claims.

    Args:
        method: id or alias.
        scale: quick (about two minutes on two cores), full or gpu.
        seed: the first seed; each study takes its seeds from there on.
        out: where the runs go, one folder a study; None makes a temporary one.
        resume: go on with the runs in ``out``.
        progress: who watches.

    Returns:
        The JSON record (method, scale, seed, claims, rows, versions, machine, date) and the comparisons.

    Raises:
        InputError: no such method or scale, or a bad folder.
    """
    if scale not in SCALES:
        raise InputError("scale", scale, f"one of {', '.join(SCALES)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise InputError("seed", seed, "a whole number from 0 to 2**31 - 1")
    card = catalog.card(method)
    module = evidence_module(card)
    claims: list[Claim] = [claim for claim in module.CLAIMS if scale in claim.scales]
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix=f"steersman-evidence-{card.id}-"))
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise InputError("out", str(out), "a new or empty folder (to go on with this one, add --resume)")
    comparisons = {}
    for name, study in module.studies(scale, seed).items():
        comparisons[name] = compare(
            study.bench,
            study.subject,
            study.contenders,
            study.grid,
            seeds=list(range(seed, seed + study.seeds)),
            out=folder / name,
            resume=resume,
            progress=progress,
            command=f"steersman evidence {card.id} --scale {scale} --seed {seed}",
        )
    verdicts = judge(claims, comparisons, scale)
    record = {
        "method": card.id,
        "scale": scale,
        "seed": seed,
        "claims": [verdict.to_json() for verdict in verdicts],
        "rows": list(_rows(comparisons)),
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    record = plain(record)
    (folder / "evidence.json").write_text(json.dumps(record, indent=1) + "\n")
    return record, comparisons


def evidence_module(card: Card) -> Any:
    """The module with ``studies`` and ``CLAIMS`` of a method.

    Raises:
        InputError: the method has no evidence.
    """
    if "evidence" not in card.verbs:
        able = [c.id for c in catalog.cards().values() if "evidence" in c.verbs]
        raise InputError("method", card.id, f"a method with evidence: {', '.join(able)}")
    return catalog.import_module(
        card.evidence or f"steersman.evidence.{card.module}", feature=f"evidence {card.id}", extra="all"
    )


def _rows(comparisons: Mapping[str, Comparison]) -> Iterable[dict[str, Any]]:
    for name, comparison in comparisons.items():
        for row in comparison.rows:
            yield {"study": name, **asdict(row)}
