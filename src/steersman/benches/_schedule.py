r"""What PEARL's schedule yields when tokens are accepted independently and forwards take a given time (simulated).

The models are :func:`~steersman.benches._latency.independent_pair`, under
:class:`~steersman.benches._latency.Latency`. With the share a of accepted tokens among those that the run checked,

.. math:: \text{yield ratio} = \frac{\text{tokens} / \text{seconds}}{R(a, \gamma) / \max(\gamma t_{draft}, t_{target})}

is 1 when a round takes as long as the slower model and adds what the formula says. Taking a from the run leaves out the
chance of the acceptances themselves, which a run of a hundred tokens has much of.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steersman.benches._latency import Latency, independent_pair
from steersman.engine.bench import Figure, Knob, PartInfo, Shape
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError
from steersman.language.pearl import PEARL, expected_tokens

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison
    from steersman.report.blocks import Block

WARM_UP = 8


@dataclass
class Host:
    """A pair of models without a loop."""

    target: Any
    draft: Any
    loop: PEARL | None = None


class Schedule:
    """Problem: PEARL with gamma tokens a block on a pair of independent laws; see the module's text."""

    id = "schedule"
    shape: Shape = "Problem"
    default_subject = "docs/tiny"  # not used: the models are made for the acceptance that is asked for
    headline = ("yield_ratio", "simulated_ms_per_token")
    knobs: Mapping[str, Knob] = {
        "acceptance": Knob(float, (0.8,), "probability that a drafted token is accepted", low=0, high=1),
        "ratio": Knob(float, (2.0, 4.0), "t_target / t_draft", low=0.1, high=100),
        "t_draft": Knob(float, 10.0, "ms of a forward of the draft model", low=0.1, high=1000, sweep=False),
        "new_tokens": Knob(int, 120, "tokens to write", low=WARM_UP, high=4000, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "yield_ratio": Figure(
            "", "neither", "quality", "tokens by simulated second, over the formula's with the run's acceptance"
        ),
        "simulated_ms_per_token": Figure(
            "ms", "lower", "cost", "time by written token where forwards take given times"
        ),
        "tokens_per_round": Figure("tokens", "higher", "info", "tokens that a round added"),
        "formula": Figure("tokens", "neither", "info", "R(a, gamma) with the run's acceptance a"),
        "accepted": Figure("", "neither", "info", "share of accepted tokens among those that were checked"),
        "late": Figure("", "lower", "info", "share of forwards that took longer than the simulated time"),
    }

    def subject(self, spec: str) -> None:
        return None

    def baselines(self) -> list[str]:
        return ["pearl:gamma=2", "pearl:gamma=4"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {"pearl": PartInfo(PEARL, "Draft and target at the same time.", "PEARL(draft_model{, knobs})")}

    def check(self, s: None, setting: Setting) -> None:
        return None

    def host(self, s: None, setting: Setting, rng: Streams) -> Host:
        return Host(*independent_pair(setting["acceptance"]))

    def mount(self, h: Host, part: Part) -> None:
        if h.loop is not None:
            raise InputError("methods", part.id, "there once")
        h.loop = PEARL(h.draft, **checked_knobs(PEARL, part, skip=("draft_model",)))

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        loop = h.loop
        if loop is None or loop.variant != "full" or isinstance(loop.gamma, str):
            raise Inapplicable("the formula is for the full method with a given gamma")
        t_draft = setting["t_draft"] / 1e3
        t_target = setting["ratio"] * t_draft
        with Latency(h.draft, t_draft) as draft, Latency(h.target, t_target) as target:
            self._write(h, WARM_UP, 0)
            seconds = self._write(h, setting["new_tokens"], rng.seed("sampling"))
        record = loop.record
        formula = expected_tokens(record.acceptance, loop.gamma)
        return {
            "yield_ratio": record.tokens / seconds / (formula / max(loop.gamma * t_draft, t_target)),
            "simulated_ms_per_token": 1e3 * seconds / record.tokens,
            "tokens_per_round": record.tokens / record.rounds,
            "formula": formula,
            "accepted": record.acceptance,
            "late": (draft.late + target.late) / (draft.calls + target.calls),
        }

    def _write(self, h: Host, tokens: int, seed: int) -> float:
        """Seconds of a text."""
        ids = torch.zeros(1, 1, dtype=torch.long)
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "max_new_tokens": tokens}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = time.perf_counter()
            h.target.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=h.loop, **options)
            return time.perf_counter() - start

    def exhibits(self, comparison: Comparison) -> list[Block]:
        return []
