r"""Trains the reference models `reviews/base`, `reviews/conditional`, `reviews/value` and `reviews/judge`.

    python train_reviews.py tokenizer base conditional value judge provenance

A word-level tokenizer of the grammar's words, then four Llama models on texts drawn from
`steersman.reference.reviews`, of which a tenth (by hash) is held out. A text is `<s> words </s>`; texts are packed
into rows of ROW tokens, and none sees another (positions begin anew, attention stays within a text).

`base` learns P(x): mean next-token cross-entropy. `judge` learns the same from other texts, is twice as large and
trained longer: it says how likely what other models wrote is.

`conditional` goes on from `base` and learns P(x | codes): before `<s>` stand control codes, of which the loss asks
nothing. A tenth of the texts has none, six tenths one (an attribute, then its value, drawn evenly), the rest each
attribute's with probability 1/2; the text is drawn from the law given its codes, so a rare value has as many texts as
a common one.

`value` learns P(attribute in the end | x_1..k) at every position k: four sigmoids (negative, neutral, positive, rude)
on the last hidden state, binary cross-entropies against what the text is in the end. Half of its texts are drawn
rude and half polite; each counts with the weight P(r) / (1/2), so that the minimum is still the law's own. Rudeness is
rare, so its term of the loss is small and learned last: it counts RUDE_TERM times as much as each of the others, which
moves no minimum either.

AdamW, linear warm-up, cosine decay to zero, gradients clipped to norm 1; in float32, stored in float16. The network
is compiled. Everything is seeded and runs on one thread, so the same interpreter, libraries and processor give the
same weights. `provenance.json` says what they were; a model that was not trained again keeps its record there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from steersman.reference import grammars, reviews

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "src" / "steersman_reference" / "reviews"
POSITIONS, ROW, ROWS = 128, 128, 8  # tokens known to a model, tokens a row, rows a step
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
RESERVED = ("<true>", "<false>")  # known to the tokenizer and to no model yet: codes for guides of many topics
HELD_OUT = 2000  # texts that losses are measured on
JUDGED = ("negative", "neutral", "positive", "rude")
RUDE_TERM = 10.0
P_RUDE = float(reviews.trace("")["rudeness"][0, 1])


@dataclass(frozen=True)
class Recipe:
    """One model and its training run.

    Args:
        hidden, layers, mlp, heads: the Llama configuration.
        steps: optimizer steps; fixed in advance from a measured speed.
        rate: peak learning rate.
        seed: of the initialisation and of the texts.
        start: the model whose weights it begins with, or None.
    """

    hidden: int
    layers: int
    mlp: int
    heads: int
    steps: int
    rate: float
    seed: int
    start: str | None


RECIPES = {
    "base": Recipe(192, 4, 512, 4, 4000, 2.5e-3, seed=21, start=None),
    "conditional": Recipe(192, 4, 512, 4, 1300, 1.5e-3, seed=22, start="base"),
    "value": Recipe(96, 3, 256, 3, 3000, 3e-3, seed=23, start=None),
    "judge": Recipe(256, 5, 640, 4, 5000, 2e-3, seed=24, start=None),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word or mark, in the order of the alphabet; `<s>` before a text, as the models saw it."""
    known = sorted({word for kind in reviews.kinds() for word in kind.automaton.words if word})
    special = [PAD, BOS, EOS, UNKNOWN, *reviews.CODES.values(), *RESERVED]
    level = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *known])}, unk_token=UNKNOWN))
    level.normalizer = normalizers.Lowercase()
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    # A space before each word but not before a mark.
    level.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    level.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, special.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[*reviews.CODES.values(), *RESERVED],
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Example:
    """One text as tokens, the first ``silent`` of which the loss doesn't ask for; labels and weight for `value`."""

    ids: list[int]
    silent: int
    labels: tuple[float, ...]
    weight: float


def drawn(name: str, tokenizer: PreTrainedTokenizerFast, seed: int, split: reviews.Split) -> Iterator[Example]:
    """Endless examples for a model, as the docstring above says."""
    known = tokenizer.get_vocab()
    rng = random.Random(f"{name} {seed}")
    streams: dict[tuple[tuple[str, str], ...], Iterator[reviews.Review]] = {}
    names = list(reviews.VALUES)
    while True:
        given: dict[str, str] = {}
        if name == "conditional":
            how = rng.random()
            if how >= 0.1:
                chosen = [names[int(rng.random() * 4)]] if how < 0.7 else [a for a in names if rng.random() < 0.5]
                for a in chosen:
                    given[a] = reviews.VALUES[a][int(rng.random() * len(reviews.VALUES[a]))]
        elif name == "value":
            given["rudeness"] = reviews.RUDENESS[rng.random() < 0.5]
        key = tuple(given.items())
        if key not in streams:
            streams[key] = reviews.draws(split, seed, **given)
        review = next(streams[key])
        before = [known[reviews.CODES[item]] for item in key] if name == "conditional" else []
        ids = [*before, known[BOS], *(known[w] for w in reviews.words(review.text)), known[EOS]]
        labels = (*(float(review.sentiment == s) for s in reviews.SENTIMENTS), float(review.rudeness == "rude"))
        weight = 2 * (P_RUDE if review.rudeness == "rude" else 1 - P_RUDE) if name == "value" else 1.0
        yield Example(ids, len(before), labels, weight)


def packed(examples: Iterator[Example], rows: int) -> Iterator[list[list[Example]]]:
    """Endless batches: each example goes into the first row that has room for it, until none of the last 8 had."""
    waiting: list[Example] = []
    while True:
        batch: list[list[Example]] = [[] for _ in range(rows)]
        room, missed = [ROW] * rows, 0
        pending, waiting = waiting, []
        while missed < 8:
            example = pending.pop() if pending else next(examples)
            for i in range(rows):
                if len(example.ids) <= room[i]:
                    batch[i].append(example)
                    room[i] -= len(example.ids)
                    break
            else:
                waiting.append(example)
                missed += 1
        waiting += pending
        yield batch


def arrays(batch: list[list[Example]]) -> dict[str, torch.Tensor]:
    """ids, positions, attention within a text (additive), targets (-100: not asked), labels and weights by token."""
    rows = len(batch)
    ids = np.zeros((rows, ROW), dtype=np.int64)  # 0 pads
    positions = np.zeros((rows, ROW), dtype=np.int64)
    owner = np.full((rows, ROW), -1)
    targets = np.full((rows, ROW), -100, dtype=np.int64)
    labels = np.zeros((rows, ROW, len(JUDGED)), dtype=np.float32)
    weights = np.zeros((rows, ROW), dtype=np.float32)
    for i, row in enumerate(batch):
        at = 0
        for number, example in enumerate(row):
            size = len(example.ids)
            here = slice(at, at + size)
            ids[i, here], positions[i, here], owner[i, here] = example.ids, range(size), number
            targets[i, at + example.silent : at + size - 1] = example.ids[example.silent + 1 :]
            labels[i, here], weights[i, here] = example.labels, example.weight
            at += size
    seen = (owner[:, :, None] == owner[:, None, :]) & np.tril(np.ones((ROW, ROW), dtype=bool))
    mask = np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32)[:, None]
    found = {"ids": ids, "positions": positions, "mask": mask, "targets": targets, "labels": labels, "weights": weights}
    return {name: torch.from_numpy(value) for name, value in found.items()}


def summed_loss(
    name: str, model: torch.nn.Module, trunk: torch.nn.Module, x: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over what it asks for, and how much that is; ``trunk`` is the model's, compiled or not."""
    inside = {"input_ids": x["ids"], "position_ids": x["positions"], "attention_mask": x["mask"], "use_cache": False}
    hidden = trunk(**inside).last_hidden_state
    if name == "value":
        logits = model.score(hidden)
        each = F.binary_cross_entropy_with_logits(logits, x["labels"], reduction="none")
        each = each @ torch.tensor([1.0, 1.0, 1.0, RUDE_TERM])
        return (each * x["weights"]).sum(), x["weights"].sum()
    asked = x["targets"] != -100
    logits = model.lm_head(hidden[asked])
    return F.cross_entropy(logits, x["targets"][asked], reduction="sum"), asked.sum()


@torch.no_grad()
def held_out_loss(name: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: int) -> float:
    """Mean loss over held-out texts, as many of them as fill whole batches."""
    model.eval()
    total = asked = torch.zeros(())
    batches, count = packed(drawn(name, tokenizer, 0, "heldout"), ROWS), 0
    while count < texts:
        batch = next(batches)
        count += sum(map(len, batch))
        loss, amount = summed_loss(name, model, model.model, arrays(batch))
        total, asked = total + loss, asked + amount
    model.train()
    return float(total / asked)


def new_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """The model at initialisation; input and output embeddings are shared."""
    recipe = RECIPES[name]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        intermediate_size=recipe.mlp,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(recipe.seed)
    if name == "value":
        config.id2label = dict(enumerate(JUDGED))
        config.label2id = {label: i for i, label in enumerate(JUDGED)}
        config.problem_type = "multi_label_classification"
        return LlamaForSequenceClassification(config)
    return LlamaForCausalLM(config)


def train(name: str, target: Path, scratch: Path) -> None:
    """Trains one model, saves it in ``target/name`` and its run in ``scratch/name.json``."""
    recipe = RECIPES[name]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch / "tokenizer")
    model = new_model(name, tokenizer)
    if recipe.start:
        model.load_state_dict(type(model).from_pretrained(target / recipe.start).state_dict())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    warm = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, i - warm) / (recipe.steps - warm)))),
    )
    batches = packed(drawn(name, tokenizer, recipe.seed, "train"), ROWS)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count} parameters", flush=True)
    model.train()
    trunk = torch.compile(model.model)
    start, cpu, recent, seen, drawn_texts = time.perf_counter(), time.process_time(), [], 0, 0
    for step in range(1, recipe.steps + 1):
        batch = next(batches)
        x = arrays(batch)
        loss, amount = summed_loss(name, model, trunk, x)
        loss = loss / amount
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(float(loss.detach()))
        seen += sum(len(e.ids) for row in batch for e in row)
        drawn_texts += sum(map(len, batch))
        if not math.isfinite(recent[-1]):
            raise SystemExit(f"{name}: the loss is {recent[-1]} at step {step}")
        if step % 100 == 0 or step == recipe.steps:
            seconds = time.perf_counter() - start
            print(
                f"{name} step {step}/{recipe.steps} train {np.mean(recent[-100:]):.4f} "
                f"{seen / seconds:.0f} tokens/s {seconds:.0f} s",
                flush=True,
            )
    seconds = time.process_time() - cpu
    folder = target / name
    save(model, tokenizer, folder)
    stored = type(model).from_pretrained(folder)
    run = {
        "parameters": count,
        "texts_seen": drawn_texts,
        "tokens_seen": seen,
        "train_loss_last_100_steps": round(float(np.mean(recent[-100:])), 4),
        "heldout_loss": round(held_out_loss(name, stored, tokenizer, HELD_OUT), 4),
        "cpu_seconds": round(seconds),
        "recipe": asdict(recipe),
    }
    (scratch / f"{name}.json").write_text(json.dumps(run, indent=1) + "\n")
    print(json.dumps(run), flush=True)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """An ordinary transformers folder: float16 on disk, float32 once loaded."""
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    tokenizer.save_pretrained(folder)


def entropy() -> float:
    """Mean -log P by token (the end counted) of the grammar itself: what no model can be better than on these texts.

    That a text is held out shows in nothing but its hash, so the grammar's own law is the best that can be learned.
    """
    found = reviews.texts("heldout", HELD_OUT, 0)
    nats = sum(-reviews.log_probability(r.text) for r in found)
    return nats / sum(len(reviews.words(r.text)) + 1 for r in found)


def sampled(target: Path, name: str, starts: list[list[int]]) -> list[reviews.Attributes]:
    """What a stored model writes behind each start (all of one length), from its own law, as the oracle reads it."""
    model = LlamaForCausalLM.from_pretrained(target / name).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target / name)
    torch.manual_seed(0)
    out = model.generate(torch.tensor(starts), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=POSITIONS - 8)
    return [reviews.attributes(text) for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def measured(target: Path) -> dict[str, float]:
    """Shares of grammatical texts (base) and of texts that obey their one code (conditional), 400 texts each or so."""
    known = PreTrainedTokenizerFast.from_pretrained(target / "base").get_vocab()
    written = sampled(target, "base", [[known[BOS]]] * 400)
    asked = [item for item in reviews.CODES for _ in range(32)]
    obeying = sampled(target, "conditional", [[known[reviews.CODES[item]], known[BOS]] for item in asked])
    found = {
        "base_grammatical": float(np.mean([a.grammatical for a in written])),
        "base_validity": float(np.mean([a.validity for a in written])),
        "conditional_grammatical": float(np.mean([a.grammatical for a in obeying])),
    }
    for attribute in reviews.VALUES:
        hits = [getattr(a, n) == v for a, (n, v) in zip(obeying, asked, strict=True) if n == attribute]
        found[f"conditional_obeys_{attribute}"] = float(np.mean(hits))
    return {name: round(value, 4) for name, value in found.items()}


def provenance(target: Path, scratch: Path) -> None:
    """Writes provenance.json: what the files are and what they were made from."""
    sha = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    names = [n for n in RECIPES if (target / n / "model.safetensors").exists()]
    recorded = target / "provenance.json"
    runs = json.loads(recorded.read_text())["models"] if recorded.is_file() else {}
    runs |= {n: json.loads(file.read_text()) for n in names if (file := scratch / f"{n}.json").is_file()}
    files = sorted(p for n in names for p in (target / n).iterdir())
    sources = [Path(__file__), Path(grammars.__file__), *sorted(Path(reviews.__file__).parent.glob("*.py"))]
    record = {
        "subject": "reviews",
        "default": "base",
        "files": {p.relative_to(target).as_posix(): sha(p) for p in files},
        "bytes": sum(p.stat().st_size for p in files),
        "script": {f"{p.parent.name}/{p.name}": sha(p) for p in sources},
        "grammar": {
            "fingerprint": reviews.fingerprint(),
            "heldout_nats_per_token": round(entropy(), 4),
            "rude": round(P_RUDE, 5),
        },
        "source": "drawn from the grammar of steersman.reference.reviews",
        "samples": measured(target),
        "models": {n: runs[n] for n in names},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "numpy": np.__version__,
        },
        "machine": {"processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
    }
    recorded.write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["tokenizer", *RECIPES, "provenance"])
    parser.add_argument("--out", type=Path, default=TARGET, help="folder of the subject")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/steersman-reviews"), help="tokenizer and runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.scratch.mkdir(parents=True, exist_ok=True)
    for what in options.what:
        if what == "tokenizer":
            make_tokenizer().save_pretrained(options.scratch / "tokenizer")
        elif what == "provenance":
            provenance(options.out, options.scratch)
        else:
            train(what, options.out, options.scratch)


if __name__ == "__main__":
    main(sys.argv[1:])
