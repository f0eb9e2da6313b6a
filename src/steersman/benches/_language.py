"""What benches over language models share: subjects, prompts, judges, and how parts mount on ``generate``."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from steersman import catalog
from steersman.engine import artefacts, subjects
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError, nearest
from steersman.language.loading import load_language_model
from steersman.language.texts import opening_of, read_rows
from steersman.reference import docs, loading, reviews, text_metrics

if TYPE_CHECKING:
    from steersman.engine.bench import PartInfo, Setting, Shape, TrialLog

REFERENCES = {  # causal language models among the reference subjects, and who judges each
    "docs/tiny": "docs/base",
    "docs/small": "docs/base",
    "docs/base": "docs/base",
    "reviews/base": "reviews/judge",
    "reviews/conditional": "reviews/judge",
    "reviews/judge": "reviews/judge",
}


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
        """What the tokenizer puts before every text: often the beginning-of-sequence token, or nothing."""
        return opening_of(self.tokenizer)

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
    if found.kind == "endpoint" or (found.kind == "reference" and reference_name(spec) not in REFERENCES):
        raise InputError(parameter, spec, f"docs, reviews, {', '.join(REFERENCES)}, a model folder or a hub id")
    source = found.path if found.path is not None and found.kind != "factory" else spec
    model, tokenizer = load_language_model(source, parameter)
    name = reference_name(spec) if found.kind == "reference" else None
    return Subject(spec, model, tokenizer, name)


def reference_name(spec: str) -> str:
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
    found: list[Prompt] = []
    if file.suffix.lower() != ".jsonl":
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("prompts", path, f"a text file that can be read ({error})") from None
        found = [Prompt((*s.opening, *_tokens(s, line))) for line in lines if line.strip()]
    else:
        for number, record in enumerate(read_rows(file, "prompts"), 1):
            text = record.get("prompt", record.get("text"))
            if not isinstance(text, str) or not text.strip():
                why = "has neither" if text is None else "has no text in it"
                raise InputError("prompts", path, f"rows with 'prompt' or 'text' (row {number} {why})")
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


# --- judges -------------------------------------------------------------------------------------------------


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


# --- mounting -----------------------------------------------------------------------------------------------


class NoNaN(LogitsProcessor):
    """Stops a trial whose model gives NaN, and says at which token."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise TrialError(f"the model gave NaN at new token {input_ids.shape[1] - self.prompt + 1}")
        return scores


class FirstCall(LogitsProcessor):
    """Stands behind all processors and notes once, when their first call is over, how often networks were run."""

    def __init__(self, count: Callable[[], dict[int, int]]) -> None:
        self.count, self.before = count, dict[int, int]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.before = self.before or self.count()
        return scores


CONTEXT = ("pad_token_id", "prompt_length", "tokenizer", "model", "draft_model", "attribute", "scorer")
"""What a part's constructor is given where it has a parameter of that name."""


@dataclass
class Mounted:
    """A part on the host: how its object is made for a batch, or what must be fitted first.

    Args:
        part: as the contender has it.
        build: makes the object from context and knobs; None until a learned part is fitted.
        knobs: of ``build``.
        settings: of the method's ``apply``, for a part that is fitted first.
        learned: whether making the object loads weights, so that it is made anew only where the batch differs.
    """

    part: Part
    build: Callable[..., Any] | None
    knobs: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    learned: bool = False
    kept: tuple[Mapping[str, Any], Any] | None = None

    def fresh(self, context: Mapping[str, Any]) -> Any:
        """The part's object for a batch."""
        assert self.build is not None
        accepted = parameters_of(self.build).keys() - self.knobs.keys()
        given = {name: value for name, value in context.items() if name in accepted}
        if self.learned and self.kept is not None and self.kept[0] == given:
            return self.kept[1]
        made = self.build(**given, **self.knobs)
        if self.learned:
            self.kept = given, made
        return made


@dataclass
class Host:
    """What ``generate`` is called with; parts mount on it.

    Args:
        options: keyword arguments of ``generate``.
        set_by: which part set an option.
        loop: the part that is the decoding loop.
        writer, opening: the model that writes instead of the subject's, and the ids in front of every text.
    """

    subject: Subject
    prompts: list[Prompt]
    setting: Setting
    parts: list[Mounted] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)
    loop: str | None = None
    writer: Any = None
    opening: Sequence[int] | None = None

    @property
    def fit_on(self) -> str:
        """What learned parts are fitted on."""
        return str(self.setting.get("fit_on") or self.subject.spec)

    def set(self, part: str, options: Mapping[str, Any]) -> None:
        """Take a part's options of ``generate``, unless another part set one of them differently."""
        for name, value in options.items():
            if name in self.options and self.options[name] != value:
                other = self.set_by[name]
                raise InputError("methods", f"{other}+{part}", f"one or the other: they disagree on {name}")
            self.options[name], self.set_by[name] = value, part


@dataclass
class Written:
    """What one call of ``generate`` wrote.

    Args:
        rows: new tokens of each row (with the end-of-sequence token, if it may end).
        seconds: of the call.
        forwards: tokens that passed through the models after the prompt's pass. Of a model that a processor runs, the
            prompt's is whatever passes until the processors' first call is over (codes that are read by themselves).
        made: the parts' objects, in order.
    """

    rows: list[list[int]]
    seconds: float
    forwards: int
    made: list[Any]


class LanguageBench(ABC):
    """Generator: a bench whose trial is ``generate`` on prompts.

    A part's object mounts by what it is. A mapping is arguments of ``generate``. A ``LogitsProcessor`` joins
    ``logits_processor``. Any other callable object is the ``custom_generate`` loop. Of any object,

    - ``generate_options`` (a mapping) are arguments that must go with it;
    - ``writer`` is a causal language model that writes instead of the subject's (a policy, an expert);
    - ``opening`` are token ids in place of those that the tokenizer puts in front of every text (control codes);
    - ``networks`` are models that it runs beside the writer: their tokens are counted too.

    Parts that disagree on an argument, or bring two loops or writers, are refused. Constructors get by name what they
    ask for of :data:`CONTEXT`. A method with ``apply`` whose object has ``from_pretrained(folder, ...)`` is learned: it
    is fitted first, on a reference subject, or its folder is named in place of its id.
    """

    id: str
    shape: Shape = "Generator"
    timed = True
    given: tuple[str, ...] = CONTEXT
    """Names of :meth:`context`: no knobs of the bench's own parts."""

    @abstractmethod
    def parts(self) -> Mapping[str, PartInfo]:
        """The bench's own baselines, by name."""

    def subject(self, spec: str) -> Subject:
        return load(spec)

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s, self.prompts(s, setting, rng), setting)

    def mount(self, h: Host, part: Part) -> None:
        own = self.parts()
        if any(part.id == mounted.part.id for mounted in h.parts):
            raise InputError("methods", part.id, "there once")
        if (Path(part.id) / artefacts.RECORD).is_file():
            record = json.loads((Path(part.id) / artefacts.RECORD).read_text())
            self._mounted(h, _learned(catalog.card(record["method"]), part, Path(part.id)))
        elif part.id in own:
            build = own[part.id].build
            self._mounted(h, Mounted(part, build, checked_knobs(build, part, skip=self.given)))
        elif part.id in catalog.cards() and self.id in catalog.card(part.id).benches:
            card = catalog.card(part.id)
            method = card.load()
            if card.apply and hasattr(method, "from_pretrained"):
                if subjects.resolve(h.fit_on).kind != "reference":
                    made = f"steersman apply {part.id} --subject {h.fit_on} --input DATA --out FOLDER"
                    raise InputError(
                        "methods", str(part), f"the folder that {made} made (a comparison makes none of yours)"
                    )
                h.parts.append(_learned(card, part, None))
            else:
                self._mounted(h, Mounted(part, method, checked_knobs(method, part, skip=CONTEXT)))
        else:
            raise InputError("methods", part.id, nearest(part.id, own))

    def _mounted(self, h: Host, mounted: Mounted) -> None:
        """Make the part's object once, so that a bad knob is said before anything runs, and note what it sets."""
        self._note(h, mounted.part.id, mounted.fresh(self.context(h, 1, padded=False)))
        h.parts.append(mounted)

    def _note(self, h: Host, name: str, made: Any) -> None:
        if isinstance(made, Mapping):
            h.set(name, made)
            return
        h.set(name, getattr(made, "generate_options", {}))
        if callable(made) and not isinstance(made, LogitsProcessor):
            if h.loop is not None:
                raise InputError("methods", f"{h.loop}+{name}", "one or the other: both are the decoding loop")
            h.loop = name
        writer, opening = getattr(made, "writer", None), getattr(made, "opening", None)
        if (writer is not None and h.writer is not None) or (opening is not None and h.opening is not None):
            raise InputError("methods", name, "alone: another part brings a model that writes, or its opening")
        h.writer, h.opening = writer or h.writer, h.opening if opening is None else opening

    def fit(self, h: Host, rng: Streams, log: TrialLog) -> None:
        """Fit the contender's learned parts on the reference subject, each once for its settings and seed."""
        for mounted in h.parts:
            if mounted.build is not None:
                continue
            folder = fitted_folder(h, mounted, self.context(h, 1, padded=False), rng, log)
            mounted.build = from_folder(catalog.card(mounted.part.id).load(), folder)
            self._note(h, mounted.part.id, mounted.fresh(self.context(h, 1, padded=False)))

    def prompts(self, s: Subject, setting: Setting, rng: Streams) -> list[Prompt]:
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

    def context(self, h: Host, width: int, padded: bool) -> dict[str, Any]:
        """What a part may want to know of a batch: values for names of :data:`CONTEXT`."""
        s = h.subject
        return {
            "pad_token_id": s.pad if padded else None,
            "prompt_length": width,
            "tokenizer": s.tokenizer,
            "model": s.model,
        }

    def generate(self, h: Host, prompts: Sequence[Prompt], new: int, stop: bool, seed: int) -> Written:
        """One batch of prompts, padded on the left, through ``generate``, under the parts' own options.

        Args:
            new: tokens to write.
            stop: whether a text may end before that.
            seed: of everything drawn.
        """
        s = h.subject
        opened = [list(prompt.ids) for prompt in prompts]
        if h.opening is not None:
            opened = [[*h.opening, *ids[len(s.opening) :]] for ids in opened]
        width = max(map(len, opened))
        ids = torch.full((len(prompts), width), s.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(opened):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        model = s.model if h.writer is None else h.writer
        ids, mask = ids.to(model.device), mask.to(model.device)
        context = self.context(h, width, padded=bool((mask == 0).any()))
        made = [mounted.fresh(context) for mounted in h.parts]
        end = s.tokenizer.eos_token_id
        settings = GenerationConfig(
            pad_token_id=s.pad,
            eos_token_id=end,
            bos_token_id=s.tokenizer.bos_token_id,
            max_new_tokens=new,
            min_new_tokens=None if stop or end is None else new,
            **({"do_sample": False} | h.options),
        )
        beside = {id(n) for m in made if isinstance(m, LogitsProcessor) for n in getattr(m, "networks", ())}
        first = FirstCall(lambda: {key: max(1, len(passed[key])) for key in beside})
        processors = [NoNaN(width), *(m for m in made if isinstance(m, LogitsProcessor)), first]
        loops = [m for m in made if callable(m) and not isinstance(m, LogitsProcessor)]
        own = model.generation_config
        model.generation_config = GenerationConfig()  # its settings would fill the gaps of ours
        networks = {id(network): network for m in made for network in getattr(m, "networks", ())}
        networks[id(model)] = model
        passed: dict[int, list[int]] = {key: [] for key in networks}
        hooks = [
            network.register_forward_pre_hook(_counter(passed[key]), with_kwargs=True)
            for key, network in networks.items()
        ]
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(seed)
                start = time.perf_counter()
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    generation_config=settings,
                    logits_processor=processors,
                    custom_generate=loops[0] if loops else None,
                )
                rows = out[:, width:].tolist()  # waits for the device
                seconds = time.perf_counter() - start
        finally:
            for hook in hooks:
                hook.remove()
            model.generation_config = own
        if stop and end is not None:
            rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
        forwards = sum(sum(counts[first.before.get(key, 1) :]) for key, counts in passed.items())
        return Written(rows, seconds, forwards, made)


def _counter(counts: list[int]) -> Callable[..., None]:
    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        counts.append(0 if given is None else given.numel())

    return count


# --- learned parts ------------------------------------------------------------------------------------------


def parameters_of(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Named parameters of a constructor, or of ``from_pretrained`` and the constructor that it passes the rest to."""
    found = dict(inspect.signature(build).parameters)
    owner = getattr(build, "steersman_method", None)
    if owner is not None and any(p.kind is p.VAR_KEYWORD for p in found.values()):
        found |= inspect.signature(owner).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in found.items() if p.kind in named and name != "self"}


def from_folder(method: Any, folder: Path) -> Callable[..., Any]:
    """``method.from_pretrained`` of a folder, as a constructor of the remaining parameters."""

    def build(**given: Any) -> Any:
        return method.from_pretrained(folder, **given)

    signature = inspect.signature(method.from_pretrained)
    build.__signature__ = signature.replace(parameters=[*signature.parameters.values()][1:])  # type: ignore[attr-defined]
    build.steersman_method = method  # type: ignore[attr-defined]
    return build


def _learned(card: catalog.Card, part: Part, folder: Path | None) -> Mounted:
    """A learned part: made from ``folder``, or to be fitted with those of its knobs that are settings of ``apply``."""
    method = card.load()
    build = from_folder(method, folder or Path())
    names = parameters_of(build).keys() - {*CONTEXT}
    knobs = {name: value for name, value in part.knobs.items() if name in names}
    rest = {name: value for name, value in part.knobs.items() if name not in names}
    if folder is not None:
        for name in rest:
            raise InputError(f"knob of {card.id}", name, nearest(name, names) if names else "left out")
        return Mounted(part, build, knobs, learned=True)
    settings = artefacts.check_settings(card, artefacts.function_of(card, "apply"), rest)
    return Mounted(part, None, knobs, settings, learned=True)


def fitted_folder(h: Host, mounted: Mounted, context: Mapping[str, Any], rng: Streams, log: TrialLog) -> Path:
    """Where a learned part's fit lies, on the reference subject's own texts; made if it isn't there yet."""
    card = catalog.card(mounted.part.id)
    function = artefacts.function_of(card, "apply")
    wanted = inspect.signature(function).parameters
    settings = {k: v for k, v in context.items() if k == "attribute" and k in wanted and v is not None}
    settings |= mounted.settings
    found = subjects.resolve(h.fit_on)

    def make(folder: Path) -> None:
        given = dict(settings)
        if "scorer" in wanted and "scorer" not in given:
            given["scorer"] = context.get("scorer") or subjects.scorer(found, settings.get("attribute"))

        def say(line: str) -> None:
            log.progress(0, 1, line)

        with tempfile.TemporaryDirectory() as temporary:
            texts = subjects.write_input(found, Path(temporary), settings.get("attribute"))
            function(found.path, texts, folder, seed=rng.seed("fit") % 2**31, log=say, **given)

    key = {"method": card.id, "settings": settings, "seed": rng.base}
    return log.fits.get(key | ({"on": h.fit_on} if h.fit_on != h.subject.spec else {}), make)
