"""``steersman probe magic-word``: how far a short prompt can push a model, state by state.

    states.jsonl     one line a state, written and synced as it is done: x0, and the prompt found for every target
    reachable.png    reached share against prompt length, by class of targets, with Wilson intervals
    report.html      the same with tables: shares, prompts found, the bound on attention heads (one file, no network)
    probe.json       settings, fingerprints, shares and the table of bounds

An interrupt or a kill loses at most the state in progress. A state's draws depend on the seed and on its place alone,
so that an interrupted run ends with the states of an uninterrupted one.

The prompts found are adversarial strings: the files say so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steersman.errors import InputError
from steersman.language.loading import load_language_model
from steersman.language.magic_word.attention_bound import attention_table, model_layer
from steersman.language.magic_word.data import KINDS, read_pairs
from steersman.language.magic_word.finding import NOTICE, Controllability, MagicWord, search_state, states_of
from steersman.language.magic_word.page import page, plot
from steersman.language.magic_word.search import Accept, BackOff, Success
from steersman.language.magic_word.system import Bos, System, whole

STATES = "states.jsonl"


def probe(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    resume: bool = False,
    states: int = 12,
    shortest: int = 8,
    longest: int = 32,
    kinds: str = ",".join(KINDS),
    greedy: int = 3,
    lengths: str = "4,6",
    iterations: int = 15,
    candidates: int = 128,
    k_sub: int = 64,
    success: Success = "any",
    accept: Accept = "improve",
    alphabet: int | None = None,
    budget: int | None = None,
    bos: Bos = "outer",
    multi_token: bool = False,
    batch: int | None = None,
    layers: str = "0",
) -> dict[str, Any]:
    """Search every pair of a set of states, and bound the heads of some layers.

    Args:
        subject: a model folder or hub id, or ``file.py:factory`` that returns ``(model, tokenizer)``.
        input: ``.jsonl`` with ``x0`` and ``y`` (or ``text``) in each line, or a text; reference subjects bring theirs.
        out: folder for what is measured.
        seed: of places, targets and searches.
        log: gets a line for each state.
        resume: keep the states that ``out`` holds.
        states: number of states that are cut from a text.
        shortest, longest: tokens of a state.
        kinds: classes of wanted tokens, with commas between: true-next, top-75, uniform.
        greedy: prompt lengths that are searched by greedy back generation.
        lengths: longer lengths, searched by GCG; 4,6,8,10 in the paper.
        iterations: of GCG at each length; 34 in the paper.
        candidates: of an iteration; 768 in the paper.
        k_sub: ids a position, those of the steepest gradient; 128 in the paper.
        success: any tests every candidate; argmin is as published.
        accept: improve, or always (as published), which also takes a best candidate that is worse.
        alphabet: ids that prompts may use, drawn at random; None: all.
        budget: forward passes a pair; None: the whole schedule.
        bos: outer puts the beginning-of-sequence token before the prompt, inner behind it.
        multi_token: allow wanted texts of several tokens.
        batch: rows of a forward pass.
        layers: whose heads are bounded, as ``0,1``; empty: none.

    Returns:
        Shares with intervals by class, slopes, correlations, forward passes and their rate, and the table of bounds.

    Raises:
        InputError: a subject, an input or a setting that is not allowed; the folder holds other states.
    """
    search = BackOff(greedy, _numbers("lengths", lengths), iterations, candidates, k_sub, success, accept)
    bounded = _numbers("layers", layers)
    whole("seed", seed, 0)
    if budget is not None:
        whole("budget", budget, 1)
    wanted = tuple(name.strip() for name in kinds.split(",") if name.strip())
    if input is None:
        raise InputError("input", None, "a .jsonl file of 'x0' and 'y', or a text file (no reference subject)")
    model, tokenizer = load_language_model(subject)
    system = System(model, tokenizer, bos=bos, alphabet=alphabet, batch=batch, seed=seed)
    pairs = read_pairs(input, system, states, shortest, longest, wanted, seed, multi_token)
    grouped = states_of(system, pairs, multi_token)
    for state, answers in grouped:
        for y, _ in answers:
            state.check(search.longest, len(y))
    for layer in bounded:
        try:
            model_layer(system, grouped[0][0].x0, layer)
        except InputError as error:
            if error.parameter != "model":
                raise InputError("layers", layers, error.allowed) from None
            log(f"no bound on attention heads: {error}")
            bounded = ()
            break
    kept = _kept(out / STATES, [state.x0 for state, _ in grouped]) if resume else []
    cost = search.cost(len(system.allowed)) if budget is None else budget
    log(f"{len(grouped)} states, {len(pairs)} pairs, at most {cost} forward passes each; {len(kept)} states are kept")
    if budget is not None and budget < len(system.allowed):
        log(f"a budget of {budget} affords no scan of {len(system.allowed)} ids: GCG alone searches")
    records = list(kept)
    with (out / STATES).open("ab") as file:
        for number in range(len(kept), len(grouped)):
            start, before = time.perf_counter(), system.forwards
            words = search_state(grouped, number, search, budget, seed)
            forwards, seconds = system.forwards - before, time.perf_counter() - start
            x0 = grouped[number][0].x0
            record = {"state": number, "x0": list(x0), "text": system.decode(x0), "notice": NOTICE}
            record |= {"words": [word.to_json() for word in words], "forwards": forwards, "seconds": seconds}
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            records.append(record)
            reached = f"{sum(word.reached for word in words)} of {len(words)} reached"
            log(f"state {number + 1} of {len(grouped)}: {reached}, {forwards / seconds:.0f} forward passes a second")
    found = Controllability(
        tuple(MagicWord.from_json(word) for record in records for word in record["words"]),
        search.longest,
        sum(record["seconds"] for record in records),
        sum(record["forwards"] for record in records),
    )
    table = attention_table(system, grouped[0][0].x0, layers=bounded, seed=seed) if bounded else []
    prompted = [word for word in found.words if word.k]
    figure = plot(found)
    figure.savefig(out / "reachable.png", dpi=150)
    (out / "report.html").write_text(page(found, table, figure, system, str(subject), cost), encoding="utf-8")
    return {
        **found.to_json(),
        "forward_passes": found.forwards,
        "forward_passes_a_second": found.passes_per_second,
        "text_roundtrip": sum(w.text_roundtrip for w in prompted) / len(prompted) if prompted else None,
        "attention": table,
        "vacuous_bounds": sum(row["vacuous"] for row in table),
        "notice": f"prompts in {STATES}: {NOTICE}",
    }


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(piece) for piece in str(text).split(",") if piece.strip())
    except ValueError:
        raise InputError(name, text, "whole numbers with commas between, as 4,6,8") from None


def _kept(path: Path, states: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Finished states of an interrupted run, in order; a torn last line is dropped from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end != len(content):
        os.truncate(path, end)
    try:
        records = [json.loads(line) for line in content[:end].splitlines()]
        same = [tuple(record["x0"]) for record in records] == list(states[: len(records)])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("resume", str(path), f"a file of finished states ({error})") from None
    if not same:
        raise InputError("resume", str(path), "of the same states (the input or the settings are others)")
    return records
