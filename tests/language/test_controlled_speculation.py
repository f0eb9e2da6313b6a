"""Control inside speculation: what is drafted and checked has the law of the controlled target, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from steersman.language import PEARL, GeDi, MomentumDecoding, MultiDraft, Rectification
from tests.language.conftest import VOCABULARY, generate, tiny
from tests.language.tabular import random_law, tabular

V, RUNS, START = 4, 600, [1, 2]
TARGET = tabular(random_law(V, 2, seed=1))
DRAFT = tabular(random_law(V, 1, seed=2))
GUIDE = tabular(random_law(V, 2, seed=3))
RISK = torch.rand(V, V, generator=torch.Generator().manual_seed(4))


def control() -> list[Any]:
    return [GeDi(GUIDE, 2, 3, omega=3.0, rho=0.6), Rectification(lambda ids: RISK[ids[:, -1]], eps=0.1)]


def law_of(processors: Any, length: int) -> torch.Tensor:
    """Exact probabilities of the next tokens under the target behind the processors, (V,) * length."""
    if not length:
        return torch.ones(())
    texts = torch.cartesian_prod(*[torch.arange(V)] * length).view(-1, length)
    p = torch.ones(len(texts), dtype=torch.float64)
    for t in range(length):
        ids = torch.cat([torch.tensor([START]).expand(len(texts), -1), texts[:, :t]], 1)
        with torch.no_grad():
            logits = TARGET(ids).logits[:, -1]
        law = LogitsProcessorList(processors)(ids, logits).double().softmax(-1)
        p = p * law.gather(1, texts[:, t : t + 1]).squeeze(1)
    return p.view((V,) * length)


def drawn(loop: Any, processors: Any, length: int) -> torch.Tensor:
    """Texts that the loop writes behind the start, (RUNS, length)."""
    ids = torch.tensor([START])
    config = GenerationConfig(do_sample=True, max_length=len(START) + length, pad_token_id=0)
    stops = StoppingCriteriaList([MaxLengthCriteria(len(START) + length)])
    rows = []
    for _ in range(RUNS):
        given = {"past_key_values": DynamicCache(), "attention_mask": torch.ones_like(ids)}
        rows.append(loop(TARGET, ids, LogitsProcessorList(processors), stops, config, **given)[0, len(START) :])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "loop", [lambda: MultiDraft(DRAFT, 2, 2), lambda: PEARL(DRAFT, 2)], ids=["multi-draft", "pearl"]
)
def test_the_law_is_the_controlled_targets(loop: Any) -> None:
    processors = control()
    expected = RUNS * law_of(processors, 2).flatten()
    uncontrolled = RUNS * law_of([], 2).flatten()
    torch.manual_seed(0)
    texts = drawn(loop(), processors, 2)
    counts = torch.bincount(texts @ torch.tensor([V, 1]), minlength=V * V).double()

    def p_value(law: torch.Tensor) -> float:
        rare = law < 8
        merged = [(counts[~rare], law[~rare]), (counts[rare].sum()[None], law[rare].sum()[None].clamp(min=1e-9))]
        found, wanted = (torch.cat(parts) for parts in zip(*merged, strict=True))
        return float(chisquare(found.numpy(), (wanted * found.sum() / wanted.sum()).numpy()).pvalue)

    assert p_value(expected) > 1e-3
    assert p_value(uncontrolled) < 1e-6


@pytest.mark.parametrize("loop", [lambda d: MultiDraft(d, 2, 3), lambda d: PEARL(d, 3)], ids=["multi-draft", "pearl"])
def test_greedy_text_is_that_without_drafts(model: Any, loop: Any) -> None:
    draft, guide = tiny("gpt2", seed=1), tiny("llama", seed=2)
    risk = torch.rand(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5))
    ids = torch.randint(3, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(6))

    def processors() -> list[Any]:
        return [
            GeDi(guide, 2, 3, omega=5.0),
            Rectification(lambda ids: risk[ids[:, -1]], sample=False),
            MomentumDecoding(),
        ]

    plain = generate(model, ids, 24, logits_processor=processors())
    drafted = generate(model, ids, 24, logits_processor=processors(), custom_generate=loop(draft))
    assert torch.equal(plain, drafted)
    assert not torch.equal(plain, generate(model, ids, 24))


def test_control_under_beams_is_a_function_of_the_prefix(model: Any, prompts: torch.Tensor) -> None:
    guide = tiny("llama", seed=2)
    options = {"num_beams": 3, "logits_processor": [GeDi(guide, 2, 3, omega=2.0)]}
    together = generate(model, prompts, 12, **options)
    for i, row in enumerate(prompts):
        alone = generate(model, row[None], 12, num_beams=3, logits_processor=[GeDi(guide, 2, 3, omega=2.0)])
        length = alone.shape[1]
        assert torch.equal(together[i, :length], alone[0])
