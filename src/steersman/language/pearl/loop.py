"""PEARL as a loop for ``model.generate``."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from steersman.errors import InputError
from steersman.language.pearl.ranks import Ranks
from steersman.language.pearl.rounds import VARIANTS, Rounds, Verdict, accept
from steersman.language.pearl.sides import Draft, Target, Work
from steersman.language.pearl.threads import Threads, warn_of_shared_cores
from steersman.language.speculation import Law, SpeculationRecord, check_pair

ENGINES = ("threads", "distributed")
MOST = 16  # tokens of a block
FIRST_GAMMA = 4  # until the models have been timed
TIMED = 4  # rounds whose median times set gamma


@dataclass
class PearlRecord(SpeculationRecord):
    """What a run did: see :class:`~steersman.language.speculation.SpeculationRecord`.

    Args:
        passed, rejected: drafted tokens that were verified and accepted, and those that were rejected.
        gammas: the block length of each round.
        t_draft, t_target: median seconds of a draft step and of a target's forward (0: not measured).
    """

    passed: int = 0
    rejected: int = 0
    gammas: list[int] = field(default_factory=list)
    t_draft: float = 0.0
    t_target: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of accepted tokens among the drafted ones that were verified."""
        checked = self.passed + self.rejected
        return self.passed / checked if checked else math.nan


class Gamma:
    """The block length: as given, or about t_target / t_draft, so that neither model waits for the other.

    Args:
        gamma: a number, or "auto": blocks of 4 until each model has been timed in 4 rounds, then the ratio of the
            medians, rounded, from 1 to 16, for this run and those after it.
    """

    def __init__(self, gamma: int | str) -> None:
        self.now = FIRST_GAMMA if isinstance(gamma, str) else gamma
        self.settled = not isinstance(gamma, str)
        self.counted: tuple[list[float], list[float]] = [], []  # draft and target, of all texts so far
        self.begin()

    def begin(self) -> None:
        """A new text: its first times hold the prompt, and aren't counted."""
        self.drafts: list[float] = []
        self.targets: list[float] = []

    def time(self, work: Work) -> None:
        """Take a round's times."""
        for now, times, counted in (
            ([work.t_draft] if work.written else [], self.drafts, self.counted[0]),
            ([work.t_target] if work.t_target else [], self.targets, self.counted[1]),
        ):
            if times and not self.settled:
                counted += now
            times += now
        if not self.settled and min(map(len, self.counted)) >= TIMED:
            t_draft, t_target = map(statistics.median, self.counted)
            self.now, self.settled = min(max(round(t_target / t_draft), 1), MOST), True

    def medians(self) -> tuple[float, float]:
        """Seconds of a draft step and of a target's forward in this text; 0 where none was counted."""
        t_draft, t_target = (
            statistics.median(times[1:]) if times[1:] else 0.0 for times in (self.drafts, self.targets)
        )
        return t_draft, t_target


class PEARL:
    r"""Parallel speculative decoding with adaptive draft length (Liu et al., 2025), as a loop for ``model.generate``.

    ::

        model.generate(**inputs, custom_generate=PEARL(draft_model))

    Draft model and target work at the same time: while the target verifies a block, the draft model writes the next.
    With the verified text y and drafted, unverified tokens *rest* behind it, a round is

    .. math:: z_{1..\gamma} \sim q(\cdot \mid y, rest) \quad\text{beside}\quad
              P_i = p(\cdot \mid y, rest_{1..i}), \qquad
              n = \min\{i : u_i\, q_i(c_i) \ge P_i(c_i)\},\; c = (rest, z_1)

    and without such an n, y grows by c and :math:`rest = z_{2..\gamma}`; else y grows by :math:`c_{<n}` and
    :math:`t \sim \mathrm{norm}(P_n - q_n)_+`, and rest is empty. A round takes the longer of gamma draft steps and one
    forward of the target. What is written has the target's law exactly, behind all logits processors and warpers,
    which are applied to both models; without sampling it is what greedy search writes (up to ties in the arithmetic).

    Two engines run the same rounds. ``threads``: this process has both models, best on two devices. ``distributed``:
    two ranks of ``torch.distributed`` (a group of gloo or nccl; the few numbers of a round go over gloo) have one each
    and call ``generate`` with the same input, rank 0 on the draft model and rank 1 on the target; both return the
    text::

        # torchrun --nproc-per-node 2 write.py
        model = AutoModelForCausalLM.from_pretrained(draft if rank == 0 else target)
        model.generate(**inputs, custom_generate=PEARL(engine="distributed"))

    Args:
        draft_model: a smaller causal language model with the same vocabulary. With ``distributed`` it may be left out.
        gamma: tokens of a block, 1 to 16; "auto" measures the models' times in the first rounds and takes
            t_target / t_draft (the text of a seed then depends on the times, its law doesn't).
        variant: "full"; "no-pre" and "no-post" leave out one of the strategies, "sd" both (plain speculative
            decoding); "target" and "draft" let one model write alone. Only "draft" changes the law.
        engine: "threads" or "distributed".
        streamer: a transformers streamer, which gets verified tokens only; ``generate`` gives none to a custom loop.
        generator: of all draws (default: torch's own, as in ``generate``). Both engines draw the same from it.
        timeout: seconds that a rank may take for one step before both ranks raise; loading a prompt is a step, too.

    Attributes:
        record: :class:`PearlRecord` of the last run.

    Raises:
        InputError: an argument out of its range. On call: more than one row, beams, an encoder-decoder, another
            vocabulary, a cache that can't be cut, scores asked for, a number of ranks other than two, or ranks that
            were called with different input.
        TrialError: a rank died or took longer than ``timeout``.

    References:
        Tianyu Liu, Yun Li, Qitan Lv, Kai Liu, Jianchen Zhu, Winston Hu, Xiao Sun. PEARL: Parallel Speculative
        Decoding with Adaptive Draft Length. ICLR 2025, arXiv:2408.11850, section 4.
    """

    record: PearlRecord
    generate_options: Mapping[str, Any] = MappingProxyType({"num_beams": 1})

    def __init__(
        self,
        draft_model: Any = None,
        gamma: int | Literal["auto"] = "auto",
        variant: str = "full",
        engine: str = "threads",
        streamer: Any = None,
        generator: torch.Generator | None = None,
        timeout: float = 8.0,
    ) -> None:
        whole = isinstance(gamma, int) and not isinstance(gamma, bool)
        if gamma != "auto" and not (whole and 1 <= int(gamma) <= MOST):
            raise InputError("gamma", gamma, f"'auto' or a whole number from 1 to {MOST}")
        Rounds(variant)  # refuses an unknown one
        if engine not in ENGINES:
            raise InputError("engine", engine, f"one of {', '.join(ENGINES)}")
        if draft_model is None and engine == "threads":
            raise InputError("draft_model", None, "a causal language model for the engine threads")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout <= 86400:
            raise InputError("timeout", timeout, "a positive number of seconds, at most a day")
        self.draft_model, self.gamma, self.variant, self.engine = draft_model, gamma, variant, engine
        self.streamer, self.generator, self.timeout = streamer, generator, float(timeout)
        self.record = PearlRecord()
        self._block = Gamma(gamma)

    @property
    def models_at_once(self) -> int:
        """How many models compute at the same time in one process, for whoever shares its cores out."""
        return 2 if self.engine == "threads" and self.variant in ("full", "no-pre", "no-post") else 1

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The loop; ``generate`` calls it. Returns what sampling (or greedy search) would: ids, or an output."""
        row, start = _one_row(input_ids, generation_config, model_kwargs)
        limit, sample = int(generation_config.max_length), bool(generation_config.do_sample)
        self.record = PearlRecord()
        seeds = self._seeds()
        engine: Threads | Ranks
        if self.engine == "threads":
            draft = self.draft_model
            check_pair("PEARL", model, draft, generation_config, model_kwargs)
            if self.models_at_once == 2 and draft.device.type == model.device.type == "cpu":
                warn_of_shared_cores()
            law = Law(logits_processor, sample, model.config.get_text_config().vocab_size)
            engine = Threads(
                lambda: Draft(draft, law, row, start, limit, seeds[0], model.device),
                Target(model, law, row, start, limit, seeds[1]),
                draft.device,
                self.models_at_once == 2,
            )
            with engine:
                text = self._write(engine, input_ids, limit, stopping_criteria)
            cache = engine.target.chain.cache
        else:
            engine = Ranks(self.timeout, model.device)
            own = self.draft_model if engine.rank == 0 and self.draft_model is not None else model
            refused: InputError | None = None
            try:
                check_pair("PEARL", own, own, generation_config, model_kwargs)
            except InputError as error:
                refused = error
            digest = int.from_bytes(hashlib.blake2b(str(row.tolist()).encode(), digest_size=7).digest())
            facts = {
                "allowed": int(refused is None),
                "vocabulary": own.config.get_text_config().vocab_size,
                "prompt length": len(row),
                "prompt": digest,
                "padding": start,
                "max_length": limit,
                "variant": VARIANTS.index(self.variant),
                "gamma": 0 if isinstance(self.gamma, str) else self.gamma,
                "do_sample": int(sample),
            }

            def loop() -> list[int]:
                size, (*common, self._block.now) = engine.meet(facts, [*seeds, self._block.now])
                if refused is not None:
                    raise refused
                law = Law(logits_processor, sample, size)
                if engine.rank == 0:
                    engine.side = Draft(own, law, row, start, limit, common[0], model.device)
                else:
                    engine.side = Target(own, law, row, start, limit, common[1])
                written = self._write(engine, input_ids, limit, stopping_criteria)
                engine.close()
                return written

            with engine:
                text = engine.run(loop)
            cache = engine.side.chain.cache
        sequences: Any = torch.cat([row, torch.tensor(text, dtype=row.dtype, device=row.device)])[None]
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)

    def _write(self, engine: Threads | Ranks, prompt: Tensor, limit: int, stopping_criteria: Any) -> list[int]:
        """Rounds until the text ends; gives the new tokens. Both ranks of an engine run it, in step."""
        rounds, record, block = Rounds(self.variant), self.record, self._block
        block.begin()
        text: list[int] = []
        chances: list[float] = []  # of rest: the probability that each token was drawn with
        if self.streamer is not None:
            self.streamer.put(prompt.cpu())
        stop = False
        while not stop:
            length = prompt.shape[1] + len(text)  # of y
            drafted = length + len(rounds.rest)
            gamma = block.now
            write, scored = rounds.plan(gamma)
            # Nothing is drafted behind the longest text: a model may have no position for it.
            work = engine.work(drafted, min(write, limit - drafted), len(rounds.rest) + 1 if scored else 0)
            chances += work.chances
            verdict = None
            if engine.verifies:
                block.time(work)
                verdict = self._judge(engine, rounds, work, scored, chances, length, stopping_criteria)
            verdict = engine.agree(verdict)
            record.passed += verdict.accepted
            record.rejected += verdict.accepted < len(rounds.check(work.written, scored))
            new = rounds.advance(work.written, verdict.accepted, verdict.token, scored)[: verdict.kept]
            chances = chances[len(chances) - len(rounds.rest) :]
            engine.commit(length, new, rounds.rest)
            text += new
            record.draft_calls += len(work.written)
            record.target_calls += scored
            record.rounds += scored
            record.gammas.append(gamma)
            if scored or new:
                record.accepted.append(len(new))
            if new and self.streamer is not None:
                self.streamer.put(torch.tensor(new))
            block.now, stop = verdict.gamma, verdict.stop
        if self.streamer is not None:
            self.streamer.end()
        record.t_draft, record.t_target = block.medians()
        return text

    def _judge(
        self,
        engine: Any,
        rounds: Rounds,
        work: Work,
        scored: bool,
        chances: list[float],
        length: int,
        stopping_criteria: Any,
    ) -> Verdict:
        """Verify what is to be checked, draw the token behind it, and see where the text stops."""
        target: Target = engine.target
        check = rounds.check(work.written, scored)
        laws: list[Tensor] = []

        def p(i: int) -> float:
            laws.append(target.law_at(i))
            return float(laws[i][check[i]])

        accepted = accept(check, chances[: len(check)], p, target.uniforms(len(check)))
        token = None
        if accepted < len(check):
            # Without sampling p and q are on one token each, and p is what is left of it: q need not be sent.
            p_n = laws[accepted]
            token = target.residual(p_n, engine.law(accepted)) if target.law.sample else target.draw(p_n)
        elif rounds.draws(work.written, accepted, scored):
            token = target.draw(target.law_at(accepted))
        new = rounds.verified(work.written, accepted, token, scored)
        target.put(length, new)
        for kept in range(1, len(new) + 1):
            if bool(stopping_criteria(target.text[None, : length + kept], None).all()):
                return Verdict(accepted, token, kept, True, self._block.now)
        return Verdict(accepted, token, len(new), False, self._block.now)

    def _seeds(self) -> list[int]:
        """Of the draft's side and of the target's: independent of each other, and not tied to places in the text."""
        device = self.generator.device if self.generator is not None else None
        return torch.randint(2**62, (2,), generator=self.generator, device=device).tolist()


def _one_row(input_ids: Tensor, config: Any, model_kwargs: Mapping[str, Any]) -> tuple[Tensor, int]:
    """The one row of ids, and how many columns of padding are in front."""
    if config.num_beams not in (None, 1):
        raise InputError("num_beams", config.num_beams, "1 for PEARL")
    if input_ids.shape[0] != 1:
        allowed = "1 for PEARL, whose rounds follow one text (MultiDraft and greedy search take batches)"
        raise InputError("batch", input_ids.shape[0], allowed)
    if input_ids.shape[1] == 0:
        raise InputError("inputs", "none", "input_ids (at least one) and their attention mask")
    mask = model_kwargs.get("attention_mask")
    start = 0
    if mask is not None:
        seen = mask[0].bool()
        start = int((~seen).sum())
        if not bool(seen[start:].all()) or start == len(seen):
            raise InputError("attention_mask", mask[0].tolist(), "zeros for padding on the left, then ones")
    return input_ids[0], start
