"""What a decoding method costs per token, as a multiple of plain greedy search on the same model.

    python benchmarks/decoding_overhead.py [--model FOLDER] [--contexts 128,1024] [--batch 1] [--out FILE]

Each round runs every contender once for ``--tokens`` tokens behind the same prompt, in rotating order, so that
a machine that slows down slows all of them; a contender's cost is the median over rounds of its time divided by
that of greedy search in the same round. ``processor_us`` is the time inside the momentum processor alone, per
step, in the same way: with its graph carried from step to step, and computed anew at each.

Without ``--model`` the model is a Llama of about 10M parameters with random weights: speed does not depend on
what the weights are.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from steersman.language import ContrastiveSearch, MomentumDecoding


def build(folder: str | None) -> Any:
    """The model to measure on."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=9,
        num_attention_heads=9,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def rows_search(model: Any) -> ContrastiveSearch:
    """Contrastive search with k rows a step, as it is usually written, in place of the tree."""
    search = ContrastiveSearch()
    search._takes_tree = {model: False}
    return search


def generation(model: Any, context: int, batch: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step and the multiple of greedy search, by contender."""
    contenders: dict[str, dict[str, Any]] = {
        "greedy": {},
        "momentum-decoding": {"logits_processor": [MomentumDecoding()]},
        "no-repeat-ngram": {"no_repeat_ngram_size": 4},
        "repetition-penalty": {"repetition_penalty": 1.2},
        "contrastive": {"custom_generate": ContrastiveSearch()},
        "contrastive (rows)": {"custom_generate": rows_search(model)},
        "contrastive (k=1)": {"custom_generate": ContrastiveSearch(top_k=1)},
    }
    ids = torch.randint(3, model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(1))
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(-1, rounds):  # round -1 warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            steps = {}
            for new in (1, 1 + tokens):  # the difference leaves the prompt's own forward pass out
                start = time.perf_counter()
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    **contenders[name],
                )
                steps[new] = time.perf_counter() - start
            if turn >= 0:
                times[name].append((steps[1 + tokens] - steps[1]) / tokens)
    return {
        name: {
            "ms_per_step": round(1e3 * statistics.median(seconds), 4),
            "times_greedy": round(statistics.median(a / b for a, b in zip(seconds, times["greedy"], strict=True)), 4),
        }
        for name, seconds in times.items()
    }


@torch.no_grad()
def processor(model: Any, context: int, batch: int, steps: int) -> dict[str, float]:
    """Microseconds inside the processor, and its share of the model's cached step."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, model.config.vocab_size, (batch, context + steps), generator=generator)
    cache, carried, anew = DynamicCache(), MomentumDecoding(), MomentumDecoding()
    model(ids[:, :context], past_key_values=cache)
    taken: dict[str, list[float]] = {"step": [], "carried": [], "anew": []}
    for t in range(context, context + steps):
        start = time.perf_counter()
        logits = model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1]
        taken["step"].append(time.perf_counter() - start)
        anew._carried = None
        pair = [("carried", carried), ("anew", anew)]
        for name, method in pair if t % 2 else pair[::-1]:
            start = time.perf_counter()
            method(ids[:, : t + 1], logits)
            taken[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values[steps // 10 :]) for name, values in taken.items()}
    return {
        "carried_us": round(1e6 * median["carried"], 1),
        "anew_us": round(1e6 * median["anew"], 1),
        "share_of_step": round(median["carried"] / median["step"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a transformers model (default: random, 10M parameters)")
    parser.add_argument("--contexts", default="128,1024", help="lengths of the prompt, comma-separated")
    parser.add_argument("--batch", type=int, default=1, help="rows a batch")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a run")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each contender")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options.model)
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": options.batch,
        "threads": options.threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "contexts": {},
    }
    for context in (int(part) for part in options.contexts.split(",")):
        record["contexts"][context] = {
            "generate": generation(model, context, options.batch, options.tokens, options.rounds),
            "processor": processor(model, context, options.batch, steps=60),
        }
    text = json.dumps(record, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
