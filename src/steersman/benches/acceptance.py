r"""Acceptance: how many of n drafts each verifier keeps on a pair of models, and the most that any verifier could.

At a context x, the target has the law p and the draft the law q, both behind temperature and top-p. Of n drafts a
verifier keeps one with probability :math:`\alpha(p, q, n)`, which never exceeds the optimal transport bound

.. math:: \alpha^*(p, q, n) = 1 + \min_H [p(H) - Q(H)], \qquad Q(H) = \Pr(\text{all drafts lie in } H),

of the sampler that drew them. Both are computed, not sampled, at contexts that the target itself wrote at that
temperature, the same for all contenders of a seed. What is kept beyond plain speculative sampling is what further
drafts are worth; what is missing to the bound is what a better verifier could still win.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman import catalog
from steersman.benches import _speculation_pair as pairs
from steersman.benches._language import LanguageBench, Subject
from steersman.benches.speculation import draft_of
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, TrialError
from steersman.language.multi_draft import VERIFIERS
from steersman.report.blocks import Block, Note, TableBlock

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

DRAWN = ("with", "without", "greedy")  # SpecHub's bound is that of greedy drafts, n = 2


@dataclass(frozen=True)
class Rule:
    """A verifier, and the sampler whose drafts it gets."""

    verifier: str
    sampler: str


def _rule(verifier: str) -> Callable[[], Rule]:
    def build() -> Rule:
        return Rule(verifier, VERIFIERS[verifier])

    return build


SUMMARIES = {
    "single": "Speculative sampling with the first draft alone.",
    "rrs": "Recursive rejection of drafts with replacement.",
    "rrsw": "Recursive rejection of drafts without replacement.",
    "k-seq": "K-SEQ of SpecTr: each draft in turn at a common rate.",
    "spechub": "SpecHub: two drafts, one of which is the most probable token.",
    "ot-lp": "Optimal transport by linear programming, for laws of at most 10 tokens.",
}
LINE = "model.generate(**inputs, custom_generate=MultiDraft(draft_model, {verifier}))"
PARTS: dict[str, PartInfo] = {
    name: PartInfo(_rule(name), summary, LINE.replace("{verifier}", f"verifier={name!r}"))
    for name, summary in SUMMARIES.items()
}


@dataclass
class Host:
    """A pair of models, and the rule that a part brought."""

    subject: Subject
    draft: Subject
    setting: Setting
    rules: list[Rule] = field(default_factory=list)


class AcceptanceBench(LanguageBench):
    """Problem: acceptance at contexts of a pair of models.

    Subjects and drafts are named as in ``compare speculation``. ``multi-draft`` mounts with its knobs ``verifier`` and
    ``sampler``.
    """

    id = "acceptance"
    shape = "Problem"
    timed = False
    default_subject = "docs/base"
    headline = ("acceptance", "n_drafts")
    knobs: Mapping[str, Knob] = {
        "draft": Knob(str, None, "draft model, named as the subject is (default for docs: docs/tiny)"),
        "temperature": Knob(float, (0.2, 0.6, 1.0), "of sampling; 0 is greedy", low=0, high=100),
        "n_drafts": Knob(int, (2, 3), "drafts a position", low=1, high=64),
        "top_p": Knob(float, (1.0,), "of sampling: the most probable tokens that hold this much", low=1e-6, high=1),
        "contexts": Knob(int, 64, "places at which acceptance is computed", low=1, high=100_000, sweep=False),
        "count": Knob(int, 8, "number of prompts", low=1, high=100_000, sweep=False),
        "prompt_tokens": Knob(int, 32, "tokens of a prompt that is cut from a text", low=1, high=100_000, sweep=False),
        "prompts": Knob(str, None, "file of prompts: lines of text, or .jsonl with 'prompt' or 'text'", sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "acceptance": Figure("", "higher", "quality", "chance that the token kept is one of the drafts"),
        "gap": Figure("", "lower", "info", "bound of the verifier's own sampler, minus acceptance"),
        "shortfall": Figure("", "lower", "info", "the best sampler's bound at each context, minus acceptance"),
        "bound_with": Figure("", "neither", "info", "the most that is kept of drafts with replacement"),
        "bound_without": Figure("", "neither", "info", "the most that is kept of drafts without replacement"),
        "bound_greedy": Figure("", "neither", "info", "the most that is kept of greedy drafts"),
    }

    def baselines(self) -> list[str]:
        return ["single", "rrs", "k-seq", "rrsw", "spechub", *_methods()]

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def check(self, s: Subject, setting: Setting) -> None:
        if 0 < setting["temperature"] < 0.01:
            raise InputError("temperature", setting["temperature"], "0 (greedy) or a number from 0.01 to 100")
        size = s.model.config.get_text_config().vocab_size
        if setting["n_drafts"] > size:
            raise InputError("n_drafts", setting["n_drafts"], f"at most the vocabulary's {size} tokens")
        positions = min(s.positions, draft_of(s, setting).positions)
        longest = max(len(prompt.ids) for prompt in self.prompts(s, _as_speculation(setting), Streams(0)))
        if longest >= positions:
            raise InputError("prompts", f"one of {longest} tokens", f"prompts of fewer than {positions:g} tokens")

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:  # type: ignore[override]
        return Host(s, draft_of(s, setting), setting)

    def mount(self, h: Host, part: Part) -> None:  # type: ignore[override]
        if h.rules:
            raise InputError("methods", part.id, "one verifier for the drafts")
        if part.id in PARTS:
            h.rules.append(PARTS[part.id].build(**checked_knobs(PARTS[part.id].build, part)))
            return
        build = catalog.card(part.id).load()
        knobs = checked_knobs(build, part, skip=("draft_model", "n_drafts", "streamer", "generator"))
        try:
            made = build(draft_model=h.draft.model, n_drafts=h.setting["n_drafts"], **knobs)
        except InputError as error:
            if error.parameter in ("n", "n_drafts", "max_nodes"):
                raise Inapplicable(str(error)) from error
            raise
        except TypeError:
            raise InputError("methods", part.id, "a method with a draft model and a verifier") from None
        if getattr(made, "verifier", None) not in VERIFIERS:
            raise InputError("methods", part.id, "a method with a draft model and a verifier")
        h.rules.append(Rule(made.verifier, made.sampler))

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:  # type: ignore[override]
        if not h.rules:
            raise TrialError("no verifier was mounted")
        (rule,), n = h.rules, setting["n_drafts"]
        if rule.verifier == "spechub" and n != 2:
            raise Inapplicable("SpecHub takes two drafts")
        s = h.subject
        shared = (
            h.draft.spec,
            rng.base,
            *(value for name, value in setting.items() if name not in ("n_drafts", "draft")),
        )
        known = s.known

        def once(name: tuple[Any, ...], make: Callable[[], Any]) -> Any:
            """What is the same for all contenders of a seed."""
            if (key := ("acceptance", *name, *shared)) not in known:
                known[key] = make()
            return known[key]

        found = once(
            ("laws",),
            lambda: pairs.laws(
                s.model,
                h.draft.model,
                [prompt.ids for prompt in self.prompts(s, _as_speculation(setting), rng)],
                setting["contexts"],
                setting["temperature"],
                setting["top_p"],
                s.tokenizer.eos_token_id,
                min(s.positions, h.draft.positions),
                rng.seed("contexts"),
            ),
        )

        bounds = {x: once(("bound", x, n), partial(pairs.bound, found, n, x)) for x in DRAWN}
        own = bounds["greedy" if rule.sampler == "spechub" else rule.sampler]
        try:
            kept = pairs.accepted(found, n, rule.verifier)
        except InputError as error:  # laws of more tokens than a linear program takes
            raise Inapplicable(str(error)) from error
        values = {"acceptance": kept, "gap": own - kept, "shortfall": np.max(list(bounds.values()), axis=0) - kept}
        values |= {f"bound_{sampler}": rows for sampler, rows in bounds.items()}
        for name, rows in values.items():
            log.per_item(name, rows.tolist())
        return {name: float(rows.mean()) for name, rows in values.items()}

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = []
        for temperature in dict.fromkeys(setting["temperature"] for setting in comparison.settings):
            counts = sorted({s["n_drafts"] for s in comparison.settings if s["temperature"] == temperature})

            def mean(
                figure: str, n: int, contender: str | None = None, temperature: float = temperature
            ) -> float | str:
                found = comparison.select(contender, temperature=temperature, n_drafts=n)
                return float(np.mean([row.figures[figure] for row in found])) if found else ""

            rows: list[list[Any]] = [
                [contender, *(mean(figure, n, contender) for n in counts for figure in ("acceptance", "gap"))]
                for contender in comparison.contenders
            ]
            rows += [
                [f"bound of drafts: {sampler}", *(cell for n in counts for cell in (mean(f"bound_{sampler}", n), ""))]
                for sampler in DRAWN
            ]
            columns = ["contender", *(f"{figure}, n = {n}" for n in counts for figure in ("kept", "gap"))]
            caption = (
                "Kept: chance that one of the n drafts is. Gap: what is missing to its sampler's bound. Means of seeds."
            )
            blocks.append(
                TableBlock("Drafts kept", columns, rows, caption=caption, setting={"temperature": temperature})
            )
        text = (
            "Acceptance is for one position, given that the target has accepted everything before. The law that comes "
            "out is the target's under every verifier. A bound belongs to a sampler: drafts of another kind may be "
            "worth more, and shortfall counts from the best of them."
        )
        return [*blocks, Note(text)]


def _methods() -> list[str]:
    return [card.id for card in catalog.cards().values() if "acceptance" in card.benches]


def _as_speculation(setting: Setting) -> dict[str, Any]:
    """The setting with what prompts are cut by: they are followed by as many tokens as the contexts are taken from."""
    return {**setting, "new_tokens": pairs.RUN}
