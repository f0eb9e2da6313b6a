"""Measure a pair of models: how many of n drafts each verifier keeps, and the most that any could."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.errors import InputError
from steersman.language.loading import load_language_model
from steersman.language.multi_draft.acceptance import acceptance, optimal_acceptance
from steersman.language.multi_draft.contexts import Contexts, contexts
from steersman.language.multi_draft.laws import VERIFIERS
from steersman.language.texts import read_rows, texts_of
from steersman.language.vocabularies import same_vocabulary

COLUMNS = ("temperature", "n_drafts", "sampler", "verifier", "acceptance", "bound", "gap", "low", "high")
AT_ONCE = 16  # contexts
RESAMPLES = 2000
FEWEST = 16  # texts at a temperature


def probe(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int,
    log: Callable[[str], None],
    draft: Path | None = None,
    temperatures: str = "0.2,0.6,1.0",
    n_drafts: str = "2,3",
    top_p: float = 1.0,
    places: int = 128,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
) -> dict[str, Any]:
    """Write ``acceptance.csv`` and ``acceptance.png``: each verifier's rate, its sampler's bound, and the gap.

    Args:
        subject: the target: a folder, a hub id, or ``file.py:factory`` that returns (model, tokenizer).
        input: prompts: a text file with one a line, or rows (.jsonl, .csv) with ``prompt`` or ``text``; without it the
            target's texts begin with its beginning-of-sequence token.
        out: the folder to write in.
        seed: of the texts that the target writes.
        log: gets a line for each temperature.
        draft: the draft model, named as the subject is.
        temperatures: numbers with commas between; 0 is greedy.
        n_drafts: whole numbers with commas between.
        top_p: of nucleus sampling.
        places: places of the target's texts where laws are taken, for each temperature; fewer at temperature 0 if there
            are few prompts, since each has one text there.
        prompt_tokens: tokens of a prompt that is cut from a text.
        new_tokens: tokens that the target writes behind each prompt.

    Returns:
        Mean acceptance of each verifier and bound of each sampler at the last temperature and n, and the number of
        contexts there.

    Raises:
        InputError: no draft, a model that doesn't load, another vocabulary, prompts that can't be read, or a number out
            of range.
    """
    if draft is None:
        raise InputError("draft", None, "a smaller model with the subject's vocabulary: --set draft=./my-small-model")
    for name, value in (("places", places), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise InputError(name, value, "a whole number of at least 1")
    heats, counts = _numbers("temperatures", temperatures, float), _numbers("n_drafts", n_drafts, int)
    target, tokenizer = load_language_model(subject)
    small, other = load_language_model(draft, "draft")
    same_vocabulary(tokenizer, other, "draft", str(draft))
    limits = (getattr(model.config, "max_position_embeddings", None) for model in (target, small))
    room = min(limit or 2**31 for limit in limits) - new_tokens
    if room < 1:
        raise InputError("new_tokens", new_tokens, f"fewer than the models' positions ({room + new_tokens})")
    most = max(FEWEST, -(-places // new_tokens))
    prompts = _prompts(input, tokenizer, min(prompt_tokens, room), most, seed)
    repeated = [prompts[i % len(prompts)] for i in range(max(most, len(prompts)))]
    rows: list[dict[str, Any]] = []
    for heat in heats:
        generator = torch.Generator(target.device).manual_seed(seed)
        found = contexts(
            target,
            small,
            repeated if heat else prompts,  # a greedy text is the same each time
            count=places if heat else min(places, len(prompts) * new_tokens),
            temperature=heat,
            top_p=top_p,
            new_tokens=new_tokens,
            generator=generator,
        )
        if len(prompts) > 1:
            found = replace(found, prompt=found.prompt % len(prompts))
        rows += [row for n in counts for row in gaps(found, n, heat)]
        best = max((row for row in rows if row["temperature"] == heat), key=lambda row: row["acceptance"])
        log(
            f"temperature {heat:g}: {len(found.p)} contexts; most is kept by {best['verifier']} with "
            f"{best['n_drafts']} drafts ({best['acceptance']:.3f}, bound {best['bound']:.3f})"
        )
    with (out / "acceptance.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    _plot(rows, out / "acceptance.png")
    last = [row for row in rows if row["temperature"] == heats[-1] and row["n_drafts"] == counts[-1]]
    kept = {row["verifier"]: row["acceptance"] for row in last}
    bounds = {f"bound_{row['sampler']}": row["bound"] for row in last}
    return {"contexts": len(found.p), "temperature": heats[-1], "n_drafts": counts[-1], **kept, **bounds}


def gaps(found: Contexts, n: int, temperature: float) -> list[dict[str, Any]]:
    """A row for each verifier that takes n drafts: mean acceptance, its sampler's mean bound, and their difference with
    a 95% bootstrap interval over prompts (over texts if there is but one prompt)."""
    generator = torch.Generator(found.p.device).manual_seed(0)
    parts = list(zip(found.p.split(AT_ONCE), found.q.split(AT_ONCE), found.ranking.split(AT_ONCE), strict=True))
    bounds: dict[str, Tensor] = {}
    rows = []
    for verifier, sampler in VERIFIERS.items():
        if verifier == "ot-lp" or (verifier == "single") != (n == 1) or (verifier == "spechub" and n != 2):
            continue
        if sampler not in bounds:
            bounds[sampler] = torch.cat([optimal_acceptance(p, q, n, sampler, ranking=r) for p, q, r in parts]).cpu()
        kept = torch.cat([acceptance(p, q, n, verifier, ranking=r, generator=generator) for p, q, r in parts]).cpu()
        gap = bounds[sampler] - kept
        low, high = _interval(gap, found.prompt)
        rows.append(
            {
                "temperature": temperature,
                "n_drafts": n,
                "sampler": sampler,
                "verifier": verifier,
                "acceptance": float(kept.mean()),
                "bound": float(bounds[sampler].mean()),
                "gap": float(gap.mean()),
                "low": low,
                "high": high,
            }
        )
    return rows


def _interval(values: Tensor, cluster: Tensor) -> tuple[float, float]:
    """Percentile bootstrap of the mean: prompts are resampled, since contexts of one are alike; nan if there is one."""
    labels, which = torch.unique(cluster, return_inverse=True)
    if len(labels) < 2:
        return math.nan, math.nan
    sums = torch.zeros(len(labels), dtype=values.dtype).index_add(0, which, values)
    sizes = torch.zeros(len(labels), dtype=values.dtype).index_add(0, which, torch.ones_like(values))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(labels), (RESAMPLES, len(labels)), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _prompts(path: Path | None, tokenizer: Any, length: int, most: int, seed: int) -> list[Tensor]:
    bos = tokenizer.bos_token_id
    if path is None:
        start = bos if bos is not None else tokenizer.eos_token_id
        if start is None:
            raise InputError("input", None, "a file of prompts: the tokenizer has no token that texts begin with")
        return [torch.tensor([start])]
    if path.suffix.lower() == ".txt" or not path.suffix:
        try:
            whole = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("input", str(path), f"a text file that can be read ({error})") from None
        texts = [line for line in whole.split("\n") if line.strip()]
    else:
        rows = read_rows(path)
        texts = texts_of(rows, "prompt" if "prompt" in rows[0] else "text", path)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:most].tolist()
    ids = [tokenizer(texts[i], truncation=True, max_length=length)["input_ids"] for i in order]
    prompts = [torch.tensor(row) for row in dict.fromkeys(map(tuple, ids)) if row]  # each once
    if not prompts:
        raise InputError("input", str(path), "a file with at least one prompt")
    return prompts


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(piece) for piece in str(text).split(",")]
    except ValueError:
        raise InputError(name, text, "numbers with commas between") from None


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Acceptance by verifier, a panel for each temperature and n, with the bound of each sampler as a mark."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["temperature"], row["n_drafts"]) for row in rows))
    figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (temperature, n) in zip(axes, panels, strict=True):
        shown = [row for row in rows if (row["temperature"], row["n_drafts"]) == (temperature, n)]
        names = [row["verifier"] for row in shown]
        axis.bar(names, [row["acceptance"] for row in shown], color="#4878a8", label="kept")
        axis.plot(names, [row["bound"] for row in shown], "_", color="black", markersize=22, label="bound")
        axis.set_title(f"temperature {temperature:g}, n = {n}", fontsize=9)
        axis.tick_params(axis="x", labelrotation=45, labelsize=8)
    axes[0].set_ylabel("chance that a draft is kept")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
