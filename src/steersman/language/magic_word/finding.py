r"""Magic words of one pair, and how controllable a model is over many.

A pair (x0, y) is *reached with k tokens* by a prompt u, |u| = k, when y is the model's top choice behind u + x0. Over
pairs drawn from data, the reached share within k tokens estimates controllability from below,

    R(k) = 1/n sum_i [ k_i <= k ],        eps_hat(k) = 1 - R(k) >= eps(k),

since a search may miss a prompt that exists: eps_hat is an upper estimate of the true eps, and its Wilson interval
speaks of the search, not of the model. eps_hat falls with k by construction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from steersman.errors import InputError
from steersman.language.magic_word.search import BackOff, Search
from steersman.language.magic_word.system import Bos, Objective, State, System, whole

NOTICE = "adversarial string found by search, not natural text"


@dataclass(frozen=True)
class MagicWord:
    """A prompt that was searched for one pair: an adversarial string, found by search.

    Args:
        x0, y: imposed tokens, wanted tokens.
        prompt: u, token ids; of a pair that was not reached, the best prompt tried.
        k: its length where y was reached (0: y is the top choice without a prompt), None where it was not.
        input_ids: the row that ``generate`` goes on from: what the tokenizer puts first, u, x0.
        text: u as text.
        text_roundtrip: whether u + x0 as text encodes to the same ids; if not, the prompt works as ids only.
        loss: CE(y | u + x0) of ``prompt``.
        rank: of y among the next tokens without a prompt, 0 is the most probable; None for several tokens.
        passes: forward passes spent, a gradient counting three.
        kind: which class of pairs it belongs to.
    """

    x0: tuple[int, ...]
    y: tuple[int, ...]
    prompt: tuple[int, ...]
    k: int | None
    input_ids: tuple[int, ...]
    text: str
    text_roundtrip: bool
    loss: float
    rank: int | None
    passes: int
    kind: str = ""

    @property
    def reached(self) -> bool:
        """Whether y is the top choice behind ``input_ids`` (a fresh pass over this row confirmed it)."""
        return self.k is not None

    def inputs(self, device: Any = None) -> dict[str, Tensor]:
        """Arguments of ``model.generate``: ``model.generate(**word.inputs())``."""
        ids = torch.tensor([self.input_ids], device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def __str__(self) -> str:
        if not self.reached:
            return f"not reached: the best of {len(self.prompt)} tokens leaves CE {self.loss:.3g}"
        return f"{self.text!r} ({self.k} tokens; {NOTICE})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> MagicWord:
        lists = {name: tuple(record[name]) for name in ("x0", "y", "prompt", "input_ids")}
        return cls(**{**record, **lists})


class Pair(NamedTuple):
    """Imposed tokens, wanted tokens, and the class that the pair belongs to."""

    x0: tuple[int, ...]
    y: tuple[int, ...]
    kind: str = ""


def find_magic_words(
    model: Any,
    tokenizer: Any,
    x0: str | Sequence[int],
    y: str | int | Sequence[int],
    search: Search | None = None,
    *,
    bos: Bos = "outer",
    blacklist: Iterable[int] = (),
    alphabet: int | None = None,
    multi_token: bool = False,
    budget: int | None = None,
    batch: int | None = None,
    seed: int = 0,
) -> MagicWord:
    """The shortest prompt in front of ``x0`` found that makes ``y`` the model's top choice.

    ::

        word = find_magic_words(model, tokenizer, "The list is", " sorted")
        model.generate(**word.inputs(model.device))

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer, or None for token ids alone.
        x0: imposed text or token ids, at least one token.
        y: wanted text or token ids.
        search: :class:`BackOff` by default; :class:`Greedy`, :class:`GCG` and :class:`RandomPrompts` are others.
        bos: ``outer`` puts what the tokenizer puts first in front of the prompt, ``inner`` behind it.
        blacklist: ids that no prompt may contain, beside special ones.
        alphabet: how many ids prompts may use, drawn at random; None: all.
        multi_token: whether ``y`` may have several tokens: each must then be the top choice behind those before.
        budget: forward passes that may be spent (a gradient counts three); None: the search's whole schedule.
        batch: rows of one forward pass; None chooses.
        seed: of random prompts and candidates.

    Raises:
        InputError: an argument outside its range; x0 and the longest prompt don't fit into the context.
    """
    system = System(model, tokenizer, bos=bos, blacklist=blacklist, alphabet=alphabet, batch=batch, seed=seed)
    return _search(State(system, x0), system.answer(y, multi_token), search or BackOff(), budget, "", [seed, 0, 0])


def _search(
    state: State, y: tuple[int, ...], search: Search, budget: int | None, kind: str, seed: Sequence[int]
) -> MagicWord:
    """k = 0 if y is the top choice already, else what the search finds."""
    state.check(search.longest, len(y))
    objective, system = Objective(state, y, budget), state.system
    empty = torch.empty(1, 0, dtype=torch.long, device=system.device)
    loss, reached = objective.scores(empty)
    rank = None
    if len(y) == 1:
        log_p = state.next_token()
        # Equal logits: the smallest id comes first, as in arg max.
        rank = int((log_p > log_p[y[0]]).sum() + (log_p[: y[0]] == log_p[y[0]]).sum())
    prompt, k, value = (), None, float(loss[0])
    if bool(reached[0]) and state.verified((), y):
        k = 0
    else:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        found = search.search(objective, generator)
        if found.prompt:
            prompt, value = found.prompt, found.loss  # type: ignore[assignment]
        k = len(found.prompt) if found.reached else None
    u = torch.tensor([prompt], dtype=torch.long)
    row = state.rows(u)[0].tolist()
    text = system.decode(prompt) if prompt else ""
    return MagicWord(
        x0=state.x0,
        y=y,
        prompt=tuple(prompt),
        k=k,
        input_ids=tuple(row),
        text=text,
        text_roundtrip=_roundtrip(system, (*prompt, *state.x0)),
        loss=value,
        rank=rank,
        passes=objective.passes,
        kind=kind,
    )


def _roundtrip(system: System, ids: tuple[int, ...]) -> bool:
    if system.tokenizer is None:
        return False
    return tuple(system.tokenizer(system.decode(ids), add_special_tokens=False, verbose=False)["input_ids"]) == ids


# ------------------------------------------------------------------ many pairs


class Share(NamedTuple):
    """Pairs reached with at most k tokens: a share with its Wilson interval (95%)."""

    k: int
    reached: int
    n: int
    share: float
    low: float
    high: float

    @property
    def epsilon(self) -> float:
        """eps_hat(k), at least the true eps(k): a search may miss prompts."""
        return 1 - self.share


@dataclass(frozen=True)
class Controllability:
    """The magic words of many pairs, and what they say of the model.

    Args:
        words: one a pair.
        longest: the longest prompt that was searched.
        seconds: of the whole search.
        forwards: rows that truly passed through the model (scans shared by the answers of a state counted once).
    """

    words: tuple[MagicWord, ...]
    longest: int
    seconds: float = math.nan
    forwards: int = 0

    @property
    def kinds(self) -> list[str]:
        """Classes of pairs, in order of appearance."""
        return list(dict.fromkeys(word.kind for word in self.words))

    def of(self, kind: str | None) -> list[MagicWord]:
        return [word for word in self.words if kind is None or word.kind == kind]

    def curve(self, kind: str | None = None) -> list[Share]:
        """The reached share within k = 0, 1, ..., longest tokens, of one class or of all pairs."""
        words = self.of(kind)
        shares = []
        for k in range(self.longest + 1):
            hits = sum(word.k is not None and word.k <= k for word in words)
            shares.append(share(k, hits, len(words)))
        return shares

    def decay(self, kind: str | None = None) -> dict[str, float | None]:
        """Slopes of log eps_hat(k) by k, fitted apart for k <= 3 and k >= 4, where the search and its budget change.

        Lengths at which nothing is left unsolved have no logarithm and are left out; None with fewer than two.
        """
        found: dict[str, float | None] = {}
        for name, low, high in (("k<=3", 0, 3), ("k>=4", 4, self.longest)):
            lengths = sorted({word.k for word in self.of(kind) if word.k} | {0, 1, 2, 3, 4, 6, 8, 10, self.longest})
            points = [(s.k, math.log(s.epsilon)) for s in self.curve(kind) if s.k in lengths and s.epsilon > 0]
            points = [p for p in points if low <= p[0] <= high]
            slope = stats.linregress([k for k, _ in points], [y for _, y in points]).slope if len(points) > 1 else None
            found[name] = None if slope is None else float(slope)
        return found

    def rank_correlation(self, kind: str | None = None) -> float | None:
        """Spearman's correlation of k with the prior rank of y; unsolved pairs count as k = longest + 1.

        Leaving them out would make it look weaker than it is. None where k or the rank does not vary.
        """
        known = [word for word in self.of(kind) if word.rank is not None]
        k = [self.longest + 1 if word.k is None else word.k for word in known]
        ranks = [word.rank for word in known]
        if len(set(k)) < 2 or len(set(ranks)) < 2:
            return None
        return float(stats.spearmanr(k, ranks).statistic)

    @property
    def passes_per_second(self) -> float:
        """Rows through the model by second of the search."""
        return self.forwards / self.seconds if self.seconds > 0 else math.nan

    def to_json(self) -> dict[str, Any]:
        """Shares by class and by k = 0, 1, ..., slopes and correlations, as plain JSON."""
        record: dict[str, Any] = {"pairs": len(self.words), "longest": self.longest}
        for kind in [None, *(k for k in self.kinds if len(self.kinds) > 1)]:
            curve = self.curve(kind)
            record["all" if kind is None else kind] = {
                "pairs": len(self.of(kind)),
                "reached": curve[-1].share,
                "reached_by_k": [s.share for s in curve],
                "low_by_k": [s.low for s in curve],
                "high_by_k": [s.high for s in curve],
                "log_epsilon_slope": self.decay(kind),
                "rank_correlation": self.rank_correlation(kind),
            }
        return record


def share(k: int, hits: int, n: int) -> Share:
    """``hits`` of ``n`` with the Wilson score interval at 95%."""
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return Share(k, hits, n, hits / n, float(interval.low), float(interval.high))


def k_epsilon(
    model: Any,
    pairs: Iterable[Pair | Sequence[Any]],
    tokenizer: Any = None,
    search: Search | None = None,
    *,
    budget: int | None = None,
    multi_token: bool = False,
    seed: int = 0,
    on_state: Callable[[int, list[MagicWord]], None] = lambda number, words: None,
    **system: Any,
) -> Controllability:
    """Search every pair of a data set, and report the reached share by prompt length.

    Pairs of one x0 are searched together: what a scan of the alphabet costs is paid once for all of them.

    Args:
        model: a causal language model, or a :class:`System`.
        pairs: ``(x0, y)`` or ``(x0, y, kind)``, as text or token ids; see :func:`pairs_from_text` for making them.
        tokenizer: the model's, or None for token ids alone.
        search: :class:`BackOff` by default.
        budget: forward passes a pair; None: the search's whole schedule.
        multi_token, seed: as in :func:`find_magic_words`. A state's draws depend on the seed and its own place alone.
        on_state: called with a state's number and its words when it is done.
        system: further arguments of :class:`System`: ``bos``, ``blacklist``, ``alphabet``, ``batch``.

    Raises:
        InputError: no pair, or a pair or argument that is not allowed; nothing has been searched then.
    """
    search = search or BackOff()
    whole("seed", seed, 0)
    machine = model if isinstance(model, System) else System(model, tokenizer, seed=seed, **system)
    if budget is not None:
        whole("budget", budget, 1)
    grouped = states_of(machine, pairs, multi_token)
    for state, answers in grouped:
        for y, _ in answers:
            state.check(search.longest, len(y))
    start, before = time.perf_counter(), machine.forwards
    words: list[MagicWord] = []
    for number in range(len(grouped)):
        found = search_state(grouped, number, search, budget, seed)
        words += found
        on_state(number, found)
    return Controllability(tuple(words), search.longest, time.perf_counter() - start, machine.forwards - before)


Grouped = list[tuple[State, list[tuple[tuple[int, ...], str]]]]


def states_of(system: System, pairs: Iterable[Pair | Sequence[Any]], multi_token: bool = False) -> Grouped:
    """Pairs grouped by x0, in order of appearance, all checked.

    Raises:
        InputError: no pair, or one that is not allowed.
    """
    states: dict[tuple[int, ...], tuple[State, list[tuple[tuple[int, ...], str]]]] = {}
    for pair in pairs:
        x0, y, *rest = pair
        ids = system.encode(x0, "x0")
        if ids not in states:
            states[ids] = (State(system, ids), [])
        state, answers = states[ids]
        wanted = system.answer(y, multi_token)
        answers.append((wanted, str(rest[0]) if rest else ""))
        if len(wanted) == 1 and wanted[0] not in state.answers:
            state.answers.append(wanted[0])
    if not states:
        raise InputError("pairs", [], "at least one pair (x0, y)")
    return list(states.values())


def search_state(grouped: Grouped, number: int, search: Search, budget: int | None, seed: int) -> list[MagicWord]:
    """The magic words of one state's answers."""
    state, answers = grouped[number]
    return [_search(state, y, search, budget, kind, [seed, number, place]) for place, (y, kind) in enumerate(answers)]
