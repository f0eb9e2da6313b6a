"""Decoding with a tree of drafts: the law of a round summed over all its random choices, and ``generate``'s corners."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from steersman.errors import InputError
from steersman.language.momentum_decoding import MomentumDecoding
from steersman.language.multi_draft import MultiDraft, contexts, decoding, measuring
from steersman.language.multi_draft.measuring import gaps, probe
from steersman.language.multi_draft.tree import ROOT, Branching, Tree, families

from .conftest import EOS, PAD, VOCABULARY, generate, left_padded, tiny
from .tabular import joint, random_law, tabular
from .test_multi_draft import sequences

SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


class Ended(Exception):
    """The first round is over; holds the text."""


class OneRound(MultiDraft):
    """Stops where the second round would begin."""

    rounds = 0

    def _grow(self, draft: Any, law: Any, row: Tensor, ids: Tensor, depth: int) -> Tree:
        self.rounds += 1
        if self.rounds > 1:
            raise Ended(row[0].tolist())
        return super()._grow(draft, law, row, ids, depth)


def all_runs(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[int]]) -> Iterator[tuple[float, list[int]]]:
    """Every outcome of ``run`` with its probability: each random choice is made in every way that it can be made."""
    chance, options, script = 1.0, [], []  # type: float, list[int], list[int]

    def choose(weights: list[float]) -> int:
        nonlocal chance
        at = script[len(options)] if len(options) < len(script) else 0
        options.append(len(weights))
        chance *= weights[at]
        return at

    def draw(q: Tensor, n: int, sampler: str, generator: Any, order: Tensor) -> Tensor:
        rows = []
        for i in range(len(q)):
            law = sequences(q[i : i + 1], n, sampler)
            rows.append(list(law)[choose(list(law.values()))])
        return torch.tensor(rows)

    def draw_tokens(law: Tensor, n: int, generator: Any) -> Tensor:
        (tokens,) = law.nonzero(as_tuple=True)[1:]
        return tokens[choose(law[0, tokens].tolist())].view(1, 1)

    monkeypatch.setattr(decoding, "draw", draw)
    monkeypatch.setattr(decoding, "draw_tokens", draw_tokens)
    waiting: list[list[int]] = [[]]
    while waiting:
        script = waiting.pop()
        chance, options = 1.0, []
        outcome = run()
        yield chance, outcome
        for depth in range(len(script), len(options)):
            made = script + [0] * (depth - len(script))
            waiting += [[*made, other] for other in range(1, options[depth])]


def law_of_a_round(
    monkeypatch: pytest.MonkeyPatch, target: Any, draft: Any, table: Tensor, first: list[int], loop: Any, **options: Any
) -> tuple[Tensor, set[int]]:
    """The law of the next three tokens, of which the first round writes some and exact sampling the rest; and how many
    tokens the first round wrote."""
    size, written = len(table), set()
    law = torch.zeros((size,) * 3, dtype=torch.float64)
    ids = torch.tensor([first])

    def run() -> list[int]:
        loop.rounds = 0
        try:
            options_of = SAMPLING | options
            mask = torch.ones_like(ids)
            out = target.generate(ids, attention_mask=mask, max_new_tokens=3, custom_generate=loop, **options_of)
        except Ended as ended:
            return list(ended.args[0])
        return list(out[0].tolist())

    for chance, text in all_runs(monkeypatch, run):
        new = text[len(first) :]
        written.add(len(new))
        if len(new) == 3:
            law[tuple(new)] += chance
        else:
            law[tuple(new)] += chance * joint(table, text, 3 - len(new))
    return law, written


# --- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verifier", "n", "size", "max_nodes"),
    [
        ("single", 1, 3, 64),
        ("greedy", 2, 3, 64),
        ("greedy", 3, 3, 6),
        ("spechub", 2, 3, 64),
        ("rrsw", 2, 3, 4),
        ("rrs", 2, 2, 64),
        ("k-seq", 2, 2, 64),
        ("k-seq", 3, 2, 6),
        ("ot-lp", 2, 3, 4),
    ],
)
def test_a_round_has_the_target_s_law(
    monkeypatch: pytest.MonkeyPatch, verifier: str, n: int, size: int, max_nodes: int
) -> None:
    """Summed over all drafts and verifications, with models that read the token before the last from their caches."""
    table, other = random_law(size, 2, seed=0), random_law(size, 2, seed=1)
    loop = OneRound(tabular(other), n, 2, verifier=verifier, max_nodes=max_nodes)
    law, written = law_of_a_round(monkeypatch, tabular(table), tabular(other), table, [1, 0], loop)
    assert torch.allclose(law, joint(table, [1, 0], 3), rtol=0, atol=1e-6)  # the laws are float32
    # Rejections and whole paths with a bonus occur, but no rejection where all tokens are drafts.
    assert {2, 3} <= written and (1 in written) == (size > n or verifier in ("rrs", "k-seq"))


def test_a_round_has_the_processed_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperature and top-k act on both models, and on the bonus token."""
    table, other = random_law(3, 2, seed=2), random_law(3, 2, seed=3)
    loop = OneRound(tabular(other), 2, 2)
    options = {"temperature": 0.5, "top_k": 2}
    law, _ = law_of_a_round(
        monkeypatch, tabular(table), tabular(other), cut := processed(table), [1, 0], loop, **options
    )
    assert torch.allclose(law, joint(cut, [1, 0], 3), rtol=0, atol=1e-6)


def processed(table: Tensor) -> Tensor:
    scores = table / 0.5
    return scores.masked_fill(scores < scores.topk(2).values[..., -1:], -1e4)


def test_the_token_behind_a_whole_path_is_drawn_at_the_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is the target is always kept, so that every second token is a bonus."""
    table = random_law(3, 2, seed=4)
    loop = OneRound(tabular(table), 1, 1)
    cold = table / 0.25
    law, written = law_of_a_round(monkeypatch, tabular(table), tabular(table), cold, [1, 0], loop, temperature=0.25)
    assert written == {2}
    assert torch.allclose(law, joint(cold, [1, 0], 3), rtol=0, atol=1e-6)
    # What forgetting it would give: the second token at temperature 1.
    first = joint(cold, [1, 0], 1)
    forgetful = torch.stack([first[a] * joint(table, [0, a], 1) for a in range(3)])
    assert float((forgetful - law.sum(2)).abs().max()) > 0.05


def test_dropping_drafts_for_what_they_are_is_not_lossless() -> None:
    """Why the tree is cut by depth and child number: three drafts, of which the least probable is dropped."""
    from steersman.language.multi_draft import output_law

    q = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    out = torch.zeros(4, dtype=torch.float64)
    for drafts, chance in sequences(q, 3, "without").items():
        kept = [i for i in drafts if i != min(drafts, key=lambda i: float(q[0, i]))]
        out += chance * output_law(p, q, torch.tensor([kept]), "rrsw")[0]
    assert float((out - p[0]).abs().max()) > 0.01


def test_three_tokens_in_many_runs() -> None:
    """Whole runs with all their rounds, chi-square; the exact test above looks at one round."""
    table, other = random_law(4, 2, seed=5), random_law(4, 2, seed=6)
    loop = MultiDraft(tabular(other), 2, 2, verifier="rrsw", generator=torch.Generator().manual_seed(8))
    ids = torch.tensor([[1, 2]]).expand(1000, -1)
    mask = torch.ones_like(ids)
    out = tabular(table).generate(ids, attention_mask=mask, max_new_tokens=3, custom_generate=loop, **SAMPLING)
    wanted = joint(table, [1, 2], 3).flatten()
    wanted = wanted / wanted.sum()
    counts = torch.bincount(out[:, 2] * 16 + out[:, 3] * 4 + out[:, 4], minlength=64)
    rare = wanted * 1000 < 5
    observed = [*counts[~rare].tolist(), int(counts[rare].sum())]
    expected = [*(wanted[~rare] * 1000).tolist(), float(wanted[rare].sum() * 1000)]
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    assert loop.record.rounds > 1000 and loop.record.tokens == 3000


# --- greedy search -------------------------------------------------------------------------------------------------


def test_greedy_search_token_by_token_over_fifty_pairs() -> None:
    for seed in range(50):
        kind = ("gpt2", "llama")[seed % 2]
        target, draft = tiny(kind, seed), tiny(("gpt2", "llama")[seed // 2 % 2], 100 + seed)
        ids = torch.randint(2, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(seed))
        loop = MultiDraft(draft, 1 + seed % 4, 1 + seed % 3, sampler=("greedy", "without", "with")[seed % 3])
        assert torch.equal(generate(target, ids, 9), generate(target, ids, 9, custom_generate=loop))


def test_a_draft_that_is_the_target_is_always_kept(model: Any, prompts: Tensor) -> None:
    loop = MultiDraft(model, 2, 4, max_nodes=8)
    generate(model, prompts[:1], 20, custom_generate=loop, eos_token_id=None)
    assert loop.record.accepted == [4, 4, 4, 4, 4] and loop.record.target_calls == 5  # 8 nodes are 3 levels
    assert loop.record.tokens_per_target_call == 4


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}])
def test_processors_of_generate(model: Any, prompts: Tensor, options: dict[str, Any]) -> None:
    loop = MultiDraft(tiny("gpt2", 9), 3, 3)
    one = generate(model, prompts[:1], 16, **options)
    assert torch.equal(one, generate(model, prompts[:1], 16, custom_generate=loop, **options))


def test_it_composes_with_momentum_decoding(model: Any, prompts: Tensor) -> None:
    """A processor that is a pure function of the prefix, in a batch with left padding."""
    ids, mask = left_padded([prompts[0], prompts[1, :4]])
    options = {"attention_mask": mask, "logits_processor": [MomentumDecoding(pad_token_id=PAD)]}
    loop = MultiDraft(tiny("llama", 9), 3, 3)
    one = generate(model, ids, 24, **options)
    assert torch.equal(one, generate(model, ids, 24, custom_generate=loop, **options))


# --- the tree --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_node_has_the_logits_of_its_path(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention)
    ids = torch.tensor([5, 3, 8, 13])
    tree = Tree(len(ids), ids.device)
    tree.add(ROOT, [4, 9, 4, -1])  # one coincides, and one is missing
    tree.grown()
    branching = Branching(model, DynamicCache())
    found = [branching(ids, tree, [0, 1])]
    tree.add(0, [7, 2])
    tree.add(1, [7])
    tree.grown()
    found.append(branching(ids, tree, [2, 3, 4]))  # a second forward, on top of the nodes in the cache
    logits = torch.cat(found)
    assert tree.tokens == [4, 9, 7, 2, 7] and tree.path(3) == [4, 2]
    for at, path in enumerate([[], [4], [9], [4, 7], [4, 2], [9, 7]]):
        alone = model(torch.cat([ids, torch.tensor(path, dtype=torch.long)])[None]).logits[0, -1]
        assert torch.allclose(logits[at], alone, rtol=0, atol=1e-4)
    # What is kept is the path's cache.
    branching.keep([1, 4])
    ids = torch.cat([ids, torch.tensor([9, 7, 11])])
    after = branching(ids, Tree(len(ids), ids.device), [])[-1]
    assert torch.allclose(after, model(ids[None]).logits[0, -1], rtol=0, atol=1e-4)
    assert branching.cache.get_seq_length() == len(ids)


def test_the_shape_of_the_tree() -> None:
    def levels(*arguments: int) -> list[int]:
        children = families(*arguments)
        level, widths = [0], []
        while level := [child for place in level for child in children[place]]:
            widths.append(len(level))
        return widths

    assert levels(1, 5, 64) == [1, 1, 1, 1, 1]
    assert levels(3, 3, 64) == [3, 9, 27]
    assert levels(3, 4, 64) == [3, 9, 27, 24]
    assert levels(3, 4, 3) == [3]
    # Families of the first children come first.
    assert families(2, 3, 8) == ((1, 2), (3, 4), (5, 6), (7, 8), (), (), (), (), ())


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
def test_left_padding_is_single_runs(model: Any, prompts: Tensor, sample: bool) -> None:
    rows = [prompts[0], prompts[1, :4], prompts[2, :1]]
    ids, mask = left_padded(rows)
    draft, options = tiny("gpt2", 9), {"eos_token_id": None, **(SAMPLING if sample else {})}

    def loop() -> MultiDraft:
        return MultiDraft(draft, 2, 3, generator=generator)

    generator = torch.Generator().manual_seed(3)
    together = generate(model, ids, 12, attention_mask=mask, custom_generate=loop(), **options)
    generator = torch.Generator().manual_seed(3)
    for i, row in enumerate(rows):
        alone = generate(model, row[None], 12, custom_generate=loop(), **options)
        assert together[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


def test_an_end_of_sequence_inside_of_an_accepted_path(model: Any, prompts: Tensor) -> None:
    plain = generate(model, prompts, 30, eos_token_id=None)[:, prompts.shape[1] :]
    end = int(plain[0, 6])  # in the middle of the second path of four
    wanted = generate(model, prompts, 30, eos_token_id=end)
    loop = MultiDraft(model, 2, 3)
    found = generate(model, prompts, 30, custom_generate=loop, eos_token_id=end)
    assert torch.equal(found, wanted)
    (row,) = generate(model, prompts[:1], 30, custom_generate=loop, eos_token_id=end)
    assert int(row[-1]) == end and int((row[prompts.shape[1] :] == end).sum()) == 1
    assert loop.record.tokens == len(row) - prompts.shape[1]


def test_the_returned_cache_goes_on(model: Any, prompts: Tensor) -> None:
    loop = MultiDraft(tiny("gpt2", 9), 3, 3)
    whole = generate(model, prompts[:1], 20, eos_token_id=None)
    for new in (1, 2, 7):
        options = {"custom_generate": loop, "return_dict_in_generate": True, "eos_token_id": None}
        out = generate(model, prompts[:1], new, **options)
        assert out.sequences.tolist() == whole[:, : prompts.shape[1] + new].tolist()
        assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
        after = model(out.sequences[:, -1:], past_key_values=out.past_key_values).logits[0, -1]
        assert int(after.argmax()) == int(whole[0, prompts.shape[1] + new])


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streaming_and_stopping(model: Any, prompts: Tensor) -> None:
    streamer = Collected()
    loop = MultiDraft(model, 2, 3, streamer=streamer)
    stop_at = int(generate(model, prompts[:1], 10, eos_token_id=None)[0, prompts.shape[1] + 5])

    def seen(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ids[:, -1] == stop_at

    out = generate(model, prompts[:1], 30, custom_generate=loop, stopping_criteria=[seen], eos_token_id=None)
    assert int(out[0, -1]) == stop_at and streamer.ended
    assert list(itertools.chain(*streamer.pieces)) == out[0].tolist()


def test_num_return_sequences_and_seeds(model: Any, prompts: Tensor) -> None:
    loop = MultiDraft(tiny("llama", 9), 2, 2)
    options = SAMPLING | {"custom_generate": loop, "num_return_sequences": 3, "eos_token_id": None}
    torch.manual_seed(0)
    one = generate(model, prompts[:2], 8, **options)
    torch.manual_seed(0)
    assert torch.equal(one, generate(model, prompts[:2], 8, **options))
    assert one.shape == (6, prompts.shape[1] + 8) and len({tuple(row.tolist()) for row in one}) == 6


def test_a_draft_with_padded_embeddings(prompts: Tensor) -> None:
    target, draft = tiny("gpt2", 0), tiny("llama", 1, vocab_size=48)
    loop = MultiDraft(draft, 3, 2)
    one = generate(target, prompts[:1], 12)
    assert torch.equal(one, generate(target, prompts[:1], 12, custom_generate=loop))


# --- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_contexts_are_the_target_s_own_texts(model: Any, prompts: Tensor, temperature: float) -> None:
    draft = tiny("gpt2", 9)
    places = contexts(
        model,
        draft,
        [prompts[0], prompts[1, :4], prompts[2]],
        count=9,
        temperature=temperature,
        new_tokens=3,
        suppress=[EOS],
        generator=torch.Generator().manual_seed(0),
    )
    assert places.p.shape == places.q.shape == places.ranking.shape == (9, VOCABULARY)
    assert places.prompt.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for laws in (places.p, places.q):
        assert torch.allclose(laws.sum(1), torch.ones(9)) and float(laws[:, EOS].max()) == 0
    # The first context of the second prompt is the prompt itself.
    scores = draft(prompts[1:2, :4]).logits[0, -1]
    assert torch.allclose(places.ranking[3], scores, atol=1e-4)
    scores[EOS] = -torch.inf
    if temperature:
        assert torch.allclose(places.q[3], (scores / temperature).softmax(-1), atol=1e-5)
    else:
        assert int(places.q[3].argmax()) == int(scores.argmax()) and float(places.q[3].max()) == 1


# --- the probe -------------------------------------------------------------------------------------------------------


def saved_pair(folder: Path) -> tuple[Path, Path]:
    """A target and a draft with one tokenizer, as folders."""
    words = {"<pad>": PAD, "<end>": EOS, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    inner = Tokenizer(WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    for name, seed in (("target", 0), ("draft", 1)):
        tiny("llama", seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "target", folder / "draft"


@pytest.mark.parametrize("file", [None, "prompts.txt", "prompts.jsonl"])
def test_the_probe_writes_every_verifier_s_gap(tmp_path: Path, file: str | None) -> None:
    target, draft = saved_pair(tmp_path)
    source = None
    if file is not None:
        source = tmp_path / file
        texts = ["w3 w4 w5", "w6 w7"]
        source.write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts) if "json" in file else "\n".join(texts)
        )
    lines: list[str] = []
    options = {"draft": draft, "temperatures": "0,1", "n_drafts": "1,2,3", "places": 20, "new_tokens": 4}
    metrics = probe(target, source, tmp_path, seed=0, log=lines.append, **options)
    assert len(lines) == 2 and "temperature 1" in lines[1] and (tmp_path / "acceptance.png").stat().st_size > 1000
    with (tmp_path / "acceptance.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 2 * (1 + 5 + 4)  # one draft is all the same; SpecHub takes two
    for row in rows:
        kept, bound, gap, low, high = (float(row[c]) for c in ("acceptance", "bound", "gap", "low", "high"))
        assert -1e-9 <= gap == pytest.approx(bound - kept, abs=1e-9)
        if file is None and row["temperature"] == "0.0":  # one text, which tells nothing of others
            assert math.isnan(low) and math.isnan(high)
        else:
            assert low - 1e-9 <= gap <= high + 1e-9
        assert row["verifier"] not in ("greedy", "spechub") or gap < 1e-9
    assert metrics["bound_greedy"] == pytest.approx(metrics["greedy"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"draft": None}, "draft=None.*--set draft"),
        ({"draft": Path("nowhere")}, "draft='nowhere'.*transformers loads"),
        ({"temperatures": "warm"}, "temperatures='warm'.*commas"),
        ({"temperatures": "-1"}, "temperature=-1.0"),
        ({"n_drafts": "99"}, "n=99.*from 1 to 64"),
        ({"new_tokens": 400}, "new_tokens=400.*positions"),
        ({"new_tokens": 0}, "new_tokens=0.*at least 1"),
        ({"places": 0}, "places=0.*at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0.*at least 1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_the_probe_refuses(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    target, draft = saved_pair(tmp_path)
    chosen = {"draft": draft, "places": 4, "new_tokens": 2} | options
    with pytest.raises(InputError, match=sentence):
        probe(target, None, tmp_path, seed=0, log=print, **chosen)


def test_the_probe_counts_each_prompt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = saved_pair(tmp_path)
    (tmp_path / "prompts.txt").write_text("w3 w4 w5\nw6 w7\nw3 w4 w5\n")
    taken = []
    monkeypatch.setattr(
        measuring, "gaps", lambda found, n, heat: taken.append((heat, found.prompt)) or gaps(found, n, heat)
    )
    options = {"draft": draft, "temperatures": "1,0", "n_drafts": "2", "places": 20, "new_tokens": 4}
    metrics = probe(target, tmp_path / "prompts.txt", tmp_path, seed=0, log=print, **options)
    (_, warm), (_, greedy) = taken
    assert warm.unique().tolist() == [0, 1] and len(warm) > 8  # texts of one prompt are one unit
    assert greedy.bincount().max() <= 4  # a greedy text is the same each time
    assert metrics["contexts"] == len(greedy) <= 8


def test_the_probe_refuses_prompts_that_are_no_text(tmp_path: Path) -> None:
    target, draft = saved_pair(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "prompts.txt").write_bytes(b"w3 \xff\xfe")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, sentence in (("folder", "can be read"), ("prompts.txt", "can be read"), ("empty.txt", "at least one")):
        with pytest.raises(InputError, match=f"input=.*{name}.*{sentence}"):
            probe(target, tmp_path / name, tmp_path, seed=0, log=print, draft=draft, places=4, new_tokens=2)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_drafts": 0}, "n_drafts=0.*from 1 to 64"),
        ({"depth": True}, "depth=True"),
        ({"max_nodes": 2}, r"max_nodes=2.*at least n_drafts \(3\)"),
        ({"sampler": "wiht"}, "did you mean 'with'"),
        ({"verifier": "rrs", "sampler": "without"}, "sampler of rrs='without'"),
        ({"verifier": "single"}, "n_drafts=3.*1 for the verifier 'single'"),
        ({"verifier": "spechub"}, "n=3.*2 for SpecHub"),
    ],
)
def test_bad_arguments(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        MultiDraft(None, **options)


def test_bad_calls(model: Any, prompts: Tensor) -> None:
    loop = MultiDraft(tiny("gpt2", 9), 2, 2)
    with pytest.raises(InputError, match="num_beams=2"):
        generate(model, prompts, num_beams=2, custom_generate=loop)
    with pytest.raises(InputError, match="past_key_values='no cache'"):
        generate(model, prompts, use_cache=False, custom_generate=loop)
    with pytest.raises(InputError, match=r"output_scores=True.*False for multi-draft"):
        generate(model, prompts, output_scores=True, return_dict_in_generate=True, custom_generate=loop)
    with pytest.raises(InputError, match="inputs='inputs_embeds'"):
        embeds = model.get_input_embeddings()(prompts)
        generate(model, prompts, inputs_embeds=embeds, custom_generate=loop)
    with pytest.raises(InputError, match=r"streamer=.*used with one row"):
        generate(model, prompts, custom_generate=MultiDraft(tiny("gpt2", 9), 2, 2, streamer=Collected()))
    with pytest.raises(InputError, match=r"row 1.*at least one token"):
        mask = torch.ones_like(prompts)
        mask[1] = 0
        generate(model, prompts, attention_mask=mask, custom_generate=loop)
    with pytest.raises(InputError, match=r"draft_model=.*same vocabulary"):
        generate(model, prompts, custom_generate=MultiDraft(tiny("gpt2", 9, vocab_size=99), 2, 2))
    with pytest.raises(InputError, match=r"max_new_tokens=.*at most 256"):
        generate(model, prompts, 300, custom_generate=loop)
    with pytest.raises(InputError, match="at most 10 tokens"):
        generate(model, prompts, custom_generate=MultiDraft(tiny("gpt2", 9), 2, 2, verifier="ot-lp"), **SAMPLING)


@pytest.mark.parametrize("sentence", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_want_of_memory_is_not_remembered_as_taking_no_tree(prompts: Tensor, sentence: str) -> None:
    kind = torch.OutOfMemoryError if sentence.startswith("CUDA") else RuntimeError
    model, full = tiny("gpt2", 5), [True]

    def fail(*_: Any) -> None:
        if full[0]:
            raise kind(sentence)

    model.register_forward_pre_hook(fail)
    with pytest.raises(kind, match="memory"):
        generate(model, prompts, custom_generate=MultiDraft(tiny("gpt2", 9), 2, 2))
    full[0] = False
    generate(model, prompts, custom_generate=MultiDraft(tiny("gpt2", 9), 2, 2))


def test_models_that_take_no_tree_are_refused(model: Any, prompts: Tensor) -> None:
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    alibi = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **special)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    window = MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=6, **sizes, **special)).eval()
    pieces = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": PAD}
    encoder = T5ForConditionalGeneration(T5Config(**pieces, **special)).eval()
    for draft, sentence in (
        (alibi, "draft_model='BloomForCausalLM.*tree of tokens"),
        (window, "draft_model='MistralForCausalLM'.*whole text"),
        (encoder, "draft_model='T5ForConditionalGeneration'.*decoder-only"),
    ):
        with pytest.raises(InputError, match=sentence):
            generate(model, prompts, custom_generate=MultiDraft(draft, 2, 2))
