"""Multi-draft decoding and PEARL against transformers' assisted generation and plain ``generate``, on the same pair.

    python benchmarks/speculation.py [--subject NAME] [--draft NAME] [--modes own,deep,simulated] [--out FILE]

All contenders write with the target's law: greedy text token by token, or samples at temperature 1. A mode says what
forwards take:

* ``own``: what the pair takes on this machine;
* ``deep``: the target has ``--layers`` layers more, which add nothing to its states. It has the same law and the times
  of a larger model, so that drafting is cheap beside it, as with the models that people speculate with;
* ``simulated``: 64 ms a forward of the target, and 8 or 4 ms one of the draft (``--latencies``), whatever it
  computes (sleeping): devices that are bound by memory, PEARL's two among them. It shows schedules, not a machine.

Each kind of contender is tuned first, with as many settings for each, on prompts of its own. Then the best setting of
each kind, plain generation and assisted generation with transformers' defaults run in rotating order, a round for each
set of prompts. ``of_assisted`` is the median over rounds of a contender's time for a token divided by that of the tuned
assisted generation in the same round, ``of_plain`` the same for plain generation.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from steersman.benches._language import Subject, load
from steersman.engine.compare import compare

PLAIN, DEFAULT = "autoregressive", "assisted"
SETTINGS = {
    "assisted": [
        "assisted",
        "assisted:schedule=heuristic",
        "assisted:num_assistant_tokens=2:confidence=0",
        "assisted:num_assistant_tokens=3:confidence=0",
        "assisted:num_assistant_tokens=5:confidence=0",
        "assisted:num_assistant_tokens=8:confidence=0",
    ],
    "multi-draft": [
        f"multi-draft:n_drafts={n}:depth={depth}" for n, depth in ((1, 3), (2, 2), (3, 2), (3, 3), (3, 4), (4, 3))
    ],
    "pearl": ["pearl", *(f"pearl:gamma={gamma}" for gamma in (1, 2, 3, 4, 6))],
}
LAYERS = 32  # of mode deep


def deep() -> tuple[Any, Any]:
    """``docs/base`` with layers behind it that add nothing."""
    s = load("docs/base")
    return deepened(s, LAYERS), s.tokenizer


def deepened(s: Subject, layers: int) -> Any:
    """A Llama with ``layers`` layers more, whose outputs are zero: the same function, at a larger model's price."""
    config = s.model.config.__class__.from_dict({**s.model.config.to_dict(), "layer_types": None})
    config.num_hidden_layers += layers
    model = s.model.__class__(config).to(s.model.device, s.model.dtype).eval()
    missing = model.load_state_dict(s.model.state_dict(), strict=False).missing_keys
    assert all(name.startswith("model.layers.") for name in missing)
    for layer in model.model.layers[s.model.config.num_hidden_layers :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def medians(found: Any, contender: str, figure: str) -> float:
    return statistics.median(found.values(figure, contender).values())


def measure(subject: str, grid: dict[str, Any], tuning: int, rounds: int) -> dict[str, Any]:
    """Tune on some seeds, and compare on others."""
    figure = "simulated_ms_per_token" if "latency" in grid else "ms_per_token"
    tuned = compare(
        "speculation", subject, [c for kind in SETTINGS.values() for c in kind], grid, range(1000, 1000 + tuning)
    )
    best = {kind: min(many, key=lambda c: medians(tuned, c, figure)) for kind, many in SETTINGS.items()}
    contenders = list(dict.fromkeys([PLAIN, DEFAULT, *best.values()]))
    found = compare("speculation", subject, contenders, grid, rounds)
    failed = [row.error for row in (*tuned.rows, *found.rows) if row.status != "ok"]
    if failed:
        raise SystemExit(f"speculation: {failed[0]}")

    def ratios(contender: str, rival: str) -> list[float]:
        ours, theirs = found.paired(figure, contender, rival)
        return (ours / theirs).tolist()

    record: dict[str, Any] = {}
    for contender in contenders:
        rows = found.select(contender)
        record[contender] = {
            figure: round(medians(found, contender, figure), 3),
            "of_assisted": round(statistics.median(ratios(contender, best["assisted"])), 3),
            "of_assisted_range": [round(f(ratios(contender, best["assisted"])), 3) for f in (min, max)],
            "of_plain": round(statistics.median(ratios(contender, PLAIN)), 3),
            "tokens_per_target_call": round(medians(found, contender, "tokens_per_target_call"), 3),
            "draft_calls": round(medians(found, contender, "draft_calls"), 3),
        }
        for name in ("equal_text", "late"):
            if name in rows[0].figures:
                record[contender][name] = round(medians(found, contender, name), 3)
    return {"best": best, "contenders": record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="docs/base", help="the target (mode deep: docs/base)")
    parser.add_argument("--draft", default="docs/small", help="the draft model")
    parser.add_argument("--modes", default="own,deep,simulated", help="own, deep, simulated; comma-separated")
    parser.add_argument("--latencies", default="8:64,4:64", help="draft:target in ms, comma-separated")
    parser.add_argument("--temperatures", default="0,1", help="0 is greedy; comma-separated")
    parser.add_argument("--count", type=int, default=2, help="prompts a round")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a text")
    parser.add_argument("--tuning", type=int, default=1, help="rounds of tuning")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, in total for each contender")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "subject": options.subject,
        "draft": options.draft,
        "threads": options.threads,
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "modes": {},
    }
    grid = {
        "draft": options.draft,
        "count": options.count,
        "new_tokens": options.tokens,
        "threads": options.threads,
        "contexts": 0,
    }
    modes: dict[str, tuple[str, dict[str, Any]]] = {}
    for mode in options.modes.split(","):
        if mode == "simulated":
            modes |= {f"simulated {x} ms": (options.subject, {"latency": x}) for x in options.latencies.split(",")}
        elif mode in ("own", "deep"):
            modes[mode] = (f"{Path(__file__).resolve()}:deep" if mode == "deep" else options.subject, {})
        else:
            parser.error(f"no mode {mode!r}: own, deep, simulated")
    for mode, (subject, more) in modes.items():
        for temperature in map(float, options.temperatures.split(",")):
            name = f"{mode}, temperature {temperature:g}"
            settings = {**grid, **more, "temperature": temperature}
            record["modes"][name] = measure(subject, settings, options.tuning, options.rounds)
            print(name, json.dumps(record["modes"][name], indent=1), file=sys.stderr, flush=True)
    text = json.dumps(record, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
