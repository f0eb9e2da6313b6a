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

import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
)
from transformers.utils import logging

from steersman import catalog
from steersman.engine import subjects
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError, nearest
from steersman.language.contrastive_search import ContrastiveSearch
from steersman.reference import docs, loading, reviews, text_metrics
from steersman.report.blocks import Answers, Block, Note, SideBySide, Span, Text

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

LOOP = 4  # tokens from which on a repetition is shown as a loop
REFERENCES = {  # causal language models among the reference subjects, and who judges each
    "docs/tiny": "docs/base",
    "docs/small": "docs/base",
    "docs/base": "docs/base",
    "reviews/base": "reviews/base",
    "reviews/conditional": "reviews/base",
}
SHOWN = 4  # prompts in the report
CLUSTERED = 20  # texts from which on their likeness to held-out text is estimated


# --- what is decoded ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from, and how the text really went on (empty where that is unknown)."""

    ids: tuple[int, ...]
    follows: tuple[int, ...] = ()


@dataclass
class Subject:
    """A causal language model and its tokenizer."""

    spec: str
    model: Any
    tokenizer: Any
    reference: str | None = None  # its name, if it is a reference model
    known: dict[Any, Any] = field(default_factory=dict)  # prompts and judges, made once

    @property
    def pad(self) -> int:
        """The id that pads prompts on the left; hidden by the attention mask."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def opening(self) -> list[int]:
        """What the tokenizer puts before every text: the beginning-of-sequence token, or nothing."""
        bos = self.tokenizer.bos_token_id
        ids = self.tokenizer("a")["input_ids"]
        return [bos] if bos is not None and ids[:1] == [bos] else []

    @property
    def positions(self) -> float:
        """The longest text that the model takes."""
        return getattr(self.model.config, "max_position_embeddings", None) or math.inf


def load(spec: str, parameter: str = "subject") -> Subject:
    """The language model that ``spec`` names: a reference name, a folder, a hub id, or ``file.py:factory``.

    A factory returns ``(model, tokenizer)``. Weights load from safetensors, and no remote code runs.

    Raises:
        InputError: nothing there that loads as a causal language model; the sentence says why.
    """
    found = subjects.resolve(spec)
    if found.kind == "factory":
        made = subjects.load_callable(spec, parameter)()
        if not isinstance(made, tuple) or len(made) != 2 or not callable(getattr(made[0], "generate", None)):
            raise InputError(parameter, spec, "a factory that returns (model, tokenizer)")
        return Subject(spec, made[0].eval(), made[1])
    if found.kind == "endpoint" or (found.kind == "reference" and _reference_name(spec) not in REFERENCES):
        raise InputError(parameter, spec, f"docs, reviews, {', '.join(REFERENCES)}, a model folder or a hub id")
    source = str(found.path) if found.path is not None else spec
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, dtype="auto"
        )
    except Exception as error:  # a half-written folder fails in a dozen ways
        line = " ".join(str(error).split()) or type(error).__name__
        allowed = f"a model with tokenizer that transformers loads ({line[:200]})"
        raise InputError(parameter, spec, allowed) from error
    finally:
        if bar:
            logging.enable_progress_bar()
    model, report = loaded
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise InputError(parameter, spec, f"a model with all its weights ({len(lacking)} lack, as {lacking[0]})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and model.dtype == torch.float16:
        model = model.float()  # half precision is an emulation there
    name = _reference_name(spec) if found.kind == "reference" else None
    return Subject(spec, model.to(device).eval(), tokenizer, name)


def _reference_name(spec: str) -> str:
    """``docs`` and ``docs/base`` by the folder's name."""
    name = spec.partition(":")[0]
    return name if "/" in name else f"{name}/{Path(str(loading.path(name))).name}"


def read_prompts(path: str, s: Subject, length: int) -> list[Prompt]:
    """Prompts from a file: a line each of plain text, or of JSON in ``*.jsonl``.

    A JSON line has ``prompt`` (and ``continuation``, if it is known), or ``text``, of which the first
    ``length`` tokens are the prompt and the rest is how it went on.

    Raises:
        InputError: no such file, a line of another form, or no prompt at all.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("prompts", path, f"a text file that can be read ({error})") from None
    found: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            found.append(Prompt((*s.opening, *_tokens(s, line))))
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError("prompts", path, f"a file of JSON lines (line {number}: {error})") from None
        text = record.get("prompt", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(text, str) or not text:
            raise InputError("prompts", path, f"lines with 'prompt' or 'text' (line {number} has neither)")
        ids = _tokens(s, text)
        if "prompt" in record:
            found.append(Prompt((*s.opening, *ids), tuple(_tokens(s, str(record.get("continuation", ""))))))
        else:
            found.append(Prompt((*s.opening, *ids[:length]), tuple(ids[length:])))
    if not found:
        raise InputError("prompts", path, "a file with at least one prompt")
    return found


def _tokens(s: Subject, text: str) -> list[int]:
    return list(s.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


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


class NoNaN(LogitsProcessor):
    """Stops a trial whose model gives NaN, and says at which token."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise TrialError(f"the model gave NaN at new token {input_ids.shape[1] - self.prompt + 1}")
        return scores


@dataclass
class Host:
    """What ``generate`` is called with; parts mount on it.

    Args:
        builds: make a part's object anew for each batch, from what the bench knows of the batch.
        options: keyword arguments of ``generate``.
        set_by: which part set an option.
    """

    subject: Subject
    prompts: list[Prompt]
    builds: list[Callable[[Mapping[str, Any]], Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)
    mounted: list[str] = field(default_factory=list)
    loop: str | None = None

    def set(self, part: str, options: Mapping[str, Any]) -> None:
        """Take a part's options of ``generate``, unless another part set one of them differently."""
        for name, value in options.items():
            if name in self.options and self.options[name] != value:
                other = self.set_by[name]
                raise InputError("methods", f"{other}+{part}", f"one or the other: they disagree on {name}")
            self.options[name], self.set_by[name] = value, part


# --- the bench --------------------------------------------------------------------------------------------------


class DecodingBench:
    """Generator: continuations of the same prompts under each decoding method.

    Subjects: ``docs`` or ``reviews`` (or a model of theirs, as ``docs/tiny``), a folder or hub id of a causal
    language model of transformers, or ``file.py:factory`` that returns ``(model, tokenizer)``.

    A method's object mounts by what it is. A ``LogitsProcessor`` joins ``logits_processor``, any other object
    that is called with the model and the ids is the ``custom_generate`` loop, and a mapping is arguments of
    ``generate``. An object's ``generate_options`` (a mapping) are arguments that must go with it. Parts that
    disagree on an argument, or bring two loops, are refused. Of ``pad_token_id``, ``prompt_length``,
    ``tokenizer`` and ``model``, an object gets what its constructor names.
    """

    id = "decoding"
    shape = "Generator"
    timed = True
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

    def subject(self, spec: str) -> Subject:
        return load(spec)

    def baselines(self) -> list[str]:
        return list(PARTS)

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def check(self, s: Subject, setting: Setting) -> None:
        longest = max(len(prompt.ids) for prompt in self._prompts(s, setting, Streams(0)))
        if longest + setting["new_tokens"] > s.positions:
            allowed = f"at most {s.positions - longest:g} behind a prompt of {longest} tokens"
            raise InputError("new_tokens", setting["new_tokens"], f"{allowed} (the model's positions)")
        by = judge(s, setting)
        if longest + setting["new_tokens"] > by.positions:
            allowed = (
                f"a judge for texts of {longest + setting['new_tokens']} tokens ({by.spec} takes {by.positions:g})"
            )
            raise InputError("judge", by.spec, allowed)

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s, self._prompts(s, setting, rng))

    def mount(self, h: Host, part: Part) -> None:
        if part.id in PARTS:
            build: Callable[..., Any] = PARTS[part.id].build
        elif part.id in catalog.cards() and self.id in catalog.card(part.id).benches:
            build = catalog.card(part.id).load()
        else:
            raise InputError("methods", part.id, nearest(part.id, PARTS))
        if part.id in h.mounted:
            raise InputError("methods", part.id, "there once")
        h.mounted.append(part.id)
        knobs = checked_knobs(build, part)
        accepted = set(inspect.signature(build).parameters) - knobs.keys()

        def fresh(context: Mapping[str, Any]) -> Any:
            return build(**{name: value for name, value in context.items() if name in accepted}, **knobs)

        made = fresh(self._context(h.subject, 1, padded=False))  # a bad knob is said before anything runs
        if isinstance(made, Mapping):
            h.set(part.id, made)
            return
        h.set(part.id, getattr(made, "generate_options", {}))
        if not isinstance(made, LogitsProcessor):
            if h.loop is not None:
                raise InputError("methods", f"{h.loop}+{part.id}", "one or the other: both are the decoding loop")
            h.loop = part.id
        h.builds.append(fresh)

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        s, prompts, new = h.subject, h.prompts, setting["new_tokens"]
        batches = [range(i, min(i + setting["batch"], len(prompts))) for i in range(0, len(prompts), setting["batch"])]
        self._generate(h, [prompts[i] for i in batches[0]], min(2, new), setting["stop"], 0)  # warms up
        written: list[list[int]] = []
        seconds, forwards = 0.0, 0
        for number, batch in enumerate(batches):
            log.progress(len(written), len(prompts), f"{len(written)} of {len(prompts)} prompts")
            texts, spent, passed = self._generate(
                h, [prompts[i] for i in batch], new, setting["stop"], rng.seed("sampling", number)
            )
            written += texts
            seconds, forwards = seconds + spent, forwards + passed
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

    def _prompts(self, s: Subject, setting: Setting, rng: Streams) -> list[Prompt]:
        """The prompts of a seed, the same for all contenders."""
        names = ("prompts", "count", "prompt_tokens", "new_tokens")
        key = ("prompts", rng.base, *(setting[name] for name in names))
        if key not in s.known:
            if setting["prompts"] is None and (s.reference or "").startswith("reviews/"):
                # A review may end sooner than what is asked for: how it went on has its own length.
                cut = reviews.prompts(
                    setting["count"], setting["prompt_tokens"], rng.seed("prompts"), tokenizer=s.tokenizer
                )
                s.known[key] = [
                    Prompt((*s.opening, *p.ids), (*p.continuation_ids, s.tokenizer.eos_token_id)) for p in cut
                ]
            elif setting["prompts"] is None:
                drawn = docs.prompts(
                    setting["count"],
                    setting["prompt_tokens"],
                    rng.seed("prompts"),
                    continuation=setting["new_tokens"],
                    tokenizer=s.tokenizer,
                )
                s.known[key] = [Prompt((*s.opening, *p.ids), p.continuation_ids) for p in drawn]
            else:
                every = read_prompts(setting["prompts"], s, setting["prompt_tokens"])
                order = rng.numpy("prompts").permutation(len(every))[: setting["count"]]
                s.known[key] = [every[i] for i in sorted(order)]
            if not all(prompt.ids for prompt in s.known[key]):
                raise InputError("prompts", setting["prompts"], "prompts of at least one token each")
        return s.known[key]

    def _context(self, s: Subject, width: int, padded: bool) -> dict[str, Any]:
        """What a part may want to know of a batch."""
        return {
            "pad_token_id": s.pad if padded else None,
            "prompt_length": width,
            "tokenizer": s.tokenizer,
            "model": s.model,
        }

    def _generate(
        self, h: Host, prompts: Sequence[Prompt], new: int, stop: bool, seed: int
    ) -> tuple[list[list[int]], float, int]:
        """Continuations, seconds, and tokens that passed through the model after the prompt."""
        s = h.subject
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), s.pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[i, width - len(prompt.ids) :] = 1
        ids, mask = ids.to(s.model.device), mask.to(s.model.device)
        context = self._context(s, width, padded=bool((mask == 0).any()))
        made = [build(context) for build in h.builds]
        processors = [NoNaN(width), *(m for m in made if isinstance(m, LogitsProcessor))]
        loops = [m for m in made if not isinstance(m, LogitsProcessor)]
        end = s.tokenizer.eos_token_id
        settings = GenerationConfig(
            pad_token_id=s.pad,
            eos_token_id=end,
            bos_token_id=s.tokenizer.bos_token_id,
            max_new_tokens=new,
            min_new_tokens=None if stop or end is None else new,
            **({"do_sample": False} | h.options),
        )
        own = s.model.generation_config
        s.model.generation_config = GenerationConfig()  # its settings would fill the gaps of ours
        passed: list[int] = []

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("input_ids")
            passed.append(0 if given is None else given.numel())

        hook = s.model.register_forward_pre_hook(count, with_kwargs=True)
        devices = [s.model.device] if s.model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(seed)
                start = time.perf_counter()
                out = s.model.generate(
                    ids,
                    attention_mask=mask,
                    generation_config=settings,
                    logits_processor=processors,
                    custom_generate=loops[0] if loops else None,
                )
                rows = out[:, width:].tolist()  # waits for the device
                seconds = time.perf_counter() - start
        finally:
            hook.remove()
            s.model.generation_config = own
        if stop and end is not None:
            rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
        return rows, seconds, sum(passed[1:])

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


def judge(s: Subject, setting: Setting) -> Subject:
    """Who scores coherence: the model that was asked for, else a reference model's larger one, else the subject.

    Raises:
        InputError: the judge can't be loaded.
    """
    spec = setting["judge"]
    if spec is None and s.reference is not None:
        spec = REFERENCES[s.reference]
    if spec is None or spec in (s.spec, s.reference):
        return s
    if ("judge", spec) not in s.known:
        s.known["judge", spec] = load(spec, "judge")
    return s.known["judge", spec]


def coherence(s: Subject, setting: Setting, prompts: list[list[int]], written: list[list[int]]) -> np.ndarray:
    """Mean log-likelihood a token of each text under the judge, in nats of the judge's tokens, (B,)."""
    by = judge(s, setting)
    if by is not s and by.tokenizer.get_vocab() != s.tokenizer.get_vocab():
        texts = s.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        whole = s.tokenizer.batch_decode(
            [[*a, *b] for a, b in zip(prompts, written, strict=True)], skip_special_tokens=True
        )
        follows = [_tokens(by, full[len(text) :]) for text, full in zip(texts, whole, strict=True)]
        prompts = [[*by.opening, *_tokens(by, text)] for text in texts]
        if not all(follows):
            raise TrialError("a text is empty in the judge's tokens")
        written = follows
    return text_metrics.log_likelihood(by.model, written, prompts).mean


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
    name = _reference_name(subject) if subject.partition("/")[0] in ("docs", "reviews") else None
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
