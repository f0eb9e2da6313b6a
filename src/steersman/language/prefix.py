r"""A second model's opinion of what comes next, as a pure function of the prefix.

Processors that change the law of the next token often ask a second model: a value function, a class-conditional
model under two codes, a reference policy. ``generate`` tells a processor only the ids so far. It swaps rows (beams),
drops them, goes back (speculation) and starts anew, and never says so. So what is carried from step to step here is
keyed by the prefix itself: with cached rows :math:`r` and asked rows :math:`b`,

.. math:: m_{b} = \max_r \, \mathrm{lcp}(x_b, r), \qquad \text{kept columns} = \min_b m_b ,

and each asked row goes on from the row that it shares most with. Where every row is a cached one and a token, as in
sampling and in beams, one token is fed. What comes out depends on the prefix alone.
"""

from __future__ import annotations

import inspect
import numbers
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steersman.errors import InputError

MOST = 2**27  # logits that are looked at together


@dataclass(frozen=True)
class Step:
    """What a model says behind each of B prefixes, under each of n openings (n B rows, opening by opening).

    Args:
        logits: the model's ``logits`` behind the last token, float32, (nB, V).
        totals: sum of log p(x_j | opening, x_<j) over the tokens of the text, float32, (nB,); None if not asked for.
        tokens: number of tokens of the text, without padding and opening, (B,).
    """

    logits: Tensor
    totals: Tensor | None
    tokens: Tensor


class Carried(threading.local):
    """What is carried from call to call, of each thread (a draft and a target may ask at the same time).

    Attributes:
        ids: the texts in the cache, (R, T').
        last: logits behind their last column, (nR, V).
        sums: totals up to each column, (nR, T').
        cache: of nR rows.
        opened: law behind each opening, (n, V) log-probabilities.
    """

    ids: Tensor | None = None
    last: Tensor | None = None
    sums: Tensor | None = None
    cache: Any = None
    opened: Tensor | None = None


class PrefixModel:
    """A causal model whose next-token outputs are asked for by prefix. It may be called from several threads.

    Args:
        model: a decoder-only model of transformers with ``.logits`` (B, T, V) of any meaning and full attention.
        pad_token_id: the id that pads prompts on the left. The run of it that opens a row is left out.
        prompt_length: columns of the padded prompt; limits that run.
        opening: token ids in front of every text, as a control code; or n sequences of ids, which give n rows for
            each text.
        totals: whether to sum the log-probabilities of the texts' tokens. The first token counts only behind an
            opening.

    Raises:
        InputError: an encoder-decoder, or attention that isn't over the whole prefix. On call: a text longer than
            the model takes.
    """

    def __init__(
        self,
        model: Any,
        *,
        pad_token_id: int | None = None,
        prompt_length: int | None = None,
        opening: Sequence[int] | Sequence[Sequence[int]] = (),
        totals: bool = False,
    ) -> None:
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError("model", name, "a decoder-only model")
        if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
            raise InputError("model", name, "a model whose every layer attends to the whole text")
        self.model, self.pad_token_id, self.prompt_length = model, pad_token_id, prompt_length
        many = bool(opening) and not isinstance(opening[0], numbers.Integral)
        self.openings: list[list[int]] = [list(row) for row in opening] if many else [list(opening)]  # type: ignore
        if any(self.openings) != all(self.openings):
            raise InputError("opening", self.openings, "token ids for every opening, or for none")
        self.n, self.width = len(self.openings), max(map(len, self.openings))
        self.size = model.config.get_text_config().vocab_size
        self.totals = totals
        self.limit = getattr(model.config, "max_position_embeddings", None)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's forward takes anything
        takes = inspect.signature(getattr(inner, "_orig_mod", inner).forward).parameters
        self._positions, self._last_only = "position_ids" in takes, "logits_to_keep" in takes
        self._carried = Carried()

    def forget(self) -> None:
        """Drop what was carried (memory only: answers never depend on it)."""
        self._carried = Carried()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_carried": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._carried = Carried()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Step:
        """The model's outputs behind each row of ``input_ids`` (B, T), T >= 1."""
        carried = self._carried
        ids = input_ids.to(self.model.device)
        length = ids.shape[1]
        if self.limit is not None and self.width + length > self.limit:
            allowed = f"at most {self.limit} for {type(self.model).__name__} (with an opening of {self.width})"
            raise InputError("input_ids", f"{length} tokens", allowed)
        text = self._text(ids)
        parent, kept = self._matched(ids)
        if kept == length and carried.last is not None:  # asked before, in any order
            rows = slice(None) if parent is None else self._all(parent)
            sums = carried.sums[rows, -1] if carried.sums is not None else None
            return Step(carried.last[rows], sums, text.sum(1))
        start = self._resume(parent, kept)
        # The totals need the logits behind every column: a long prompt of a large vocabulary goes in pieces.
        piece = max(1, MOST // (self.n * len(ids) * self.size)) if self.totals else length
        for stop in [*range(start + piece, length, piece), length]:
            logits = self._feed(ids[:, :stop], text[:, :stop], start)
            if self.totals:
                self._add(ids[:, :stop], text[:, :stop], logits, start)
            last, start = logits[:, -1].clone(), stop
            carried.last = last
        carried.ids = ids.clone()
        sums = carried.sums[:, -1] if carried.sums is not None else None
        return Step(last, sums, text.sum(1))

    # --- inside -------------------------------------------------------------------------------------------

    def _text(self, ids: Tensor) -> Tensor:
        """Which columns are text, (B, T)."""
        if self.pad_token_id is None:
            return torch.ones_like(ids, dtype=torch.bool)
        padding = (ids == self.pad_token_id).cumprod(1).bool()
        if self.prompt_length is not None:
            padding[:, self.prompt_length :] = False
        return ~padding

    def _matched(self, ids: Tensor) -> tuple[Tensor | None, int]:
        """The cached row that each text goes on from (None: its own), and how many columns all share with theirs."""
        before = self._carried.ids
        if before is None:
            return None, 0
        width = min(before.shape[1], ids.shape[1])
        parent: Tensor | None = None
        if before.shape[0] == ids.shape[0] and torch.equal(before[:, :width], ids[:, :width]):
            shared = width
        else:
            same = (ids[:, None, :width] == before[None, :, :width]).cumprod(2).sum(2)  # (B, R)
            most, parent = same.max(1)
            shared = int(most.min())
        if shared == ids.shape[1] < before.shape[1]:
            shared -= 1  # the outputs behind an inner column were not kept
        return parent, shared

    def _all(self, rows: Tensor) -> Tensor:
        """Rows of the texts as rows under every opening."""
        carried = self._carried
        assert carried.ids is not None
        return (torch.arange(self.n, device=rows.device)[:, None] * len(carried.ids) + rows).flatten()

    def _resume(self, parent: Tensor | None, kept: int) -> int:
        """Bring the cache to the columns that are shared, and say from which column on to feed."""
        carried = self._carried
        rows = None if parent is None else self._all(parent)
        back = 0 if carried.ids is None else carried.ids.shape[1] - kept
        known = carried.ids is not None
        carried.ids = None  # until the texts' passes are through, nothing here is to be gone on from
        if back and self.totals:
            # The next token's log-probability needs the outputs behind the last shared column: feed that again.
            kept, back = kept - 1, back + 1
        if not known or kept <= 0:
            carried.last = carried.sums = None
            carried.cache = DynamicCache()
            return 0
        if rows is not None:
            carried.cache.batch_select_indices(rows)
            carried.last = None if carried.last is None else carried.last[rows]
            carried.sums = None if carried.sums is None else carried.sums[rows]
        if back:
            carried.cache.crop(-back)
            carried.last = None
            carried.sums = None if carried.sums is None else carried.sums[:, : kept + 1]
        return kept

    def _feed(self, ids: Tensor, text: Tensor, start: int) -> Tensor:
        """Logits behind each column from ``start`` on (without totals: some, the last among them), under each opening,
        (nB, T - start, V) float32."""
        carried = self._carried
        new = ids[:, start:].repeat(self.n, 1)
        width = self.width
        opening, opens = self._opening(ids.device)  # (n, O) each
        mask = torch.cat([opens.repeat_interleave(len(ids), 0), text.repeat(self.n, 1)], 1)
        if start == 0 and width:
            new = torch.cat([opening.repeat_interleave(len(ids), 0), new], 1)
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        given: dict[str, Any] = {"position_ids": places} if self._positions else {}
        if self._last_only and not self.totals:
            given["logits_to_keep"] = 1
        output = self.model(
            new, attention_mask=mask.long(), past_key_values=carried.cache, use_cache=True, return_dict=True, **given
        )
        carried.cache = output.past_key_values
        logits = output.logits.float()
        if self.totals and start == 0 and width:
            if carried.opened is None:
                carried.opened = logits[:: len(ids), width - 1].log_softmax(-1)
            logits = logits[:, width:]
        return logits

    def _opening(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The openings, padded on the left, and which of their columns count, (n, O)."""
        width = self.width
        rows = [[0] * (width - len(row)) + row for row in self.openings]
        counts = [[False] * (width - len(row)) + [True] * len(row) for row in self.openings]
        shape = (self.n, width)
        opening = torch.tensor(rows, dtype=torch.long, device=device).view(shape)
        return opening, torch.tensor(counts, dtype=torch.bool, device=device).view(shape)

    def _add(self, ids: Tensor, text: Tensor, logits: Tensor, start: int) -> None:
        """Extend the running totals by the columns from ``start`` on, whose logits these are."""
        carried = self._carried
        token = ids[:, start:].repeat(self.n, 1)
        said = torch.zeros(token.shape, dtype=logits.dtype, device=logits.device)
        said[:, 1:] = logits[:, :-1].gather(2, token[:, 1:, None]).squeeze(2) - logits[:, :-1].logsumexp(-1)
        if start and carried.last is not None:
            said[:, :1] = carried.last.log_softmax(-1).gather(1, token[:, :1])
        # The first token of a text comes behind the opening, whatever padding lies between.
        counted = text.repeat(self.n, 1)
        first = ((counted.long().cumsum(1) == 1) & counted)[:, start:]
        behind = torch.zeros_like(said)
        if carried.opened is not None:
            behind = carried.opened.repeat_interleave(len(ids), 0).gather(1, token)
        said = torch.where(first, behind, said).masked_fill(~counted[:, start:], 0.0)
        known = carried.sums
        if known is None or not start:
            carried.sums = said.cumsum(1)
            return
        # A column that was fed again is in the totals already.
        said[:, 0] = known[:, -1] if known.shape[1] > start else known[:, -1] + said[:, 0]
        carried.sums = torch.cat([known[:, :start], said.cumsum(1)], 1)
