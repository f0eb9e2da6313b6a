"""``steersman apply gedi``: a guide trained on labelled texts, for a language model whose vocabulary it shares."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback, TrainingArguments

from steersman.errors import InputError, nearest
from steersman.language.gedi.codes import ControlCodes, parted
from steersman.language.gedi.training import GeDiTrainer, save_guide, tokenized
from steersman.language.loading import load_language_model
from steersman.language.texts import read_rows
from steersman.language.training import Told, on_its_own
from steersman.language.vocabularies import same_vocabulary

TEXT = ("text", "sentence", "comment_text", "content", "review", "description")
"""Columns that are taken for the text, in this order."""
PUBLISHED_RATE, PUBLISHED_SIZE = 2e-5, 355e6  # the authors' learning rate, and the size of their guide
MOST_CODES = 3  # values from which on keywords are used


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    attribute: str = "sentiment=positive",
    codes: Literal["auto", "values", "keyword"] = "auto",
    code_tokens: str | None = None,
    held_out: str | None = None,
    guide: str | None = None,
    layers: int | None = None,
    gen_weight: float = 0.6,
    learn_scale: bool = True,
    learn_bias: bool = False,
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 16,
    learning_rate: float | None = None,
    length: int = 192,
    text_column: str | None = None,
) -> dict[str, Any]:
    """Train a guide for the language model ``subject``.

    Args:
        subject: a causal language model's folder, hub id, or file.py:factory.
        input: .jsonl, .csv or .tsv with texts and the attribute's column; ``reviews`` brings its own.
        out: where the guide goes, an ordinary transformers folder.
        seed: of batches and what is drawn.
        log: gets a line now and then.
        attribute: what is wanted, column=value.
        codes: values: a code for each value of the column; keyword: true and false, with the value's words, which
            takes other words later; auto: keyword from four values on.
        code_tokens: tokens for the codes, with commas, in the order of the values (sorted), or true,false.
        held_out: a value whose texts are left out (to see what a keyword does that was never trained).
        guide: the model to start from, of the subject's vocabulary; by default the subject's own first layers.
        layers: how many of them; by default a quarter of the subject's, or all of another guide's.
        gen_weight: lambda; 1 is a plain class-conditional model.
        learn_scale: learn the scale of log-likelihoods.
        learn_bias: learn a bias of each code.
        steps: optimizer steps; by default as many as the epochs have.
        epochs: passes over the texts.
        batch_size: texts of a step; each stands under every code.
        learning_rate: the largest; by default the published 2e-5 at the published size of 355M, and more for smaller
            guides, with the power 3/4.
        length: tokens of a text at most.
        text_column: the column of texts; by default text, sentence, comment_text, content, review or description (with
            a title in front).

    Returns:
        dict: accuracy by Bayes' rule and log-likelihood on texts that were set aside, scale, parameters.

    Raises:
        InputError: a subject, input or settings that don't fit together.
    """
    for name, value, low in (
        ("batch_size", batch_size, 1),
        ("length", length, 2),
        ("steps", steps, 1),
        ("layers", layers, 1),
    ):
        if value is not None and (isinstance(value, bool) or value < low):
            raise InputError(name, value, f"a whole number of at least {low}")
    if not 0 < epochs < math.inf:
        raise InputError("epochs", epochs, "a number above 0")
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise InputError("learning_rate", learning_rate, "a number above 0 and below 1")
    column, wanted = parted(attribute)
    if input is None:
        raise InputError("input", None, f"a .jsonl, .csv or .tsv file with texts and a column {column!r}")
    texts, given = read_labelled(input, column, text_column)
    if held_out is not None and held_out not in given:
        raise InputError("held_out", held_out, nearest(held_out, set(given)))
    kept = [(text, value) for text, value in zip(texts, given, strict=True) if value != held_out]
    values = sorted({value for _, value in kept})
    if wanted not in values and wanted != held_out:
        raise InputError("attribute", attribute, f"{column}= {nearest(wanted, values)}")
    keywords = codes == "keyword" or (codes == "auto" and len(values) > MOST_CODES)
    if held_out is not None and not keywords:
        raise InputError("held_out", held_out, "used with codes=keyword: a value's own code isn't there without texts")

    model, tokenizer = _start(subject, guide, layers)
    names = [name.strip() for name in code_tokens.split(",")] if code_tokens else []
    chosen = ControlCodes.choose(tokenizer, column, values, wanted, keywords, names)
    _told_apart(model, [i for i in chosen.ids if i in tokenizer.all_special_ids], seed)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(1, *(len(chosen.words(v, tokenizer)) + 1 for v in values)) if keywords else 1
    length = length if limit is None else min(length, limit - longest)
    data = tokenized(tokenizer, [t for t, _ in kept], [values.index(v) for _, v in kept], len(values), length)
    training, aside = _divided(data, len(values), seed)

    size = sum(p.numel() for p in model.parameters())
    rate = learning_rate or PUBLISHED_RATE * max(1.0, PUBLISHED_SIZE / size) ** 0.75
    log(f"{size} parameters, {len(training)} texts of {', '.join(values)}")
    with tempfile.TemporaryDirectory(prefix="steersman-gedi-") as scratch, on_its_own(seed):
        args = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            max_steps=steps or -1,
            num_train_epochs=epochs,
            learning_rate=rate,
            weight_decay=0.0,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=0.1,
            dataloader_pin_memory=False,
        )
        trainer = GeDiTrainer(
            model,
            args,
            chosen,
            training,
            aside,
            processing_class=tokenizer,
            gen_weight=gen_weight,
            learn_scale=learn_scale,
            learn_bias=learn_bias,
            callbacks=[Told(log)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        measured = trainer.evaluate()
        learned = trainer.learned_codes()
        save_guide(trainer.classifier.guide, tokenizer, learned, out)
    return {
        "codes": "keyword" if keywords else "values",
        "values": values,
        "accuracy": measured["eval_accuracy"],
        "nll": measured["eval_nll"],
        "logit_scale": learned.logit_scale,
        "bias": list(learned.bias),
        "parameters": size,
        "texts": len(training),
        "set_aside": len(aside),
        "steps": trainer.state.global_step,
        "learning_rate": rate,
    }


def read_labelled(path: Path, column: str, text_column: str | None = None) -> tuple[list[str], list[str]]:
    """Texts and their values of ``column``, from .jsonl, .csv or .tsv with a header.

    Column names are found whatever their case. Rows without text are left out.

    Raises:
        InputError: a file of another form, or without the columns.
    """
    path, rows = Path(path), read_rows(path)
    names = {str(name).lower(): name for name in rows[0]}
    if column.lower() not in names:
        raise InputError("attribute", column, f"a column of {path.name}, {nearest(column, map(str, rows[0]))}")
    asked = [text_column] if text_column else TEXT
    named = next((names[name.lower()] for name in asked if name.lower() in names), None)
    if named is None:
        raise InputError("text_column", text_column, f"a column of {path.name}, {nearest('text', map(str, rows[0]))}")
    title = names.get("title") if str(named).lower() == "description" else None
    texts, values = [], []
    for number, row in enumerate(rows, 1):
        text, value = row.get(named), row.get(names[column.lower()])
        if value is None or value == "":
            raise InputError("input", str(path), f"rows that all have {column!r} (row {number} has none)")
        if not isinstance(text, str) or not text.strip():
            continue
        texts.append(f"{row.get(title)} {text}" if title and row.get(title) else text)
        values.append(json.dumps(value) if isinstance(value, bool) else str(value).strip())
    if len(set(values)) < 2:
        raise InputError(
            "input", str(path), f"texts of at least two values of {column!r} (all are {', '.join(set(values))})"
        )
    return texts, values


def _divided(data: list[dict[str, Any]], classes: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A twentieth of the texts, at most 400 and one of each class, is set aside to measure on."""
    order = random.Random(seed).sample(range(len(data)), len(data))
    left = Counter(row["label"] for row in data)
    aside: list[int] = []
    for i in order:
        if len(aside) >= min(400, max(classes, len(data) // 20)):
            break
        if left[data[i]["label"]] > 1:
            left[data[i]["label"]] -= 1
            aside.append(i)
    if not aside:
        raise InputError("input", f"{len(data)} texts", "at least two texts of some value")
    chosen = set(aside)
    return [data[i] for i in order if i not in chosen], [data[i] for i in aside]


def _start(subject: str | Path, guide: str | None, layers: int | None) -> tuple[Any, Any]:
    """The model that training starts from, and the tokenizer that it shares with the subject."""
    model, tokenizer = load_language_model(subject, "subject", "float32")
    if guide is not None:
        other, own = load_language_model(guide, "guide", "float32")
        same_vocabulary(tokenizer, own, "guide", guide)
        return (_first_layers(other, layers) if layers else other), tokenizer
    total = model.config.get_text_config().num_hidden_layers
    return _first_layers(model, layers or max(1, total // 4)), tokenizer


@torch.no_grad()
def _told_apart(model: Any, ids: list[int], seed: int) -> None:
    """Give reserved tokens, which no text has, embeddings in directions of their own.

    Training has pushed all of them the same way, and a guide would first have to find out that its codes differ.
    """
    table, generator = model.get_input_embeddings().weight, torch.Generator().manual_seed(seed)
    for i in ids:
        direction = torch.randn(table.shape[1], generator=generator).to(table.device)
        table[i] = (direction * table.norm(dim=1).median() / direction.norm()).to(table)


def _first_layers(model: Any, layers: int) -> Any:
    """A copy of the model with its first layers only: embeddings, final norm and head are kept."""
    config = type(model.config).from_dict(model.config.to_dict())
    total = config.num_hidden_layers
    if layers > total:
        raise InputError("layers", layers, f"at most the {total} that the model has")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    copy = type(model)(config)
    missing, _ = copy.load_state_dict(model.state_dict(), strict=False)
    if missing:
        raise InputError(
            "layers", layers, f"left out: {type(model).__name__} has weights that depend on it ({missing[0]})"
        )
    return copy.float()
