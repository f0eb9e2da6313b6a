"""How fast candidates are scored: forward passes a second, beside the model's own speed on whole batches.

    python benchmarks/magic_word.py [--subject docs/tiny] [--tokens 16] [--rounds 5] [--out FILE]

Each round runs every contender once on the same state, in rotating order; a contender's figure is the median over
rounds, and its ratio that of the same round to the model alone.

    model       the bare model on batches of the size that the search takes, its logits thrown away
    scan        |V| candidates by ``State.scan``: rows built, read, cross-entropy and arg max taken
    gcg         iterations of GCG (gradient, 128 candidates, scores); the gradient counts three passes
    one-by-one  candidates one row at a time, as a loop over candidates does it
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steersman.benches._language import load
from steersman.language.magic_word import GCG, Objective, State, System
from steersman.reference import docs


def contenders(system: System, x0: tuple[int, ...], y: int) -> dict[str, Callable[[], int]]:
    """Each runs once and says how many passes it made."""
    state = State(system, x0)
    size = system.split(len(x0) + 1)
    rows = torch.cat([system.allowed[:, None], torch.tensor(x0).expand(len(system.allowed), -1)], 1)
    empty = system.allowed[:0]

    def model() -> int:
        with torch.inference_mode():
            for part in rows.split(size):
                system.logits(part)
        return len(rows)

    def scan() -> int:
        state._scans.clear()
        state.scan(empty, (y,))
        return len(rows)

    def gcg() -> int:
        objective = Objective(state, (y,))
        GCG((4,), 8, 128, 64).search(objective, torch.Generator().manual_seed(0))
        return objective.passes

    def one_by_one() -> int:
        with torch.inference_mode():
            for row in rows[:64]:
                logits = system.logits(row[None])[0, -1]
                float(logits.logsumexp(-1) - logits[y]), int(logits.argmax())
        return 64

    return {"model": model, "scan": scan, "gcg": gcg, "one-by-one": one_by_one}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--subject", default="docs/tiny")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    asked = parser.parse_args()
    subject = load(asked.subject)
    system = System(subject.model, subject.tokenizer)
    (state,) = docs.prompts(1, asked.tokens, 0, continuation=1, tokenizer=subject.tokenizer)
    runs = contenders(system, state.ids, int(State(system, state.ids).next_token().argmin()))
    names = list(runs)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        runs[name]()  # warms up
    for turn in range(asked.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            passes = runs[name]()
            rates[name].append(passes / (time.perf_counter() - start))
    result: dict[str, Any] = {
        "subject": asked.subject,
        "tokens": asked.tokens,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "passes_per_second": {name: statistics.median(rates[name]) for name in names},
        "of_the_model": {
            name: statistics.median(a / b for a, b in zip(rates[name], rates["model"], strict=True)) for name in names
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
