"""Language models whose law is a table, with transformers' real cache behind them.

Their caches hold the tokens themselves, and the trigram reads the token before the last from its cache, through the
attention mask: a crop, a gather or a tree mask that is wrong gives another law.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TabularConfig(PretrainedConfig):
    model_type = "tabular"

    def __init__(self, vocab_size: int = 3, order: int = 1, **kwargs: Any) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.num_hidden_layers, self.hidden_size, self.num_attention_heads = 1, 1, 1
        self.max_position_embeddings = 100_000
        super().__init__(**kwargs)


class Tabular(PreTrainedModel, GenerationMixin):
    """p(x_t | x_{t-1}) from ``table`` (V, V), or p(x_t | x_{t-2}, x_{t-1}) from ``table`` (V, V, V).

    Behind the first token the trigram takes token 0 for the one before it.
    """

    config_class = TabularConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.zeros((config.vocab_size,) * (config.order + 1)))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        pass

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        batch, new = input_ids.shape
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(1) - 1)[:, -new:]
            else:
                position_ids = torch.arange(before, before + new, device=input_ids.device)[None]
        position_ids = position_ids.expand(batch, -1)
        keys = torch.stack([input_ids, position_ids], -1)[:, None].to(self.table.dtype)  # (B, 1, N, 2)
        if past_key_values is not None:
            keys, _ = past_key_values.update(keys, keys.clone(), 0)
        tokens, places = keys[:, 0, :, 0].long(), keys[:, 0, :, 1].long()  # (B, P + N)
        sees = self._sees(attention_mask, batch, new, before, input_ids.device)
        if self.config.order == 1:
            logits = self.table[input_ids]
        else:
            # Among the columns that a query sees, the one at the position before its own.
            previous = sees & (places[:, None, :] == position_ids[:, :, None] - 1)
            found = previous.any(-1)
            second = tokens[:, None].expand(-1, new, -1).gather(2, previous.long().argmax(-1, keepdim=True)).squeeze(2)
            logits = self.table[torch.where(found, second, 0), input_ids]
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]

    @staticmethod
    def _sees(mask: Tensor | None, batch: int, new: int, before: int, device: Any) -> Tensor:
        """Which columns each query sees, (B, N, P + N)."""
        causal = torch.ones(new, before + new, dtype=torch.bool, device=device).tril(before)
        if mask is None:
            return causal.expand(batch, -1, -1)
        if mask.ndim == 2:
            return causal & mask[:, None].bool()
        if mask.dtype is torch.bool:
            raise TypeError("a boolean mask of four dimensions is added to the scores by eager attention")
        return (mask > torch.finfo(mask.dtype).min / 2)[:, 0].expand(batch, -1, -1)


def tabular(table: Tensor, **config: Any) -> Tabular:
    """The model with log-probabilities (or logits) ``table``: (V, V) a bigram, (V, V, V) a trigram."""
    special = {"pad_token_id": None, "eos_token_id": None, "bos_token_id": None} | config
    model = Tabular(TabularConfig(vocab_size=len(table), order=table.ndim - 1, **special))
    model.table.data = table.clone()
    return model.eval()


def random_law(size: int, order: int = 1, concentration: float = 1.0, seed: int = 0) -> Tensor:
    """Log-probabilities of a random law, rows from a Dirichlet."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch._sample_dirichlet(torch.full((size,) * (order + 1), concentration), generator)
    return rows.clamp(min=1e-30).log()


def joint(table: Tensor, first: list[int], length: int) -> Tensor:
    """Exact probabilities of the next ``length`` tokens behind the tokens ``first``, (V,) * length."""
    law, order = table.log_softmax(-1).exp(), table.ndim - 1
    size = len(table)
    out = torch.zeros((size,) * length, dtype=torch.float64)
    for index in torch.cartesian_prod(*[torch.arange(size)] * length).view(-1, length).tolist():
        text, p = [0, *first], 1.0
        for token in index:
            p *= float(law[tuple(text[-order:])][token])
            text.append(token)
        out[tuple(index)] = p
    return out
