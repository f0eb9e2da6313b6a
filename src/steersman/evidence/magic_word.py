r"""Evidence for magic words: the back-off search beside its parts at equal forward passes, and the bound on a head.

The language models are the shipped ``docs`` ones. Every seed cuts states of its own from held-out documents, draws the
targets, the ids that prompts may use (quick: 1024 of 4096) and the search's random numbers, which all contenders share.
A state is one unit: the effects of its targets are averaged. The budget of a pair is what the back-off search takes at
most, and the other searches may spend as much, GCG and random prompts in equal shares for all lengths. Greedy search
alone goes to the longest prompt and is then at its end. Pairs that need no prompt (k = 0) count as reached.

The cross-entropy is compared on pairs that neither of the two searches reached: a search that reaches a target stops
there.

What the paper reports for models of 7 to 40 billion parameters is not shown here: models of 0.3 to 8 million parameters
hang on their last tokens, and a prompt in front moves them less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from steersman.benches._language import Subject, load
from steersman.benches.controllability import words_of
from steersman.engine.bench import Figure, Knob, PartInfo, Setting, Shape, TrialLog
from steersman.engine.claims import Claim, Effects
from steersman.engine.comparison import Comparison
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError, nearest
from steersman.evidence.study import Study
from steersman.language.magic_word import Head, MagicWord, System, attention_bound, best_attack, model_layer
from steersman.reference import docs
from steersman.report.blocks import Block, TableBlock

OURS, GREEDY, GCG, RANDOM = "magic-word", "greedy", "gcg", "random"
PUBLISHED = "magic-word:success=argmin:accept=always"


# --- the bound on heads -------------------------------------------------------------------------------------


@dataclass
class HeadHost:
    """Which form of the bound is put to the test."""

    subject: Subject
    form: str = ""


class HeadBench:
    """Problem: how near an attack comes to the bound on an attention head, and whether it gets past it.

    Heads are drawn at random (``heads=random``: weights of scales 0.1 to 1, up to k controls drawn on the sphere), or
    they are all heads of the subject's first layers, reading a held-out state (``heads=model``: the controls by
    gradient ascent).
    """

    id = "attention-bound"
    shape: Shape = "Problem"
    default_subject = "docs/tiny"
    headline = ("ratio", "k")
    knobs: Mapping[str, Knob] = {
        "heads": Knob(str, ("random", "model"), "which heads", choices=("random", "model")),
        "k": Knob(int, (1, 8), "control tokens (heads=random: at most)", low=1, high=1000),
        "count": Knob(int, 300, "random heads", low=1, high=1_000_000, sweep=False),
        "layers": Knob(int, 1, "layers of the model, from the first", low=1, high=1000, sweep=False),
        "steps": Knob(int, 100, "of gradient ascent", low=1, high=100_000, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "ratio": Figure("", "neither", "quality", "largest orthogonal component over the bound; above 1 violates it"),
        "violated": Figure("", "lower", "info", "share of heads whose bound is violated"),
        "beta": Figure("", "lower", "info", "mean beta of the heads"),
        "vacuous": Figure("", "lower", "info", "share of heads whose bound says nothing (beta above 0.999)"),
        "mean_ratio": Figure("", "higher", "info", "mean over heads of the component over the bound"),
    }

    def subject(self, spec: str) -> Subject:
        return load(spec)

    def baselines(self) -> list[str]:
        return list(self.parts())

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "corrected": PartInfo(lambda: "corrected", "beta s_v M_u, alpha from the key matrix"),
            "printed": PartInfo(lambda: "printed", "beta alone, alpha from the value matrix: the notebook's formula"),
        }

    def check(self, s: Subject, setting: Setting) -> None:
        if setting["heads"] == "model":
            model_layer(System(s.model, s.tokenizer), (3, 4), setting["layers"] - 1)

    def host(self, s: Subject, setting: Setting, rng: Streams) -> HeadHost:
        return HeadHost(s)

    def mount(self, h: HeadHost, part: Part) -> None:
        if part.id not in self.parts():
            raise InputError("methods", part.id, nearest(part.id, self.parts()))
        build = self.parts()[part.id].build
        checked_knobs(build, part)
        if h.form:
            raise InputError("methods", f"{h.form}+{part.id}", "one or the other")
        h.form = build()

    def trial(self, h: HeadHost, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        cases = _random_heads(setting, rng) if setting["heads"] == "random" else _model_heads(h.subject, setting, rng)
        rows: list[dict[str, Any]] = []
        for name, head, x, u, m_u in cases:
            found = attention_bound(head, x, len(u), m_u)
            component = found.orthogonal(head(x, u))
            if h.form == "corrected":
                beta, limit = found.beta, found.bound
            else:
                s_q, s_v = (float(torch.linalg.matrix_norm(w, 2)) for w in (head.w_q, head.w_v))
                alpha = head.s * s_q * s_v * m_u * float(x.norm(dim=1).max())
                beta = limit = torch.sigmoid(math.log(len(u)) + alpha - found.log_d)
            ratio = component / limit.clamp(min=1e-300)
            at = int(ratio.argmax()) if setting["heads"] == "random" else len(x) - 1
            row = {"head": name, "k": len(u), "component": float(component[at]), "bound": float(limit[at])}
            rows.append(row | {"ratio": float(ratio[at]), "beta": float(beta[at])})
        ratios, betas = (np.array([row[name] for row in rows]) for name in ("ratio", "beta"))
        log.texts("heads", rows[:100])
        log.per_item("ratio", ratios.tolist())
        return {
            "ratio": float(ratios.max()),
            "mean_ratio": float(ratios.mean()),
            "violated": float((ratios > 1 + 1e-9).mean()),
            "beta": float(betas.mean()),
            "vacuous": float((betas > 0.999).mean()),
        }

    def exhibits(self, comparison: Comparison) -> list[Block]:
        rows = [
            [row.contender, row.setting["heads"], row.setting["k"], row.figures["ratio"], row.figures["vacuous"]]
            for row in comparison.select()
            if row.seed == comparison.config["seeds"][0]
        ]
        names = ["contender", "heads", "k", "largest component / bound", "vacuous"]
        return [TableBlock("Bound and attack, first seed", names, rows)]


Case = tuple[str, Head, torch.Tensor, torch.Tensor, float]


def _random_heads(setting: Setting, rng: Streams) -> list[Case]:
    g, cases = rng.torch("heads"), []
    for number in range(setting["count"]):
        d, d_k, m = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((2, 17), (1, 9), (1, 9)))
        k = int(torch.randint(1, setting["k"] + 1, (1,), generator=g))
        scale, m_u = (float(0.1 + 0.9 * torch.rand(1, generator=g)) for _ in range(2))
        w_q, w_k, w_v = (scale * torch.randn(d, d_k, generator=g, dtype=torch.float64) for _ in range(3))
        x, u = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (m, k))
        u = 3 * m_u * u / u.norm(dim=1, keepdim=True)
        cases.append((f"random {number}", Head(w_q, w_k, w_v, causal=bool(number % 2)), x, u, 3 * m_u))
    return cases


def _model_heads(s: Subject, setting: Setting, rng: Streams) -> list[Case]:
    system = System(s.model, s.tokenizer)
    (state,) = docs.prompts(1, 12, rng.seed("state") % 2**31, continuation=1, tokenizer=s.tokenizer)
    cases = []
    for layer in range(setting["layers"]):
        found = model_layer(system, state.ids, layer)
        for number, head in enumerate(found.heads):
            _, u = best_attack(
                head, found.x, setting["k"], found.m_u, steps=setting["steps"], restarts=4, seed=rng.base % 2**31
            )
            cases.append((f"layer {layer}, head {number}", head, found.x, u, found.m_u))
    return cases


# --- studies ------------------------------------------------------------------------------------------------


def studies(scale: str, seed: int) -> dict[str, Study]:
    """60 pairs on docs/tiny, k <= 6, 1024 ids (quick); 300 pairs, k <= 10, all ids, and two larger models (full)."""
    quick = {"states": 4, "shortest": 8, "longest": 16, "alphabet": 1024}
    whole = {"states": 20, "shortest": 8, "longest": 32, "k": 10, "iterations": 34, "candidates": 256, "k_sub": 128}
    grid = quick if scale == "quick" else whole
    if scale == "gpu":
        grid = {**whole, "candidates": 768}
    searches = (OURS, PUBLISHED, GREEDY, GCG, RANDOM)
    found = {
        "searches": Study("controllability", searches, "docs/tiny", grid),
        "bound": Study(HeadBench(), ("corrected", "printed"), "docs/tiny", {"k": (1, 8)}),
    }
    if scale != "quick":
        fewer = {**whole, "states": 4, "alphabet": 1024, "candidates": 128} if scale == "full" else grid
        found["small"] = Study("controllability", (OURS, RANDOM), "docs/small", {**whole, "alphabet": 1024})
        found["base"] = Study("controllability", (OURS, RANDOM), "docs/base", fewer)
        found["bound-base"] = Study(HeadBench(), ("corrected",), "docs/base", {"k": (1, 8), "layers": 4})
    return found


def paired(comparison: Comparison, rival: str) -> list[tuple[MagicWord, MagicWord]]:
    """What the back-off search and the rival found for the same state and target."""
    theirs = {(word.x0, word.y, word.kind): word for word in words_of(comparison, rival, {})}
    ours = words_of(comparison, OURS, {})
    found = [(word, theirs[key]) for word in ours if (key := (word.x0, word.y, word.kind)) in theirs]
    if not found:
        raise LookupError(f"no pairs that {OURS} and {rival} searched")
    return found


def states_of(words: list[tuple[MagicWord, MagicWord]]) -> np.ndarray:
    """The number of each pair's state: targets of one state are no independent units."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(ours.x0, len(numbers)) for ours, _ in words])


def reached_more(rival: str) -> Callable[[Comparison], Effects]:
    """By state: the share of its targets that the back-off search reached, minus the rival's share."""

    def effects(comparison: Comparison) -> Effects:
        words = paired(comparison, rival)
        values = np.array([float(ours.reached) - float(theirs.reached) for ours, theirs in words])
        return Effects(values, states_of(words))

    return effects


def lower_loss(rival: str) -> Callable[[Comparison], Effects]:
    """By state, over its targets that neither reached: the rival's cross-entropy minus that of the back-off search."""

    def effects(comparison: Comparison) -> Effects:
        words = [(ours, theirs) for ours, theirs in paired(comparison, rival) if not (ours.reached or theirs.reached)]
        if not words:
            raise LookupError(f"no pair that neither {OURS} nor {rival} reached")
        return Effects(np.array([theirs.loss - ours.loss for ours, theirs in words]), states_of(words))

    return effects


def kind_over(easier: str, harder: str) -> Callable[[Comparison], Effects]:
    """By state: whether its target of the one class was reached, beside that of the other."""

    def effects(comparison: Comparison) -> Effects:
        words = words_of(comparison, OURS, {})
        by_state: dict[tuple[int, ...], dict[str, float]] = {}
        for word in words:
            by_state.setdefault(word.x0, {})[word.kind] = float(word.reached)
        both = [found for found in by_state.values() if easier in found and harder in found]
        if not both:
            raise LookupError(f"no state with targets of {easier} and {harder}")
        values, reference = (np.array([found[kind] for found in both]) for kind in (easier, harder))
        return Effects(values, kind="paired-rate", reference=reference)

    return effects


def unrelated_to_rank(kind: str, most: float) -> Callable[[Comparison], Effects]:
    """``most`` minus Spearman's correlation of prompt length and prior rank, as a mean over pairs.

    With ranks standardised over the pairs of the class, the correlation is the mean of their products. Pairs that were
    not reached count as the longest prompt plus one.
    """

    def effects(comparison: Comparison) -> Effects:
        words = [word for word in words_of(comparison, OURS, {}) if word.kind == kind and word.rank is not None]
        longest = comparison.rows[0].setting["k"] if comparison.rows else 0
        lengths = np.array([longest + 1 if word.k is None else word.k for word in words], dtype=float)
        ranks = np.array([word.rank for word in words], dtype=float)
        if len(words) < 2 or len(set(lengths)) < 2 or len(set(ranks)) < 2:
            raise LookupError(f"prompt lengths or ranks of {kind} that vary")
        one, other = (stats.zscore(stats.rankdata(values)) for values in (lengths, ranks))
        return Effects(most - one * other)

    return effects


def confirmed(comparison: Comparison) -> Effects:
    """By trial: the share of reached pairs that a fresh pass confirms."""
    values = [row.figures["verified"] for row in comparison.select() if "verified" in row.figures]
    if not values:
        raise LookupError("no trial that reached a pair")
    return Effects(np.array(values), kind="exact")


def below_the_bound(heads: str) -> Callable[[Comparison], Effects]:
    """By head: one minus the orthogonal component over the bound."""

    def effects(comparison: Comparison) -> Effects:
        values = [v for row in comparison.select("corrected", heads=heads) for v in row.per_item["ratio"]]
        if not values:
            raise LookupError(f"no heads of {heads}")
        return Effects(1 - np.array(values), kind="exact")

    return effects


def printed_is_violated(comparison: Comparison) -> Effects:
    """By seed: heads that violate the printed form, of the random ones with up to eight controls."""
    rows = comparison.select("printed", heads="random", k=8)
    if not rows:
        raise TrialError("no trial of the printed form")
    return Effects(np.array([row.figures["violated"] for row in rows]), kind="exact")


CLAIMS = [
    Claim(
        "reaches-random",
        "It reaches more pairs, those that need no prompt counted, than random prompts of as many forward passes.",
        "not in the paper",
        "searches",
        reached_more(RANDOM),
        unit="item",
    ),
    Claim(
        "reaches-greedy",
        "It reaches as many pairs, those without a prompt counted, as greedy search alone, or fewer by under 5 points.",
        "Algorithm 1",
        "searches",
        reached_more(GREEDY),
        margin=-0.05,
        unit="item",
    ),
    Claim(
        "reaches-gcg",
        "It reaches as many pairs, those that need no prompt counted, as GCG alone, or fewer by under 5 points.",
        "Algorithm 1",
        "searches",
        reached_more(GCG),
        margin=-0.05,
        unit="item",
    ),
    Claim(
        "reaches-published",
        "Testing all candidates reaches as many pairs (k = 0 counted) as the arg min alone, or under 2 points fewer.",
        "not in the paper",
        "searches",
        reached_more(PUBLISHED),
        margin=-0.02,
        unit="item",
    ),
    Claim(
        "loss-random",
        "Where neither reaches the target, its cross-entropy is lower than with random prompts by more than 0.2 nats.",
        "not in the paper",
        "searches",
        lower_loss(RANDOM),
        margin=0.2,
        unit="item",
    ),
    Claim(
        "loss-greedy",
        "Where neither reaches the target, its cross-entropy is lower than with greedy back generation alone.",
        "Algorithm 1",
        "searches",
        lower_loss(GREEDY),
        unit="item",
    ),
    Claim(
        "loss-gcg",
        "Where neither reaches the target, its cross-entropy is lower than with GCG alone.",
        "Algorithm 1",
        "searches",
        lower_loss(GCG),
        unit="item",
    ),
    Claim(
        "true-next",
        "True next tokens are the top choice, with a prompt or without, more often than top-75 ones by over 10 points.",
        "Section 5 (97% and 89% on Falcon-7b)",
        "searches",
        kind_over("true-next", "top-75"),
        margin=0.1,
        unit="item",
    ),
    Claim(
        "top-75",
        "Tokens among the 75 most probable are the top choice, with a prompt or without, more often than uniform ones.",
        "Section 5 (89% and 46% on Falcon-7b)",
        "searches",
        kind_over("top-75", "uniform"),
        unit="item",
    ),
    Claim(
        "rank",
        "Among top-75 tokens, prompt length (0 counted) hardly depends on the prior rank: a correlation below 0.3.",
        "Section 5.3 (nearly unrelated)",
        "searches",
        unrelated_to_rank("top-75", 0.3),
        unit="item",
    ),
    Claim(
        "confirmed",
        "Every pair reported as reached, with a prompt or without, is confirmed by a fresh pass over its row.",
        "definition of reachability",
        "searches",
        confirmed,
        margin=0.999,
        unit="exact",
    ),
    Claim(
        "bound-random",
        "No random head's output gets past the bound.",
        "self-attention theorem, corrected",
        "bound",
        below_the_bound("random"),
        margin=-1e-9,
        unit="exact",
    ),
    Claim(
        "bound-model",
        "No attack by gradient ascent on the first layer's heads of docs/tiny gets past the bound.",
        "self-attention theorem, corrected",
        "bound",
        below_the_bound("model"),
        margin=-1e-9,
        unit="exact",
    ),
    Claim(
        "bound-printed",
        "With every seed some random head's output gets past the formula as the notebook prints it.",
        "published notebook",
        "bound",
        printed_is_violated,
        unit="exact",
    ),
]
