"""Momentum decoding: greedy decoding that pays a resistance for walking in circles.

The text so far is a walk on a directed graph whose nodes are token ids. Choosing a token that is already a
node closes a circle, and costs a resistance f that grows with the length of the n-gram it would repeat:

    l(v)  = 0 if v does not occur in x_<t, else the largest i in 1..L such that the i-gram
            (x_{t-i+1}, ..., x_{t-1}, v) already occurs in x_<t
    x_t   = argmax over v in C of  p(v | x_<t) - alpha f(l(v)),      C = the k most probable tokens

No graph needs to be built. Let n_t(j) be the length of the n-gram ending at column j < t that emitting x_j
at t would repeat, which is one more than the longest common suffix of x_<t and x_<j. Then

    l(v) = max over { j < t : x_j = v } of  min(n_t(j), L),          one scatter-max over the columns
    n_{t+1}(0) = 1,     n_{t+1}(j) = 1 + [x_{j-1} = x_t] n_t(j-1)

so that n is carried from token to token at O(t), on tensors. The carried n is a memo of the prefix that it
belongs to: wherever a prefix isn't the last one plus a token (beams that swap rows, another batch), n is
computed anew at O(t L). The law is the same pure function of the prefix either way.
"""

from __future__ import annotations

import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from steersman.errors import InputError, nearest

RESISTANCES: Mapping[str, Callable[[int], float]] = {
    "ours": lambda l: float(l) if l <= 5 else math.inf,
    "ours-zh": lambda l: {0: 0.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}.get(l, math.inf),
    "ngram": lambda l: {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 5.0}.get(l, math.inf),
    "constant": lambda l: 2.0 if l else 0.0,
    "log": lambda l: math.log(1 + l, 6) / 0.2 if l else 0.0,
    "exp": lambda l: 1.5**l / 2 if l else 0.0,
}
"""The paper's resistance functions f(l), by name: ``ours`` (GPT2-XL), ``ours-zh`` (the Chinese 3.5B GPT-2),
``ngram`` (4-gram blocking: at alpha = 0.2, f(4) = 5 costs a whole unit of probability), ``constant``, ``log``
and ``exp``."""


def repetition_length(ids: Tensor, vocab_size: int, max_length: int = 5, start: int | Tensor = 0) -> Tensor:
    """l(v) for every token v: the length of the longest n-gram that emitting v next would repeat.

    Args:
        ids: token ids so far, (B, T).
        vocab_size: V; every id is below it.
        max_length: L, the longest n-gram looked at, at least 1.
        start: the first column that is text, one number or (B,); columns before it (padding) equal nothing.

    Returns:
        Whole numbers from 0 (v does not occur) to ``max_length``, (B, V).

    Raises:
        InputError: ``ids`` is no matrix of whole numbers, or ``max_length`` or ``vocab_size`` is below 1.
    """
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype is torch.bool:
        raise InputError("ids", f"{tuple(ids.shape)} of {ids.dtype}", "a matrix (batch, length) of token ids")
    _whole("vocab_size", vocab_size, 1)
    _whole("max_length", max_length, 1)
    ids = ids.long()
    if isinstance(start, Tensor):
        start = start.view(-1, 1)
    return _lengths(ids, _repeats(ids, max_length), start, vocab_size)


def _repeats(ids: Tensor, longest: int) -> Tensor:
    """min(n(j), L), by comparing the L - 1 tokens before every column j with the last L - 1, (B, T)."""
    if longest == 1:
        return torch.ones_like(ids)
    # -1 before the text is no token: at most the tokens there are can match.
    windows = F.pad(ids, (longest - 1, 0), value=-1).unfold(1, longest - 1, 1)
    return 1 + (windows[:, :-1] == windows[:, -1:]).flip(2).cumprod(2).sum(2)


def _lengths(ids: Tensor, repeats: Tensor, start: int | Tensor, vocab_size: int) -> Tensor:
    """max over { j : x_j = v } of min(n(j), L), n-grams that begin before ``start`` cut short, (B, V)."""
    if isinstance(start, Tensor) or start > 0:
        text = torch.arange(1, ids.shape[1] + 1, device=ids.device) - start  # tokens of text up to column j
        repeats = torch.minimum(repeats, text).clamp(min=0)
    return repeats.new_zeros(len(ids), vocab_size).scatter_reduce_(1, ids, repeats, "amax")


class MomentumDecoding(LogitsProcessor):
    r"""Momentum decoding (Lan et al., 2022), for ``model.generate`` with ``do_sample=False``.

        x_t = argmax_{v in C} p(v | x_<t) - alpha f(l(v))

    ::

        model.generate(**inputs, logits_processor=[MomentumDecoding()], do_sample=False)

    The scores it returns are p - alpha f for the candidates and -inf for all other tokens: they are no
    logits, so it must be the last processor, and temperature or top-p after it mean nothing. Under beam
    search a beam's score is the sum of p - alpha f over its tokens. Candidates that tie go to the more
    probable one, then to the lower id, so alpha = 0 is greedy search token for token. Tokens that an
    earlier processor forbade (-inf) stay forbidden. If all candidates have infinite resistance, the one
    that repeats least is taken, then the most probable.

    Speed: on the CPU n is carried from step to step, which was 2 to 4 times faster than computing it anew
    at t >= 1024 or B >= 32. On an accelerator it is computed anew (a few kernels): checking that a prefix
    only grew would stall the device. A step reads one flag back from the device, as the stopping criteria
    of ``generate`` do in any case: it tells the ordinary step from the one with ties, forbidden tokens or
    NaN among the candidates.

    Args:
        alpha: strength of the resistance, at least 0 (0 is greedy search).
        top_k: k, how many of the most probable tokens are candidates (ties go to the lower id). With more
            than the vocabulary has, all are, with a warning.
        resistance: f, a name from :data:`RESISTANCES`, or a table of your own: a sequence f(0), f(1), ...
            or a mapping from l to f(l). f(0) is 0; a length past the table is infinitely resisted.
        max_length: L, the longest n-gram looked at.
        pad_token_id: the id that pads short prompts on the left. A processor never sees the attention mask:
            without this, padding counts as text. The run of it that opens a row is left out (so a prompt
            that truly begins with this id loses that one node).
        prompt_length: columns of the padded prompt. Limits the run of padding, and is needed for
            ``include_prompt=False``.
        include_prompt: whether the prompt's tokens are nodes. False leaves repetition of the prompt (code,
            tables, names) free.
        exempt_ids: tokens without resistance, such as the end-of-sequence id when prompts contain it.
        window: only the last ``window`` tokens are the graph (our addition, for very long contexts; at
            least ``max_length``). None: all of them, as published.
        sample: our addition, not in the paper: return log p - alpha f, to be used with ``do_sample=True``,
            ``top_k=0``, ``top_p=1.0`` and ``temperature=1.0``.

    Raises:
        InputError: an argument outside its range. On call: scores with NaN or +inf, or with a row that
            leaves no token (all -inf).

    References:
        Tian Lan, Yixuan Su, Shuhang Liu, Heyan Huang, Xian-Ling Mao. Momentum Decoding: Open-ended Text
        Generation As Graph Exploration. arXiv:2212.02175, 2022.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        top_k: int = 5,
        resistance: str | Sequence[float] | Mapping[int, float] = "ours",
        max_length: int = 5,
        *,
        pad_token_id: int | None = None,
        prompt_length: int | None = None,
        include_prompt: bool = True,
        exempt_ids: Sequence[int] = (),
        window: int | None = None,
        sample: bool = False,
    ) -> None:
        number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
        if not number or not 0 <= alpha < math.inf:
            raise InputError("alpha", alpha, "a number of at least 0")
        _whole("top_k", top_k, 1)
        _whole("max_length", max_length, 1)
        for name, value in (("pad_token_id", pad_token_id), ("prompt_length", prompt_length)):
            if value is not None:
                _whole(name, value, 0)
        if window is not None:
            _whole("window", window, max_length, f"a whole number of at least max_length={max_length}")
        if not include_prompt and prompt_length is None:
            raise InputError("include_prompt", include_prompt, "True, or given together with prompt_length")
        for token in exempt_ids:
            _whole("exempt_ids", token, 0, "token ids, whole numbers of at least 0")
        self.alpha, self.top_k, self.max_length = float(alpha), top_k, max_length
        self.resistance = resistance
        self.pad_token_id, self.prompt_length, self.include_prompt = pad_token_id, prompt_length, include_prompt
        self.exempt_ids, self.window, self.sample = tuple(exempt_ids), window, sample
        table = resistance_table(resistance, max_length)
        # alpha 0 means no resistance, also where f is infinite: 0 * inf is NaN.
        self.penalty = torch.tensor([self.alpha * f if self.alpha else 0.0 for f in table])
        self.exempt = torch.tensor(self.exempt_ids, dtype=torch.long)
        self._carried: tuple[Tensor, Tensor] | None = None

    @property
    def generate_options(self) -> dict[str, Any]:
        """The options that ``generate`` must have beside this processor."""
        if not self.sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """p - alpha f(l) for the candidates, -inf for the rest, float32.

        Args:
            input_ids: the text so far, (B, T).
            scores: logits or log-probabilities of the next token, (B, V).
        """
        scores = scores.float()
        length_BV = _lengths(input_ids, self._carry(input_ids), self._start(input_ids), scores.shape[1])
        p = scores.log_softmax(-1) if self.sample else scores.softmax(-1)
        if 1 < self.top_k < scores.shape[1]:
            p_BK, candidates = p.topk(self.top_k + 1)
            last, after, p_BK, candidates = p_BK[:, -2], p_BK[:, -1], p_BK[:, :-1], candidates[:, :-1]
            value = p_BK - self._penalty(length_BV.gather(1, candidates), candidates)
            best = value.topk(2).values
            # False for NaN, for ties, and where a candidate is forbidden or all are infinitely resisted.
            if bool((last > after).all() & (best[:, :1] > best[:, 1:]).all()):
                return torch.full_like(scores, -math.inf).scatter_(1, candidates, value)
        return self._ranked(scores, p, length_BV)

    def _ranked(self, scores: Tensor, p: Tensor, length_BV: Tensor) -> Tensor:
        """The same scores, with ties, forbidden tokens and infinite resistance told apart."""
        candidates = self._candidates(scores, p)
        score, p, length = (x.gather(1, candidates) for x in (scores, p, length_BV))
        forbidden = score == -math.inf
        value = (p - self._penalty(length, candidates)).masked_fill(forbidden, -math.inf)

        blocked = value.amax(1, keepdim=True) == -math.inf
        length = length.masked_fill(forbidden, self.max_length + 1)
        value = torch.where(blocked & (length == length.amin(1, keepdim=True)), p, value)
        if not self.sample:
            # Of candidates that tie, all but the most probable lose; argmax alone would take the lowest id.
            ties = value == value.amax(1, keepdim=True)
            top = score.masked_fill(~ties, -math.inf).amax(1, keepdim=True)
            value = value.masked_fill(ties & (score < top), -math.inf)
        return torch.full_like(scores, -math.inf).scatter_(1, candidates, value)

    def _candidates(self, scores: Tensor, p: Tensor) -> Tensor:
        """Ids of the k most probable tokens, ties at the k-th place to the lower ids, (B, k)."""
        bad = p[:, 0].isnan()  # softmax spreads NaN, +inf and "no token left" over the whole row
        if bool(bad.any()):
            rows = f"rows {bad.nonzero().flatten().tolist()}"
            raise InputError("scores", rows, "free of NaN and +inf, with a finite value in every row")
        size = scores.shape[1]
        if self.top_k >= size:
            if self.top_k > size:
                text = f"top_k={self.top_k} is more than the vocabulary of {size}: all are candidates"
                warnings.warn(text, stacklevel=4)
            return torch.arange(size, device=scores.device).expand_as(scores)
        kth = scores.topk(self.top_k).values[:, -1:]
        above, equal = scores > kth, scores == kth
        left = self.top_k - above.sum(1, keepdim=True)
        return (above | (equal & (equal.cumsum(1) <= left))).nonzero()[:, 1].view(-1, self.top_k)

    def _penalty(self, length: Tensor, candidates: Tensor) -> Tensor:
        """alpha f(l) of the candidates, (B, k)."""
        if self.penalty.device != length.device:
            self.penalty, self.exempt = self.penalty.to(length.device), self.exempt.to(length.device)
        penalty = self.penalty.take(length)
        if self.exempt_ids:
            penalty = penalty.masked_fill(torch.isin(candidates, self.exempt), 0.0)
        return penalty

    def _start(self, ids: Tensor) -> int | Tensor:
        """The first column of each row that is a node of the graph."""
        start: int | Tensor = 0
        if not self.include_prompt:
            start = self.prompt_length or 0
        elif self.pad_token_id is not None:
            start = (ids[:, : self.prompt_length] == self.pad_token_id).cumprod(1).sum(1, keepdim=True)
        if self.window is not None and ids.shape[1] > self.window:
            oldest = ids.shape[1] - self.window
            start = start.clamp(min=oldest) if isinstance(start, Tensor) else max(start, oldest)
        return start

    def _carry(self, ids: Tensor) -> Tensor:
        """min(n(j), L) of the prefix ``ids``: carried on if it is the last prefix plus a token, else anew."""
        if ids.device.type != "cpu":
            return _repeats(ids, self.max_length)
        carried = self._carried  # read once: another thread may use this processor as well
        if carried is not None and ids.shape[1] and torch.equal(carried[0], ids[:, :-1]):
            before, repeats = carried
            repeats = F.pad((before == ids[:, -1:]) * repeats, (1, 0)).add_(1).clamp_(max=self.max_length)
        else:
            repeats = _repeats(ids, self.max_length)
        # A copy: the caller may write the next step into the same memory.
        self._carried = (ids.clone(), repeats)
        return repeats

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_carried": None}

    def __repr__(self) -> str:
        return (
            f"MomentumDecoding(alpha={self.alpha}, top_k={self.top_k}, resistance={self.resistance!r}, "
            f"max_length={self.max_length})"
        )


def resistance_table(resistance: str | Sequence[float] | Mapping[int, float], max_length: int) -> list[float]:
    """f(0), ..., f(L), infinite past the end of a user's table.

    Raises:
        InputError: an unknown name, a table without f(0) = 0, or a value that is no number above -inf.
    """
    if isinstance(resistance, str):
        if resistance not in RESISTANCES:
            raise InputError("resistance", resistance, nearest(resistance, RESISTANCES))
        return [RESISTANCES[resistance](l) for l in range(max_length + 1)]
    if not isinstance(resistance, (Mapping, Sequence)):
        raise InputError("resistance", resistance, f"a table, or {nearest('', RESISTANCES)}")
    pairs: Any = resistance.items() if isinstance(resistance, Mapping) else enumerate(resistance)
    given: dict[int, float] = dict(pairs)
    for l, f in given.items():
        if isinstance(l, bool) or not isinstance(l, numbers.Integral) or l < 0:
            raise InputError("resistance", resistance, "a table from whole numbers of at least 0 to numbers")
        if not isinstance(f, numbers.Real) or isinstance(f, bool) or math.isnan(f) or f == -math.inf:
            raise InputError("resistance", resistance, f"a table of numbers (f({l}) is {f!r})")
    if given.get(0) != 0:
        raise InputError("resistance", resistance, "a table with f(0) = 0")
    table = [float(given.get(l, math.inf)) for l in range(max_length + 1)]
    if any(later < earlier for earlier, later in itertools.pairwise(table)):
        warnings.warn(f"resistance {table} falls somewhere: a longer repetition costs less there", stacklevel=3)
    return table


def _whole(name: str, value: Any, low: int, allowed: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise InputError(name, value, allowed or f"a whole number of at least {low}")
