r"""The value model: a small causal language model's trunk with a head that values every next token.

.. math:: Q_D(s, a) = \mathrm{head}(h(s))_a , \qquad \mathrm{head} = W_2\, \mathrm{ReLU}(W_1 h + b_1) + b_2

with h(s) the trunk's last hidden state behind the tokens s, W_1 of 2h rows and W_2 of V rows; nothing bounds the
output. It is an ordinary model of transformers, whose ``logits`` are the values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from steersman import quiet
from steersman.errors import InputError


class QModelConfig(PreTrainedConfig):
    """Configuration of :class:`QModel`.

    Args:
        text_config: the trunk's configuration, or its fields with ``model_type``.
        head_dropout: of the head's hidden layer, in [0, 1).
    """

    model_type = "steersman-q"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self, text_config: PreTrainedConfig | dict[str, Any] | None = None, head_dropout: float = 0.0, **kwargs: Any
    ) -> None:
        if isinstance(text_config, dict):
            fields = dict(text_config)
            text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.text_config = text_config
        self.head_dropout = head_dropout
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        kwargs["tie_word_embeddings"] = False  # the head is no embedding
        super().__init__(**kwargs)

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest text that the trunk takes."""
        return getattr(self.text_config, "max_position_embeddings", None)


@dataclass
class QOutput(ModelOutput):
    """What :class:`QModel` gives.

    Args:
        logits: Q(s_t, a) for every token a, (B, T, V); None if actions were given.
        values: Q(s_t, a_t) of the given actions, (B, T).
        target_values: the target head's values of the same, (B, T), without gradient.
        past_key_values: the trunk's cache.
    """

    logits: Tensor | None = None
    values: Tensor | None = None  # type: ignore[assignment]  # hides a method of the dictionary that outputs are
    target_values: Tensor | None = None
    past_key_values: Any = None


class QModel(PreTrainedModel):
    r"""Values of all next tokens behind a text: ``model(input_ids).logits[b, t, a]`` is Q_D(s_t, a).

    -Q_D(s, a) is the probability that the finished text is undesired if a comes next and the language model goes on
    from there. ``save_pretrained`` and ``from_pretrained`` are transformers' own.

    Args:
        config: of trunk and head.

    References:
        Meng Cao, Mehdi Fatemi, Jackie Chi Kit Cheung, Samira Shabanian. Systematic Rectification of Language Models
        via Dead-end Analysis. ICLR 2023, arXiv:2302.14003.
    """

    config_class = QModelConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # The target head is for training alone.
    _keys_to_ignore_on_load_unexpected = [r"^target_head\."]

    def __init__(self, config: QModelConfig) -> None:
        super().__init__(config)
        self.trunk = AutoModel.from_config(config.text_config)
        text: Any = config.text_config
        width, size = text.hidden_size, text.vocab_size
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(config.head_dropout), nn.Linear(2 * width, size)
        )
        self.target_head: nn.Sequential | None = None
        self.post_init()

    @classmethod
    def from_trunk(
        cls, language_model: str | Path | PreTrainedModel, layers: int | None = None, head_dropout: float = 0.0
    ) -> QModel:
        """A value model to be trained, with a copy of a causal language model's trunk and a new head.

        The head's last layer begins at 0, which is the value of a model that never writes anything undesired.

        Args:
            language_model: a decoder-only model, or its folder or hub id, with the vocabulary of the model to control.
            layers: only this many of its first layers; None is all.
            head_dropout: in [0, 1).

        Raises:
            InputError: an encoder-decoder, or ``layers`` or ``head_dropout`` out of range.
        """
        if not isinstance(language_model, PreTrainedModel):
            with quiet.loading():
                language_model = AutoModelForCausalLM.from_pretrained(
                    language_model, use_safetensors=True, dtype="float32"
                )
        assert isinstance(language_model, PreTrainedModel)
        config = copy.deepcopy(language_model.config.get_text_config(decoder=True))
        config.dtype = torch.float32  # as the head: what is learned is a difference of small numbers
        if language_model.config.is_encoder_decoder:
            raise InputError("trunk", type(language_model).__name__, "a decoder-only model")
        if not 0 <= head_dropout < 1:
            raise InputError("head_dropout", head_dropout, "a number in [0, 1)")
        depth = config.num_hidden_layers
        if layers is not None and (isinstance(layers, bool) or not 1 <= layers <= depth):
            raise InputError("layers", layers, f"a whole number from 1 to {depth}, the trunk's layers")
        config.num_hidden_layers = layers or depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        model = cls(QModelConfig(config, head_dropout))
        weights = language_model.base_model.state_dict()
        wanted = model.trunk.state_dict()
        model.trunk.load_state_dict({name: weights[name].to(value.dtype) for name, value in wanted.items()})
        last: Any = model.head[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        actions: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QOutput:
        """Values behind every token.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, use_cache, inputs_embeds: as in any causal model.
                Without positions they are counted along the mask, so that left padding shifts nothing.
            actions: tokens a_t, (B, T): only their values are computed, which takes no memory of the vocabulary's size.
            logits_to_keep: values behind the last so many tokens alone; 0 is all.
        """
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        output = self.trunk(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden, cache = output.last_hidden_state, output.get("past_key_values")
        if actions is None:
            return QOutput(logits=self.head(hidden[:, -logits_to_keep:]), past_key_values=cache)
        target = None
        if self.target_head is not None:
            with torch.no_grad():
                target = _values_of(self.target_head, hidden, actions)
        return QOutput(values=_values_of(self.head, hidden, actions), target_values=target, past_key_values=cache)

    def begin_target(self) -> None:
        """Make the target head, a copy of the head that no optimizer moves."""
        if self.target_head is None:
            self.target_head = copy.deepcopy(self.head).requires_grad_(False)

    @torch.no_grad()
    def follow(self, tau: float) -> None:
        r"""Polyak update of the target head: Q̄ <- (1 - τ) Q̄ + τ Q."""
        assert self.target_head is not None
        for slow, fast in zip(self.target_head.parameters(), self.head.parameters(), strict=True):
            slow.lerp_(fast.to(slow), tau)

    def end_target(self) -> None:
        """Drop the target head: what is used and saved afterwards is the head."""
        self.target_head = None


def _values_of(head: nn.Sequential, hidden: Tensor, actions: Tensor) -> Tensor:
    """head(h_t)[a_t], (B, T): the last layer's rows of the actions alone."""
    last = head[-1]
    assert isinstance(last, nn.Linear)
    return (head[:-1](hidden) * F.embedding(actions, last.weight)).sum(-1) + last.bias[actions]


# A folder with a value model and a tokenizer: AutoTokenizer asks AutoConfig what model it is of.
AutoConfig.register(QModelConfig.model_type, QModelConfig, exist_ok=True)
