r"""Speculation: how fast a model writes when a smaller one drafts for it, and how much of the draft it can keep.

A draft model proposes tokens, the target checks several of them in one forward, and what is written has the target's
law exactly: so contenders do not differ in what they write, only in what it costs. At temperature 0 every contender
must write the target's greedy text (``equal_text``, where it is not 1 the arithmetic broke a tie). Measured are

.. math:: \text{tokens per target call} = \frac{\text{tokens written}}{\text{forwards of the target}}, \qquad
          \text{acceptance} = \mathbb{E}_x\big[\Pr(\text{the token kept is a draft} \mid p_x, q_x, n)\big],

the bound on acceptance that the sampler of the drafts leaves to any verifier, and the verifier's gap to it, on contexts
x that the target itself wrote at that temperature.

**Calls hold on every machine, milliseconds on one.** Speculation buys time where a forward of several tokens takes the
target as long as a forward of one: on a device whose time goes into reading the weights. Small models on few cores are
not like that. ``latency`` simulates such a pair of devices: every forward takes the given time, whatever it computes
(the figures then say so, and real times are left out).

All contenders write one text at a time with the same number of threads in total. One model at a time runs with all of
them; PEARL, which runs both models at once, shares them out between the two, and does not run where there are fewer
threads than models (simulated devices don't compute on the processor: there it does).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from steersman import catalog
from steersman.benches import _pearl_ranks
from steersman.benches import _speculation_pair as pairs
from steersman.benches._language import Host, LanguageBench, Prompt, Subject, load
from steersman.benches._latency import Latency
from steersman.benches._speculation_exhibits import CHOICES, exhibits, recommendations
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import parse
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, TrialError
from steersman.language.speculation import check_pair
from steersman.language.vocabularies import same_vocabulary

if TYPE_CHECKING:
    from steersman.engine.bench import Row, Setting, TrialLog
    from steersman.engine.comparison import Comparison
    from steersman.language.multi_draft import Contexts
    from steersman.report.blocks import Block

DRAFTS = {"docs/base": "docs/tiny", "docs/small": "docs/tiny"}  # of reference subjects, where none is named
CONTENDERS = (
    "autoregressive",
    "assisted",
    "assisted:schedule=heuristic",
    "multi-draft:n_drafts=1:depth=4",
    "multi-draft:n_drafts=2:depth=3",
    "multi-draft:n_drafts=3:depth=4",
    "pearl",
)
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
WARM_UP = 8  # tokens before the clock runs
T = TypeVar("T")


def autoregressive() -> dict[str, Any]:
    """One token by forward of the target."""
    return {}


def assisted(schedule: str = "constant", num_assistant_tokens: int = 20, confidence: float = 0.4) -> dict[str, Any]:
    """transformers' assisted generation: one chain of drafts; the defaults are those of transformers.

    Args:
        schedule: of the chain's length: constant, heuristic (two more behind a chain that was all right, one less
            otherwise), or heuristic_transient (the same, anew for each text).
        num_assistant_tokens: the chain's (first) length, from 1 to 1000.
        confidence: the chain ends where the draft's probability of its own token is below this, adapted on the way
            where scikit-learn is installed; from 0 (never) to 1.
    """
    if schedule not in SCHEDULES:
        raise InputError("schedule", schedule, f"one of {', '.join(SCHEDULES)}")
    whole = isinstance(num_assistant_tokens, int) and not isinstance(num_assistant_tokens, bool)
    if not whole or not 1 <= num_assistant_tokens <= 1000:
        raise InputError("num_assistant_tokens", num_assistant_tokens, "a whole number from 1 to 1000")
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1:
        raise InputError("confidence", confidence, "a number from 0 to 1")
    return {
        "num_assistant_tokens_schedule": schedule,
        "num_assistant_tokens": num_assistant_tokens,
        "assistant_confidence_threshold": float(confidence),
    }


PARTS: dict[str, PartInfo] = {
    "autoregressive": PartInfo(
        autoregressive,
        "Plain generation: one token by forward of the target.",
        "model.generate(**inputs)",
    ),
    "assisted": PartInfo(
        assisted,
        "transformers' assisted generation: one chain of drafts.",
        "draft_model.generation_config.update(num_assistant_tokens={num_assistant_tokens=20}, "
        "num_assistant_tokens_schedule={schedule='constant'}, assistant_confidence_threshold={confidence=0.4}); "
        "model.generate(**inputs, assistant_model=draft_model)",
    ),
}


class Rounds(BaseStreamer):
    """How many tokens each round of assisted generation added to the text."""

    def __init__(self) -> None:
        self.pieces: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.numel())

    def end(self) -> None: ...

    @property
    def sizes(self) -> list[int]:
        """Without the prompt, which is the first piece."""
        return self.pieces[1:]


@dataclass
class Pairing(Host):
    """A target, the draft that writes ahead for it, and the loop that a part brought.

    Args:
        draft: the draft model.
        assistant: generation settings of the draft, which assisted generation reads and (with the heuristic schedule)
            writes; of the trial, not of the text.
    """

    draft: Subject = field(kw_only=True)
    assistant: GenerationConfig | None = None


@dataclass(frozen=True)
class Text:
    """One text: its tokens, its seconds, tokens in each forward of the target and of the draft, how many tokens each
    round added, PEARL's block lengths, and seconds in forwards (None where models run at once)."""

    ids: list[int]
    seconds: float
    target: list[int]
    draft: list[int]
    rounds: list[int]
    gammas: list[int]
    forward_s: float | None = None


class SpeculationBench(LanguageBench):
    """Generator: the same texts, one at a time, under each way to write them with the help of a draft model.

    Subjects: ``docs`` (or a model of its, as ``docs/small``), a folder or hub id of a causal language model of
    transformers, or ``file.py:factory`` that returns ``(model, tokenizer)``. ``draft`` is named in the same way and has
    the subject's vocabulary.

    A method's object mounts as in every bench of language models; a loop gets ``draft_model``, if its constructor asks
    for it, and lives for a trial. It is warmed up before the clock runs. Where it has a ``record``, the tokens of its
    rounds are read from there; where it runs both models at the same time, it says so by ``models_at_once``.

    Args:
        thread_each: let two models that run at once have a thread each even where ``threads`` is 1 and all others have
            that one: their total is then 2, which whoever compares them has to say.
    """

    def __init__(self, thread_each: bool = False) -> None:
        self.thread_each = thread_each

    id = "speculation"
    default_subject = "docs/base"
    headline = ("tokens_per_s", "target_calls")
    knobs: Mapping[str, Knob] = {
        "draft": Knob(str, None, "draft model, named as the subject is (default for docs: docs/tiny)"),
        "temperature": Knob(float, (0.0, 1.0), "of sampling; 0 is greedy", low=0, high=100),
        "top_p": Knob(float, (1.0,), "of sampling: the most probable tokens that hold this much", low=1e-6, high=1),
        "latency": Knob(str, None, "simulate devices: ms of a forward of draft:target, as 5:20, or none"),
        "new_tokens": Knob(int, (64,), "tokens to write", low=1, high=100_000),
        "prompt_tokens": Knob(int, (32,), "tokens of a prompt that is cut from a text", low=1, high=100_000),
        "count": Knob(int, 3, "number of prompts", low=1, high=100_000, sweep=False),
        "prompts": Knob(str, None, "file of prompts: lines of text, or .jsonl with 'prompt' or 'text'", sweep=False),
        "threads": Knob(
            int, None, "threads of the processor, the same in total for all (2 or more for PEARL)", low=1, sweep=False
        ),
        "contexts": Knob(
            int,
            64,
            "places at which acceptance and its bound are computed (0: nowhere)",
            low=0,
            high=100_000,
            sweep=False,
        ),
    }
    figures: Mapping[str, Figure] = {
        "tokens_per_s": Figure(
            "tokens/s", "higher", "quality", "written tokens by wall time, the prompt's pass included"
        ),
        "simulated_tokens_per_s": Figure(
            "tokens/s",
            "higher",
            "quality",
            "the same where every forward takes a given time: a schedule, not a machine",
        ),
        "tokens_per_target_call": Figure("tokens", "higher", "quality", "written tokens by forward of the target"),
        "equal_text": Figure(
            "", "higher", "quality", "share of greedy texts that are plain generation's, token by token"
        ),
        "target_calls": Figure("calls/token", "lower", "cost", "forwards of the target by written token"),
        "draft_calls": Figure("calls/token", "lower", "cost", "forwards of the draft by written token"),
        "ms_per_token": Figure("ms", "lower", "cost", "wall time by written token"),
        "simulated_ms_per_token": Figure("ms", "lower", "cost", "the same where every forward takes a given time"),
        "overhead_ms": Figure("ms", "lower", "info", "of the wall time of a written token, what forwards did not take"),
        "tokens_per_round": Figure(
            "tokens", "higher", "info", "tokens that a round added: drafts kept, and the target's own"
        ),
        "target_tokens": Figure(
            "tokens", "lower", "info", "tokens through the target by written token, prompts left out"
        ),
        "acceptance": Figure("", "higher", "info", "chance that the token kept is one of the n drafts, by verifier"),
        "acceptance_bound": Figure("", "neither", "info", "the most that any verifier reaches with that sampler and n"),
        "acceptance_gap": Figure("", "lower", "info", "bound minus acceptance"),
        "gamma": Figure("tokens", "neither", "info", "PEARL's block length, where it was measured"),
        "late": Figure("", "lower", "info", "share of forwards that took longer than the simulated time"),
    }

    def headline_for(self, rows: Sequence[Row]) -> tuple[str, str]:
        """Simulated times lead where the times are simulated."""
        simulated = any("simulated_tokens_per_s" in row.figures for row in rows)
        return ("simulated_tokens_per_s" if simulated else "tokens_per_s"), "target_calls"

    def baselines(self) -> list[str]:
        return [label for label in CONTENDERS if parse(label).parts[0].id in {*PARTS, *catalog.cards()}]

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def check(self, s: Subject, setting: Setting) -> None:
        if 0 < setting["temperature"] < 0.01:
            raise InputError("temperature", setting["temperature"], "0 (greedy) or a number from 0.01 to 100")
        latencies(setting["latency"])
        d = draft_of(s, setting)
        longest = _fitting(s, d, self.prompts(s, setting, Streams(0)), setting["new_tokens"])
        whole = GenerationConfig(max_length=longest + setting["new_tokens"])
        check_pair("speculation", s.model, d.model, whole, {"past_key_values": DynamicCache()})

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Pairing:
        return Pairing(s, self.prompts(s, setting, rng), setting, draft=draft_of(s, setting))

    def context(self, h: Host, width: int, padded: bool) -> dict[str, Any]:
        assert isinstance(h, Pairing)
        return super().context(h, width, padded) | {"draft_model": h.draft.model}

    def trial(self, h: Pairing, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        self.fit(h, rng, log)
        s, new = h.subject, setting["new_tokens"]
        _fitting(s, h.draft, h.prompts, new)
        loop = self.loop(h)
        expected = self.greedy(h, rng) if setting["temperature"] == 0 else None
        if getattr(loop, "engine", None) == "distributed":
            texts, late = self.on_ranks(h, rng, log)
        else:
            texts, late = self.here(h, loop, rng, log)
        for text in texts:
            if len(text.ids) != new:
                raise TrialError(f"a text has {len(text.ids)} tokens where {new} were asked for")
        written = sum(len(text.ids) for text in texts)
        seconds = np.array([text.seconds for text in texts])
        kind = "" if late is None else "simulated_"
        added = [size for text in texts for size in text.rounds]
        figures = {
            f"{kind}tokens_per_s": written / seconds.sum(),
            f"{kind}ms_per_token": 1e3 * seconds.sum() / written,
            "tokens_per_target_call": written / sum(len(text.target) for text in texts),
            "target_calls": sum(len(text.target) for text in texts) / written,
            "draft_calls": sum(len(text.draft) for text in texts) / written,
            "tokens_per_round": float(np.mean(added)),
            "target_tokens": sum(sum(text.target[1:]) for text in texts) / written,
        }
        log.per_item(f"{kind}ms_per_token", (1e3 * seconds / new).tolist())
        log.per_item("tokens_per_target_call", [new / len(text.target) for text in texts])
        log.per_item("tokens_per_round", [float(np.mean(text.rounds)) for text in texts])
        if late is not None:
            figures["late"] = late
        inside = [text.forward_s for text in texts if text.forward_s is not None]
        if len(inside) == len(texts):
            figures["overhead_ms"] = 1e3 * (seconds.sum() - sum(inside)) / written
        gammas = [gamma for text in texts for gamma in text.gammas]
        if gammas:
            figures["gamma"] = float(np.median(gammas))
        if expected is not None:
            equal = [float(text.ids == ids) for text, ids in zip(texts, expected, strict=True)]
            figures["equal_text"] = float(np.mean(equal))
            log.per_item("equal_text", equal)
        if loop is not None:
            log.texts("choices", [{name: getattr(loop, name) for name in CHOICES if hasattr(loop, name)}])
        log.arrays("rounds", added=np.array(added))
        log.texts("texts", [_record(s, prompt, text) for prompt, text in zip(h.prompts, texts, strict=True)])
        if setting["contexts"] and (h.assistant is not None or loop is not None):
            figures |= self.acceptance(h, loop, rng, log)
        return figures

    def exhibits(self, comparison: Comparison) -> list[Block]:
        return exhibits(comparison)

    def closing(self, comparison: Comparison) -> list[str]:
        """The recommendation, for the terminal."""
        times = ", simulated" if comparison.bench.headline[0].startswith("simulated") else ""
        return [f"recommended ({where}{times}): {code}" for where, code in recommendations(comparison)]

    def acceptance(self, h: Pairing, loop: Any, rng: Streams, log: TrialLog) -> dict[str, float]:
        """The contender's rate and bound, and the rates of all verifiers for its number of drafts.

        A chain of drafts is n = 1, where all verifiers are the same. Processors that were stacked on the loop change
        both laws, and the laws here are those of the models: nothing is reported then.
        """
        if any(m.part.id not in (h.loop, *PARTS) for m in h.parts):
            return {}
        found = self.laws(h, rng)
        n = getattr(loop, "n_drafts", 1)
        sampler, verifier = ("with", "single") if n == 1 else (loop.sampler, loop.verifier)
        own = self.once(h, rng, ("accepted", n, verifier), lambda: pairs.accepted(found, n, verifier))
        bound = self.once(h, rng, ("bound", n, sampler), lambda: pairs.bound(found, n, sampler))
        values = {"acceptance": own, "acceptance_bound": bound, "acceptance_gap": bound - own}
        for name, rows in values.items():
            log.per_item(name, rows.tolist())
        log.texts("acceptance", self.once(h, rng, ("table", n), lambda: pairs.table(found, n)))
        log.texts("plans", self.plans(h, rng))
        return {name: float(rows.mean()) for name, rows in values.items()}

    def plans(self, h: Pairing, rng: Streams) -> list[dict[str, Any]]:
        """What forwards ought to take under each setting of a loop, from the pair's acceptance and forward times."""

        def make() -> list[dict[str, Any]]:
            prompt, positions = h.prompts[0].ids, min(h.subject.positions, h.draft.positions)
            with _threads(h.setting["threads"]), _simulated(h.draft, h.subject, h.setting["latency"]):
                times = [pairs.forward_ms(s.model, prompt, positions) for s in (h.subject, h.draft)]
            return pairs.plans(self.laws(h, rng), *times, parallel=latencies(h.setting["latency"]) is not None)

        return self.once(h, rng, ("plans", h.setting["latency"], h.setting["threads"]), make)

    # --- texts ---------------------------------------------------------------------------------------------

    def loop(self, h: Pairing) -> Any:
        """The trial's loop, or None; assisted generation's settings are made anew."""
        mine = {name: value for name, value in h.options.items() if "assistant" in name}
        h.assistant = GenerationConfig(pad_token_id=h.subject.pad, **mine) if mine else None
        if h.loop is None:
            return None
        return next(m for m in h.parts if m.part.id == h.loop).fresh(self.context(h, 1, padded=False))

    def here(self, h: Pairing, loop: Any, rng: Streams, log: TrialLog) -> tuple[list[Text], float | None]:
        """All texts in this process, and the share of simulated forwards that were late (None: they aren't simulated).

        A loop that runs both models at once (``models_at_once``) has half of the threads for each.
        """
        setting, texts = h.setting, []
        on_cpu = h.subject.model.device.type == h.draft.model.device.type == "cpu"
        with (
            _threads(self.share(setting, getattr(loop, "models_at_once", 1) if on_cpu else 1)),
            _simulated(h.draft, h.subject, setting["latency"]) as devices,
        ):
            self.write(h, loop, h.prompts[0], min(WARM_UP, setting["new_tokens"]), 0)
            for number, prompt in enumerate(h.prompts):
                log.progress(number, len(h.prompts), f"{number} of {len(h.prompts)} prompts")
                texts.append(self.write(h, loop, prompt, setting["new_tokens"], rng.seed("sampling", number)))
        if not devices:
            return texts, None
        return texts, sum(device.late for device in devices) / sum(device.calls for device in devices)

    def share(self, setting: Setting, models: int) -> int:
        """Threads of each of so many models that run at once.

        Raises:
            Inapplicable: fewer threads than models, on devices that are not simulated: others would have less.
        """
        total = setting["threads"] or torch.get_num_threads()
        if total < models and not self.thread_each and latencies(setting["latency"]) is None:
            raise Inapplicable(
                f"{models} models at once need {models} threads, and threads={total} is for each contender"
            )
        return max(1, total // models)

    def on_ranks(self, h: Pairing, rng: Streams, log: TrialLog) -> tuple[list[Text], float | None]:
        """All texts in two processes, a model each, with half of the threads each."""
        setting = h.setting
        if any(m.part.id != h.loop for m in h.parts):
            raise Inapplicable("stacked parts run with the engine threads only")
        (mounted,) = h.parts
        found = _pearl_ranks.write(
            h.subject.spec,
            h.draft.spec,
            [prompt.ids for prompt in h.prompts],
            [rng.seed("sampling", number) for number in range(len(h.prompts))],
            setting["new_tokens"],
            setting["temperature"],
            setting["top_p"],
            self.share(setting, 2),
            latencies(setting["latency"]),
            {name: value for name, value in mounted.knobs.items() if name != "engine"},
            progress=log.progress,
        )
        names = ("ids", "seconds", "target", "draft", "rounds", "gammas")
        late = sum(text["late"] for text in found) / max(1, sum(text["calls"] for text in found))
        texts = [Text(*(text[name] for name in names)) for text in found]
        return texts, None if latencies(setting["latency"]) is None else late

    def write(self, h: Pairing, loop: Any, prompt: Prompt, new: int, seed: int) -> Text:
        """One text under the contender; ``loop`` None and no assistant is plain generation."""
        s, draft = h.subject, h.draft.model
        ids = torch.tensor([prompt.ids], device=s.model.device)
        context = self.context(h, len(prompt.ids), padded=False)
        stacked = [m for m in h.parts if m.part.id not in (h.loop, *PARTS)]
        processors = [made for made in (m.fresh(context) for m in stacked) if isinstance(made, LogitsProcessor)]
        rounds = Rounds()
        more: dict[str, Any] = {"custom_generate": loop} if loop is not None else {}
        if h.assistant is not None:
            more |= {"assistant_model": draft, "streamer": rounds}
        own = s.model.generation_config, draft.generation_config
        s.model.generation_config = GenerationConfig()  # its settings would fill the gaps of ours
        draft.generation_config = h.assistant or GenerationConfig()
        devices = [s.model.device] if s.model.device.type == "cuda" else []
        try:
            with (
                _hushed(),
                _forwards(s.model) as target,
                _forwards(draft) as drafted,
                torch.random.fork_rng(devices=devices),
                torch.no_grad(),
            ):
                torch.manual_seed(seed)
                start = time.perf_counter()
                out = s.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=generation(s, h.setting, new),
                    logits_processor=processors,
                    **more,
                )
                written = out[0, len(prompt.ids) :].tolist()  # waits for the device
                seconds = time.perf_counter() - start
        finally:
            s.model.generation_config, draft.generation_config = own
        record = getattr(loop, "record", None)
        added = rounds.sizes if h.assistant is not None else getattr(record, "accepted", [1] * len(written))
        # On an accelerator forwards go on while Python does: their time isn't seen from here.
        alone = getattr(loop, "models_at_once", 1) == 1 and s.model.device.type == "cpu"
        return Text(
            written,
            seconds,
            target.tokens,
            drafted.tokens,
            list(added),
            list(getattr(record, "gammas", ())),
            target.seconds + drafted.seconds if alone else None,
        )

    def greedy(self, h: Pairing, rng: Streams) -> list[list[int]]:
        """Plain generation's greedy texts behind the same prompts, under the same processors."""
        names = ("prompts", "count", "prompt_tokens", "new_tokens", "threads")
        stacked = [str(m.part) for m in h.parts if m.part.id not in (h.loop, *PARTS)]
        key = ("greedy", rng.base, *stacked, *(h.setting[name] for name in names))
        if key not in h.subject.known:
            assistant, h.assistant = h.assistant, None
            with _threads(h.setting["threads"]):
                texts = [self.write(h, None, prompt, h.setting["new_tokens"], 0).ids for prompt in h.prompts]
            h.assistant, h.subject.known[key] = assistant, texts
        return h.subject.known[key]

    def laws(self, h: Pairing, rng: Streams) -> Contexts:
        """Both models' laws at places of texts that the target wrote at the trial's temperature."""

        def make() -> Contexts:
            s, d, setting = h.subject, h.draft, h.setting
            return pairs.laws(
                s.model,
                d.model,
                [prompt.ids for prompt in h.prompts],
                setting["contexts"],
                setting["temperature"],
                setting["top_p"],
                s.tokenizer.eos_token_id,
                min(s.positions, d.positions),
                rng.seed("contexts"),
            )

        return self.once(h, rng, ("laws",), make)

    def once(self, h: Pairing, rng: Streams, name: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What depends on the pair, the laws and the seed alone is made once for all contenders."""
        names = ("prompts", "count", "prompt_tokens", "new_tokens", "temperature", "top_p", "contexts")
        key = (*name, h.draft.spec, rng.base, *(h.setting[knob] for knob in names))
        if key not in h.subject.known:
            h.subject.known[key] = make()
        return h.subject.known[key]


# --- settings -----------------------------------------------------------------------------------------------------


def draft_of(s: Subject, setting: Setting) -> Subject:
    """The draft model of a setting, loaded once.

    Raises:
        InputError: none is named and the subject has no usual one, it can't be loaded, or it speaks of other tokens.
    """
    spec = setting["draft"] or DRAFTS.get(s.reference or "")
    if spec is None:
        allowed = "the name of a smaller model with the subject's vocabulary (a folder, a hub id, file.py:factory)"
        raise InputError("draft", spec, allowed)
    key = ("draft", spec)
    if key not in s.known:
        d = load(spec, "draft")
        same_vocabulary(s.tokenizer, d.tokenizer, "draft", spec)
        if d.model is s.model:
            raise InputError("draft", spec, "a model of its own (its factory returns the very model of the subject)")
        d.model.to(s.model.device)
        s.known[key] = d
    return s.known[key]


def _fitting(s: Subject, d: Subject, prompts: Sequence[Prompt], new: int) -> int:
    """Tokens of the longest prompt.

    Raises:
        InputError: prompt and new tokens are more than one of the models takes.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    positions = min(s.positions, d.positions)
    if longest >= positions:
        allowed = f"fewer than the {positions:g} that both models take"
        raise InputError("prompts", f"a prompt of {longest} tokens", allowed)
    if longest + new > positions:
        which = "the draft's" if d.positions < s.positions else "the model's"
        allowed = f"at most {positions - longest:g} behind a prompt of {longest} tokens ({which} positions)"
        raise InputError("new_tokens", new, allowed)
    return longest


def latencies(text: str | None) -> tuple[float, float] | None:
    """Seconds of a forward of the draft and of the target, from ``5:20`` (milliseconds); None: nothing is simulated.

    Raises:
        InputError: text of another form.
    """
    if text in (None, "none"):
        return None
    try:
        draft, target = (float(part) / 1e3 for part in str(text).split(":"))
    except ValueError:
        draft = target = -1.0
    if not (0 <= draft <= 60 and 0 <= target <= 60):
        raise InputError("latency", text, "DRAFT:TARGET in milliseconds, as 5:20, each at most 60000, or none")
    return draft, target


def generation(s: Subject, setting: Setting, new: int) -> GenerationConfig:
    """What ``generate`` is told: exactly ``new`` tokens, and the law of the setting."""
    end = s.tokenizer.eos_token_id
    law: dict[str, Any] = {"do_sample": False}
    if setting["temperature"] > 0:
        # generate's own default of 50 candidates would change the law.
        law = {"do_sample": True, "top_k": 0, "temperature": setting["temperature"], "top_p": setting["top_p"]}
    return GenerationConfig(
        pad_token_id=s.pad,
        eos_token_id=end,
        bos_token_id=s.tokenizer.bos_token_id,
        max_new_tokens=new,
        min_new_tokens=None if end is None else new,
        **law,
    )


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads for a model; threads of Python that are started meanwhile take the number that is set here."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _simulated(draft: Subject, target: Subject, latency: str | None) -> Iterator[list[Latency]]:
    """Both models on simulated devices; none where nothing is simulated."""
    times = latencies(latency)
    with contextlib.ExitStack() as stack:
        pair = [] if times is None else zip((draft, target), times, strict=True)
        yield [stack.enter_context(Latency(subject.model, seconds)) for subject, seconds in pair]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what transformers says of its own calls: assisted generation warns of how it calls ``generate``."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass
class Forwards:
    """Tokens in each forward of a model, and seconds in all of them."""

    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


@contextlib.contextmanager
def _forwards(model: Any) -> Iterator[Forwards]:
    """What passes through ``model`` meanwhile; only the thread that runs the model writes to it."""
    found = Forwards()
    started: list[float] = []

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        found.tokens.append(0 if given is None else given.numel())
        started.append(time.perf_counter())

    def end(*_: Any) -> None:
        found.seconds += time.perf_counter() - started.pop()

    hooks = model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _record(s: Subject, prompt: Prompt, text: Text) -> dict[str, Any]:
    return {
        "prompt": s.tokenizer.decode(list(prompt.ids), skip_special_tokens=True),
        "text": s.tokenizer.decode(text.ids, skip_special_tokens=True),
        "ids": text.ids,
        "rounds": text.rounds,
    }
