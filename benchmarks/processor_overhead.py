"""What each of steersman's logits processors costs per token, as a multiple of plain sampling from the same model.

    python benchmarks/processor_overhead.py [--layers 12] [--guide-layers 3] [--vocabulary 4096] [--out FILE]

Each round runs every contender once behind the same prompts, in rotating order, so that a machine that slows down slows
all of them; ``times_sample`` is the median over rounds of a contender's time for a step divided by that of plain
sampling in the same round. GeDi and Rectification run a second model beside the first: ``second_model`` is what its own
cached step takes, as a share of the first's, so that 1 + second_model is the least that they can cost. ``arithmetic``
has rectification with risks that are known, without a second model.

Models are Llamas with random weights (by default a base of about 30M parameters and a second model with a quarter of
its layers): speed does not depend on what the weights are.
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
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, TopKLogitsWarper

from steersman.language import GeDi, MomentumDecoding, Rectification
from steersman.language.rectification import QModel


def build(layers: int, vocabulary: int, seed: int) -> Any:
    """A Llama of width 448 in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=448,
        intermediate_size=1216,
        num_hidden_layers=layers,
        num_attention_heads=7,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return model


@torch.no_grad()
def cached_step(model: Any, ids: torch.Tensor, steps: int) -> float:
    """Median seconds of one cached token behind ``ids``."""
    cache, taken = DynamicCache(), []
    model(ids, past_key_values=cache, use_cache=True)
    for _ in range(steps):
        start = time.perf_counter()
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[steps // 10 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the base")
    parser.add_argument("--guide-layers", type=int, default=3, help="layers of the second model")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of both")
    parser.add_argument("--batch", type=int, default=4, help="rows a batch")
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a run")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each contender")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = build(options.layers, options.vocabulary, 0)
    guide = build(options.guide_layers, options.vocabulary, 1)
    q_model = QModel.from_trunk(guide).eval()
    shape = (options.batch, options.context)
    ids = torch.randint(3, options.vocabulary, shape, generator=torch.Generator().manual_seed(2))
    risks = torch.rand(options.batch, options.vocabulary, generator=torch.Generator().manual_seed(3))
    contenders: dict[str, Any] = {
        "sample": lambda: [],
        "top-k": lambda: [TopKLogitsWarper(50)],
        "momentum-decoding": lambda: [MomentumDecoding(sample=True)],
        "rectification": lambda: [Rectification(q_model)],
        "rectification, official": lambda: [Rectification(q_model, projection="official")],
        "rectification, arithmetic": lambda: [Rectification(lambda ids: risks)],
        "gedi": lambda: [GeDi(guide, 1, 2)],
    }

    def run(name: str, new: int) -> float:
        start = time.perf_counter()
        base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            logits_processor=contenders[name](),
        )
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(-1, options.rounds):  # round -1 warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            # The difference leaves the prompt's own forward pass out.
            spent = -run(name, 1) + run(name, 1 + options.tokens)
            if turn >= 0:
                times[name].append(spent / options.tokens)
    one = cached_step(base, ids, 40)
    second = {
        "gedi": cached_step(guide, ids.repeat(2, 1), 40),  # both codes of every row in one batch
        "rectification": cached_step(q_model, ids, 40),
    }
    record = {
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "second_parameters": sum(p.numel() for p in guide.parameters()),
        "batch": options.batch,
        "context": options.context,
        "vocabulary": options.vocabulary,
        "threads": options.threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "ms_per_step": {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in times.items()},
        "times_sample": {
            name: round(statistics.median(a / b for a, b in zip(seconds, times["sample"], strict=True)), 3)
            for name, seconds in times.items()
        },
        "second_model": {name: round(seconds / one, 3) for name, seconds in second.items()},
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
