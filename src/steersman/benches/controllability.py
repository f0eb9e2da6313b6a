r"""Controllability: which wanted tokens a search brings to the top with a short prompt, at equal forward passes.

A trial searches a prompt u, :math:`|u| \le k`, in front of every state :math:`x_0` that makes the wanted token y the
model's top choice. Measured are the share of pairs reached (:math:`1 - \hat\varepsilon(k)`, by class of targets), and
the cross-entropy of y behind the best prompt, which tells searches apart also where none reaches y.

**All searches have the same budget** of forward passes a pair (a gradient counts three); each goes on until it reaches
y, or its next step does not fit. **What is not reached may be reachable**: the share says how good the search is
first, and bounds the model's controllability from below.

The prompts found are adversarial strings.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from steersman import catalog
from steersman.benches._language import Subject, load
from steersman.engine import subjects
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError, nearest
from steersman.language.magic_word import (
    GCG,
    BackOff,
    Controllability,
    Greedy,
    MagicWord,
    RandomPrompts,
    System,
    read_pairs,
)
from steersman.language.magic_word.data import KINDS
from steersman.language.magic_word.finding import Grouped, search_state, states_of
from steersman.report.blocks import Answers, Block, Curves, Line, Note, SideBySide, Span, TableBlock, Text

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

LENGTHS = (1, 2, 3, 4, 6, 8, 10)
"""Prompt lengths that searches go through, as far as ``k`` allows."""
SHOWN = 6  # pairs in the report


def greedy(k: int = 6, success: Literal["any", "argmin"] = "any") -> Greedy:
    """Greedy back generation alone, one token after the other up to k."""
    return Greedy(k, success)


def gcg(
    k: int = 6,
    iterations: int = 15,
    candidates: int = 128,
    k_sub: int = 64,
    success: Literal["any", "argmin"] = "any",
    accept: Literal["improve", "always"] = "improve",
) -> GCG:
    """GCG alone at every length, warm-started, and again from random prompts until the budget is spent."""
    return GCG([n for n in LENGTHS if n <= k], iterations, candidates, k_sub, success, accept)


def random_prompts(k: int = 6) -> RandomPrompts:
    """Random prompts, as many of every length."""
    return RandomPrompts([n for n in LENGTHS if n <= k])


PARTS: dict[str, PartInfo] = {
    "greedy": PartInfo(
        greedy,
        "Greedy back generation alone.",
        "find_magic_words(model, tokenizer, x0, y, Greedy({k=6}))",
    ),
    "gcg": PartInfo(
        gcg,
        "GCG alone, at every length.",
        "find_magic_words(model, tokenizer, x0, y, GCG({knobs}))",
    ),
    "random": PartInfo(
        random_prompts,
        "Random prompts.",
        "find_magic_words(model, tokenizer, x0, y, RandomPrompts())",
    ),
}


@dataclass
class Host:
    """The states of a seed; a search mounts on them."""

    system: System
    grouped: Grouped
    setting: Setting
    search: Any = None
    name: str = ""


class ControllabilityBench:
    """Generator: prompts that make wanted tokens the top choice, by each search.

    Subjects: ``docs`` or ``reviews`` (or a model of theirs, as ``docs/tiny``), a folder or hub id of a causal
    language model of transformers, or ``file.py:factory`` that returns ``(model, tokenizer)``. A user's model needs
    ``input``: a ``.jsonl`` of ``x0`` and ``y``, or a text that states are cut from.

    A method mounts by its object: a search with ``search(objective, generator)`` and ``cost(allowed)``. Of ``k``,
    ``greedy``, ``lengths``, ``iterations``, ``candidates`` and ``k_sub`` it gets those that its constructor names.
    """

    id = "controllability"
    shape: Literal["Generator"] = "Generator"
    default_subject = "docs/tiny"
    headline = ("reached", "passes")
    knobs: Mapping[str, Knob] = {
        "k": Knob(int, (6,), "longest prompt, tokens", low=1, high=100),
        "states": Knob(int, 8, "states x0, each with a target of every class", low=1, high=100_000, sweep=False),
        "shortest": Knob(int, 8, "tokens of the shortest state", low=1, high=100_000, sweep=False),
        "longest": Knob(int, 32, "tokens of the longest state", low=1, high=100_000, sweep=False),
        "kinds": Knob(str, ",".join(KINDS), "classes of targets, with commas between", sweep=False),
        "input": Knob(str, None, "a .jsonl of 'x0' and 'y', or a text", sweep=False),
        "alphabet": Knob(int, None, "ids that prompts may use, drawn by seed (default: all)", low=1),
        "passes": Knob(int, None, "forward passes a pair (default: what the back-off search takes)", low=1),
        "iterations": Knob(int, (15,), "iterations of GCG at each length", low=1, high=100_000),
        "candidates": Knob(int, (128,), "candidates of one iteration", low=1, high=100_000),
        "k_sub": Knob(int, (64,), "ids a position that GCG draws from", low=1, high=1_000_000),
        "bos": Knob(str, "outer", "where the beginning-of-sequence token is", choices=("outer", "inner"), sweep=False),
        "multi_token": Knob(bool, False, "whether targets of the input may have several tokens", sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "reached": Figure("", "higher", "quality", "share of pairs whose target is the top choice behind the prompt"),
        "loss": Figure("nats", "lower", "quality", "cross-entropy of the target behind the best prompt found"),
        "passes": Figure("passes", "lower", "cost", "forward passes by pair, a gradient counting three"),
        "reached_true_next": Figure("", "higher", "info", "share reached of tokens that truly follow"),
        "reached_top_75": Figure("", "higher", "info", "share reached of tokens among the 75 most probable"),
        "reached_uniform": Figure("", "higher", "info", "share reached of tokens of uniform rank"),
        "without_prompt": Figure("", "neither", "info", "share of pairs that need no prompt"),
        "length": Figure("tokens", "lower", "info", "prompt length, k + 1 for pairs that were not reached"),
        "verified": Figure("", "higher", "info", "share of reached pairs that a fresh pass confirms"),
        "survives_as_text": Figure("", "higher", "info", "share of prompts that encode to the same ids again"),
        "passes_per_s": Figure("passes/s", "higher", "info", "rows through the model by second"),
    }

    def subject(self, spec: str) -> Subject:
        return load(spec)

    def baselines(self) -> list[str]:
        return list(PARTS)

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def check(self, s: Subject, setting: Setting) -> None:
        if setting["longest"] < setting["shortest"]:
            raise InputError("longest", setting["longest"], f"at least shortest={setting['shortest']}")
        h = self.host(s, setting, Streams(0))
        for state, answers in h.grouped:
            for y, _ in answers:
                state.check(setting["k"], len(y))

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        names = ("states", "shortest", "longest", "kinds", "input", "alphabet", "bos", "multi_token")
        key = ("controllability", rng.base, *(setting[name] for name in names))
        if key not in s.known:
            system = System(
                s.model,
                s.tokenizer,
                bos=setting["bos"],
                alphabet=setting["alphabet"],
                seed=rng.seed("alphabet") % 2**31,
            )
            s.known[key] = system, states_of(system, _pairs(s, system, setting, rng), setting["multi_token"])
        system, grouped = s.known[key]
        return Host(system, grouped, setting)

    def mount(self, h: Host, part: Part) -> None:
        if h.search is not None:
            raise InputError("methods", f"{h.name}+{part.id}", "one or the other: both are the search")
        if part.id in PARTS:
            build: Callable[..., Any] = PARTS[part.id].build
        elif part.id in catalog.cards() and self.id in catalog.card(part.id).benches:
            build = catalog.card(part.id).load()
        else:
            raise InputError("methods", part.id, nearest(part.id, PARTS))
        knobs = checked_knobs(build, part)
        h.search, h.name = build(**_context(build, h.setting) | knobs), part.id
        if h.search.longest > h.setting["k"]:
            raise InputError(f"lengths of {part.id}", h.search.longest, f"at most k={h.setting['k']}")

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        if h.search is None:
            raise TrialError("no search was mounted")
        system, budget = h.system, passes(h.system, setting)
        words: list[MagicWord] = []
        start, before = time.perf_counter(), system.forwards
        for number in range(len(h.grouped)):
            log.progress(number, len(h.grouped), f"{number} of {len(h.grouped)} states")
            words += search_state(h.grouped, number, h.search, budget, rng.seed("search") % 2**31)
        seconds, forwards = time.perf_counter() - start, system.forwards - before
        found = Controllability(tuple(words), setting["k"], seconds, forwards)
        items = {
            "reached": [float(word.reached) for word in words],
            "loss": [word.loss for word in words],
            "passes": [float(word.passes) for word in words],
            "length": [float(setting["k"] + 1 if word.k is None else word.k) for word in words],
        }
        for kind in KINDS:
            if kind in found.kinds:
                items[f"reached_{kind.replace('-', '_')}"] = [float(word.reached) for word in found.of(kind)]
        for name, values in items.items():
            log.per_item(name, values)
        log.texts("words", [_record(system, word) for word in words])
        log.texts("summary", [found.to_json()])
        prompted = [word for word in words if word.k]
        figures = {name: float(np.mean(values)) for name, values in items.items()}
        figures |= {"without_prompt": float(np.mean([word.k == 0 for word in words]))}
        reached = [word for word in words if word.reached]
        if reached:
            figures["verified"] = float(np.mean([_confirmed(system, word) for word in reached]))
        if prompted:
            figures["survives_as_text"] = float(np.mean([word.text_roundtrip for word in prompted]))
        if forwards:
            figures["passes_per_s"] = forwards / seconds
        return figures

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = [
            Note(
                "The prompts shown are adversarial strings that a search found, no natural text. What no search "
                "reached may still be reachable: one minus a share is an upper estimate of epsilon.",
                "warning",
                "How to read these prompts",
            )
        ]
        for setting in comparison.settings:
            words = {label: words_of(comparison, label, setting) for label in comparison.contenders}
            words = {label: found for label, found in words.items() if found}
            if not words:
                continue
            first = comparison.select(next(iter(words)), **setting)[0].setting
            found = {label: Controllability(tuple(rows), first["k"]) for label, rows in words.items()}
            kinds = next(iter(found.values())).kinds
            for kind in kinds:
                lines = {label: _line(value.curve(kind)) for label, value in found.items()}
                title = f"Reached share against prompt length: {kind or 'all'}"
                blocks.append(
                    Curves(title, lines, "prompt tokens k", "share", band="95% Wilson interval", setting=setting)
                )
            rows = [
                [label, kind, *value.decay(kind).values(), value.rank_correlation(kind)]
                for label, value in found.items()
                for kind in kinds
            ]
            caption = (
                "Slopes of log epsilon by k, apart where the search changes; Spearman's correlation of k with the "
                "prior rank of the target, unsolved pairs counting as k + 1."
            )
            names = ["contender", "targets", "slope, k ≤ 3", "slope, k ≥ 4", "rank correlation"]
            rows = [["" if cell is None else cell for cell in row] for row in rows]
            blocks.append(TableBlock("Length and rank", names, rows, caption, setting))
            shown = _side_by_side(comparison, setting)
            if shown is not None:
                blocks.append(shown)
        return blocks


def passes(system: System, setting: Setting) -> int:
    """The budget of a pair: as asked for, or what the back-off search takes at most."""
    if setting["passes"] is not None:
        return int(setting["passes"])
    cost = BackOff(**_context(BackOff, setting)).cost(len(system.allowed))
    return cost + 1  # the pass without a prompt


def _context(build: Callable[..., Any], setting: Setting) -> dict[str, Any]:
    """Sizes of the setting that a search's constructor names."""
    k = setting["k"]
    sizes: dict[str, Any] = {name: setting[name] for name in ("iterations", "candidates", "k_sub")}
    sizes |= {"k": k, "greedy": min(3, k), "lengths": [n for n in LENGTHS if 3 < n <= k]}
    return {name: value for name, value in sizes.items() if name in inspect.signature(build).parameters}


def _pairs(s: Subject, system: System, setting: Setting, rng: Streams) -> list[Any]:
    kinds = [name.strip() for name in setting["kinds"].split(",") if name.strip()]
    seed = rng.seed("states") % 2**31
    sizes = (setting["states"], setting["shortest"], setting["longest"], kinds, seed, setting["multi_token"])
    if setting["input"] is not None:
        return read_pairs(setting["input"], system, *sizes)
    if s.reference is None:
        raise InputError("input", None, "a .jsonl of 'x0' and 'y', or a text (the subject is no reference model)")
    with tempfile.TemporaryDirectory(prefix="steersman-input-") as temporary:
        texts = subjects.write_input(subjects.resolve(s.reference), Path(temporary), split="heldout")
        assert texts is not None
        return read_pairs(texts, system, *sizes)


@torch.no_grad()
def _confirmed(system: System, word: MagicWord) -> bool:
    """Whether a fresh pass over the whole row, without anything of the search, gives the target."""
    ids = torch.tensor([[*word.input_ids, *word.y[:-1]]], device=system.device)
    top = system.model(input_ids=ids).logits[0, -len(word.y) :].argmax(-1)
    return tuple(top.tolist()) == word.y


def _record(system: System, word: MagicWord) -> dict[str, Any]:
    return word.to_json() | {"x0_text": system.decode(word.x0), "y_text": system.decode(word.y)}


def _read(comparison: Comparison, row: Any) -> list[dict[str, Any]]:
    folder = row.items_dir(comparison.out)
    return [] if folder is None else json.loads((folder / "words.json").read_text())


def words_of(comparison: Comparison, contender: str, setting: Mapping[str, Any]) -> list[MagicWord]:
    """The magic words that a contender found at a setting, over all seeds."""
    records = [r for row in comparison.select(contender, **setting) for r in _read(comparison, row)]
    return [MagicWord.from_json({k: v for k, v in r.items() if k not in ("x0_text", "y_text")}) for r in records]


def _line(curve: Sequence[Any]) -> Line:
    return Line([s.k for s in curve], [s.share for s in curve], [s.low for s in curve], [s.high for s in curve])


def _side_by_side(comparison: Comparison, setting: Mapping[str, Any]) -> SideBySide | None:
    """Prompts of the first seed, each in front of its state and marked; pairs that some search needed a prompt for."""
    by_label = {
        label: _read(comparison, rows[0])
        for label in comparison.contenders
        if (rows := comparison.select(label, **setting))
    }
    if not by_label:
        return None
    items = []
    for place, first in enumerate(next(iter(by_label.values()))):
        here = {label: records[place] for label, records in by_label.items() if place < len(records)}
        if not any(record["k"] for record in here.values()):
            continue
        texts = {}
        for label, record in here.items():
            text = record["text"] + record["x0_text"]
            kind: Literal["steered", "bad"] = "steered" if record["k"] is not None else "bad"
            note = "adversarial prompt" if kind == "steered" else "adversarial prompt; does not reach the target"
            spans = [Span(0, len(record["text"]), kind, note)] if record["text"] else []
            reached = f"{record['k']} tokens" if record["k"] is not None else "not reached"
            texts[label] = Text(text, spans, f"{reached}, cross-entropy {record['loss']:.2f}")
        title = f"wanted next token: {first['y_text']!r} (rank {first['rank']} without a prompt)"
        items.append(Answers(title, texts))
    if not items:
        return None
    caption = "Adversarial prompts in front of the state; the first seed."
    return SideBySide("Prompts found", items[:SHOWN], caption, setting)
