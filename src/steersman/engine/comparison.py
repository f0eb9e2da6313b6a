"""A comparison: the rows of one run and the questions that are asked of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.engine.bench import Bench, Row
from steersman.engine.rows import CONFIG, read_rows
from steersman.errors import InputError, MissingExtra, nearest

if TYPE_CHECKING:
    import pandas


class Comparison:
    """Rows of one run.

    Args:
        bench: the bench that ran.
        rows: its rows.
        config: what was asked for (``config.json``).
        out: the run folder.
    """

    def __init__(self, bench: Bench[Any, Any], rows: Sequence[Row], config: Mapping[str, Any], out: Path) -> None:
        self.bench, self.config, self.out = bench, config, Path(out)
        # A bench may lead with another figure on another subject: points have no Frechet distance.
        if hasattr(bench, "headline_for"):
            bench.headline = bench.headline_for(rows)
        order = {label: i for i, label in enumerate(config["contenders"])}
        self.rows = sorted(rows, key=lambda r: (_setting_key(r.setting), r.seed, order.get(r.contender, len(order))))

    @classmethod
    def load(cls, out: str | Path) -> Comparison:
        """The comparison in a run folder.

        Raises:
            InputError: ``out`` is not a run folder.
        """
        from steersman import catalog

        path = Path(out) / CONFIG
        if not path.is_file():
            raise InputError("out", str(out), "a run folder (with config.json)")
        config = json.loads(path.read_text())
        return cls(catalog.bench(config["bench"]), read_rows(Path(out)), config, Path(out))

    @property
    def contenders(self) -> list[str]:
        """The contenders' labels, in the order in which they were asked for."""
        return list(self.config["contenders"])

    @property
    def settings(self) -> list[dict[str, Any]]:
        """The settings of the grid, by the knobs that vary, in order."""
        varying = self.config["grid"]
        seen: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            short = {k: row.setting[k] for k in varying if k in row.setting}
            seen.setdefault(json.dumps(short, sort_keys=True, default=str), short)
        return list(seen.values())

    def select(self, contender: str | None = None, status: str | None = "ok", **setting: Any) -> list[Row]:
        """The rows of a contender (a label) at a setting (any subset of the knobs)."""
        return [
            row
            for row in self.rows
            if (contender is None or row.contender == contender)
            and (status is None or row.status == status)
            and all(row.setting.get(k) == v for k, v in setting.items())
        ]

    def saved(self, name: str, **setting: Any) -> dict[str, dict[str, np.ndarray]]:
        """What contenders saved as ``name`` (``log.images`` and ``log.arrays``), by label and array: of the first row
        that went well at a setting."""
        found = {}
        for label in self.contenders:
            for row in self.select(label, **setting)[:1]:
                folder = row.items_dir(self.out)
                if folder is not None and (folder / f"{name}.npz").is_file():
                    with np.load(folder / f"{name}.npz") as arrays:
                        found[label] = {key: arrays[key] for key in arrays.files}
        return found

    def values(self, figure: str, contender: str, **setting: Any) -> dict[int, float]:
        """``figure`` by seed, of the rows that went well.

        Raises:
            LookupError: no such figure or contender, or a setting that leaves several rows a seed.
        """
        if figure not in self.bench.figures:
            raise LookupError(f"no figure {figure!r}: {nearest(figure, self.bench.figures)}")
        if contender not in self.contenders:
            raise LookupError(f"no contender {contender!r}: {nearest(contender, self.contenders)}")
        found: dict[int, float] = {}
        for row in self.select(contender, **setting):
            if figure in row.figures:
                if row.seed in found:
                    raise LookupError(f"several rows of {contender} with seed {row.seed} at {setting}")
                found[row.seed] = row.figures[figure]
        return found

    def paired(self, figure: str, a: str, b: str, **setting: Any) -> tuple[np.ndarray, np.ndarray]:
        """``figure`` of ``a`` and of ``b`` at the seeds that both have, in the order of the seeds.

        Raises:
            LookupError: one of them has no row there, or failed with some seed: leaving that seed out would
                judge a contender on the seeds that suit it.
        """
        for name in (a, b):
            failed = sorted(r.seed for r in self.select(name, status="failed", **setting))
            if failed:
                raise LookupError(f"{name} failed with seed {', '.join(map(str, failed))} at {setting}")
        left, right = self.values(figure, a, **setting), self.values(figure, b, **setting)
        seeds = sorted(left.keys() & right.keys())
        if not seeds:
            lacking = ", ".join(name for name, rows in ((a, left), (b, right)) if not rows) or "a common seed"
            raise LookupError(f"no rows of {lacking} for {figure} at {setting}")
        return np.array([left[s] for s in seeds]), np.array([right[s] for s in seeds])

    def paired_items(self, figure: str, a: str, b: str, **setting: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per-item values of ``a`` and ``b`` over the common seeds, and each item's seed.

        Raises:
            LookupError: one of them has no such values, or the numbers of items differ.
        """
        left = {r.seed: r.per_item.get(figure) for r in self.select(a, **setting)}
        right = {r.seed: r.per_item.get(figure) for r in self.select(b, **setting)}
        columns: tuple[list[float], list[float], list[int]] = ([], [], [])
        for seed in sorted(left.keys() & right.keys()):
            one, two = left[seed], right[seed]
            if one is None or two is None or len(one) != len(two):
                raise LookupError(f"no paired items of {figure} for {a} and {b} with seed {seed}")
            columns[0].extend(one)
            columns[1].extend(two)
            columns[2].extend([seed] * len(one))
        if not columns[0]:
            raise LookupError(f"no rows of {a} and {b} for {figure} at {setting}")
        return np.array(columns[0]), np.array(columns[1]), np.array(columns[2])

    @property
    def failed(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.status == "failed"]

    def to_json(self) -> dict[str, Any]:
        """Everything but the items, as plain JSON."""
        from dataclasses import asdict

        from steersman.engine.rows import plain

        return {"config": dict(self.config), "rows": [plain(asdict(row)) for row in self.rows]}

    def to_pandas(self) -> pandas.DataFrame:
        """One line a row: contender, setting, seed, status, figures, timing.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise MissingExtra("Comparison.to_pandas", "dev") from error
        return pandas.DataFrame(
            [
                {
                    "contender": r.contender,
                    **r.setting,
                    "seed": r.seed,
                    "status": r.status,
                    **r.figures,
                    **r.timing,
                }
                for r in self.rows
            ]
        )


def _setting_key(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((k, (0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v))) for k, v in setting.items())
