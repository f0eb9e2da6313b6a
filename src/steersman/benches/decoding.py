r"""Decoding: what a language model writes under each decoding method, on the same prompts, and how fast.

A prompt :math:`x_{1..p}` is continued by n tokens. Measured on each continuation: repetition (rep-n,
:math:`\mathrm{diversity} = \prod_{n=2}^4 (1 - \text{rep-}n)`), coherence (mean log-likelihood a token under a
judge, a larger model where there is one), the share of tokens that greedy search would have taken too, and
over all continuations the divergence from how the held-out texts really went on.

**Diversity and coherence pull against each other.** A loop is coherent and random words are diverse: read both,
beside those of the held-out text itself.

Cost is counted in tokens that pass through the model for each token that comes out (the prompt left aside),
which holds on every machine, and in milliseconds, which do not.

Texts are compared at equal length: the end-of-sequence token is not allowed before the last token, unless
``stop`` is set. The model's own generation settings (temperature, penalties) are not used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from steersman.benches._language import (
    REFERENCES,
    Host,
    LanguageBench,
    Prompt,
    Subject,
    coherence,
    judge,
    reference_name,
)
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError
from steersman.language.contrastive_search import ContrastiveSearch
from steersman.reference import text_metrics
from steersman.report.blocks import Answers, Block, Note, SideBySide, Span, Text

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

LOOP = 4  # tokens from which on a repetition is shown as a loop
SHOWN = 4  # prompts in the report
CLUSTERED = 20  # texts from which on their likeness to held-out text is estimated


# --- decoding methods -----------------------------------------------------------------------------------------


def greedy() -> dict[str, Any]:
    """The most probable token at every step."""
    return {"do_sample": False}


def beam(num_beams: int = 4) -> dict[str, Any]:
    """The most probable text that a beam of ``num_beams`` finds."""
    return {"do_sample": False, "num_beams": _within("num_beams", num_beams, 2, 64, whole=True)}


def no_repeat_ngram(no_repeat_ngram_size: int = 4) -> dict[str, Any]:
    """Greedy search that never says an n-gram twice."""
    return {"no_repeat_ngram_size": _within("no_repeat_ngram_size", no_repeat_ngram_size, 1, 1000, whole=True)}


def repetition_penalty(repetition_penalty: float = 1.2) -> dict[str, Any]:
    """Greedy search on logits that are divided by the penalty for tokens said before (CTRL)."""
    return {"repetition_penalty": _within("repetition_penalty", repetition_penalty, 0.01, 100)}


def contrastive(top_k: int = 5, alpha: float = 0.6) -> ContrastiveSearch:
    """Contrastive search: looks one token ahead and avoids hidden states like the context's."""
    return ContrastiveSearch(top_k, alpha)


def nucleus(top_p: float = 0.95, temperature: float = 1.0) -> dict[str, Any]:
    """Samples from the most probable tokens that hold ``top_p`` of the probability."""
    return _sampling(temperature, top_p=_within("top_p", top_p, 1e-6, 1))


def typical(typical_p: float = 0.2, temperature: float = 1.0) -> dict[str, Any]:
    """Samples from the tokens whose surprise is nearest to the expected one."""
    return _sampling(temperature, typical_p=_within("typical_p", typical_p, 1e-6, 1 - 1e-6))


def min_p(min_p: float = 0.05, temperature: float = 1.0) -> dict[str, Any]:
    """Samples from the tokens at least ``min_p`` times as probable as the most probable one."""
    return _sampling(temperature, min_p=_within("min_p", min_p, 0, 1))


def _sampling(temperature: float, **options: float) -> dict[str, Any]:
    # generate's own default of 50 candidates would hide behind every sampler.
    temperature = _within("temperature", temperature, 0.01, 100)
    return {"do_sample": True, "top_k": 0, "temperature": temperature, **options}


def _within(name: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise InputError(name, value, f"a {'whole ' if whole else ''}number from {low:g} to {high:g}")
    return value


PARTS: dict[str, PartInfo] = {
    "greedy": PartInfo(
        greedy,
        "The most probable token at every step.",
        "model.generate(**inputs, do_sample=False)",
    ),
    "beam": PartInfo(
        beam,
        "Beam search.",
        "model.generate(**inputs, do_sample=False, num_beams={num_beams=4})",
    ),
    "no-repeat-ngram": PartInfo(
        no_repeat_ngram,
        "Greedy search that never says an n-gram twice.",
        "model.generate(**inputs, do_sample=False, no_repeat_ngram_size={no_repeat_ngram_size=4})",
    ),
    "repetition-penalty": PartInfo(
        repetition_penalty,
        "Greedy search on logits that are divided by a penalty for tokens said before.",
        "model.generate(**inputs, do_sample=False, repetition_penalty={repetition_penalty=1.2})",
    ),
    "contrastive": PartInfo(
        contrastive,
        "Contrastive search: looks one token ahead and avoids hidden states like the context's.",
        "model.generate(**inputs, custom_generate=steersman.language.ContrastiveSearch({knobs}))",
    ),
    "nucleus": PartInfo(
        nucleus,
        "Samples from the most probable tokens that hold most of the probability.",
        "model.generate(**inputs, do_sample=True, top_k=0, top_p={top_p=0.95}, temperature={temperature=1.0})",
    ),
    "typical": PartInfo(
        typical,
        "Samples from the tokens whose surprise is nearest to the expected one.",
        "model.generate(**inputs, do_sample=True, top_k=0, typical_p={typical_p=0.2}, temperature={temperature=1.0})",
    ),
    "min-p": PartInfo(
        min_p,
        "Samples from the tokens that are probable enough beside the most probable one.",
        "model.generate(**inputs, do_sample=True, top_k=0, min_p={min_p=0.05}, temperature={temperature=1.0})",
    ),
}


# --- the bench --------------------------------------------------------------------------------------------------


class DecodingBench(LanguageBench):
    """Generator: continuations of the same prompts under each decoding method.

    Subjects: ``docs`` or ``reviews`` (or a model of theirs, as ``docs/tiny``), a folder or hub id of a causal
    language model of transformers, or ``file.py:factory`` that returns ``(model, tokenizer)``.

    How parts mount: :class:`~steersman.benches._language.LanguageBench`.
    """

    id = "decoding"
    default_subject = "docs"
    headline = ("diversity", "ms_per_token")
    knobs: Mapping[str, Knob] = {
        "new_tokens": Knob(int, (64,), "tokens to write", low=1, high=100_000),
        "batch": Knob(int, (8,), "prompts that run together", low=1, high=4096),
        "prompt_tokens": Knob(int, (32,), "tokens of a prompt that is cut from a text", low=1, high=100_000),
        "count": Knob(int, 16, "number of prompts", low=1, high=100_000, sweep=False),
        "prompts": Knob(str, None, "file of prompts: lines of text, or .jsonl with 'prompt' or 'text'", sweep=False),
        "judge": Knob(
            str, None, "model that scores coherence (default: a larger reference, or the subject)", sweep=False
        ),
        "stop": Knob(bool, False, "whether a text may end before new_tokens", sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "diversity": Figure("", "higher", "quality", "share of 2-, 3- and 4-grams that are new, multiplied"),
        "coherence": Figure("nats/token", "higher", "quality", "log-likelihood under the judge; loops score high"),
        "divergence": Figure("bits", "lower", "quality", "Jensen-Shannon, words against those of held-out text"),
        "likeness": Figure("", "higher", "info", "MAUVE's area in hidden states of the judge, to held-out text"),
        "ms_per_token": Figure("ms", "lower", "cost", "wall time by emitted token, all rows of a batch counted"),
        "forward_tokens": Figure("tokens", "lower", "cost", "tokens through the model by emitted token"),
        "tokens_per_s": Figure("tokens/s", "higher", "info", "emitted tokens by wall time"),
        "rep_2": Figure("", "lower", "info", "share of 2-grams that repeat an earlier one"),
        "rep_3": Figure("", "lower", "info", "share of 3-grams that repeat an earlier one"),
        "rep_4": Figure("", "lower", "info", "share of 4-grams that repeat an earlier one"),
        "greedy_ratio": Figure("", "neither", "info", "share of tokens that are the model's most probable"),
        "length": Figure("tokens", "neither", "info", "mean length of a text"),
        "held_out_diversity": Figure("", "neither", "info", "diversity of how the prompts really went on"),
        "held_out_coherence": Figure("nats/token", "neither", "info", "coherence of how they really went on"),
    }

    def baselines(self) -> list[str]:
        return list(PARTS)

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def check(self, s: Subject, setting: Setting) -> None:
        longest = max(len(prompt.ids) for prompt in self.prompts(s, setting, Streams(0)))
        if longest >= s.positions:
            value = f"a prompt of {longest} tokens"
            raise InputError("prompts", value, f"fewer than the {s.positions:g} positions of {s.spec}")
        if longest + setting["new_tokens"] > s.positions:
            allowed = f"at most {s.positions - longest:g} behind a prompt of {longest} tokens"
            raise InputError("new_tokens", setting["new_tokens"], f"{allowed} (the model's positions)")
        by = judge(s, setting)
        if longest + setting["new_tokens"] > by.positions:
            allowed = (
                f"a judge for texts of {longest + setting['new_tokens']} tokens ({by.spec} takes {by.positions:g})"
            )
            raise InputError("judge", by.spec, allowed)

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, prompts, new = h.subject, h.prompts, setting["new_tokens"]
        batches = [range(i, min(i + setting["batch"], len(prompts))) for i in range(0, len(prompts), setting["batch"])]
        self.fit(h, rng, log)
        self.generate(h, [prompts[i] for i in batches[0]], min(2, new), setting["stop"], 0)  # warms up
        written: list[list[int]] = []
        seconds, forwards = 0.0, 0
        for number, batch in enumerate(batches):
            log.progress(len(written), len(prompts), f"{len(written)} of {len(prompts)} prompts")
            wrote = self.generate(h, [prompts[i] for i in batch], new, setting["stop"], rng.seed("sampling", number))
            written += wrote.rows
            seconds, forwards = seconds + wrote.seconds, forwards + wrote.forwards
        if not all(written):
            raise TrialError("a text ended before its first token (leave stop unset)")

        emitted = sum(map(len, written))
        ids = [list(prompt.ids) for prompt in prompts]
        items = {f"rep_{n}": text_metrics.rep_n(written, n) for n in (2, 3, 4)}
        items["diversity"] = text_metrics.diversity(written)
        end = None if setting["stop"] else s.tokenizer.eos_token_id
        items["greedy_ratio"] = greedy_share(s.model, ids, written, without=end)
        items["coherence"] = coherence(s, setting, ids, written)
        items["length"] = np.array([len(row) for row in written], dtype=float)
        figures = {name: float(np.mean(values)) for name, values in items.items()}
        for name, values in items.items():
            if name != "length":
                log.per_item(name, values.tolist())
        figures |= {
            "ms_per_token": 1e3 * seconds / emitted,
            "tokens_per_s": emitted / seconds,
            "forward_tokens": forwards / emitted,
        }
        figures |= self._beside_held_out(s, setting, rng, prompts, written)
        log.texts("texts", [_record(s, prompt, row) for prompt, row in zip(prompts, written, strict=True)])
        return figures

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = [
            Note(
                "A loop is coherent and random words are diverse: read diversity and coherence together"
                f"{_held_out(comparison)}. {_judged(comparison)}",
                title="How to read these figures",
            )
        ]
        for setting in comparison.settings:
            found = _side_by_side(comparison, setting)
            if found is not None:
                blocks.append(found)
        return blocks

    # --- inside -------------------------------------------------------------------------------------------

    def _beside_held_out(
        self, s: Subject, setting: Setting, rng: Streams, prompts: Sequence[Prompt], written: list[list[int]]
    ) -> dict[str, float]:
        """Figures against how the prompts really went on; none where that isn't known."""
        follows = [list(prompt.follows[: setting["new_tokens"]]) for prompt in prompts]
        if not all(follows):
            return {}
        ids = [list(prompt.ids) for prompt in prompts]
        key = ("held out", rng.base, *sorted((k, str(v)) for k, v in setting.items()))
        if key not in s.known:
            values = {
                "held_out_diversity": float(text_metrics.diversity(follows).mean()),
                "held_out_coherence": float(coherence(s, setting, ids, follows).mean()),
            }
            features = None
            if len(prompts) >= CLUSTERED:
                features = text_metrics.hidden_features(s.model, follows, ids)
            s.known[key] = values, features
        values, features = s.known[key]
        figures = dict(values)
        figures["divergence"] = text_metrics.ngram_divergence(written, follows, n=1)
        if features is not None:
            own = text_metrics.hidden_features(s.model, written, ids)
            figures["likeness"] = text_metrics.cluster_divergence(own, features, seed=rng.base)
        return figures


# --- measures that need a model -----------------------------------------------------------------------------


@torch.no_grad()
def greedy_share(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    without: int | None = None,
) -> np.ndarray:
    """Share of each text's tokens that are the model's most probable ones behind their own prefix, (B,).

    Args:
        without: a token that was not allowed (the end-of-sequence token), or None.
    """
    shares = np.zeros(len(written))
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, (prompt, row) in enumerate(zip(prompts, written, strict=True)):
        shapes.setdefault((len(prompt), len(row)), []).append(i)
    for (first, _), members in shapes.items():
        for at in range(0, len(members), 16):
            batch = members[at : at + 16]
            ids = torch.tensor([[*prompts[i], *written[i]] for i in batch], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, first - 1 : -1]
            if without is not None:
                logits[..., without] = -math.inf
            shares[batch] = (logits.argmax(-1) == ids[:, first:]).double().mean(1).cpu().numpy()
    return shares


# --- exhibits ---------------------------------------------------------------------------------------------------


def _record(s: Subject, prompt: Prompt, row: list[int]) -> dict[str, Any]:
    return {
        "prompt": s.tokenizer.decode(list(prompt.ids), skip_special_tokens=True),
        "pieces": text_metrics.marked_pieces(row, s.tokenizer, LOOP),
        "ids": row,
        "loops": [[loop.start, loop.stop, loop.source] for loop in text_metrics.find_loops(row, LOOP)],
    }


def _held_out(comparison: Comparison) -> str:
    for row in comparison.rows:
        if "held_out_diversity" in row.figures:
            diversity, likely = row.figures["held_out_diversity"], row.figures["held_out_coherence"]
            return f", and beside those of the held-out text itself (first seed: {diversity:.2f} and {likely:.2f} nats)"
    return ""


def _judged(comparison: Comparison) -> str:
    subject = str(comparison.config["subject"])
    asked = comparison.config.get("fixed", {}).get("judge")
    name = reference_name(subject) if subject.partition("/")[0] in ("docs", "reviews") else None
    by = asked or REFERENCES.get(name or "", subject)
    if by not in (subject, name):
        return f"Coherence is judged by {by}."
    return (
        "Coherence is judged by the subject itself, for lack of a larger model with its words: that favours what "
        "greedy search would write. Name another with --judge."
    )


def _side_by_side(comparison: Comparison, setting: Mapping[str, Any]) -> SideBySide | None:
    """The first prompts of the first seed that all contenders finished."""
    rows = {c: {r.seed: r for r in comparison.select(c, **setting) if r.items} for c in comparison.contenders}
    rows = {c: by_seed for c, by_seed in rows.items() if by_seed}
    if not rows:
        return None
    common = set.intersection(*(set(by_seed) for by_seed in rows.values()))
    if not common:
        return None
    seed = min(common)
    texts = {}
    for contender, by_seed in rows.items():
        row = by_seed[seed]
        file = (row.items_dir(comparison.out) or Path()) / "texts.json"
        if file.is_file():
            texts[contender] = (json.loads(file.read_text()), row.per_item)
    if not texts:
        return None
    count = min(SHOWN, *(len(records) for records, _ in texts.values()))
    answers = []
    for i in range(count):
        shown = {}
        for contender, (records, values) in texts.items():
            text, spans = "", []
            for piece, looping in records[i]["pieces"]:
                if looping:
                    spans.append(Span(len(text), len(text) + len(piece), "loop", "said before"))
                text += piece
            facts = f"diversity {values['diversity'][i]:.2f}, coherence {values['coherence'][i]:.2f} nats"
            shown[contender] = Text(text, spans, facts)
        answers.append(Answers(next(iter(texts.values()))[0][i]["prompt"], shown))
    caption = f"Marked: every run of {LOOP} tokens or more that the text has said before. Prompts of seed {seed}."
    return SideBySide("The same prompts", answers, caption=caption, setting=setting)
