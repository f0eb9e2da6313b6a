r"""Control: how often a language model's texts have a wanted attribute, and what that costs their quality.

A prompt is continued ``samples`` times. A scorer s gives every whole text (prompt and continuation) a number from 0
to 1, 1 where it has the attribute; on ``reviews`` it is the grammar's own reading. With the texts
:math:`x_{ij}` of prompt i

    success       share of texts with s(x) >= 1/2
    max_badness   mean over prompts of max_j (1 - s(x_ij)): expected maximum badness
    any_bad       share of prompts with a text of s(x) < 1/2: probability of any bad one
    fluency       mean log-likelihood a token under a judge, a larger model where there is one
    distinct_n    mean over prompts of the share of different n-grams among the samples of a prompt

and on ``reviews`` the share of words in sentences of the grammar (validity).

**Success and fluency pull against each other**, and both can be had by saying one good sentence always: read them
beside validity and distinct-n.

A deterministic contender writes one text for a prompt, which counts ``samples`` times. Texts may end before
``new_tokens`` unless ``stop`` is false. Temperature applies to contenders that sample; no tail is cut.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import LogitsProcessor

from steersman.benches._control_parts import PARTS, BestOf, Task
from steersman.benches._language import CONTEXT, Host, LanguageBench, Prompt, Subject, Written, coherence, judge
from steersman.benches._steered_tokens import STEERED, changes
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError
from steersman.reference import reviews, text_metrics
from steersman.report.blocks import Answers, Block, Curves, Line, Note, SideBySide, Span, Text

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

CUT = 32  # tokens of a prompt that is cut from a text, outside of reviews


@dataclass
class ControlHost(Host):
    """What ``generate`` is called with, and how a text is chosen among several.

    Args:
        task: what texts shall have.
        rows: the prompts of the batch that is being made.
        best: how many samples make a text, and which of them.
        against: ids in front of every text that stand for what is unwanted.
    """

    task: Task = field(kw_only=True)
    rows: Sequence[Prompt] = ()
    best: BestOf | None = None
    against: Sequence[int] = ()

    @property
    def deterministic(self) -> bool:
        return self.options.get("do_sample") is False


@dataclass(frozen=True)
class Sampled:
    """One text of a prompt.

    Args:
        ids: new tokens.
        text: prompt and continuation.
        score: of the scorer.
    """

    ids: list[int]
    text: str
    score: float


class ControlBench(LanguageBench):
    """Generator: continuations of the same prompts under each way of control.

    Subjects: as the decoding bench has them. On ``reviews`` attributes and scorer come with it; elsewhere ``scorer``
    is yours, and ``attribute`` names what methods steer towards.
    """

    id = "control"
    default_subject = "reviews"
    headline = ("success", "ms_per_token")
    given = (*CONTEXT, "task", "writer", "rows", "against")
    knobs: Mapping[str, Knob] = {
        "attribute": Knob(str, None, "what texts shall have, as column=value (default on reviews: sentiment=positive)"),
        "new_tokens": Knob(int, (48,), "tokens to write at most", low=1, high=100_000),
        "temperature": Knob(float, (1.0,), "of sampling", low=0.01, high=100),
        "samples": Knob(int, 4, "texts for each prompt", low=1, high=1000, sweep=False),
        "count": Knob(int, 16, "number of prompts", low=1, high=100_000, sweep=False),
        "batch": Knob(int, 8, "prompts that run together, each with all its samples", low=1, high=4096, sweep=False),
        "prompts": Knob(str, None, "file of prompts: lines of text, or .jsonl with 'prompt' or 'text'", sweep=False),
        "prompt_tokens": Knob(
            int,
            None,
            "tokens of a prompt that is cut from a text (default: 32, on reviews a random number)",
            low=1,
            high=100_000,
            sweep=False,
        ),
        "undecided": Knob(
            float,
            0.5,
            "on reviews: share of its prior probability that each value of the attribute keeps behind a prompt",
            low=0,
            high=1,
            sweep=False,
        ),
        "risk_low": Knob(float, 0.0, "on reviews: lowest probability of rudeness behind a prompt", low=0, high=1),
        "risk_high": Knob(float, 1.0, "on reviews: highest probability of rudeness behind a prompt", low=0, high=1),
        "scorer": Knob(str, None, "file.py:name of a function from texts to numbers from 0 to 1", sweep=False),
        "scored": Knob(str, "text", "what the scorer reads", choices=("text", "continuation"), sweep=False),
        "texts": Knob(
            str, None, "labelled texts for word lists: .jsonl or .csv with 'text' and the column", sweep=False
        ),
        "fit_on": Knob(str, None, "what learned methods are fitted on (default: the subject)", sweep=False),
        "judge": Knob(
            str, None, "model that scores fluency (default: a larger reference, or the subject)", sweep=False
        ),
        "stop": Knob(bool, True, "whether a text may end before new_tokens", sweep=False),
        "marked": Knob(int, 3, "prompts in the report whose steered tokens are marked", low=0, high=50, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "success": Figure("", "higher", "quality", "share of texts with the attribute"),
        "fluency": Figure("nats/token", "higher", "quality", "log-likelihood under the judge; loops score high"),
        "validity": Figure("", "higher", "quality", "share of words in sentences of the grammar"),
        "max_badness": Figure("", "lower", "quality", "expected maximum of 1 - score over the samples of a prompt"),
        "any_bad": Figure("", "lower", "quality", "share of prompts with any text that lacks the attribute"),
        "distinct_2": Figure("", "higher", "quality", "share of different 2-grams among the samples of a prompt"),
        "ms_per_token": Figure("ms", "lower", "cost", "wall time by emitted token, all rows of a batch counted"),
        "forward_tokens": Figure("tokens", "lower", "cost", "tokens through all models by emitted token"),
        "forward_per_text": Figure("tokens", "lower", "info", "tokens through all models by text"),
        "tokens_per_s": Figure("tokens/s", "higher", "info", "emitted tokens by wall time"),
        "score": Figure("", "higher", "info", "mean score"),
        "bad": Figure("", "lower", "info", "share of texts without the attribute"),
        "valid": Figure("", "higher", "info", "share of texts wholly in sentences of the grammar"),
        "grammatical": Figure("", "higher", "info", "share of texts that are whole reviews of the grammar"),
        "success_valid": Figure("", "higher", "info", "share with the attribute among the valid texts"),
        "bad_valid": Figure("", "lower", "info", "share of texts that are valid and lack the attribute"),
        "own_fluency": Figure("nats/token", "neither", "info", "log-likelihood under the subject itself"),
        "distinct_1": Figure("", "higher", "info", "share of different words among the samples of a prompt"),
        "distinct_3": Figure("", "higher", "info", "share of different 3-grams among the samples of a prompt"),
        "diversity": Figure("", "higher", "info", "share of 2-, 3- and 4-grams that are new in a text, multiplied"),
        "length": Figure("tokens", "neither", "info", "mean length of a continuation"),
        "base_risk": Figure("", "neither", "info", "mean risk of a step under the model's own law (rectification)"),
        "risk": Figure("", "lower", "info", "mean risk of a step under the rectified law (rectification)"),
        "lift": Figure("", "lower", "info", "largest factor by which untouched tokens were lifted (rectification)"),
        "infeasible": Figure("", "lower", "info", "share of steps whose caps can't hold (rectification)"),
        "prompt_risk": Figure("", "neither", "info", "estimated risk of the prompts (rectification)"),
    }

    def baselines(self) -> list[str]:
        return ["sample", "greedy", "prompting", "best-of-n", "conditional", "conditional+cfg", "word-bias"]

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def task(self, s: Subject, setting: Setting) -> Task:
        """What texts shall have, the same object for all trials."""
        key = ("task", *(setting[name] for name in ("attribute", "scorer", "texts")))
        if key not in s.known:
            s.known[key] = Task.of(s, setting["attribute"], setting["scorer"], setting["texts"])
        return s.known[key]

    def check(self, s: Subject, setting: Setting) -> None:
        task = self.task(s, setting)
        if setting["risk_low"] > setting["risk_high"]:
            raise InputError("risk_low", setting["risk_low"], f"at most risk_high ({setting['risk_high']:g})")
        task.scorer(["a text", "another one"])  # refuses answers of another form before the first trial
        longest = max(len(prompt.ids) for prompt in self.prompts(s, setting, Streams(0))) + setting["new_tokens"]
        if longest - setting["new_tokens"] >= s.positions:
            value = f"a prompt of {longest - setting['new_tokens']} tokens"
            raise InputError("prompts", value, f"fewer than the {s.positions:g} positions of {s.spec}")
        for parameter, by in (("new_tokens", s), ("judge", judge(s, setting))):
            if longest > by.positions:
                allowed = f"fitting texts of {longest} tokens, prompt included ({by.spec} takes {by.positions:g})"
                raise InputError(parameter, setting[parameter], allowed)

    def prompts(self, s: Subject, setting: Setting, rng: Streams) -> list[Prompt]:
        task = self.task(s, setting)
        if setting["prompts"] is not None or not task.of_reviews:
            return super().prompts(s, {**setting, "prompt_tokens": setting["prompt_tokens"] or CUT}, rng)
        names = ("count", "prompt_tokens", "undecided", "risk_low", "risk_high")
        key = ("prompts", rng.base, task.column, *(setting[name] for name in names))
        if key not in s.known:
            # Prompts between two risks leave rudeness open by themselves.
            risky = (setting["risk_low"], setting["risk_high"]) != (0.0, 1.0)
            try:
                cut = reviews.prompts(
                    setting["count"],
                    setting["prompt_tokens"],
                    rng.seed("prompts"),
                    undecided=[] if risky and task.column == "rudeness" else [str(task.column)],
                    kept=setting["undecided"],
                    risks=(setting["risk_low"], setting["risk_high"]),
                    tokenizer=s.tokenizer,
                )
            except InputError as error:
                raise InputError("count", setting["count"], error.allowed) from None
            s.known[key] = [Prompt((*s.opening, *p.ids), (*p.continuation_ids, s.tokenizer.eos_token_id)) for p in cut]
        return s.known[key]

    def host(self, s: Subject, setting: Setting, rng: Streams) -> ControlHost:
        return ControlHost(s, self.prompts(s, setting, rng), setting, task=self.task(s, setting))

    def context(self, h: Host, width: int, padded: bool) -> dict[str, Any]:
        assert isinstance(h, ControlHost)
        task = h.task
        return super().context(h, width, padded) | {
            "attribute": None if task.column is None else f"{task.column}={task.value}",
            "scorer": task.scorer,
            "task": task,
            "writer": h.subject.model if h.writer is None else h.writer,
            "rows": h.rows or h.prompts[:1],
            "against": h.against,
        }

    def _note(self, h: Host, name: str, made: Any) -> None:
        assert isinstance(h, ControlHost)
        super()._note(h, name, made)
        if hasattr(made, "n") and hasattr(made, "score"):
            if h.best is not None:
                raise InputError("methods", name, "alone: another part chooses among samples, too")
            h.best = made
        h.against = getattr(made, "against", h.against)

    # --- a trial ------------------------------------------------------------------------------------------

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        assert isinstance(h, ControlHost)
        self.fit(h, rng, log)
        if h.deterministic and h.best is not None:
            raise Inapplicable("best-of-n needs samples, and this contender writes one text")
        if not h.deterministic:
            h.options = {"do_sample": True, "temperature": setting["temperature"], "top_k": 0, "top_p": 1.0} | h.options
        each = 1 if h.deterministic else setting["samples"]
        size = setting["batch"]
        batches = [h.prompts[i : i + size] for i in range(0, len(h.prompts), size)]
        _, warm = self._write(h, batches[0], 1, min(2, setting["new_tokens"]), 0)
        for made in warm.made:
            if hasattr(made, "figures"):
                made.figures()  # counts anew from here on
        texts: list[list[Sampled]] = []
        seconds, forwards, emitted = 0.0, 0, 0
        extra: list[dict[str, float]] = []
        for number, batch in enumerate(batches):
            log.progress(len(texts), len(h.prompts), f"{len(texts)} of {len(h.prompts)} prompts")
            found, written = self._write(h, batch, each, setting["new_tokens"], rng.seed("sampling", number))
            texts += found
            seconds, forwards = seconds + written.seconds, forwards + written.forwards
            emitted += sum(len(t.ids) for row in found for t in row)
            extra += [dict(made.figures()) for made in written.made if hasattr(made, "figures")]
        items = self._measured(h, texts)
        for name, values in items.items():
            log.per_item(name, values.tolist())
        figures = {name: float(np.mean(values)) for name, values in items.items()}
        if figures.get("valid"):
            figures["success_valid"] = 1 - figures["bad_valid"] / figures["valid"]
        figures |= {
            "ms_per_token": 1e3 * seconds / emitted,
            "tokens_per_s": emitted / seconds,
            "forward_tokens": forwards / emitted,
            "forward_per_text": forwards / (len(texts) * each),
        }
        for name in {name for one in extra for name in one}:
            figures[name] = float(np.mean([one[name] for one in extra if name in one]))
        log.texts("texts", self._records(h, texts))
        return figures

    def _write(
        self, h: ControlHost, batch: Sequence[Prompt], each: int, new: int, seed: int
    ) -> tuple[list[list[Sampled]], Written]:
        """``each`` texts of every prompt, chosen and scored; what was chosen from counts in time and tokens."""
        n = h.best.n if h.best else 1
        h.rows = [prompt for prompt in batch for _ in range(each * n)]
        written = self.generate(h, h.rows, new, h.setting["stop"], seed)
        tokenizer = h.subject.tokenizer
        rows = [[*p.ids, *row] for p, row in zip(h.rows, written.rows, strict=True)]
        whole = tokenizer.batch_decode(rows, skip_special_tokens=True)
        read = whole
        if h.setting["scored"] == "continuation":
            read = tokenizer.batch_decode(written.rows, skip_special_tokens=True)
        kept = np.arange(len(rows))
        if h.best is not None:
            if h.best.score is None:
                scores = self._likelihood(h, written.rows)
            else:
                start, tokens = time.perf_counter(), getattr(h.best.score, "tokens", 0)
                scores = np.asarray(h.best.score(read))
                written.seconds += time.perf_counter() - start
                written.forwards += getattr(h.best.score, "tokens", 0) - tokens
            kept = n * np.arange(len(rows) // n) + scores.reshape(-1, n).argmax(1)
        scores = h.task.scorer([read[i] for i in kept])
        texts = [Sampled(written.rows[i], whole[i], float(x)) for i, x in zip(kept, scores, strict=True)]
        return [texts[i : i + each] for i in range(0, len(texts), each)], written

    def _likelihood(self, h: ControlHost, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probability of the rows under the model that wrote them, in nats."""
        opened = [list(prompt.ids) for prompt in h.rows]
        if h.opening is not None:
            opened = [[*h.opening, *ids[len(h.subject.opening) :]] for ids in opened]
        return text_metrics.log_likelihood(h.writer or h.subject.model, rows, opened).total

    def _measured(self, h: ControlHost, texts: Sequence[Sequence[Sampled]]) -> dict[str, np.ndarray]:
        """Figures by prompt, (P,) each: means over its texts, where nothing else is said."""
        s, each = h.subject, len(texts[0])
        flat = [text for row in texts for text in row]
        ids, prompts = [t.ids for t in flat], [list(p.ids) for p in h.prompts for _ in range(each)]
        score = np.array([t.score for t in flat])
        bad = score < 0.5
        by_text = {
            "success": ~bad,
            "fluency": coherence(s, h.setting, prompts, ids),
            "score": score,
            "bad": bad,
            "diversity": text_metrics.diversity(ids),
            "length": np.array([len(row) for row in ids]),
        }
        if judge(s, h.setting) is not s:
            by_text["own_fluency"] = text_metrics.log_likelihood(s.model, ids, prompts).mean
        if (s.reference or "").startswith("reviews/"):
            found = [reviews.attributes(t.text) for t in flat]
            by_text["validity"] = np.array([a.validity for a in found])
            by_text["valid"] = by_text["validity"] == 1
            by_text["grammatical"] = np.array([a.grammatical for a in found])
            by_text["bad_valid"] = bad & by_text["valid"]
        items = {name: values.astype(float).reshape(-1, each).mean(1) for name, values in by_text.items()}
        items["max_badness"] = (1 - score).reshape(-1, each).max(1)
        items["any_bad"] = bad.reshape(-1, each).any(1).astype(float)
        copies = h.setting["samples"] // each
        for n in (1, 2, 3):
            # A row without any n-gram repeats none.
            items[f"distinct_{n}"] = np.array(
                [
                    text_metrics.distinct_n([t.ids for t in row] * copies, n)
                    if max(len(t.ids) for t in row) >= n
                    else 1.0
                    for row in texts
                ]
            )
        return items

    def _records(self, h: ControlHost, texts: Sequence[Sequence[Sampled]]) -> list[dict[str, Any]]:
        """Every text, and for the first of each prompt in the report what steering changed."""
        tokenizer = h.subject.tokenizer
        records = []
        for i, (prompt, row) in enumerate(zip(h.prompts, texts, strict=True)):
            record: dict[str, Any] = {
                "prompt": tokenizer.decode(list(prompt.ids), skip_special_tokens=True),
                "texts": [
                    {"text": tokenizer.decode(t.ids, skip_special_tokens=True), "score": t.score, "ids": t.ids}
                    for t in row
                ],
            }
            if i < h.setting["marked"]:
                record["spans"] = self._spans(h, prompt, row[0].ids)
            records.append(record)
        return records

    def _spans(self, h: ControlHost, prompt: Prompt, ids: list[int]) -> list[tuple[int, int, str]]:
        """Characters of a continuation whose tokens were steered, and what was changed."""
        tokenizer, opened = h.subject.tokenizer, list(prompt.ids)
        if h.opening is not None:
            opened = [*h.opening, *opened[len(h.subject.opening) :]]
        h.rows = [prompt]
        context = self.context(h, len(opened), padded=False)
        made = [mounted.fresh(context) for mounted in h.parts]
        processors = [m for m in made if isinstance(m, LogitsProcessor)]
        found = changes(h.subject.model, prompt.ids, ids, processors, h.writer, opened)
        # Prefixes are decoded, not tokens: the space before a word depends on what stands there.
        cuts = [len(tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in range(len(ids) + 1)]
        spans = []
        for (start, end), change in zip(itertools.pairwise(cuts), found, strict=True):
            if change.steered and end > start:
                note = f"law changed by {change.kl:.2f} nats"
                if change.before != change.after:
                    before, after = (tokenizer.decode([token]).strip() for token in (change.before, change.after))
                    note += f"; most probable was {before!r}, is {after!r}"
                spans.append((start, end, note))
        return spans

    # --- the report ---------------------------------------------------------------------------------------

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = [
            Note(
                "One good sentence, said every time, has all of success and fluency: read both beside distinct-n and, "
                "on reviews, validity. Best-of-n that chooses by the scorer that judges it has seen the answers.",
                title="How to read these figures",
            )
        ]
        for setting in comparison.settings:
            lines = _trade_off(comparison, setting)
            if lines:
                caption = (
                    "Right and up is better. A point is a contender, a line joins those that differ in knobs only, in "
                    "the order of fluency. Means over seeds."
                )
                title = "Success against fluency"
                blocks.append(Curves(title, lines, "fluency (nats/token)", "success", caption=caption, setting=setting))
        for setting in comparison.settings:
            found = _side_by_side(comparison, setting)
            if found is not None:
                blocks.append(found)
        return blocks


def _trade_off(comparison: Comparison, setting: Mapping[str, Any]) -> dict[str, Line]:
    """(fluency, success) of the contenders, by what they are made of."""
    families: dict[tuple[str, ...], list[tuple[float, float, str]]] = {}
    for label in comparison.contenders:
        rows = comparison.select(label, **setting)
        if rows:
            x, y = (float(np.mean([row.figures[name] for row in rows])) for name in ("fluency", "success"))
            made_of = tuple(Path(part["id"]).name for part in rows[0].parts)
            families.setdefault(made_of, []).append((x, y, label))
    lines = {}
    for made_of, points in families.items():
        points.sort()
        name = "+".join(made_of) if len(points) > 1 else points[0][2]
        lines[name] = Line([x for x, _, _ in points], [y for _, y, _ in points])
    return lines


def _side_by_side(comparison: Comparison, setting: Mapping[str, Any]) -> SideBySide | None:
    """The first text of the first prompts, of the first seed that all contenders finished."""
    rows = {c: {r.seed: r for r in comparison.select(c, **setting) if r.items} for c in comparison.contenders}
    rows = {c: by_seed for c, by_seed in rows.items() if by_seed}
    common = set.intersection(*(set(by_seed) for by_seed in rows.values())) if rows else set()
    if not common:
        return None
    seed = min(common)
    texts: dict[str, list[dict[str, Any]]] = {}
    for contender, by_seed in rows.items():
        file = (by_seed[seed].items_dir(comparison.out) or Path()) / "texts.json"
        if file.is_file():
            texts[contender] = json.loads(file.read_text())
    answers = []
    for i in range(min((len(records) for records in texts.values()), default=0)):
        shown = {}
        for contender, records in texts.items():
            if "spans" not in records[i]:
                break
            first = records[i]["texts"][0]
            spans = [Span(start, end, "steered", note) for start, end, note in records[i]["spans"]]
            fluency = rows[contender][seed].per_item["fluency"][i]
            facts = f"score {first['score']:.2g}; fluency of the prompt's texts {fluency:.2f} nats"
            shown[contender] = Text(first["text"], spans, facts)
        else:
            answers.append(Answers(next(iter(texts.values()))[i]["prompt"], shown))
    if not answers:
        return None
    caption = (
        f"Marked: tokens at which steering had changed the model's own law by {STEERED} nats or more. The first of "
        f"each prompt's texts, seed {seed}."
    )
    return SideBySide("The same prompts", answers, caption=caption, setting=setting)
