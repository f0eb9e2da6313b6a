"""What each way to steer costs per token, as a multiple of plain sampling from the same model.

    python benchmarks/control_overhead.py [--layers 12] [--guide-layers 3] [--vocabulary 4096] [--batch 4] [--out FILE]

Each round runs every contender once behind the same prompts, in rotating order, so that a machine that slows down slows
all of them; a contender's cost is the median over rounds of its time divided by that of plain sampling in the same
round. ``bound`` is 1.2 (1 + K guide / base) for K codes, from the measured cached steps of guide and base alone (of one
row of the batch under each code), and ``within`` says whether the multiple is below it.

``gradient`` is the least that a gradient method (PPLM) does: for each token, ``--iterations`` passes forward and back
through the cached keys and values to raise the probability of a bag of words, and one pass forward.

``rectification`` asks a value model of the guide's size, with its own head over the vocabulary, once for each row;
``rectification arithmetic`` has risks that are known, and no second model. ``second_model`` is what each second model's
own cached step takes, as a share of the base's: one plus that is the least that the method can cost.

Models are Llamas with random weights (by default a base of about 30M parameters and a guide with a quarter of its
layers): speed does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, TopKLogitsWarper

from steersman.language import GeDi, MomentumDecoding, QModel, Rectification


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


def sampled(model: Any, ids: Tensor, new: int, **options: Any) -> None:
    """``generate`` from the model's own law."""
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0, **options
    )


def by_gradient(model: Any, ids: Tensor, new: int, iterations: int) -> None:
    """Sampling with keys and values that are moved by gradients at every token."""
    bag = torch.arange(10, 60)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    for _ in range(new):
        stored = [(layer.keys, layer.values) for layer in cache.layers]
        moved = [[torch.zeros_like(x, requires_grad=True) for x in pair] for pair in stored]
        for _ in range(iterations):
            logits = model(ids[:, -1:], past_key_values=_shifted(stored, moved)).logits[:, -1]
            loss = -logits.log_softmax(-1)[:, bag].logsumexp(-1).sum()
            flat = [x for pair in moved for x in pair]
            for x, g in zip(flat, torch.autograd.grad(loss, flat), strict=True):
                x.data -= 0.02 * g / (g.norm() + 1e-12)
        with torch.no_grad():
            shifted = _shifted(stored, moved)
            logits = model(ids[:, -1:], past_key_values=shifted).logits[:, -1]
            for i, layer in enumerate(shifted.layers):  # the text goes on behind its own keys and values
                cache.update(layer.keys[:, :, -1:], layer.values[:, :, -1:], i)
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)


def _shifted(stored: list[tuple[Tensor, Tensor]], moved: list[list[Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for i, ((keys, values), (dk, dv)) in enumerate(zip(stored, moved, strict=True)):
        cache.update(keys + dk, values + dv, i)
    return cache


@torch.no_grad()
def cached_step(model: Any, ids: Tensor, steps: int) -> float:
    """Median seconds of one cached token behind ``ids``."""
    cache, taken = DynamicCache(), []
    model(ids, past_key_values=cache)
    for _ in range(steps):
        start = time.perf_counter()
        model(ids[:, -1:], past_key_values=cache)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[steps // 10 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the base")
    parser.add_argument("--guide-layers", type=int, default=3, help="layers of the guide")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of both")
    parser.add_argument("--batch", type=int, default=4, help="rows a batch")
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompts")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a run")
    parser.add_argument("--iterations", type=int, default=3, help="gradient steps a token")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each contender")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, help="write the JSON there as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = build(options.layers, options.vocabulary, 0)
    guide = build(options.guide_layers, options.vocabulary, 1)
    value = QModel.from_trunk(guide)
    torch.nn.init.normal_(value.head[-1].weight, std=0.02)  # type: ignore[arg-type]
    risks = torch.rand(options.batch, options.vocabulary, generator=torch.Generator().manual_seed(3))
    shape = (options.batch, options.context)
    ids = torch.randint(3, options.vocabulary, shape, generator=torch.Generator().manual_seed(2))
    contenders: dict[str, Callable[[int], None]] = {
        "sample": lambda new: sampled(base, ids, new),
        "top-k": lambda new: sampled(base, ids, new, logits_processor=[TopKLogitsWarper(50)]),
        "momentum-decoding": lambda new: sampled(base, ids, new, logits_processor=[MomentumDecoding(sample=True)]),
        "gedi": lambda new: sampled(base, ids, new, logits_processor=[GeDi(guide, 1, 2)]),
        "gedi without filter": lambda new: sampled(base, ids, new, logits_processor=[GeDi(guide, 1, 2, rho=1.0)]),
        "rectification": lambda new: sampled(base, ids, new, logits_processor=[Rectification(value, 0.1)]),
        "rectification arithmetic": lambda new: sampled(
            base, ids, new, logits_processor=[Rectification(lambda ids: risks, 0.1)]
        ),
        "cfg": lambda new: sampled(base, ids, new, guidance_scale=1.5),
        "gradient": lambda new: by_gradient(base, ids, new, options.iterations),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(-1, options.rounds):  # round -1 warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            steps = {}
            for new in (1, 1 + options.tokens):  # the difference leaves the prompt's own forward pass out
                start = time.perf_counter()
                contenders[name](new)
                steps[new] = time.perf_counter() - start
            if turn >= 0:
                times[name].append((steps[1 + options.tokens] - steps[1]) / options.tokens)
    one = cached_step(base, ids, 40)
    two = cached_step(guide, ids.repeat(2, 1), 40)  # both codes of every row in one batch
    multiple = {
        name: statistics.median(a / b for a, b in zip(seconds, times["sample"], strict=True))
        for name, seconds in times.items()
    }
    bound = 1.2 * (1 + two / one)
    record = {
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "guide_parameters": sum(p.numel() for p in guide.parameters()),
        "batch": options.batch,
        "context": options.context,
        "vocabulary": options.vocabulary,
        "threads": options.threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "ms_per_step": {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in times.items()},
        "times_sample": {name: round(value, 3) for name, value in multiple.items()},
        "base_ms": round(1e3 * one, 3),
        "second_model": {
            "gedi": round(two / one, 3),
            "rectification": round(cached_step(value, ids, 40) / one, 3),
        },
        "bound": round(bound, 3),
        "within": multiple["gedi"] < bound,
        "gradient_by_gedi": round(multiple["gradient"] / multiple["gedi"], 2),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
