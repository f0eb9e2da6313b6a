"""A bench and comparisons that need no model, for the report's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steersman.engine.bench import Figure, Knob, PartInfo, Row
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import parse
from steersman.report.blocks import (
    Activity,
    Answers,
    Block,
    Curves,
    ImageGrid,
    Line,
    LoadMap,
    Note,
    Scatter,
    SideBySide,
    Span,
    TableBlock,
    Text,
    Timeline,
    loops,
)

QUALITY = {"ddim": 3.0, "heun": 2.4, "plms": 1.6, "euler": 3.6}


class ToyBench:
    """Quality falls with the calls; every contender has its own curve."""

    id = "sampling"
    shape = "Sampler"
    default_subject = "digits"
    headline = ("frechet", "calls")
    knobs = {
        "calls": Knob(int, (5, 10, 20), "network calls a sample may cost", low=1, high=1000),
        "images": Knob(int, 256, "images a trial makes", low=1, sweep=False),
    }
    figures = {
        "frechet": Figure("", "lower", "quality", "Frechet distance to held-out digits in the classifier's features."),
        "accuracy": Figure("%", "higher", "quality", "How often the classifier sees the class that was asked for."),
        "seconds": Figure("s", "lower", "cost", "Wall time of one trial."),
        "mode_entropy": Figure("nats", "neither", "info", "Entropy of the classes that came out."),
    }

    def parts(self) -> dict[str, PartInfo]:
        return {
            name: PartInfo(dict, f"The {name} solver.", f"pipe.scheduler = {name.title()}Scheduler(order=2{{, knobs}})")
            for name in QUALITY
        }


def rows_of(
    contenders: list[str],
    calls: list[int] = [5, 10, 20],  # noqa: B006
    seeds: int = 8,
    bench: Any = ToyBench,
) -> list[Row]:
    rows = []
    for n in calls:
        for seed in range(seeds):
            shared = np.random.default_rng(seed).normal(0, 0.08)  # common to all contenders: pairing helps
            for i, label in enumerate(contenders):
                own = np.random.default_rng([seed, i, n])
                level = QUALITY.get(label.split(":")[0].split("+")[0], 2.0 + 0.3 * i)
                frechet = level * (10 / n) ** 0.8 + 0.4 + shared + own.normal(0, 0.02)
                figures = {
                    "frechet": frechet,
                    "accuracy": 100 / (1 + 0.05 * frechet) + own.normal(0, 0.2),
                    "seconds": 0.02 * n * (1 + 0.1 * i) + abs(own.normal(0, 0.01)),
                    "mode_entropy": 2.2 + own.normal(0, 0.01),
                }
                parts = parse(label).to_json()
                setting = {"calls": n, "images": 256}
                key = f"{label}-{n}-{seed}"
                rows.append(
                    Row(key, bench.id, label, parts, setting, seed, "ok", figures, {"wall_s": 0.4, "cpu_s": 0.7})
                )
    return rows


def comparison_of(rows: list[Row], contenders: list[str], out: Path, bench: Any = None, **config: Any) -> Comparison:
    bench = bench or ToyBench()
    swept = {k: sorted({r.setting[k] for r in rows if k in r.setting}) for k, v in bench.knobs.items() if v.sweep}
    return Comparison(
        bench,
        rows,
        {
            "bench": bench.id,
            "subject": "digits",
            "contenders": contenders,
            "parts": {c: parse(c).to_json() for c in contenders},
            "grid": swept,
            "fixed": {"images": 256},
            "seeds": sorted({r.seed for r in rows}),
            "versions": {"steersman": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.6"},
            "machine": {"system": "Linux x86_64", "cores": 2, "threads": 2},
            "started": "2026-11-24T03:25:27+00:00",
            "command": "steersman compare sampling --methods ddim,plms --calls 5,10,20 --seeds 8",
            **config,
        },
        out,
    )


class FabricBench:
    """Cost is a figure; one knob is a name. Everything but ecmp is the same at every seed."""

    id = "load-balancing"
    shape = "Problem"
    default_subject = "fabric"
    headline = ("congestion", "pieces")
    knobs = {
        "collective": Knob(str, ("ring", "all-to-all"), "traffic"),
        "hosts": Knob(int, (64,), "hosts", low=2, high=1024),
    }
    figures = {
        "congestion": Figure("× ideal", "lower", "quality", "Load of the most loaded link."),
        "pieces": Figure("pieces", "lower", "cost", "Pieces that the flows are cut into."),
    }

    def parts(self) -> dict[str, PartInfo]:
        return {name: PartInfo(dict, f"The policy {name}.") for name in ("ecmp", "spray", "plan")}


def fabric_of(out: Path, seeds: int = 5) -> Comparison:
    contenders = ["ecmp", "spray", "plan"]
    rows = []
    for collective, worst in (("ring", 1.0), ("all-to-all", 3.0)):
        for seed in range(seeds):
            for label in contenders:
                noise = np.random.default_rng(seed).random() if label == "ecmp" and worst > 1 else 0.0
                figures = {
                    "congestion": worst + noise if label == "ecmp" else 1.0,
                    "pieces": {"ecmp": 240.0, "spray": 3840.0, "plan": 240.0}[label],
                }
                setting = {"collective": collective, "hosts": 64}
                parts = parse(label).to_json()
                key = f"{label}-{collective}-{seed}"
                rows.append(Row(key, "load-balancing", label, parts, setting, seed, "ok", figures, {"wall_s": 0.1}))
    found = comparison_of(rows, contenders, out, FabricBench(), subject="fabric", fixed={}, command=None)
    found.config["grid"] = {"collective": ["ring", "all-to-all"], "hosts": [64]}  # type: ignore[index]
    return found


def exhibits_of(contenders: list[str]) -> list[Block]:
    """A block of every kind."""
    rng = np.random.default_rng(0)
    blocks: list[Block] = [
        ImageGrid(
            "Images from the same noise",
            {label: rng.random((20, 8, 8)) for label in contenders},
            columns=[f"class {i}" for i in range(20)],
            setting={"calls": calls},
        )
        for calls in (5, 10, 20)
    ]
    looping = "the module returns a list of names. the module returns a list of names."
    blocks.append(
        SideBySide(
            "Continuations",
            [
                Answers(
                    "The os module",
                    {
                        contenders[0]: Text(looping, loops(looping), "repetition 0.5"),
                        contenders[-1]: Text("a portable way" * 400, [Span(2, 10, "steered", "moved by the method")]),
                    },
                )
            ],
        )
    )
    loads = {label: rng.poisson(8, (6, 4)) / 8 for label in contenders}
    loads[contenders[0]][0, 0] = np.nan
    blocks.append(LoadMap("Link loads", loads, loads, ideal=1.0))
    target = rng.normal(size=(500, 2))
    blocks.append(Scatter("Samples", {label: target + 0.1 * i for i, label in enumerate(contenders)}, target))
    spans = [Activity(0.0, 1.0), Activity(1.0, 1.5, "communicate"), Activity(1.5, 2.0, "wait")]
    blocks.append(Timeline("Who works when", {contenders[0]: {"rank 0": spans, "rank 1": spans[:2]}}))
    line = Line([1, 2, 3], [3.0, 2.0, 1.0], [2.5, 1.5, 0.5], [3.5, 2.5, 1.5])
    blocks.append(Curves("Loss", dict.fromkeys(contenders, line), "steps", "loss (nats)", band="range over seeds"))
    blocks.append(TableBlock("Flows", ["contender", "flows"], [[contenders[0], 240], [contenders[-1], None]]))
    blocks.append(Note("The classifier saw the same digits.", "warning", "Mind:"))
    return blocks
