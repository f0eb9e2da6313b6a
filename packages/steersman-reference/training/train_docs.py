r"""Trains the reference language models `docs/tiny`, `docs/small` and `docs/base`.

    python train_docs.py tokenizer tiny small base provenance

A byte-level BPE tokenizer, then three Llama models on the training documents of `steersman.reference.docs`.
A window is 512 tokens of documents packed end to end (`<s> text </s>`), in a new order with a new offset
each epoch. The loss is the mean next-token cross-entropy; AdamW with a linear warm-up and a cosine decay to
zero, gradients clipped to norm 1, dropout on what attention and MLP add to the residual stream. The network is
compiled, and its matrix products run in bfloat16 (for `base` 1.4 and 1.7 times faster); weights and optimizer
stay in float32. Weights are stored in float16 and load as float32. The models are wide and shallow because that
is what a processor core trains fastest.

Everything is seeded and runs on one thread, so the same interpreter, libraries and processor give the same
weights. `provenance.json` says what they were.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steersman.reference import docs

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "src" / "steersman_reference" / "docs"
VOCABULARY, POSITIONS, BATCH = 4096, 512, 4  # tokens known, tokens a window, windows a step
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class Recipe:
    """One model and its training run.

    Args:
        hidden, layers, mlp, heads: the Llama configuration.
        steps: optimizer steps; fixed in advance from a measured speed.
        rate, embedding_rate: peak learning rates.
        scaled_start: begin with embeddings 2.5 times as large, and with what attention and MLP add smaller by
            the root of twice the number of layers: in a wide network the branches would drown the embeddings
            (after 200 steps of `base` the held-out loss is 5.1 with it and 5.5 without).
        dropout: probability, on the residual branches.
        seed: of the initialisation, the order of the data and the dropout.
    """

    hidden: int
    layers: int
    mlp: int
    heads: int
    steps: int
    rate: float
    embedding_rate: float
    scaled_start: bool
    dropout: float
    seed: int


RECIPES = {
    "tiny": Recipe(48, 3, 128, 2, 1600, 6e-3, 6e-3, scaled_start=False, dropout=0.0, seed=11),
    "small": Recipe(128, 3, 344, 2, 2000, 4e-3, 4e-3, scaled_start=False, dropout=0.0, seed=12),
    "base": Recipe(384, 4, 832, 4, 1400, 1.5e-3, 4e-3, scaled_start=True, dropout=0.05, seed=13),
}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training documents; nothing is added to a text unless asked."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in docs.documents("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, split: docs.Split) -> list[np.ndarray]:
    """`<s> text </s>` of every document."""
    texts = [d.text for d in docs.documents(split)]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [
        np.asarray([bos, *ids, eos], dtype=np.int64)
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def windows(documents: list[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless windows of POSITIONS tokens: epochs of shuffled, packed, randomly offset documents."""
    while True:
        packed = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        packed = packed[rng.integers(POSITIONS) :]
        cut = packed[: len(packed) // POSITIONS * POSITIONS].reshape(-1, POSITIONS)
        yield from cut[rng.permutation(len(cut))]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[np.ndarray], limit: int | None = None) -> float:
    """Mean next-token cross-entropy (nats) over packed windows of held-out documents in their order."""
    packed = np.concatenate(documents)
    cut = packed[: len(packed) // POSITIONS * POSITIONS].reshape(-1, POSITIONS)[:limit]
    model.eval()
    losses = []
    for rows in np.array_split(cut, math.ceil(len(cut) / 8)):
        x = torch.from_numpy(np.ascontiguousarray(rows))
        losses.append((float(model(input_ids=x, labels=x).loss), len(rows)))
    model.train()
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model at initialisation; input and output embeddings are shared."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
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
    model = LlamaForCausalLM(config)
    if recipe.scaled_start:
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(2.5)
            for layer in model.model.layers:
                for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    branch.weight.div_(math.sqrt(2 * recipe.layers))
    return model


def train(name: str, target: Path, scratch: Path, save_every: int) -> None:
    """Trains one model, saves it in ``target/name`` and its run in ``target/name/run.json``."""
    recipe = RECIPES[name]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch / "tokenizer")
    training, held_out = encode(tokenizer, "train"), encode(tokenizer, "heldout")
    model = new_model(recipe, tokenizer)
    if recipe.dropout:
        for layer in model.model.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.register_forward_hook(
                    lambda module, _, y: torch.nn.functional.dropout(y, recipe.dropout, module.training)
                )
    embeddings = [model.model.embed_tokens.weight]
    matrices = [p for p in model.model.layers.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": embeddings, "lr": recipe.embedding_rate, "weight_decay": 0.1},
            {"params": matrices, "weight_decay": 0.1},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=recipe.rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm = max(1, recipe.steps // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, i - warm) / (recipe.steps - warm)))),
    )
    data = windows(training, np.random.default_rng(recipe.seed))
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count} parameters, {sum(map(len, training))} training tokens", flush=True)
    model.train()
    compiled = torch.compile(model)
    start, recent = time.perf_counter(), []
    for step in range(1, recipe.steps + 1):
        x = torch.from_numpy(np.stack([next(data) for _ in range(BATCH)]))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(float(loss.detach()))
        if not math.isfinite(recent[-1]):
            raise SystemExit(f"{name}: the loss is {recent[-1]} at step {step}")
        if step % 100 == 0 or step == recipe.steps:
            seconds = time.perf_counter() - start
            print(
                f"{name} step {step}/{recipe.steps} train {np.mean(recent[-100:]):.3f} "
                f"held-out(16) {held_out_loss(model, held_out, 16):.3f} "
                f"{step * BATCH * POSITIONS / seconds:.0f} tokens/s {seconds:.0f} s",
                flush=True,
            )
        if save_every and step % save_every == 0 and step < recipe.steps:
            save(model, tokenizer, scratch / f"{name}-{step}")
    folder = target / name
    save(model, tokenizer, folder)
    stored = LlamaForCausalLM.from_pretrained(folder)
    loss = held_out_loss(stored, held_out)
    size = sum(len(d.text.encode()) for d in docs.documents("heldout"))
    run = {
        "parameters": count,
        "tokens_seen": recipe.steps * BATCH * POSITIONS,
        "epochs": round(recipe.steps * BATCH * POSITIONS / sum(map(len, training)), 2),
        "train_loss_last_100_steps": round(float(np.mean(recent[-100:])), 4),
        "heldout_loss": round(loss, 4),
        "heldout_perplexity": round(math.exp(loss), 3),
        "heldout_bits_per_byte": round(loss * sum(map(len, held_out)) / size / math.log(2), 4),
        "tokens_per_second": round(recipe.steps * BATCH * POSITIONS / (time.perf_counter() - start)),
        "recipe": asdict(recipe),
    }
    (scratch / f"{name}.json").write_text(json.dumps(run, indent=1) + "\n")
    print(json.dumps(run), flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """An ordinary transformers folder: float16 on disk, float32 once loaded."""
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    tokenizer.save_pretrained(folder)


def provenance(target: Path, scratch: Path) -> None:
    """Writes provenance.json: what the files are and what they were made from."""
    sha = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()  # noqa: E731
    names = [n for n in RECIPES if (target / n / "model.safetensors").exists()]
    files = sorted(p for n in names for p in (target / n).iterdir())
    record = {
        "subject": "docs",
        "default": "small",
        "files": {p.relative_to(target).as_posix(): sha(p) for p in files},
        "bytes": sum(p.stat().st_size for p in files),
        "script": {"train_docs.py": sha(Path(__file__)), "docs.py": sha(Path(docs.__file__))},
        "corpus": {
            split: {
                "documents": len(docs.documents(split)),
                "characters": sum(len(d.text) for d in docs.documents(split)),
                "fingerprint": docs.fingerprint(split),
            }
            for split in ("train", "heldout")
        },
        "source": f"documentation topics and standard library of Python {platform.python_version()} (PSF License)",
        "models": {n: json.loads((scratch / f"{n}.json").read_text()) for n in names},
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
    (target / "provenance.json").write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["tokenizer", *RECIPES, "provenance"])
    parser.add_argument("--out", type=Path, default=TARGET, help="folder of the subject")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/steersman-docs"), help="runs and checkpoints")
    parser.add_argument("--save-every", type=int, default=0, metavar="N", help="checkpoint each N steps in --scratch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.scratch.mkdir(parents=True, exist_ok=True)
    for what in options.what:
        if what == "tokenizer":
            train_tokenizer().save_pretrained(options.scratch / "tokenizer")
        elif what == "provenance":
            provenance(options.out, options.scratch)
        else:
            train(what, options.out, options.scratch, options.save_every)


if __name__ == "__main__":
    main(sys.argv[1:])
