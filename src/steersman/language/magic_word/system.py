r"""A language model as a system to be steered: imposed tokens x0, and a prompt u in front of them that is free.

The model reads the row

    [BOS] u x0 y_1 ... y_{m-1}        (bos="outer": what the tokenizer puts first stays first)
    u [BOS] x0 y_1 ... y_{m-1}        (bos="inner")

and a prompt's loss is the mean cross-entropy of the answer, CE(u) = -1/m sum_j log P(y_j | u + x0 + y_<j). A prompt
*reaches* y when every y_j is the arg max there (of equal logits the smallest id is the arg max, as in ``generate``).
Since u stands in front, every state behind it changes with it: no key-value cache can be kept between candidates, and
what a search costs is rows through the model.
"""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from steersman.errors import InputError
from steersman.language.texts import opening_of

Bos = Literal["outer", "inner"]
KEPT = 4096
"""Candidates of a scan up to which it is kept for the state's other answers; longer ones would fill the memory."""


class System:
    """What prompts are made of, and the model that reads them.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer; None works on token ids alone (nothing in front, no special ids known).
        bos: where what the tokenizer puts in front of a text goes: in front of all (``outer``) or behind the
            prompt (``inner``, what the published code does for Llama).
        blacklist: ids that no prompt may contain, beside special ids and rows of the embedding without a token.
        alphabet: use only this many of the allowed ids, drawn by ``seed``: a scan then costs as many rows. None:
            all. The reachable set is then that of the smaller alphabet.
        batch: rows of one forward pass; None chooses by length and device.
        seed: of the alphabet.

    Raises:
        InputError: an encoder-decoder, a model in training mode, a tokenizer with more tokens than the embedding
            has rows, a number out of range, or no id left that a prompt may contain.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        bos: Bos = "outer",
        blacklist: Iterable[int] = (),
        alphabet: int | None = None,
        batch: int | None = None,
        seed: int = 0,
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError("model", type(model).__name__, "a decoder-only language model")
        if model.training:
            raise InputError("model", "in training mode", "in evaluation mode: model.eval()")
        if bos not in ("outer", "inner"):
            raise InputError("bos", bos, "'outer' or 'inner'")
        self.model, self.tokenizer, self.bos = model, tokenizer, bos
        embedding = model.get_input_embeddings()
        self.rows = int(embedding.weight.shape[0])  # V, trailing rows of padding included
        self.device = embedding.weight.device
        tokens = self.rows if tokenizer is None else len(tokenizer)
        if tokens > self.rows:
            raise InputError("tokenizer", f"{tokens} tokens", f"one of at most {self.rows}, the rows of the embedding")
        self.special = frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids)
        self.blacklist = frozenset(whole("blacklist", token, 0, self.rows - 1) for token in blacklist)
        free = [v for v in range(tokens) if v not in self.special and v not in self.blacklist]
        if alphabet is not None:
            whole("alphabet", alphabet, 1)
            drawn = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))[:alphabet]
            free = [free[i] for i in sorted(drawn.tolist())]
        if not free:
            raise InputError("blacklist", f"{len(self.blacklist)} ids", "one that leaves an id for the prompt")
        self.allowed = torch.tensor(free, device=self.device)
        self.batch = None if batch is None else whole("batch", batch, 1)
        text = getattr(model.config, "get_text_config", lambda: model.config)()
        self.positions: int | None = getattr(text, "max_position_embeddings", None)
        self.opening = () if tokenizer is None else tuple(opening_of(tokenizer))
        known = inspect.signature(type(model).forward).parameters
        self.options = {name: value for name, value in (("use_cache", False),) if name in known}
        self.keeps_logits = "logits_to_keep" in known
        self.forwards = self.backwards = 0
        self._table: Tensor | None = None
        self._float32: Any = None

    @property
    def table(self) -> Tensor:
        """What the embedding gives for every id, (V, d): scaled embeddings come scaled."""
        if self._table is None:
            with torch.no_grad():
                self._table = self.model.get_input_embeddings()(torch.arange(self.rows, device=self.device))
        return self._table

    def encode(self, text: str | Sequence[int], parameter: str) -> tuple[int, ...]:
        """Token ids of ``text`` (given ids are checked and kept).

        Raises:
            InputError: no token, an id that the embedding lacks, or text without a tokenizer.
        """
        if isinstance(text, str):
            if self.tokenizer is None:
                raise InputError(parameter, text, "token ids where there is no tokenizer")
            ids = tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        else:
            ids = tuple(whole(parameter, token, 0, self.rows - 1) for token in text)
        if not ids:
            raise InputError(parameter, text, "at least one token")
        return ids

    def answer(self, y: str | int | Sequence[int], multi_token: bool = False) -> tuple[int, ...]:
        """Token ids of a wanted answer.

        Raises:
            InputError: more than one token without ``multi_token``, a special or a blacklisted id.
        """
        ids = self.encode((y,) if isinstance(y, numbers.Integral) else y, "y")  # type: ignore[arg-type]
        if len(ids) > 1 and not multi_token:
            raise InputError("y", y, f"one token (this is {len(ids)}; multi_token=True allows more)")
        for token in ids:
            if token in self.special or token in self.blacklist:
                raise InputError("y", y, f"free of special and blacklisted tokens (it has the id {token})")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; the ids themselves where there is no tokenizer."""
        ids = list(ids)
        return " ".join(map(str, ids)) if self.tokenizer is None else str(self.tokenizer.decode(ids))

    def logits(self, ids: Tensor, last: int = 1, model: Any = None) -> Tensor:
        """Logits at the last columns of rows of equal length: (N, T) -> (N, last, V)."""
        model = self.model if model is None else model
        keep = {"logits_to_keep": last} if self.keeps_logits else {}
        self.forwards += len(ids)
        # A model that is spread over devices gives its logits on the last of them.
        return model(input_ids=ids, **self.options, **keep).logits[:, -last:].to(ids.device)

    def in_float32(self) -> Any:
        """The model itself, or a copy in float32 of one in half precision, made once."""
        if torch.finfo(self.model.dtype).bits >= 32:
            return self.model
        if self._float32 is None:
            self._float32 = copy.deepcopy(self.model).float()
        return self._float32

    def split(self, length: int, last: int = 1) -> int:
        """Rows of one forward pass over ``length`` tokens: what a CPU's cache, or an accelerator, likes best."""
        if self.batch is not None:
            return self.batch
        tokens, numbers_out = (3072, 2**22) if self.device.type == "cpu" else (2**16, 2**27)
        return max(1, min(tokens // length, numbers_out // (last * self.rows)))


class State:
    """Imposed tokens x0, and what the model says behind prompts in front of them.

    Args:
        system: the model and what prompts may contain.
        x0: text or token ids, at least one.

    Raises:
        InputError: x0 is empty, or longer than the model's context.
    """

    def __init__(self, system: System, x0: str | Sequence[int]) -> None:
        self.system = system
        self.x0 = system.encode(x0, "x0")
        outer = system.bos == "outer"
        self.left = system.opening if outer else ()
        self.right = self.x0 if outer else (*system.opening, *self.x0)
        self.answers: list[int] = []  # single tokens that are looked for: one scan serves all of them
        self._scans: dict[tuple[int, ...], tuple[Tensor, dict[int, Tensor]]] = {}
        self._next: Tensor | None = None
        self.check(0)

    def check(self, prompt: int, answer: int = 1) -> None:
        """Refuse a prompt of this many tokens that doesn't fit into the context."""
        longest = self.system.positions
        length = len(self.left) + prompt + len(self.right) + answer - 1
        if longest is not None and length > longest:
            value = f"{prompt} tokens in front of {len(self.right)}"
            raise InputError("prompt", value, f"at most {longest} tokens together (the model's context)")

    def rows(self, prompts: Tensor, answer: Sequence[int] = ()) -> Tensor:
        """The whole rows that the model reads, (N, T), for prompts (N, k)."""
        n = len(prompts)
        left, right = (
            torch.tensor(part, dtype=torch.long, device=prompts.device).expand(n, -1)
            for part in (self.left, (*self.right, *answer))
        )
        return torch.cat([left, prompts, right], 1)

    def logits(self, prompts: Tensor, answer: Sequence[int] = ()) -> Iterator[Tensor]:
        """Logits behind x0 and behind each token of ``answer``, batch by batch: (n, 1 + len(answer), V), float32.

        Args:
            prompts: (N, k).
            answer: tokens behind x0, the same for all.
        """
        last = 1 + len(answer)
        size = self.system.split(len(self.left) + prompts.shape[1] + len(self.right) + len(answer), last)
        with torch.inference_mode():
            for part in prompts.split(size):
                logits = self.system.logits(self.rows(part, answer), last)
                yield logits if logits.dtype == torch.float64 else logits.float()

    def next_token(self) -> Tensor:
        """Log-probabilities of the next token without a prompt, (V,)."""
        if self._next is None:
            empty = torch.empty(1, 0, dtype=torch.long, device=self.system.device)
            (logits,) = self.logits(empty)
            self._next = logits[0, 0].log_softmax(-1)
        return self._next

    def scores(self, prompts: Tensor, y: Sequence[int]) -> tuple[Tensor, Tensor]:
        """CE of every prompt, (N,), and whether it reaches y, (N,)."""
        wanted = torch.tensor(y, device=prompts.device)
        losses, reached = [], []
        for logits in self.logits(prompts, y[:-1]):
            own = logits.gather(2, wanted.expand(len(logits), -1)[..., None])[..., 0]
            losses.append((logits.logsumexp(-1) - own).mean(1))
            reached.append((logits.argmax(-1) == wanted).all(1))
        return torch.cat(losses), torch.cat(reached)

    def scan(self, prompt: Tensor, y: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``scores`` of every allowed id in front of ``prompt``, in the order of ``system.allowed``.

        Rows depend on the prompt alone, so what is read from them for one answer is read for all answers of the
        state, and the first scan (|V| rows) is made once a state.
        """
        allowed = self.system.allowed
        candidates = torch.cat([allowed[:, None], prompt.expand(len(allowed), -1)], 1)
        if len(y) > 1:
            return self.scores(candidates, y)
        key = tuple(prompt.tolist())
        if y[0] not in self._scans.get(key, (None, {}))[1]:
            wanted = list(dict.fromkeys([*self.answers, y[0]]))
            index = torch.tensor(wanted, device=allowed.device)
            tops, losses = [], []
            for logits in self.logits(candidates):
                logits = logits[:, 0]
                tops.append(logits.argmax(-1))
                losses.append(logits.logsumexp(-1, keepdim=True) - logits[:, index])
            loss = torch.cat(losses)
            found = torch.cat(tops), {token: loss[:, i] for i, token in enumerate(wanted)}
            if prompt.numel() and len(allowed) > KEPT:
                return found[1][y[0]], found[0] == y[0]
            self._scans[key] = found
        top, by_answer = self._scans[key]
        return by_answer[y[0]], top == y[0]

    def tops(self, prompts: Tensor) -> Tensor:
        """The arg max behind every prompt, (N,)."""
        return torch.cat([logits[:, 0].argmax(-1) for logits in self.logits(prompts)])

    def gradient(self, prompt: Tensor, loss: Any, answer: Sequence[int] = ()) -> Tensor:
        """d loss / d onehot(u), (k, V): of ``loss(logits (1 + len(answer), V))`` at one prompt (k,).

        The rows of the embedding are what one-hot rows are multiplied by, e_i = onehot_i E, so the gradient with
        regard to a one-hot row is (d loss / d e_i) E^T. It is taken at the output of the embedding module, which
        every model of transformers has, whatever its class.
        """
        system, start = self.system, len(self.left)
        ids = self.rows(prompt[None], answer)
        change = torch.zeros(*ids.shape, system.table.shape[1], dtype=system.table.dtype, device=ids.device)
        change.requires_grad_()
        hook = system.model.get_input_embeddings().register_forward_hook(lambda module, given, made: made + change)
        try:
            with torch.enable_grad():
                logits = system.logits(ids, 1 + len(answer))[0]
                value = loss(logits if logits.dtype == torch.float64 else logits.float())
                (found,) = torch.autograd.grad(value, change)
        finally:
            hook.remove()
        system.backwards += 1
        return found[0, start : start + len(prompt)] @ system.table.T

    def verified(self, prompt: Sequence[int], y: Sequence[int]) -> bool:
        """Whether a fresh pass over this one row gives y, in the model's precision and in float32.

        Logits of a batch differ from those of one row in the last digits, and half precision has many ties: what
        only holds through either does not count.
        """
        prompts = torch.tensor([list(prompt)], dtype=torch.long, device=self.system.device)
        ids, wanted = self.rows(prompts, y[:-1]), torch.tensor(y, device=self.system.device)
        with torch.inference_mode():
            return all(
                bool((self.system.logits(ids, len(y), model)[0].argmax(-1) == wanted).all())
                for model in {id(m): m for m in (self.system.model, self.system.in_float32())}.values()
            )


class Objective:
    """One pair (x0, y): what a search may ask, and what it has spent.

    A row counts as one forward pass and a gradient as three (a backward pass costs about two). A scan counts in
    full also where it was made before for another answer of the state.

    Args:
        state: x0.
        y: wanted tokens.
        budget: forward passes that may be spent; None: no end.
    """

    def __init__(self, state: State, y: Sequence[int], budget: int | None = None) -> None:
        self.state, self.y, self.budget = state, tuple(y), budget
        self.passes = 0
        if len(self.y) == 1 and self.y[0] not in state.answers:
            state.answers.append(self.y[0])

    @property
    def allowed(self) -> Tensor:
        return self.state.system.allowed

    def affords(self, passes: int) -> bool:
        """Whether the budget has this many passes left."""
        return self.budget is None or self.passes + passes <= self.budget

    def scores(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += len(prompts)
        return self.state.scores(prompts, self.y)

    def scan(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += len(self.allowed)
        return self.state.scan(prompt, self.y)

    def gradient(self, prompt: Tensor) -> Tensor:
        self.passes += 3
        wanted = torch.tensor(self.y, device=prompt.device)
        return self.state.gradient(prompt, lambda logits: F.cross_entropy(logits, wanted), self.y[:-1])

    def first_verified(self, prompts: Tensor, loss: Tensor, reached: Tensor) -> int | None:
        """The reached prompt of the least loss (of equal losses the first) that a fresh pass confirms."""
        found = reached.nonzero()[:, 0]
        order = found[loss[found].sort(stable=True).indices]
        for i in order[:8].tolist():  # the eighth that a batch and a single row disagree on is not worth a row
            if self.state.verified(prompts[i].tolist(), self.y):
                return int(i)
        return None


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as a whole number in its range.

    Raises:
        InputError: it is none, or out of the range.
    """
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(name, value, f"a whole number {'of ' if high is None else ''}{allowed}")
    return int(value)
