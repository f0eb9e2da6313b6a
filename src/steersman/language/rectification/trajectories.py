r"""Finished texts with rewards, to learn a value model from.

As published: prompts are the beginnings of labelled texts; the language model goes on from each several times; each
finished text gets the reward -1 if a scorer finds it undesired, else 0. Which of a prompt's continuations are kept
decides what the value model estimates. All of them: the risk under the language model. The most and the least
undesired one (``most``): half of what is kept may be bad where one in a hundred was, so that risks come out too high.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from steersman.errors import InputError

Data = Literal["all", "most", "sample"]
Scorer = Callable[[list[str]], Any]


@dataclass(frozen=True)
class Trajectory:
    """A finished text.

    Args:
        ids: all tokens, the prompt's first.
        prompt_length: number of those that are the prompt.
        reward: -1 (undesired) to 0.
        prompt: which prompt it went on from.
    """

    ids: tuple[int, ...]
    prompt_length: int
    reward: float
    prompt: int

    def row(self) -> dict[str, Any]:
        """As a row of a dataset for :class:`~.training.DeadEndTrainer`."""
        return {
            "input_ids": list(self.ids),
            "attention_mask": [1] * len(self.ids),
            "reward": self.reward,
            "prompt_length": self.prompt_length,
        }


def recorded(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, opening: Sequence[int], longest: int
) -> list[Trajectory]:
    """Trajectories of texts that come with ``reward`` in [-1, 0], or ``score`` in [0, 1] (below 1/2 is undesired).

    A row's ``prompt``, if it has one, stands before its ``text`` and counts as the prompt.

    Raises:
        InputError: a row without either, or with one out of range.
    """
    found, prompts = [], dict[str, int]()
    for number, row in enumerate(rows, 1):
        name = "reward" if row.get("reward") not in (None, "") else "score"
        low, high = (-1, 0) if name == "reward" else (0, 1)
        try:
            value = float(row[name])
        except (KeyError, TypeError, ValueError):
            value = float("nan")
        if not low <= value <= high:
            allowed = (
                f"in every row, a number in [{low}, {high}] (row {number}; a reward in [-1, 0] or a score in [0, 1])"
            )
            raise InputError(name, row.get(name), allowed)
        reward = value if name == "reward" else -float(value < 0.5)
        prompt = str(row.get("prompt") or "")
        first = [*opening, *_tokens(tokenizer, prompt)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*first, *_tokens(tokenizer, row["text"]), *end][:longest]
        # The first token of a text is nobody's choice where nothing stands before it.
        start = max(len(first), 1)
        if len(ids) > start:
            found.append(
                Trajectory(tuple(ids), start, reward, prompts.setdefault(prompt or f"\0{number}", len(prompts)))
            )
    return found


def cut_prompts(
    rows: Sequence[Mapping[str, Any]],
    n: int,
    tokenizer: Any,
    opening: Sequence[int],
    longest: int,
    rng: random.Random,
    *,
    tokens: int | None = None,
    near: int | None = None,
    wanted: tuple[str, str] | None = None,
    scorer: Scorer | None = None,
) -> list[tuple[int, ...]]:
    """``n`` beginnings of texts as token ids, from wanted and unwanted texts in turn where a label tells them.

    Args:
        tokens: tokens of a prompt; None cuts each text at a random place.
        near: texts that turn undesired are cut at most this many tokens before they do, so that the model's own
            continuations turn often enough to learn from. None, or without a scorer: anywhere before.
        wanted: column and value of the label; texts without it are unwanted.
        scorer: prompts that are undesired already are left out: nothing can be learned behind them.

    Raises:
        InputError: no text long enough.
    """
    sides: list[list[list[int]]] = [[], []]
    for row in rows:
        side = 1 if wanted is not None and str(row.get(wanted[0])) != wanted[1] else 0
        ids = _tokens(tokenizer, row["text"])
        if len(ids) > (tokens or 1):
            sides[side].append(ids)
    sides = [side for side in sides if side]
    if not sides:
        raise InputError("input", f"texts of at most {tokens or 1} tokens", "texts that are longer than a prompt")
    found: list[tuple[int, ...]] = []
    for _ in range(20):  # rounds, because a scorer may refuse many
        texts = [rng.choice(sides[i % len(sides)]) for i in range(n - len(found))]
        ends = [min(len(ids) - 1, longest - len(opening)) for ids in texts]
        starts = [1] * len(texts)
        if scorer is not None and tokens is None:
            for i, turn in enumerate(_turns(texts, tokenizer, scorer)):
                if turn is not None and turn > 1:
                    ends[i] = min(ends[i], turn - 1)
                    starts[i] = 1 if near is None else max(1, ends[i] - near + 1)
        cut = [(*opening, *ids[: tokens or rng.randint(a, b)]) for ids, a, b in zip(texts, starts, ends, strict=True)]
        if scorer is not None:
            scores = scored(scorer, tokenizer.batch_decode([list(ids) for ids in cut], skip_special_tokens=True))
            cut = [ids for ids, score in zip(cut, scores, strict=True) if score >= 0.5]
        found += cut
        if len(found) >= n:
            return found
    raise InputError(
        "input", f"{len(found)} prompts of {n}", "texts most of whose beginnings the scorer finds all right"
    )


def _turns(texts: Sequence[list[int]], tokenizer: Any, scorer: Scorer) -> list[int | None]:
    """With how many tokens each text is undesired first, by bisection; None where it never is.

    Where a text can turn back, the place found is one at which it turns.
    """
    whole = scored(scorer, tokenizer.batch_decode(list(texts), skip_special_tokens=True))
    low, high = [0] * len(texts), [len(ids) for ids in texts]  # all right with low tokens, undesired with high
    open_ = [i for i, score in enumerate(whole) if score < 0.5]
    turning = set(open_)
    while open_:
        middle = [(low[i] + high[i]) // 2 for i in open_]
        begun = [texts[i][:m] for i, m in zip(open_, middle, strict=True)]
        for i, m, score in zip(
            open_, middle, scored(scorer, tokenizer.batch_decode(begun, skip_special_tokens=True)), strict=True
        ):
            low[i], high[i] = (m, high[i]) if score >= 0.5 else (low[i], m)
        open_ = [i for i in open_ if high[i] - low[i] > 1]
    return [high[i] if i in turning else None for i in range(len(texts))]


def written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    continuations: int,
    new_tokens: int,
    batch: int,
    log: Callable[[str], None],
) -> list[list[tuple[int, ...]]]:
    """Samples of the model's own law behind each prompt: whole texts, prompts and ends included."""
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    end = tokenizer.eos_token_id
    jobs = sorted((i for i in range(len(prompts)) for _ in range(continuations)), key=lambda i: len(prompts[i]))
    found: list[list[tuple[int, ...]]] = [[] for _ in prompts]
    for at in range(0, len(jobs), batch):
        part = jobs[at : at + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in part], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=model.device
        )
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new_tokens,
            pad_token_id=pad, eos_token_id=end,
        )[:, width:].tolist()  # fmt: skip
        for i, row in zip(part, out, strict=True):
            text = row[: row.index(end) + 1] if end in row else row
            found[i].append((*prompts[i], *text))
        log(f"wrote {min(at + batch, len(jobs))} of {len(jobs)} texts")
    return found


def selected(
    texts: Sequence[Sequence[tuple[int, ...]]],
    scores: Sequence[Sequence[float]],
    prompts: Sequence[tuple[int, ...]],
    data: Data,
    drop_rate: float,
    rng: random.Random,
    sample_num: int = 6,
) -> list[Trajectory]:
    """Which continuations are learned from, as in the published code.

    Args:
        texts: continuations of each prompt, with their ``scores`` (1: as wanted).
        data: ``all``, ``most`` (the most and the least undesired of each prompt), or ``sample`` (``sample_num`` at
            random).
        drop_rate: chance that a prompt with nothing undesired is dropped.

    Raises:
        InputError: an unknown ``data``.
    """
    if data not in get_args(Data):
        raise InputError("data", data, f"one of {', '.join(get_args(Data))}")
    found = []
    for i, (group, marks) in enumerate(zip(texts, scores, strict=True)):
        if min(marks) >= 0.5 and rng.random() < drop_rate:
            continue
        order = sorted(range(len(group)), key=lambda j: marks[j])
        if data == "most":
            kept = [order[0], order[-1]] if len(order) > 1 else order
        elif data == "sample":
            kept = rng.sample(range(len(group)), min(sample_num, len(group)))
        else:
            kept = list(range(len(group)))
        found += [Trajectory(group[j], len(prompts[i]), -float(marks[j] < 0.5), i) for j in kept]
    return found


def scored(scorer: Scorer, texts: list[str]) -> list[float]:
    """The scorer's answers, checked.

    Raises:
        InputError: not as many numbers in [0, 1] as texts.
    """
    found = [float(value) for value in scorer(texts)]
    if len(found) != len(texts) or not all(0 <= value <= 1 for value in found):
        raise InputError("scorer", "its answers", f"as many numbers from 0 to 1 as texts ({len(texts)})")
    return found


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
