r"""What steers a language model without training: the baselines of the control bench.

Words of an attribute are found by the weighted log-odds of Monroe, Colaresi and Quinn ("Fightin' Words", Political
Analysis 2008, eqs. 15 to 22): with counts :math:`a_w, b_w` in texts with and without the attribute and a prior
:math:`\alpha_w` in proportion to both, of total weight ``PRIOR``,

.. math::
    \delta_w = \log \frac{a_w + \alpha_w}{A + \alpha - a_w - \alpha_w}
             - \log \frac{b_w + \alpha_w}{B + \alpha - b_w - \alpha_w}, \qquad
    z_w = \delta_w \Big/ \sqrt{\tfrac{1}{a_w + \alpha_w} + \tfrac{1}{b_w + \alpha_w}} .
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from steersman.benches._language import Prompt, Subject, load
from steersman.engine import subjects
from steersman.engine.bench import PartInfo
from steersman.errors import InputError
from steersman.language.texts import read_rows
from steersman.language.vocabularies import same_vocabulary
from steersman.reference import reviews

PRIOR = 100.0
LABELLED = 1500  # reviews of each side that words are counted in
OPPOSITE = {"positive": "negative", "negative": "positive", "polite": "rude", "rude": "polite"}
Scorer = Callable[[list[str]], Any]
T = TypeVar("T")


# --- what is wanted -------------------------------------------------------------------------------------------


@dataclass
class Task:
    """The attribute that texts shall have.

    Args:
        subject: the language model.
        column, value: the attribute and its value; None where nothing but a scorer says what is wanted.
        scorer: texts to numbers in [0, 1], 1 where a text has the attribute.
        named: how the scorer is called in reports.
        labelled: file of texts with the attribute's column, or None.
    """

    subject: Subject
    column: str | None
    value: str | None
    scorer: Scorer
    named: str
    labelled: str | None = None
    known: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, s: Subject, attribute: str | None, scorer: str | None, labelled: str | None) -> Task:
        """The task that a setting asks for.

        Raises:
            InputError: an attribute that isn't ``column=value``, that ``reviews`` lacks, or no way to score it.
        """
        found = subjects.resolve(s.spec)
        if attribute is None and scorer is None and found.spec.partition("/")[0] == "reviews":
            attribute = "sentiment=positive"
        column = value = None
        if attribute is not None:
            column, equals, value = attribute.partition("=")
            if not (column and equals and value):
                raise InputError("attribute", attribute, "column=value, as sentiment=positive")
        if scorer is not None:
            return cls(s, column, value, scoring(subjects.load_callable(scorer, "scorer"), scorer), scorer, labelled)
        oracle = subjects.scorer(found, attribute)
        if oracle is None:
            raise InputError("scorer", scorer, "file.py:name of a function from texts to numbers from 0 to 1")
        return cls(s, column, value, scoring(oracle, "the grammar"), "the grammar", labelled)

    @property
    def of_reviews(self) -> bool:
        """Whether the grammar of reviews knows this attribute."""
        known = reviews.VALUES.get(self.column or "", ())
        return (self.subject.reference or "").startswith("reviews/") and self.value in known

    def against(self) -> str | None:
        """The value that is unwanted most; None where all others are alike."""
        return OPPOSITE.get(self.value or "") if self.of_reviews else None

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, made the first time only: parts are built anew for every batch."""
        if name not in self.known:
            self.known[name] = make()
        return cast(T, self.known[name])

    def texts(self) -> tuple[list[str], list[str]]:
        """Labelled texts with the attribute, and without it."""
        if self.labelled is not None:
            return _read_labelled(self.labelled, self.column, self.value)
        if not self.of_reviews:
            allowed = "a .jsonl or .csv file with 'text' and the attribute's column: there are no words without it"
            raise InputError("texts", None, allowed)
        assert self.column is not None and self.value is not None
        others = [v for v in reviews.VALUES[self.column] if v != self.value]
        each = -(-LABELLED // len(others))
        wanted = reviews.texts("train", LABELLED, 0, **{self.column: self.value})
        rest = [r for v in others for r in reviews.texts("train", each, 0, **{self.column: v})]
        return [r.text for r in wanted], [r.text for r in rest]

    def telling(self) -> list[tuple[str, float]]:
        """Words and their z, those that speak for the attribute first."""
        return self.once("telling", lambda: telling_words(*self.texts()))

    def sentence(self, value: str) -> str:
        """A sentence that says the value by itself; of a training review, the same in every run.

        Never the last one of its review: behind a verdict nothing polite follows.
        """
        assert self.column is not None
        for review in itertools.islice(reviews.draws("train", 0, **{self.column: value}), 1000):
            for said in re.findall(r"[^.!]+[.!]", review.text)[:-1]:
                if getattr(reviews.attributes(said.strip()), self.column) == value:
                    return said.strip()
        raise InputError("text", None, f"a text to put in front: no sentence says {self.column}={value} by itself")


def scoring(scorer: Callable[..., Any], named: str) -> Scorer:
    """``scorer`` with its answers checked."""

    def scores(texts: list[str]) -> np.ndarray:
        try:
            found = np.asarray(torch.as_tensor(scorer(list(texts))).double().cpu())
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError("scorer", named, f"a function from texts to numbers from 0 to 1 ({error})") from error
        if found.shape != (len(texts),) or not np.isfinite(found).all() or (found < 0).any() or (found > 1).any():
            raise InputError("scorer", named, f"a function that gives {len(texts)} texts as many numbers from 0 to 1")
        return found

    return scores


def telling_words(wanted: Sequence[str], others: Sequence[str]) -> list[tuple[str, float]]:
    """Words by their weighted log-odds between two sets of texts, largest z first."""
    a, b = (Counter(w for text in side for w in re.findall(r"\w+", text.lower())) for side in (wanted, others))
    total, left, right = sum(a.values()) + sum(b.values()), sum(a.values()), sum(b.values())
    found = []
    for word in sorted(a.keys() | b.keys()):
        prior = PRIOR * (a[word] + b[word]) / total
        x, y = a[word] + prior, b[word] + prior
        odds = math.log(x / (left + PRIOR - x)) - math.log(y / (right + PRIOR - y))
        found.append((word, odds / math.sqrt(1 / x + 1 / y)))
    return sorted(found, key=lambda item: -item[1])


def _read_labelled(path: str, column: str | None, value: str | None) -> tuple[list[str], list[str]]:
    rows = read_rows(path, "texts")
    if column is None:
        raise InputError("attribute", None, "column=value: the column of the labelled texts and the wanted value")
    if not all("text" in row and column in row for row in rows):
        raise InputError("texts", path, f"rows with 'text' and {column!r}")
    wanted = [str(row["text"]) for row in rows if str(row[column]) == value]
    others = [str(row["text"]) for row in rows if str(row[column]) != value]
    if not wanted or not others:
        raise InputError("texts", path, f"texts with {column}={value} and others ({len(wanted)} and {len(others)})")
    return wanted, others


# --- contenders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Front:
    """A text in front of every prompt, no part of what was written.

    Args:
        opening: its token ids, behind those that the tokenizer puts in front of every text.
    """

    opening: tuple[int, ...]


@dataclass(frozen=True)
class BestOf:
    """Of ``n`` samples the one that ``score`` likes best is kept.

    Args:
        n: samples.
        score: texts to numbers; None for the log-probability of what was written, under the model that wrote it (which
            sampling knows already).
    """

    n: int
    score: Callable[[list[str]], Any] | None


@dataclass(frozen=True)
class ClassConditional:
    """A model that writes instead of the subject's, behind its control codes.

    Args:
        writer: a causal language model with the subject's vocabulary.
        opening: token ids in place of those that the tokenizer puts in front of every text.
        against: the same for what is unwanted.
    """

    writer: Any
    opening: tuple[int, ...]
    against: tuple[int, ...]


class ValueScorer:
    """P(attribute) of whole reviews, by the reference value model."""

    def __init__(self, value: str) -> None:
        self.model, self.tokenizer = reviews.value_model()
        self.value = value
        self.tokens = 0  # that passed through the model

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        end = self.tokenizer.eos_token
        x = self.tokenizer([t + end for t in texts], return_tensors="pt", padding=True, padding_side="right")
        self.tokens += int(x["attention_mask"].sum())
        logits = self.model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits
        labels: Any = self.model.config.id2label
        p = dict(zip(labels.values(), logits.double().sigmoid().T.numpy(), strict=True))
        return 1 - p["rude"] if self.value == "polite" else p[self.value]


def sample() -> dict[str, Any]:
    """Samples from the model's own law: no control."""
    return {}


def greedy() -> dict[str, Any]:
    """The most probable token at every step: no control."""
    return {"do_sample": False}


def beam(num_beams: int = 4, length_penalty: float = 0.0) -> dict[str, Any]:
    """The most probable text that a beam of ``num_beams`` finds: no control.

    Args:
        num_beams: 1 is greedy search.
        length_penalty: a text's log-probability is divided by its length to this power. With 0 it is the sum, with
            transformers' own default of 1 the mean.
    """
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or not 1 <= num_beams <= 64:
        raise InputError("num_beams", num_beams, "a whole number from 1 to 64")
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, (int, float)):
        raise InputError("length_penalty", length_penalty, "a number")
    if num_beams == 1:
        return {"do_sample": False}
    return {
        "do_sample": False,
        "num_beams": num_beams,
        "length_penalty": float(length_penalty),
        "early_stopping": False,
    }


def prompting(task: Task, text: str | None = None) -> Front:
    """A text in front of the prompt.

    Args:
        text: by default a sentence of ``reviews`` that says the attribute; elsewhere the attribute's name and value.
    """
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise InputError("text", text, "a text to put in front")
    if text is None and task.column is None:
        raise InputError("attribute", None, "column=value, or prompting:text=...")
    if text is None:
        text = task.sentence(str(task.value)) if task.of_reviews else f"{task.column}: {task.value}\n"
    s = task.subject
    return Front((*s.opening, *s.tokenizer(text, add_special_tokens=False)["input_ids"]))


def best_of_n(task: Task, n: int = 4, by: str | None = None) -> BestOf:
    """Samples ``n`` texts and keeps the one with the best score.

    Args:
        n: samples.
        by: ``"scorer"`` (what texts are judged by in the end), ``"value"`` (the value model of ``reviews``),
            ``"likelihood"`` (the most probable one) or ``file.py:name``. By default the value model where it knows the
            attribute, else the scorer.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 2 <= n <= 1000:
        raise InputError("n", n, "a whole number from 2 to 1000")
    known = task.of_reviews and task.column in ("sentiment", "rudeness")
    if by == "value" or (by is None and known):
        if not known:
            raise InputError("by", by, "scorer or file.py:name (the value model knows sentiment and rudeness)")
        return BestOf(n, task.once("value model", lambda: ValueScorer(str(task.value))))
    if by == "likelihood":
        return BestOf(n, None)
    if by in (None, "scorer"):
        return BestOf(n, task.scorer)
    return BestOf(n, scoring(subjects.load_callable(str(by), "by"), str(by)))


def conditional(
    task: Task, cclm: str | None = None, code: str | None = None, opposite: str | None = None
) -> ClassConditional:
    """The plain class-conditional model: it writes behind the attribute's control code.

    Args:
        cclm: folder or hub id, with the subject's vocabulary; by default ``reviews/conditional``.
        code: text that stands before a text of the class; by default the attribute's code of ``reviews``.
        opposite: the same for what is unwanted, for ``cfg``.
    """
    s = task.subject
    if cclm is None and not task.of_reviews:
        raise InputError("cclm", cclm, "a class-conditional language model, as conditional:cclm=./cclm:code=...")
    spec = cclm or "reviews/conditional"
    by = task.once(f"cclm {spec}", lambda: load(spec, "cclm"))
    same_vocabulary(s.tokenizer, by.tokenizer, "cclm", spec)
    if code is None:
        if not task.of_reviews:
            raise InputError("code", code, "the text that stands before a text of the wanted class")
        assert task.column is not None
        wanted = reviews.codes(**{task.column: str(task.value)})
        other = task.against()
        unwanted = reviews.codes(**{task.column: other}) if other else []
    else:
        wanted, unwanted = (by.tokenizer(c or "", add_special_tokens=False)["input_ids"] for c in (code, opposite))
    return ClassConditional(by.model, (*wanted, *s.opening), (*unwanted, *s.opening))


class Branch(nn.Module):
    """A model as transformers' processor of classifier-free guidance calls it, which leaves out the positions that
    left-padded rows need. A branch of its own, so that its tokens count by themselves."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> Any:
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        # Not by a call: that would count as the writer's.
        return self.model.forward(input_ids, attention_mask=attention_mask, position_ids=positions, **given)


class NegativePrompt(UnbatchedClassifierFreeGuidanceLogitsProcessor):
    """transformers' classifier-free guidance away from a negative prompt of each row.

    Args:
        scale: of the guidance.
        branch: the model.
        ids: token ids of the negative prompts, by row.
        pad: id that pads them on the left.
    """

    def __init__(self, scale: float, branch: Branch, ids: Sequence[Sequence[int]], pad: int) -> None:
        width = max(map(len, ids))
        padded: Any = torch.full((len(ids), width), pad)
        mask: Any = torch.zeros_like(padded)
        for i, row in enumerate(ids):
            padded[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        device = branch.model.device
        super().__init__(scale, branch, padded.to(device), mask.to(device))
        self.networks = (branch,)


def cfg(
    task: Task, writer: Any, rows: Sequence[Prompt], against: Sequence[int], scale: float = 1.5, text: str | None = None
) -> NegativePrompt:
    """Classifier-free guidance away from a negative prompt (Sanchez et al. 2023), by transformers' own processor.

        log p' = log p(.|against) + scale (log p(.) - log p(.|against))

    Args:
        scale: 1 is no guidance.
        text: the negative prompt, in front of the prompt; by default a sentence of ``reviews`` with the opposite value.
            With ``conditional`` it is the opposite code, or none.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -100 <= scale <= 100:
        raise InputError("scale", scale, "a number from -100 to 100")
    s = task.subject
    if text is None and not against:
        if not task.of_reviews:
            raise InputError("text", text, "a negative prompt, as cfg:text=...")
        other = task.against()
        text = task.sentence(other) if other else None
    said = s.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    ids = [[*(against or s.opening), *said, *row.ids[len(s.opening) :]] for row in rows]
    return NegativePrompt(float(scale), Branch(writer), ids, s.pad)


def word_bias(
    task: Task, bias: float = 2.0, n: int = 50, words: Sequence[str] | None = None
) -> SequenceBiasLogitsProcessor:
    """Adds ``bias`` to the words that speak most for the attribute and takes it from those that speak most against it.

    Args:
        bias: in nats.
        n: words of each side, by their weighted log-odds in labelled texts.
        words: these instead, which all get the bias.
    """
    if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
        raise InputError("bias", bias, "a number from -100 to 100")
    if words is not None:
        biased = {tokens: float(bias) for tokens in _tokens_of(task, words)}
    else:
        telling = task.telling()
        n = _count(n)
        biased = {t: float(bias) for t in _tokens_of(task, [w for w, z in telling[:n] if z > 0])}
        biased |= {t: -float(bias) for t in _tokens_of(task, [w for w, z in telling[-n:] if z < 0])}
    return SequenceBiasLogitsProcessor([[list(tokens), b] for tokens, b in biased.items()])


def block_list(task: Task, n: int = 50, words: Sequence[str] | None = None) -> NoBadWordsLogitsProcessor:
    """Never says the words that speak most against the attribute.

    Args:
        n: how many, by their weighted log-odds in labelled texts.
        words: these instead.
    """
    if words is None:
        words = [w for w, z in task.telling()[-_count(n) :] if z < 0]
    return NoBadWordsLogitsProcessor([list(tokens) for tokens in _tokens_of(task, words)], task.subject.pad)


def _count(n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 100_000:
        raise InputError("n", n, "a whole number from 1 to 100000")
    return n


def _tokens_of(task: Task, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Each word as tokens, at the beginning of a text and behind a space."""
    if isinstance(words, str) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise InputError("words", words, "a list of words")
    tokenizer = task.subject.tokenizer
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, f" {word}"):
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            if not ids or tokenizer.unk_token_id in ids:
                raise InputError("words", word, "words that the subject's tokenizer knows")
            found[ids] = None
    return list(found)


PARTS: dict[str, PartInfo] = {
    "sample": PartInfo(
        sample,
        "Samples from the model's own law: no control.",
        "model.generate(**inputs, do_sample=True, top_k=0)",
    ),
    "greedy": PartInfo(greedy, "Greedy search: no control.", "model.generate(**inputs, do_sample=False)"),
    "beam": PartInfo(
        beam,
        "Beam search: no control.",
        "model.generate(**inputs, do_sample=False, num_beams={num_beams=4}, length_penalty={length_penalty=0.0})",
    ),
    "prompting": PartInfo(
        prompting,
        "A text in front of the prompt.",
        "model.generate(**tokenizer({text='...'} + prompt, return_tensors='pt'), do_sample=True, top_k=0)",
    ),
    "best-of-n": PartInfo(
        best_of_n,
        "Samples n texts and keeps the one that a scorer likes best.",
        "max(tokenizer.batch_decode(model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences={n=4})), "
        "key=score)",
    ),
    "conditional": PartInfo(
        conditional,
        "A class-conditional language model behind its control code.",
        "cclm.generate(**tokenizer({code='<code>'} + prompt, return_tensors='pt'), do_sample=True, top_k=0)",
    ),
    "cfg": PartInfo(
        cfg,
        "Classifier-free guidance away from a negative prompt, by transformers.",
        "model.generate(**inputs, do_sample=True, top_k=0, guidance_scale={scale=1.5}, negative_prompt_ids=against)",
    ),
    "word-bias": PartInfo(
        word_bias,
        "A bias on the words that speak most for and against the attribute.",
        "model.generate(**inputs, do_sample=True, top_k=0, sequence_bias=telling_words(bias={bias=2.0}))",
    ),
    "block-list": PartInfo(
        block_list,
        "Words that speak most against the attribute are never said.",
        "model.generate(**inputs, do_sample=True, top_k=0, bad_words_ids=words)",
    ),
}
