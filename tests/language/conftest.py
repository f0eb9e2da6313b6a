"""Small causal language models with random weights, built without a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 41
PAD, EOS = 0, 1


def tiny(kind: str, seed: int = 0, vocab_size: int = VOCABULARY, **config: Any) -> Any:
    """A two-layer model of the class ``gpt2`` or ``llama`` whose logits are far from uniform."""
    torch.manual_seed(seed)
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "vocab_size": vocab_size}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.25}
        return GPT2LMHeadModel(GPT2Config(**sizes | special | config)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 256, "initializer_range": 0.25, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes | special | config)).eval()


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def prompts() -> torch.Tensor:
    """Three prompts of nine tokens, free of padding and end-of-sequence."""
    return torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(7))


def generate(model: Any, ids: torch.Tensor, new_tokens: int = 40, **options: Any) -> torch.Tensor:
    """``model.generate`` without sampling; gives the whole sequences."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, max_new_tokens=new_tokens, **options)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch, and its attention mask."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask
