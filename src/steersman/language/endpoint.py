r"""Steering a model that is only there as an endpoint, through the log-probabilities of its most probable tokens.

An endpoint gives no logits, only the k most probable next tokens and their log-probabilities. That is enough for a
method that changes the law of the next token: with the k tokens K and p their law,

.. math:: p(v) = \begin{cases} p_v / \sum_{u \in K} p_u & v \in K \\ 0 & \text{else,} \end{cases}

the method's ``LogitsProcessor`` is run on this row here, the token is drawn here, and the text with it goes back for
the next one: one request a token. Tokens are matched by what they say, so the tokenizer at hand must be the endpoint's.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from steersman.errors import InputError


@dataclass
class EndpointText:
    """What was written.

    Args:
        text: the continuation.
        ids: its tokens, the end included if it was drawn.
        requests: how many the endpoint got.
        unseen: for each token, the probability that the endpoint gave to none of its k tokens, or to tokens that the
            tokenizer doesn't know: it could not be drawn.
        ended: whether the text ended by itself.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    requests: int = 0
    unseen: list[float] = field(default_factory=list)
    ended: bool = False


class EndpointSampler:
    r"""Samples from an endpoint's law, behind logits processors.

    ::

        from openai import OpenAI

        client = OpenAI(base_url="http://127.0.0.1:8000/v1")      # the key comes from the environment
        write = EndpointSampler(client, "my-model", tokenizer, [Rectification.from_pretrained("./value-model")])
        print(write("The hotel was", max_new_tokens=20).text)

    Any client of this shape will do: ``client.completions.create(model=, prompt=, max_tokens=1, logprobs=k,
    temperature=1)``, or with ``chat`` ``client.chat.completions.create(model=, messages=, max_tokens=1, logprobs=True,
    top_logprobs=k, temperature=1)``, both as in the openai package. Neither client nor key is shown or stored.

    A chat endpoint must go on with a begun answer: servers such as vLLM do with ``continue_final_message``, which is
    sent along; OpenAI's own begins anew, so only text completions work there.

    Args:
        client: see above.
        model: name of the model at the endpoint.
        tokenizer: the model's, of transformers.
        processors: logits processors, as for ``generate``; they get rows (1, V) that are -inf but for k tokens.
        top_logprobs: k, from 1 to 1000; endpoints allow 5 to 20 as a rule.
        chat: whether to use the chat interface.

    Raises:
        InputError: an argument out of range; on call, an endpoint that gives no log-probabilities or no token that the
            tokenizer knows.
    """

    def __init__(
        self,
        client: Any,
        model: str,
        tokenizer: Any,
        processors: Sequence[Any] = (),
        *,
        top_logprobs: int = 20,
        chat: bool = False,
    ) -> None:
        _whole("top_logprobs", top_logprobs, 1, 1000)
        if not isinstance(model, str) or not model:
            raise InputError("model", model, "the name of a model at the endpoint")
        self._client, self.model, self.tokenizer = client, model, tokenizer
        self.processors = LogitsProcessorList(processors)
        self.top_logprobs, self.chat = int(top_logprobs), bool(chat)
        self.size = len(tokenizer)
        self._ids = _ids_by_text(tokenizer)

    def __repr__(self) -> str:
        return f"EndpointSampler({self.model!r}, top_logprobs={self.top_logprobs}, chat={self.chat})"

    def __call__(
        self,
        prompt: str,
        max_new_tokens: int = 20,
        *,
        do_sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> EndpointText:
        """Go on with ``prompt``.

        Args:
            prompt: a text; with ``chat``, what the user says.
            max_new_tokens: requests, at most.
            do_sample: draw tokens, or take the most probable one.
            generator: what draws.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("prompt", prompt, "a text that isn't empty")
        _whole("max_new_tokens", max_new_tokens, 1, 100_000)
        given = list(self.tokenizer(prompt)["input_ids"])
        if not self.chat and self.tokenizer.eos_token_id is not None and given[-1] == self.tokenizer.eos_token_id:
            given = given[:-1]  # some tokenizers end every text
        found = EndpointText()
        while len(found.ids) < max_new_tokens:
            said = self._ask(prompt, found.text)
            found.requests += 1
            if said is None:
                found.ended = True
                break
            scores, unseen = self._row(said)
            ids: Any = torch.tensor([given + found.ids])
            scores = self.processors(ids, scores)
            if not bool((scores > -math.inf).any()) or bool(scores.isnan().any()):
                raise InputError("processors", "no token left", f"ones that leave one of {self.top_logprobs} tokens")
            if do_sample:
                token = int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
            else:
                token = int(scores.argmax())
            found.ids.append(token)
            found.unseen.append(unseen)
            if token == self.tokenizer.eos_token_id:
                found.ended = True
                break
            found.text = self._text(given, found.ids)
        return found

    def _ask(self, prompt: str, text: str) -> dict[str, float] | None:
        """Log-probabilities of the most probable tokens by what they say; None where the text is at its end."""
        shared: dict[str, Any] = {"model": self.model, "max_tokens": 1, "temperature": 1.0}
        if self.chat:
            messages = [{"role": "user", "content": prompt}]
            if text:
                messages.append({"role": "assistant", "content": text})
                shared["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
            choice = self._client.chat.completions.create(
                messages=messages, logprobs=True, top_logprobs=self.top_logprobs, **shared
            ).choices[0]
            places = getattr(choice.logprobs, "content", None)
            found = {entry.token: float(entry.logprob) for entry in places[0].top_logprobs} if places else None
        else:
            choice = self._client.completions.create(
                prompt=prompt + text, logprobs=self.top_logprobs, **shared
            ).choices[0]
            rows = getattr(choice.logprobs, "top_logprobs", None)
            found = {token: float(value) for token, value in rows[0].items()} if rows else None
        if found:
            return found
        if getattr(choice, "finish_reason", None) == "stop":
            return None
        raise InputError("client", self.model, "an endpoint that gives log-probabilities of its most probable tokens")

    def _row(self, said: Mapping[str, float]) -> tuple[Tensor, float]:
        """The tokens as a row of log-probabilities (1, V), and the probability that is on none of them."""
        scores = torch.full((1, self.size), -math.inf)
        for text, value in said.items():
            token = self._ids.get(text)
            if token is not None:
                # Two spellings of one token: both are it.
                scores[0, token] = torch.logaddexp(scores[0, token], torch.tensor(value))
        known = float(scores.exp().sum())
        if known <= 0:
            raise InputError("tokenizer", f"{len(said)} unknown tokens", "the tokenizer of the endpoint's model")
        return scores.log_softmax(-1), max(0.0, 1.0 - known)

    def _text(self, given: list[int], ids: list[int]) -> str:
        """The continuation as text: what decoding adds to the prompt's."""
        if self.chat:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        before = self.tokenizer.decode(given, skip_special_tokens=True)
        return str(self.tokenizer.decode(given + ids, skip_special_tokens=True))[len(before) :]


def _ids_by_text(tokenizer: Any) -> dict[str, int]:
    """Token ids by the texts that endpoints name them with: as decoded, or as in the vocabulary."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    ids = sorted(vocabulary.values())
    # SentencePiece marks a space in front, which decoding a single token would lose.
    found = {text.replace("▁", " "): token for text, token in vocabulary.items() if "▁" in text}
    for token, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True):
        if text and "\ufffd" not in text:  # a part of a character is no text
            found.setdefault(text, token)
    for text, token in vocabulary.items():
        found.setdefault(text, token)
    return found


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise InputError(name, value, f"a whole number from {low} to {high}")
