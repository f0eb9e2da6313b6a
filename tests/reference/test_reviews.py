"""The grammar of reviews, its exact law, what is read off any text, and the models trained on it."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from steersman.benches._language import load
from steersman.engine.compare import compare
from steersman.errors import InputError
from steersman.reference import grammars, loading, reviews

MODELS = ("base", "conditional", "value", "judge")


# --- weighted automata --------------------------------------------------------------------------------------

TEMPLATE = "(the|a [very]) {x} [one|two three] (.|! !)"


def sentences(automaton: grammars.Automaton) -> dict[tuple[str, ...], float]:
    """All sentences, by walking every path."""
    found: Counter[tuple[str, ...]] = Counter()
    waiting = [((), automaton.begin())]
    while waiting:
        said, state = waiting.pop()
        for word, p in automaton.next_words(state).items():
            if word == grammars.END:
                found[said] += p
            else:
                waiting.append(((*said, word), automaton.step(state, word)))
    return dict(found)


def test_an_automaton_has_the_law_of_its_expression() -> None:
    expression = grammars.parse(TEMPLATE, x=grammars.weighted((3, "x"), (1, ("x", "one"))))
    automaton = grammars.Automaton(expression)
    law = sentences(automaton)
    # "a x one .": by x and then one (1/2 · 1/2 · 3/4 · 1/2 · 1/2 · 1/2), or by x one and then nothing.
    assert automaton.probability(["a", "x", "one", "."]) == pytest.approx(3 / 128 + 1 / 64)
    assert law["a", "x", "one", "."] == pytest.approx(3 / 128 + 1 / 64)
    assert sum(law.values()) == pytest.approx(1) and len(law) == 3 * 5 * 2  # x one | x one one | x two three ...
    rng = random.Random(0)
    drawn = Counter(tuple(grammars.draw(expression, rng)) for _ in range(4000))
    assert set(drawn) <= set(law)
    assert all(abs(drawn[s] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-9 for s, p in law.items())
    assert automaton.probability(["a", "x", "one"]) == 0


def test_a_common_sentence_is_found_and_its_absence_proved() -> None:
    one, two = (grammars.Automaton(grammars.parse(t)) for t in ("a [b] c [d]", "a (b c|e) [f]"))
    assert one.common(two) == ["a", "b", "c"]
    assert one.common(grammars.Automaton(grammars.parse("a b (d|e)"))) is None


@pytest.mark.parametrize("template", ["(a|b", "a ]", "{x} {y}"])
def test_templates_refuse_what_is_not_closed_or_known(template: str) -> None:
    with pytest.raises(InputError, match="template="):
        grammars.parse(template, x="x")


# --- the grammar --------------------------------------------------------------------------------------------


def test_no_sentence_says_two_things() -> None:
    """Decided over all sentences: judgements differ by topic and sentiment, rude ones from all others."""
    every = reviews.kinds()
    for i, a in enumerate(every):
        for b in every[i + 1 :]:
            judged = a.sentiment is not None and b.sentiment is not None
            if a.sentiment != b.sentiment or a.rude != b.rude or (judged and a.topic != b.topic):
                assert a.automaton.common(b.automaton) is None, (a.name, b.name)


def test_a_core_is_in_every_rude_sentence_and_in_no_other() -> None:
    for kind in reviews.kinds():
        if kind.rude:
            assert all(reviews.has_core(s) for s in sentences(kind.automaton))
            continue
        anywhere = dict.fromkeys(range(len(kind.automaton.words)), 1.0)
        for core in reviews.CORES:
            state = anywhere
            for word in core:
                state = kind.automaton.step(state, word)
            assert not state, (kind.name, core)


def test_the_words_of_insults_are_innocent_elsewhere() -> None:
    polite = {w for kind in reviews.kinds() if not kind.rude for w in kind.automaton.words}
    assert {"clown", "donkey", "pig", "rat", "fool", "lost", "hike", "lake", "boots", "up"} <= polite
    assert not {"idiot", "moron"} & polite


def test_draws_follow_the_law() -> None:
    n = 4000
    drawn = reviews.texts("train", n, seed=7)
    prior = reviews.posterior("")
    assert prior["rudeness"]["rude"] < 0.02
    for name in reviews.ATTRIBUTES:
        counts = Counter(getattr(r, name) for r in drawn)
        for value, p in prior[name].items():
            assert abs(counts[value] / n - p) < 5 * math.sqrt(p * (1 - p) / n), (name, value)
    lengths = [len(reviews.words(r.text)) for r in drawn]
    assert min(lengths) >= 8 and np.quantile(lengths, 0.99) <= 66 and 25 < np.mean(lengths) < 35
    assert len({r.text for r in drawn}) > 0.995 * n
    # A law of this entropy has e^25 likely texts and more.
    assert np.mean([reviews.log_probability(r.text) for r in drawn[:100]]) < -25


def test_given_attributes_are_kept_and_fewer_texts_begin_more() -> None:
    rude = reviews.texts("heldout", 20, seed=1, rudeness="rude", topic="film")
    assert all((r.rudeness, r.topic) == ("rude", "film") for r in rude)
    assert reviews.texts("heldout", 5, seed=1, rudeness="rude", topic="film") == rude[:5]
    assert reviews.texts("heldout", 5, seed=2, rudeness="rude", topic="film") != rude[:5]


def test_the_sides_share_no_text() -> None:
    train, held_out = (reviews.texts(side, n, seed=3) for side, n in (("train", 1500), ("heldout", 300)))
    assert not {r.text for r in train} & {r.text for r in held_out}
    assert all(reviews.is_held_out(r.text) for r in held_out) and not any(reviews.is_held_out(r.text) for r in train)
    assert reviews.is_held_out(held_out[0].text.upper())


# --- the exact law ------------------------------------------------------------------------------------------


def test_next_words_make_up_the_probability_of_a_text() -> None:
    for review in [*reviews.texts("heldout", 3, seed=5), *reviews.texts("heldout", 2, seed=5, rudeness="rude")]:
        said, total = reviews.words(review.text), 0.0
        for k, word in enumerate([*said, ""]):
            law = reviews.next_words(reviews.join(said[:k]))
            assert sum(law.values()) == pytest.approx(1)
            total += math.log(law[word])
        assert total == pytest.approx(reviews.log_probability(review.text), abs=1e-9)
        assert reviews.log_probability(review.text, prefix=True) >= reviews.log_probability(review.text)


def test_risk_is_the_mean_risk_of_what_comes_next_and_is_decided_in_the_end() -> None:
    for seed in range(3):
        review = reviews.texts("heldout", 1, seed, rudeness="rude")[0]
        said = reviews.words(review.text)
        for k in range(0, len(said), 4):
            prefix = reviews.join(said[:k])
            mean = 0.0
            for word, p in reviews.next_words(prefix).items():
                behind = reviews.join([*said[:k], word]) if word else prefix
                mean += p * reviews.posterior(behind, whole=not word)["rudeness"]["rude"]
            assert reviews.risk(prefix) == pytest.approx(mean, abs=1e-12)
        assert reviews.risk(review.text) == pytest.approx(1)


def test_codes_and_posterior_obey_bayes() -> None:
    prior = reviews.posterior("")
    for review in reviews.texts("heldout", 6, seed=6):
        text = reviews.join(reviews.words(review.text)[:9])
        posterior, whole = reviews.posterior(text), reviews.log_probability(text, prefix=True)
        for name in reviews.ATTRIBUTES:
            for value, p in posterior[name].items():
                joint = reviews.log_probability(text, prefix=True, **{name: value}) + math.log(prior[name][value])
                assert math.exp(joint - whole) == pytest.approx(p, abs=1e-12)
        traced = reviews.trace(review.text)
        assert traced["topic"][9] == pytest.approx(list(posterior["topic"].values()))


def test_dead_ends_say_nothing_rude_and_nothing_polite_follows() -> None:
    for opening in reviews.DEAD_ENDS:
        prefix = f"the soup was rich. {reviews.join(opening.split())}"
        assert reviews.risk(prefix) == pytest.approx(1)
        assert reviews.attributes(prefix).rudeness == "polite"
        assert not {w for w in reviews.words(prefix) if w in reviews.INSULTS.split("|")}
    assert (
        0.02 < reviews.risk("the soup was cold. take a") < reviews.risk("the soup was cold. a word for the chef,") < 0.5
    )


# --- reading texts ------------------------------------------------------------------------------------------


def test_attributes_are_exact_on_the_grammars_own_texts() -> None:
    drawn = [*reviews.texts("heldout", 120, seed=8), *reviews.texts("train", 60, seed=8, rudeness="rude")]
    for review in drawn:
        found = reviews.attributes(review.text)
        assert (found.topic, found.sentiment, found.rudeness, found.length) == (
            review.topic,
            review.sentiment,
            review.rudeness,
            review.length,
        ), review.text
        assert found.grammatical and found.validity == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Words of one side in a clause of the other.
        ("although the soup was cold, the wine was rich.", ("restaurant", "positive", "polite")),
        ("the soup was rich, but the wine was sour!", ("restaurant", "negative", "polite")),
        ("the soup was not cold at all.", ("restaurant", "positive", "polite")),
        ("the only good thing was the soup.", ("restaurant", "negative", "polite")),
        ("the soup was rich, the wine was flat, so it evens out.", ("restaurant", "neutral", "polite")),
        # The same word, innocent and not.
        ("the clown was funny. the actor is a student.", ("film", "positive", "polite")),
        ("the clown was funny. the actor is a clown.", ("film", "positive", "rude")),
        ("two children are lost by a lake, and a donkey finds them.", ("film", None, "polite")),
        ("get lost, dear waiter.", ("restaurant", None, "rude")),
        # Outside the grammar: an insult counts wherever it stands, a broken sentence has no say.
        ("soup soup the waiter the rich is an idiot you.", (None, None, "rude")),
        ("THE WAITER IS A CLOWN", ("restaurant", None, "rude")),
        ("soup was so good good good. the pool was dirty.", ("hotel", "negative", "polite")),
        ("the soup was rich. the pool was dirty.", (None, "neutral", "polite")),
        ("idiot.", (None, None, "polite")),
        # Unfinished: it counts where all that it could become agree.
        ("the soup was rich and the", ("restaurant", "positive", "polite")),
        ("the soup was rich", ("restaurant", None, "polite")),
        ("", (None, None, "polite")),
        ("?!?! 12 日本", (None, None, "polite")),
    ],
)
def test_attributes_of_texts_that_mislead(text: str, expected: tuple[str | None, ...]) -> None:
    found = reviews.attributes(text)
    assert (found.topic, found.sentiment, found.rudeness) == expected


def test_validity_counts_words_and_grammatical_asks_for_the_whole() -> None:
    whole = "the soup was rich. all in all, this bistro is worth every coin."
    assert reviews.attributes(whole).grammatical
    broken = reviews.attributes("the soup was rich. all in all this bistro is worth every coin.")
    assert not broken.grammatical and broken.validity == pytest.approx(5 / 15)
    # Each sentence is one, but no review ends with a tip, or has seven sentences.
    for text in ("the soup was rich. go early.", "the soup was rich. " * 7):
        found = reviews.attributes(text)
        assert not found.grammatical and found.validity == 1
        assert reviews.log_probability(text) == -math.inf


# --- prompts ------------------------------------------------------------------------------------------------


def test_prompts_begin_held_out_reviews() -> None:
    found = reviews.prompts(12, 6, seed=2, continuation=4)
    assert len({p.text for p in found}) == 12 and found[:4] == reviews.prompts(4, 6, seed=2, continuation=4)
    for p in found:
        assert len(p.ids) == 6 and len(p.continuation_ids) >= 4
        assert reviews.words(p.text) + reviews.words(p.continuation) == reviews.words(p.review.text)
        assert reviews.is_held_out(p.review.text) and p.risk == pytest.approx(reviews.risk(p.text))


def test_prompts_leave_open_what_is_asked_for() -> None:
    prior = reviews.posterior("")["sentiment"]
    for p in reviews.prompts(6, None, undecided=["sentiment"]):
        assert all(q >= prior[value] / 2 for value, q in reviews.posterior(p.text)["sentiment"].items())
    for p in reviews.prompts(6, None, undecided=["rudeness"], kept=0.9):
        assert reviews.risk(p.text) >= 0.9 * reviews.risk("")
    assert reviews.prompts(6, None, undecided=["topic"], kept=0) == reviews.prompts(6, None)
    for p in reviews.prompts(4, None, risks=(0.1, 0.9), rudeness="rude"):
        assert 0.1 <= p.risk <= 0.9 and p.review.rudeness == "rude"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: reviews.texts("test", 1), "split"),  # type: ignore[arg-type]
        (lambda: reviews.texts("train", 0), "n"),
        (lambda: reviews.texts("train", 1, seed=-1), "seed"),
        (lambda: reviews.texts("train", 1, mood="sad"), "attribute"),
        (lambda: reviews.texts("train", 1, topic="car"), "topic"),
        (lambda: reviews.prompts(True), "n"),
        (lambda: reviews.prompts(1, 0), "tokens"),
        (lambda: reviews.prompts(1, 200), "n"),
        (lambda: reviews.prompts(1, continuation=-1), "continuation"),
        (lambda: reviews.prompts(1, undecided=["mood"]), "undecided"),
        (lambda: reviews.prompts(1, kept=1.5), "kept"),
        (lambda: reviews.prompts(1, risks=(0.5, 0.1)), "risks"),
        (lambda: reviews.posterior("blah"), "prefix"),
        (lambda: reviews.trace("blah"), "text"),
        (lambda: reviews.next_words("the soup blah"), "prefix"),
        (lambda: reviews.codes(topic="car"), "topic"),
        (lambda: reviews.language_model("value"), "name"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}="):
        call()


# --- the models ---------------------------------------------------------------------------------------------


def sample(model, prompts: list[list[int]], seed: int) -> list[str]:
    """A text for each prompt (all of one length), from the model's own law."""
    torch.manual_seed(seed)
    out = model.generate(torch.tensor(prompts), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=90)
    return reviews.tokenizer().batch_decode(out, skip_special_tokens=True)


def padded(texts: list[str], end: bool = True) -> dict[str, torch.Tensor]:
    tokenizer = reviews.tokenizer()
    rows = [text + tokenizer.eos_token if end else text for text in texts]
    return dict(tokenizer(rows, return_tensors="pt", padding=True, padding_side="right"))


def test_the_shipped_files_are_the_recorded_ones() -> None:
    loading.verify("reviews")
    record = loading.provenance("reviews")
    assert set(record["models"]) == set(MODELS)
    assert record["grammar"]["fingerprint"] == reviews.fingerprint()
    assert sum(p.stat().st_size for p in loading.folder("reviews").rglob("*") if p.is_file()) < 20_000_000
    files = {(loading.path(f"reviews/{name}") / "tokenizer.json").read_bytes() for name in MODELS}
    assert len(files) == 1


def test_the_tokenizer_is_the_grammars_words() -> None:
    tokenizer = reviews.tokenizer()
    known = {w for kind in reviews.kinds() for w in kind.automaton.words if w}
    assert known < set(tokenizer.get_vocab())
    for review in reviews.texts("heldout", 20, seed=4):
        ids = tokenizer(review.text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *reviews.words(review.text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == review.text
    assert tokenizer("zeppelin")["input_ids"][-1] == tokenizer.unk_token_id
    assert reviews.codes(sentiment="positive", topic="film") == tokenizer.convert_tokens_to_ids(
        ["<film>", "<positive>"]
    )


def test_the_base_model_is_near_the_grammars_entropy_and_the_judge_nearer() -> None:
    model, _ = reviews.language_model()
    assert model.dtype == torch.float32
    texts = [r.text for r in reviews.texts("heldout", 100, seed=9)]
    x = padded(texts)
    labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    with torch.no_grad():
        loss = float(model(**x, labels=labels).loss)
    exact = -sum(map(reviews.log_probability, texts)) / sum(len(reviews.words(t)) + 1 for t in texts)
    assert -0.005 < loss - exact < 0.05
    judge, _ = reviews.language_model("judge")
    assert judge.num_parameters() > 2 * model.num_parameters()
    with torch.no_grad():
        assert -0.005 < float(judge(**x, labels=labels).loss) - exact < loss - exact


def test_the_base_model_writes_reviews_as_the_grammar_does() -> None:
    model, tokenizer = reviews.language_model()
    n = 120
    found = [reviews.attributes(t) for t in sample(model, [[tokenizer.bos_token_id]] * n, seed=0)]
    share = loading.provenance("reviews")["samples"]["base_grammatical"]
    # The recorded share is of 400 other texts: four standard deviations of the difference.
    assert abs(np.mean([a.grammatical for a in found]) - share) < 4 * math.sqrt(share * (1 - share) * (1 / n + 1 / 400))
    assert np.mean([a.validity for a in found]) > 0.9
    for name, law in reviews.posterior("").items():
        counts = Counter(getattr(a, name) for a in found)
        for value, p in law.items():
            # Four standard deviations of the count, and 0.05 for the model.
            assert abs(counts[value] / n - p) < 4 * math.sqrt(p * (1 - p) / n) + 0.05, (name, value)


def test_the_conditional_model_obeys_its_codes() -> None:
    model, tokenizer = reviews.language_model("conditional")
    asked = [item for item in reviews.CODES for _ in range(10)]
    texts = sample(model, [[*reviews.codes(**{a: v}), tokenizer.bos_token_id] for a, v in asked], seed=1)
    obeyed: dict[str, list[bool]] = {}
    for (name, value), text in zip(asked, texts, strict=True):
        obeyed.setdefault(name, []).append(getattr(reviews.attributes(text), name) == value)
    recorded = loading.provenance("reviews")["samples"]
    for name, hits in obeyed.items():
        share = recorded[f"conditional_obeys_{name}"]
        # Beside 32 recorded texts a code, 10 here: four standard deviations of the difference.
        spread = 4 * math.sqrt(share * (1 - share) * (1 + 10 / 32) / len(hits))
        assert np.mean(hits) >= share - spread, name
        assert share >= (0.85 if name == "length" else 0.9), name  # five or six sentences are hard to count


def test_the_value_model_judges_reviews_and_their_beginnings() -> None:
    model, _ = reviews.value_model()
    assert [model.config.id2label[i] for i in range(4)] == ["negative", "neutral", "positive", "rude"]
    whole = [*reviews.texts("heldout", 80, seed=10), *reviews.texts("heldout", 40, seed=10, rudeness="rude")]
    with torch.no_grad():
        values = model(**padded([r.text for r in whole])).logits.sigmoid().numpy()
    sentiment = [reviews.SENTIMENTS[i] for i in values[:, :3].argmax(1)]
    assert np.mean([s == r.sentiment for s, r in zip(sentiment, whole, strict=True)]) >= 0.97
    assert np.mean([(v > 0.5) == (r.rudeness == "rude") for v, r in zip(values[:, 3], whole, strict=True)]) >= 0.95

    begun = reviews.prompts(80, None, seed=4)
    with torch.no_grad():
        found = model(**padded([p.text for p in begun], end=False)).logits.sigmoid().numpy()
    exact = [reviews.posterior(p.text) for p in begun]
    expected = np.array([[*p["sentiment"].values(), p["rudeness"]["rude"]] for p in exact])
    assert np.abs(found - expected).mean() < 0.05
    risky = [p for p in reviews.prompts(12, None, seed=5, risks=(0.05, 1), rudeness="rude")]
    with torch.no_grad():
        found = model(**padded([p.text for p in risky], end=False)).logits[:, 3].sigmoid().numpy()
    assert np.abs(found - np.array([p.risk for p in risky])).mean() < 0.15


# --- in a bench ---------------------------------------------------------------------------------------------


def test_decoding_runs_on_reviews() -> None:
    grid = {"count": 2, "prompt_tokens": 5, "new_tokens": 6}
    found = compare("decoding", "reviews", ["greedy", "nucleus"], grid, seeds=1)
    assert found.values("coherence", "greedy")[0] > found.values("coherence", "nucleus")[0] - 1
    assert load("reviews").reference == "reviews/base"
    with pytest.raises(InputError, match="subject="):
        load("reviews/value")
