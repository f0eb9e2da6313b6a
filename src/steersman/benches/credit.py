r"""Credit: which token of a text was wrong, told from preferences between whole answers.

A policy is tuned on pairs of answers of which a scorer prefers one. Then every contender gives each token :math:`y_t`
of other texts, in which one token was made wrong, a *blame* :math:`b_t`; token-level DPO blames by
:math:`-\hat r_t = \beta \log \pi_\mathrm{ref}(y_t|\cdot) - \beta \log \pi(y_t|\cdot)`. Measured by text:

    auroc   probability that the wrong token is blamed more than a token that is as rare under the reference
    all     the same against every other token of the text
    top     share of texts whose most blamed token is the wrong one

Baselines: surprise (``-log pi_ref``), the log-ratio of two models tuned on rejected and on chosen answers, log-odds of
words, chance, and gradients of the sequence log-ratio of the very policy.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from steersman import catalog, quiet
from steersman.benches._faults import Case, Planter, load_cases, load_pairs, planted, read_cases, save, without
from steersman.benches._language import Subject, load
from steersman.engine import artefacts, subjects
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.fits import Fits
from steersman.engine.streams import Streams
from steersman.errors import InputError, nearest
from steersman.language.loading import load_language_model
from steersman.language.q_star import (
    Pair,
    apply,
    beginnings,
    fingerprint,
    log_probabilities,
    pieces,
    read_pairs,
    sampled_pairs,
    supervised_training,
    token_rewards,
)
from steersman.language.texts import SUFFIXES, read_rows, texts_of
from steersman.reference import reviews
from steersman.report.blocks import Answers, Block, Note, SideBySide, Span, Text

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

SHOWN = 6  # texts in the report
MARKED = 3  # tokens that are marked in each
METHOD = "q-star"
OWN = ("pairs", "samples", "prompt_tokens", "new_tokens", "temperature", "held_out", "attribute", "scorer")
"""Settings of the method's training that the bench decides, alike for all."""


@dataclass
class Host:
    """What a contender blames with; its one part mounts on it."""

    subject: Subject
    setting: Setting
    part: Part | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # of a policy that is there already


# --- baselines --------------------------------------------------------------------------------------------------


def surprise() -> dict[str, Any]:
    """How improbable a token is under the reference."""
    return {}


def sft_ratio(epochs: float = 1.0, learning_rate: float = 5e-4, batch_size: int = 32) -> dict[str, Any]:
    """How much more probable a token is after training on rejected answers than on chosen ones."""
    return {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}


def unigram(prior: float = 1.0) -> dict[str, Any]:
    """Log-odds of a token in rejected against chosen answers, with ``prior`` counts of each."""
    if isinstance(prior, bool) or not isinstance(prior, (int, float)) or not prior > 0:
        raise InputError("prior", prior, "a number above 0")
    return {"prior": float(prior)}


def random() -> dict[str, Any]:
    """A number by chance."""
    return {}


def gradient(
    form: Literal["norm", "product"] = "norm",
    beta: float = 0.1,
    epochs: float = 1.0,
    learning_rate: float = 5e-4,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Gradient of the policy's sequence log-ratio by a token's embedding: its norm, or minus its product with it."""
    if form not in ("norm", "product"):
        raise InputError("form", form, "norm or product")
    return {"beta": beta, "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}


PARTS: dict[str, PartInfo] = {
    "surprise": PartInfo(surprise, "How improbable a token is under the reference.", "-log_probabilities(reference)"),
    "sft-ratio": PartInfo(sft_ratio, "Log-ratio of models tuned on rejected and on chosen answers.", ""),
    "unigram": PartInfo(unigram, "Log-odds of a word in rejected against chosen answers.", ""),
    "random": PartInfo(random, "Chance.", ""),
    "gradient": PartInfo(gradient, "Gradient of the policy's sequence log-ratio by a token's embedding.", ""),
}


class CreditBench:
    """Recipe: tune on whole answers once a seed, then blame tokens of texts with one fault.

    Subjects: as the decoding bench has them. On ``reviews`` texts and scorer come with it. Elsewhere ``scorer`` and
    ``texts`` are yours, or ``pairs`` and ``faults``: preferences, and texts whose wrong place you know.
    """

    id = "credit"
    shape = "Recipe"
    default_subject = "reviews"
    headline = ("auroc", "fit_s")
    knobs: Mapping[str, Knob] = {
        "attribute": Knob(str, None, "what texts shall have, as column=value (default on reviews: sentiment=positive)"),
        "preferences": Knob(int, (1000,), "pairs to train on", low=1, high=1_000_000),
        "scorer": Knob(str, None, "file.py:name of a function from texts to numbers from 0 to 1", sweep=False),
        "texts": Knob(str, None, "texts to spoil and to begin answers: lines, or .jsonl with 'text'", sweep=False),
        "pairs": Knob(str, None, "your pairs: .jsonl or .csv with prompt, chosen, rejected", sweep=False),
        "faults": Knob(str, None, "your faults: .jsonl with prompt, completion, fault: [start, end]", sweep=False),
        "count": Knob(int, 64, "texts with a fault", low=2, high=100_000, sweep=False),
        "matched": Knob(
            int, 3, "tokens rarer than the fault, and less rare, that it is compared with", low=1, sweep=False
        ),
        "unseen": Knob(float, 0.15, "share of the faults' words that no pair has", low=0, high=0.9, sweep=False),
        "temperature": Knob(float, (1.0,), "of the answers of which pairs are made", low=0.01, high=100),
        "samples": Knob(int, 4, "answers to a prompt, of which pairs are made", low=2, high=64, sweep=False),
        "prompt_tokens": Knob(int, 12, "tokens of the longest prompt", low=1, high=10_000, sweep=False),
        "new_tokens": Knob(int, 64, "tokens of the longest answer", low=2, high=10_000, sweep=False),
        "held_out": Knob(int, 64, "pairs to watch rewards drift on", low=1, high=10_000, sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "auroc": Figure("", "higher", "quality", "probability that the fault is blamed more than a token as rare"),
        "auroc_seen": Figure("", "higher", "quality", "the same where pairs have the fault's word"),
        "auroc_unseen": Figure("", "higher", "quality", "the same where no pair has the fault's word"),
        "all": Figure("", "higher", "quality", "probability that the fault is blamed more than any other token"),
        "top": Figure("", "higher", "quality", "share of texts whose most blamed token is the fault"),
        "fit_s": Figure("s", "lower", "cost", "seconds of training"),
        "blame_ms": Figure("ms", "lower", "cost", "milliseconds of blaming for a text"),
        "accuracy": Figure("", "higher", "info", "share of held-out pairs whose chosen answer has the larger reward"),
        "chosen": Figure("", "neither", "info", "implicit reward of held-out chosen answers"),
        "rejected": Figure("", "neither", "info", "implicit reward of held-out rejected answers"),
    }

    def subject(self, spec: str) -> Subject:
        return load(spec)

    def baselines(self) -> list[str]:
        return [*PARTS, "gradient:form=product"]

    def parts(self) -> Mapping[str, PartInfo]:
        return PARTS

    def check(self, s: Subject, setting: Setting) -> None:
        ours = (s.reference or "").startswith("reviews/")
        if s.tokenizer.eos_token_id is None:
            raise InputError("subject", s.spec, "a model whose tokenizer has an end-of-sequence token")
        if not s.opening and setting["faults"] is None:
            raise InputError("faults", None, "a file of yours: the tokenizer puts no token in front of texts")
        if not ours and setting["pairs"] is None and (setting["scorer"] is None or setting["texts"] is None):
            raise InputError("pairs", None, "a file with prompt, chosen and rejected (or give scorer and texts)")
        if not ours and setting["faults"] is None and (setting["scorer"] is None or setting["texts"] is None):
            raise InputError("faults", None, "a file with prompt, completion and fault (or give scorer and texts)")
        if setting["scorer"] is not None or ours:
            self.scorer(s, setting)

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(s, setting)

    def mount(self, h: Host, part: Part) -> None:
        if h.part is not None:
            raise InputError("methods", f"{h.part}+{part}", "one part alone: each gives blame of its own")
        h.part = part
        if part.id in PARTS:
            build: Callable[..., dict[str, Any]] = PARTS[part.id].build
            h.settings = build(**checked_knobs(build, part))
            if part.id == "gradient":  # the settings of a policy, which may be one that is there
                h.settings = artefacts.check_settings(catalog.card(METHOD), apply, h.settings)
            return
        if (Path(part.id) / artefacts.RECORD).is_file():
            made_by = json.loads((Path(part.id) / artefacts.RECORD).read_text())["method"]
            if made_by != METHOD or part.knobs:
                raise InputError("methods", str(part), f"a folder that `steersman apply {METHOD}` made, without knobs")
            h.folder = Path(part.id)
            return
        if part.id != METHOD:
            raise InputError("methods", part.id, nearest(part.id, [*PARTS, METHOD]))
        card = catalog.card(METHOD)
        for name in part.knobs:
            if name in OWN:
                raise InputError(f"knob of {METHOD}", name, "a setting of the bench, the same for all contenders")
        h.settings = artefacts.check_settings(card, apply, part.knobs)

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        assert h.part is not None
        data = self.data(h.subject, setting, rng, log)
        cases, pairs, held_out = load_cases(data), load_pairs(data), load_pairs(data, "held_out")
        figures: dict[str, float] = {}
        blame = self.blamer(h, data, pairs, held_out, rng, log, figures)
        log.progress(0, 1, f"blaming in {len(cases)} texts")
        start = time.perf_counter()
        blames = blame(cases)
        figures["blame_ms"] = 1e3 * (time.perf_counter() - start) / len(cases)
        matched = np.array([case.auroc(b) for case, b in zip(cases, blames, strict=True)])
        hidden = np.array([case.unseen for case in cases])
        log.per_item("auroc", matched.tolist())
        ranks = [case.rank(b) for case, b in zip(cases, blames, strict=True)]
        figures |= {
            "auroc": float(matched.mean()),
            "all": float(np.mean([case.auroc(b, True) for case, b in zip(cases, blames, strict=True)])),
            "top": float(np.mean([rank == 1 for rank in ranks])),
        }
        if hidden.any():
            figures["auroc_unseen"] = float(matched[hidden].mean())
        if not hidden.all():
            figures["auroc_seen"] = float(matched[~hidden].mean())
        log.texts(
            "cases", [_record(h.subject, c, b, r) for c, b, r in list(zip(cases, blames, ranks, strict=True))[:SHOWN]]
        )
        return figures

    # ---------------------------------------------------------------- data

    def scorer(self, s: Subject, setting: Setting) -> Callable[[list[str]], Any]:
        """Who approves of texts."""
        if setting["scorer"] is not None:
            return subjects.load_callable(setting["scorer"], "scorer")
        found = subjects.scorer(subjects.resolve(s.spec), setting["attribute"] or "sentiment=positive")
        if found is None:
            raise InputError("scorer", None, "file.py:name of a function from texts to numbers from 0 to 1")
        return found

    def data(self, s: Subject, setting: Setting, rng: Streams, log: TrialLog) -> Path:
        """A folder with the seed's cases and pairs, the same for all contenders."""
        files = {n: setting[n] for n in ("scorer", "texts", "pairs", "faults") if setting[n] is not None}
        prints = {n: subjects.tree_hash(Path(str(f).rpartition(":")[0] if n == "scorer" else str(f)).expanduser())
                  for n, f in files.items()}  # fmt: skip

        def make(folder: Path) -> None:
            numbers = rng.numpy("faults")
            ours = (s.reference or "").startswith("reviews/")
            scorer = self.scorer(s, setting) if setting["scorer"] is not None or ours else _nothing
            planter = Planter(
                s, scorer, _whole if ours else _any, setting["prompt_tokens"], setting["matched"], numbers
            )
            log.progress(0, 1, "planting faults")
            hidden: set[int] = set()
            if setting["faults"] is not None:
                cases = read_cases(setting["faults"], planter, s.tokenizer)[: setting["count"]]
            else:
                texts = self._texts(s, setting, rng)
                cases, hidden = planted(texts, planter, setting["count"], setting["unseen"])
            keep = without(hidden, s.tokenizer)
            wanted = setting["preferences"] + setting["held_out"]
            if setting["pairs"] is not None:
                found = [pair for pair in read_pairs(Path(setting["pairs"]).expanduser()) if keep(pair)]
                found = [found[i] for i in numbers.permutation(len(found))[:wanted]]
                if not found:
                    raise InputError("unseen", setting["unseen"], "0, or less: no pair is left without these words")
            else:
                found = sampled_pairs(
                    s.model,
                    s.tokenizer,
                    self._prompts(s, setting, rng),
                    scorer,
                    wanted,
                    samples=setting["samples"],
                    new_tokens=setting["new_tokens"],
                    temperature=setting["temperature"],
                    seed=rng.seed("answers"),
                    keep=keep,
                    log=lambda line: log.progress(0, 1, line),
                )
            watched = min(setting["held_out"], len(found) // 2)
            save(cases, found[watched:], found[:watched], folder)

        names = (
            "attribute",
            "preferences",
            "count",
            "matched",
            "unseen",
            "samples",
            "prompt_tokens",
            "new_tokens",
            "temperature",
            "held_out",
        )
        key = {"data": {name: setting[name] for name in names}, "files": prints, "seed": rng.base}
        return log.fits.get(key, make)

    def _texts(self, s: Subject, setting: Setting, rng: Streams) -> Iterator[str]:
        """Texts to spoil."""
        if setting["texts"] is None:
            column, _, value = (setting["attribute"] or "sentiment=positive").partition("=")
            for review in reviews.draws("heldout", rng.seed("texts"), **{column: value}):
                yield review.text
            return
        rows = _rows(setting["texts"])
        for i in rng.numpy("texts").permutation(len(rows)):
            yield str(rows[i]["text"])

    def _prompts(self, s: Subject, setting: Setting, rng: Streams) -> Iterator[list[int]]:
        """Beginnings that are answered."""
        seed = rng.seed("prompts") % 2**31
        if setting["texts"] is not None:
            return beginnings(_rows(setting["texts"]), s.tokenizer, setting["prompt_tokens"], seed, setting["texts"])
        rows = [{"text": review.text} for review in reviews.texts("train", 2000, seed)]
        return beginnings(rows, s.tokenizer, setting["prompt_tokens"], seed)

    # ---------------------------------------------------------------- blame

    def blamer(
        self,
        h: Host,
        data: Path,
        pairs: list[Pair],
        held_out: list[Pair],
        rng: Streams,
        log: TrialLog,
        figures: dict[str, float],
    ) -> Callable[[list[Case]], list[np.ndarray]]:
        """What the mounted part blames by, trained if it needs that."""
        assert h.part is not None
        s, name = h.subject, h.part.id
        if name == "surprise":
            return lambda cases: [-row for row in _log_probabilities(s.model, cases)]
        if name == "random":
            numbers = rng.numpy("chance")
            return lambda cases: [numbers.random(len(case.completion)) for case in cases]
        if name == "unigram":
            return _log_odds(s, pairs, h.settings["prior"])
        if name == "sft-ratio":
            start = time.perf_counter()
            tuned = [
                supervised_training(
                    s.model,
                    s.tokenizer,
                    [(pair.prompt, getattr(pair, side)) for pair in pairs],
                    seed=rng.seed("fit") % 2**31,
                    log=lambda line: log.progress(0, 1, line),
                    **h.settings,
                )
                for side in ("rejected", "chosen")
            ]
            figures["fit_s"] = time.perf_counter() - start
            return lambda cases: [
                worse - better
                for worse, better in zip(*(_log_probabilities(model, cases) for model in tuned), strict=True)
            ]
        policy, reference, beta = self.policy(h, data, rng, log, figures)
        if held_out:
            rewards = [
                token_rewards(
                    policy,
                    reference,
                    [pair.prompt for pair in held_out],
                    [getattr(pair, side) for pair in held_out],
                    beta,
                    tokenizer=s.tokenizer,
                    end=True,
                ).totals
                for side in ("chosen", "rejected")
            ]
            figures["chosen"], figures["rejected"] = (float(r.mean()) for r in rewards)
            figures["accuracy"] = float((rewards[0] > rewards[1]).double().mean())
        if name == "gradient":
            form = h.part.knobs.get("form", "norm")
            return lambda cases: [_gradient(policy, reference, case, form) for case in cases]

        def credit(cases: list[Case]) -> list[np.ndarray]:
            found = token_rewards(policy, reference, [c.prompt for c in cases], [c.completion for c in cases], beta)
            return [-row.numpy() for row in found.rewards]

        return credit

    def policy(
        self, h: Host, data: Path, rng: Streams, log: TrialLog, figures: dict[str, float]
    ) -> tuple[Any, Any, float]:
        """The tuned policy, its reference and beta; trained on the pairs, once for its settings and seed."""
        s = h.subject
        found = subjects.resolve(s.spec)
        if h.folder is not None:
            record = json.loads((h.folder / "q_star.json").read_text())
            folder = h.folder
        else:

            def make(out: Path) -> None:
                with tempfile.TemporaryDirectory() as temporary:
                    source: str | Path = found.path if found.path is not None and found.kind != "factory" else s.spec
                    if found.kind == "factory":
                        source = Path(temporary)
                        with quiet.loading():
                            s.model.save_pretrained(source)
                            s.tokenizer.save_pretrained(source)
                    file = Path(temporary) / "pairs.jsonl"
                    pairs = load_pairs(data)
                    file.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in pairs))
                    apply(
                        source,
                        file,
                        out,
                        seed=rng.seed("fit") % 2**31,
                        log=lambda line: log.progress(0, 1, line),
                        pairs=len(pairs),
                        held_out=0,
                        **h.settings,
                    )

            defaults = {"beta": 0.1, "epochs": 1.0, "learning_rate": 5e-4, "batch_size": 32}
            key = {"method": METHOD, "settings": defaults | h.settings, "data": data.name, "seed": rng.base}
            folder = log.fits.get(key, make)
            figures["fit_s"] = Fits.seconds(folder)
            record = json.loads((folder / "q_star.json").read_text())
        policy, reference = load_language_model(folder, "methods")[0].to(s.model.device), s.model
        if (folder / "reference").is_dir():
            reference = load_language_model(folder / "reference", "methods")[0].to(s.model.device)
        if h.folder is not None and record["fingerprint"] != fingerprint(reference):
            raise InputError("subject", s.spec, f"the model that {h.folder} was tuned from")
        return policy, reference, float(record["beta"])

    # ---------------------------------------------------------------- report

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = [
            Note(
                "auroc compares a fault with tokens that are as rare under the reference, so surprise has 1/2 by "
                "construction. Compare blame within one contender only: scales differ.",
                title="How to read these figures",
            )
        ]
        for setting in comparison.settings:
            found = _side_by_side(comparison, setting)
            if found is not None:
                blocks.append(found)
        return blocks


# --- pieces -------------------------------------------------------------------------------------------------


def _rows(path: str) -> list[dict[str, Any]]:
    """Texts of a user's file: rows with ``text``, or lines."""
    file = Path(path).expanduser()
    if file.suffix.lower() in SUFFIXES:
        rows = read_rows(file, "texts")
        texts_of(rows, "text", path, "texts")
        return rows
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("texts", path, f"a text file that can be read ({error})") from None
    if not lines:
        raise InputError("texts", path, "a file with at least one text")
    return [{"text": line} for line in lines]


def _whole(text: str) -> bool:
    """Whether every word of a review stands in a sentence of the grammar."""
    return reviews.attributes(text).validity == 1


def _any(text: str) -> bool:
    return True


def _nothing(texts: list[str]) -> Any:
    raise InputError("scorer", None, "file.py:name of a function from texts to numbers from 0 to 1")


def _log_probabilities(model: Any, cases: Sequence[Case]) -> list[np.ndarray]:
    found = log_probabilities(model, [case.prompt for case in cases], [case.completion for case in cases])
    return [row.numpy() for row in found]


def _log_odds(s: Subject, pairs: Sequence[Pair], prior: float) -> Callable[[list[Case]], list[np.ndarray]]:
    """log P(token | rejected) - log P(token | chosen), with ``prior`` counts."""
    counts: dict[str, Counter[int]] = {}
    for side in ("chosen", "rejected"):
        rows = s.tokenizer([getattr(pair, side) for pair in pairs], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        counts[side] = Counter(token for row in rows for token in row)
    size = len(s.tokenizer)
    total = {side: sum(found.values()) + prior * size for side, found in counts.items()}

    def log_odds(token: int) -> float:
        worse, better = ((counts[side][token] + prior) / total[side] for side in ("rejected", "chosen"))
        return float(np.log(worse / better))

    return lambda cases: [np.array([log_odds(token) for token in case.completion]) for case in cases]


def _gradient(policy: Any, reference: Any, case: Case, form: str) -> np.ndarray:
    """Saliency of each token for the log-ratio of the whole answer."""
    ids = torch.tensor([[*case.prompt, *case.completion]], device=policy.device)
    inputs: list[Any] = []
    grads: list[Any] = []
    for model, sign in ((policy, 1), (reference, -1)):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        law = model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits[:, :-1].log_softmax(-1)
        said = law.gather(-1, ids[:, 1:, None])[0, len(case.prompt) - 1 :, 0]
        ratio = sign * said.sum()
        grads.append(torch.autograd.grad(ratio, embedded)[0][0, len(case.prompt) :])
        inputs.append(embedded[0, len(case.prompt) :].detach())
    if form == "norm":
        return (grads[0] + grads[1]).norm(dim=-1).cpu().numpy()
    return -sum((g * x).sum(-1) for g, x in zip(grads, inputs, strict=True)).cpu().numpy()


def _record(s: Subject, case: Case, blame: np.ndarray, rank: int) -> dict[str, Any]:
    return {
        "prompt": s.tokenizer.decode(case.prompt, skip_special_tokens=True),
        "pieces": pieces(s.tokenizer, case.prompt, case.completion),
        "blame": blame.tolist(),
        "faults": case.faults,
        "rank": rank,
        "was": case.was,
        "unseen": case.unseen,
    }


def _side_by_side(comparison: Comparison, setting: Mapping[str, Any]) -> SideBySide | None:
    """The first texts of the first seed, the most blamed tokens marked."""
    records = {}
    for label in comparison.contenders:
        for row in comparison.select(label, **setting)[:1]:
            file = (row.items_dir(comparison.out) or Path()) / "cases.json"
            if file.is_file():
                records[label] = json.loads(file.read_text())
    if not records:
        return None
    answers = []
    for i, first in enumerate(next(iter(records.values()))):
        shown = {}
        for label, found in records.items():
            record = found[i]
            edges = np.cumsum([0, *map(len, record["pieces"])])
            marked = np.argsort(-np.asarray(record["blame"]), kind="stable")[:MARKED]
            spans = [
                Span(int(edges[t]), int(edges[t + 1]), "bad", f"blame {record['blame'][t]:.3g}, number {n} of the text")
                for n, t in enumerate(marked, 1)
                if edges[t + 1] > edges[t]
            ]
            fault = "".join(record["pieces"][t] for t in record["faults"]).strip()
            facts = f"the fault {fault!r} is number {record['rank']} of {len(record['pieces'])}"
            shown[label] = Text("".join(record["pieces"]), sorted(spans, key=lambda span: span.start), facts)
        fault = "".join(first["pieces"][t] for t in first["faults"]).strip()
        was = f" ({first['was'].strip()!r} became {fault!r})" if first["was"] else f" (wrong: {fault!r})"
        answers.append(Answers(f"{first['prompt']} ...{was}", shown))
    caption = f"Marked: the {MARKED} tokens that each contender blames most."
    return SideBySide("Where is the fault?", answers, caption=caption, setting=setting)
