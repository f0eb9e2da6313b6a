"""``steersman apply rectification``: a value model for a language model, learned from its own finished texts."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainingArguments

from steersman import quiet
from steersman.errors import InputError
from steersman.language.rectification.q_model import QModel
from steersman.language.rectification.training import DeadEndTrainer, collate
from steersman.language.rectification.trajectories import (
    Data,
    Scorer,
    Trajectory,
    cut_prompts,
    recorded,
    scored,
    selected,
    written,
)
from steersman.language.texts import opening_of, read_rows, texts_of
from steersman.language.training import Told, on_its_own
from steersman.language.vocabularies import same_vocabulary

HELD_OUT = 0.1  # of the prompts


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    attribute: str = "rudeness=polite",
    scorer: Callable[..., Any] | None = None,
    data: Data = "all",
    prompts: int = 1000,
    prompt_tokens: int | None = None,
    near: int | None = 8,
    continuations: int = 4,
    new_tokens: int = 64,
    drop_rate: float | None = None,
    writer: str | None = None,
    trunk: str | None = None,
    layers: int | None = None,
    head_dropout: float = 0.0,
    epochs: int = 3,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    warmup_steps: int = 500,
    gamma: float = 1.0,
    lam: float = 0.9,
    tau: float = 0.1,
    include_prompt: bool = False,
) -> dict[str, Any]:
    """Learn which next tokens lead the language model ``subject`` to texts without the attribute.

    Args:
        subject: a causal language model of transformers with its tokenizer, a folder or hub id.
        input: .jsonl or .csv with ``text``. With ``reward`` in [-1, 0] or ``score`` in [0, 1] (1: as wanted) in its
            rows, these texts (each behind its ``prompt``, if it has one) are what is learned from. Else prompts are cut
            from the texts, the subject goes on, and the scorer judges. Without a scorer the texts themselves are
            learned from, by their label.
        out: where the value model goes.
        seed: of prompts, texts, weights and batches.
        log: gets a line now and then.
        attribute: column=value, what finished texts should have. The column may be in ``input``: prompts are then cut
            from texts with and without the value in turn.
        scorer: from texts to numbers in [0, 1], 1 where a text has the attribute.
        data: all continuations, most (the most and the least undesired of each prompt, as published), or sample (six).
        prompts: number of prompts.
        prompt_tokens: of a prompt; None cuts at a random place.
        near: with prompt_tokens=None, texts of the input that turn undesired are cut at most this many tokens before
            they do; None is anywhere. What follows is the model's own either way.
        continuations: texts for each prompt (25 in the paper).
        new_tokens: most tokens of a continuation.
        drop_rate: chance that a prompt without any undesired continuation is dropped; None is 0 with data=all, whose
            risks it would raise, and 0.5 else.
        writer: another model of the same vocabulary that writes in place of the subject.
        trunk: a causal language model of the same vocabulary whose trunk the value model begins with; None is the
            subject.
        layers: only so many of the trunk's first layers; None is all.
        head_dropout: in [0, 1).
        epochs: passes over the texts.
        batch_size: texts of a step.
        learning_rate: the largest, on a linear schedule.
        warmup_steps: steps up to that rate, at most a tenth of all.
        gamma: discount, in (0, 1].
        lam: λ of SARSA(λ) in [0, 1]; 0 is the published one-step target, which needs many more steps.
        tau: how fast the target head follows, in (0, 1].
        include_prompt: learn the values of the prompt's tokens too, as the published code does.

    Returns:
        dict: texts, share of undesired ones, parameters, losses, and on beginnings of held-out texts (all that was
        written behind them): Brier score of the risks, that of a constant, and by how much the risks are too high.

    Raises:
        InputError: a subject, input or settings that don't fit together.
    """
    for name, count in (("prompts", prompts), ("continuations", continuations), ("new_tokens", new_tokens),
                        ("epochs", epochs), ("batch_size", batch_size)):  # fmt: skip
        if isinstance(count, bool) or count < 1:
            raise InputError(name, count, "a whole number of at least 1")
    if drop_rate is not None and not 0 <= drop_rate <= 1:
        raise InputError("drop_rate", drop_rate, "a number from 0 to 1")
    if prompt_tokens is not None and prompt_tokens < 1:
        raise InputError("prompt_tokens", prompt_tokens, "a whole number of at least 1")
    if near is not None and near < 1:
        raise InputError("near", near, "a whole number of at least 1, or none")
    if data not in get_args(Data):
        raise InputError("data", data, f"one of {', '.join(get_args(Data))}")
    for name, share, good in (
        ("gamma", gamma, 0 < gamma <= 1),
        ("lam", lam, 0 <= lam <= 1),
        ("tau", tau, 0 < tau <= 1),
    ):
        if not good:
            raise InputError(name, share, f"a number {'from 0 to 1' if name == 'lam' else 'above 0, at most 1'}")
    column, equals, value = attribute.partition("=")
    if not (column and equals and value):
        raise InputError("attribute", attribute, "column=value, as rudeness=polite")
    if input is None:
        raise InputError("input", None, "a .jsonl or .csv file of texts")
    rows = read_rows(input)
    texts_of(rows, "text", input)
    tokenizer = AutoTokenizer.from_pretrained(subject)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    with on_its_own(seed):
        model = QModel.from_trunk(_vocabulary_checked(trunk, tokenizer, "trunk") or subject, layers, head_dropout)
        model.to(device)
        learned, held_out = _texts(
            _vocabulary_checked(writer, tokenizer, "writer") or subject, tokenizer, rows, random.Random(seed), log,
            column=column, value=value, scorer=scorer, data=data, prompts=prompts, prompt_tokens=prompt_tokens,
            near=near, continuations=continuations, new_tokens=new_tokens, drop_rate=drop_rate, longest=_longest(model),
        )  # fmt: skip
        bad = sum(t.reward < -0.5 for t in learned) / len(learned)
        if not 0 < bad < 1:
            allowed = "texts some of which are undesired, and some not" + (" (more prompts?)" if scorer else "")
            raise InputError("input", f"{bad:.0%} of {len(learned)} texts without {attribute}", allowed)
        steps = epochs * -(-len(learned) // batch_size)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch, num_train_epochs=epochs, per_device_train_batch_size=batch_size,
                learning_rate=learning_rate, warmup_steps=min(warmup_steps, steps // 10), weight_decay=0.0, seed=seed,
                use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", disable_tqdm=True,
                logging_steps=max(steps // 10, 1), dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = DeadEndTrainer(
                model, arguments, gamma=gamma, lam=lam, tau=tau, include_prompt=include_prompt,
                train_dataset=[t.row() for t in learned], callbacks=[Told(log)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.end_target()
    with quiet.loading():
        model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "texts": len(learned),
        "undesired": bad,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        **calibration(model, held_out, batch_size),
    }


@torch.no_grad()
def calibration(model: QModel, texts: Sequence[Trajectory], batch_size: int = 64) -> dict[str, float | int]:
    """How the risks of taken tokens compare with how the texts ended, on texts that were not selected by their end.

    Returns:
        dict: ``heldout_texts``, ``heldout_undesired``, ``brier`` (mean squared distance of -Q to the end),
        ``brier_constant`` (that of the share of undesired ends), ``excess_risk`` (mean of -Q less that share; above 0:
        over-estimated).
    """
    risks, ends = [], []
    for at in range(0, len(texts), batch_size):
        part = texts[at : at + batch_size]
        batch = collate([t.row() for t in part])
        ids = batch["input_ids"].to(model.device)
        actions = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        values = model(input_ids=ids, attention_mask=batch["attention_mask"].to(model.device), actions=actions).values
        for text, row in zip(part, values.cpu(), strict=True):
            taken = row[max(text.prompt_length, 1) - 1 : len(text.ids) - 1]
            risks.append((-taken).clamp(0, 1).double())
            ends.append(torch.full_like(risks[-1], float(text.reward < -0.5)))
    if not risks:
        return {"heldout_texts": 0}
    risk, end = torch.cat(risks), torch.cat(ends)
    share = end.mean()
    return {
        "heldout_texts": len(texts),
        "heldout_undesired": sum(t.reward < -0.5 for t in texts) / len(texts),
        "brier": float((risk - end).square().mean()),
        "brier_constant": float(share * (1 - share)),
        "excess_risk": float((risk - end).mean()),
    }


def _texts(
    writer: str | Path, tokenizer: Any, rows: list[dict[str, Any]], rng: random.Random, log: Callable[[str], None], *,
    column: str, value: str, scorer: Scorer | None, data: Data, prompts: int, prompt_tokens: int | None,
    near: int | None, continuations: int, new_tokens: int, drop_rate: float | None, longest: int,
) -> tuple[list[Trajectory], list[Trajectory]]:  # fmt: skip
    """Texts to learn from, and all texts of prompts that were held out."""
    opening = opening_of(tokenizer)
    labelled = all(row.get(column) not in (None, "") for row in rows)
    if any(row.get(name) not in (None, "") for row in rows for name in ("reward", "score")):
        return _split(recorded(rows, tokenizer, opening, longest), rng)
    if scorer is None:
        if not labelled:
            allowed = f"file.py:name, or given with texts that have a column {column!r}, a reward or a score"
            raise InputError("scorer", None, allowed)
        marked = [{"text": row["text"], "score": float(str(row[column]) == value)} for row in rows]
        return _split(recorded(marked, tokenizer, opening, longest), rng)
    if new_tokens + (prompt_tokens or 1) > longest - len(opening):
        allowed = f"at most {longest - len(opening) - (prompt_tokens or 1)} behind prompts, what the models take"
        raise InputError("new_tokens", new_tokens, allowed)
    # Texts are drawn with replacement, so those whose beginnings are held out must not be drawn for learning.
    distinct = sorted({str(row["text"]) for row in rows})
    apart = set(rng.sample(distinct, round(HELD_OUT * len(distinct)))) if prompts > 1 else set()
    sides = [row for row in rows if row["text"] in apart], [row for row in rows if row["text"] not in apart]
    cut = max(1, round(HELD_OUT * prompts)) if apart else 0

    def begun(rows: list[dict[str, Any]], n: int) -> list[tuple[int, ...]]:
        return cut_prompts(
            rows, n, tokenizer, opening, longest - new_tokens, rng, tokens=prompt_tokens, near=near,
            wanted=(column, value) if labelled else None, scorer=scorer,
        )  # fmt: skip

    learnt = begun(sides[1], prompts - cut)
    try:
        beginnings = [*(begun(sides[0], cut) if cut else []), *learnt]
    except InputError:  # so few texts that none of those held out has a beginning: nothing is measured
        cut, beginnings = 0, learnt
    with quiet.loading():
        model = AutoModelForCausalLM.from_pretrained(writer, use_safetensors=True).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    groups = written(model, tokenizer, beginnings, continuations, new_tokens, 256, log)
    flat = scored(scorer, tokenizer.batch_decode([list(t) for g in groups for t in g], skip_special_tokens=True))
    marks = [flat[i : i + continuations] for i in range(0, len(flat), continuations)]
    log(f"{sum(score < 0.5 for score in flat)} of {len(flat)} texts are undesired")
    rate = (0.0 if data == "all" else 0.5) if drop_rate is None else drop_rate
    held_out = selected(groups[:cut], marks[:cut], beginnings[:cut], "all", 0.0, rng)
    return selected(groups[cut:], marks[cut:], beginnings[cut:], data, rate, rng), held_out


def _split(texts: list[Trajectory], rng: random.Random) -> tuple[list[Trajectory], list[Trajectory]]:
    """All texts of a tenth of the prompts are held out."""
    if not texts:
        raise InputError("input", "no text", "texts of at least two tokens")
    names = sorted({t.prompt for t in texts})
    out = set(rng.sample(names, round(HELD_OUT * len(names))))
    return [t for t in texts if t.prompt not in out], [t for t in texts if t.prompt in out]


def _vocabulary_checked(folder: str | None, tokenizer: Any, parameter: str) -> str | None:
    if folder is not None:
        same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(folder), parameter, folder)
    return folder


def _longest(model: QModel) -> int:
    return model.config.max_position_embeddings or 2048
