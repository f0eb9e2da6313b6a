"""Magic words against brute force, finite differences, models with known reachable sets, and random heads."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from steersman import catalog
from steersman.errors import InputError
from steersman.language import MomentumDecoding
from steersman.language.magic_word import (
    GCG,
    BackOff,
    Controllability,
    Greedy,
    Head,
    MagicWord,
    Objective,
    RandomPrompts,
    State,
    System,
    attention_bound,
    attention_table,
    best_attack,
    dataset_gcg,
    find_magic_words,
    k_epsilon,
    model_layer,
    pairs_from_text,
    reachable_set,
    read_pairs,
    score_only_search,
)
from steersman.language.magic_word.dataset_gcg import mean_loss
from steersman.language.magic_word.search import warm_start
from steersman.reference import loading

from .conftest import EOS, PAD, tiny

SMALL = 14  # tokens of the models that brute force goes over: 14 + 196 prompts of up to two tokens


def states(n: int, vocab_size: int = SMALL, length: int = 5, seed: int = 0) -> list[tuple[int, ...]]:
    drawn = torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))
    return [tuple(row) for row in drawn.tolist()]


def tops(model: Any, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(rows).logits[:, -1].argmax(-1)


def exact_reach(model: Any, x0: tuple[int, ...], k: int, vocab_size: int = SMALL) -> dict[int, int]:
    """token -> fewest prompt tokens that make it the top choice, by plain enumeration."""
    least: dict[int, int] = {}
    for length in range(k + 1):
        prompts = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)), dtype=torch.long)
        prompts = prompts.view(vocab_size**length, length)
        rows = torch.cat([prompts, torch.tensor(x0).expand(len(prompts), -1)], 1)
        for token in tops(model, rows).tolist():
            least.setdefault(token, length)
    return least


class CopyFirst(nn.Module):
    """The first token of the row is the top choice, whatever follows."""

    def __init__(self, vocab_size: int = 9, column: int = 0) -> None:
        super().__init__()
        self.config = GPT2Config(vocab_size=vocab_size, n_positions=64)
        self.embedding = nn.Embedding.from_pretrained(torch.eye(vocab_size))
        self.column = column

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        return CausalLMOutput(logits=5 * hidden[:, self.column, None].expand_as(hidden))  # type: ignore[arg-type]


def last_token_only(vocab_size: int = 12) -> Any:
    """GPT-2 without values and positions: its next-token law depends on the last token alone."""
    model = tiny("gpt2", 3, vocab_size)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        for block in model.transformer.h:
            d = block.attn.embed_dim
            block.attn.c_attn.weight[:, 2 * d :].zero_()
            block.attn.c_attn.bias[2 * d :].zero_()
    return model


WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", " "]


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each letter; puts <s> in front of a text if asked."""
    from tokenizers.processors import TemplateProcessing

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    if bos:
        raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# ------------------------------------------------------------------ exact checks: searches


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_of_one_token_is_the_exhaustive_argmin(kind: str) -> None:
    model = tiny(kind, 1, SMALL)
    for x0 in states(4):
        rows = torch.cat([torch.arange(SMALL)[:, None], torch.tensor(x0).expand(SMALL, -1)], 1)
        with torch.no_grad():
            loss = -model(rows).logits[:, -1].log_softmax(-1)
        for y in range(SMALL):
            if int(tops(model, torch.tensor([x0]))) == y:
                continue
            word = find_magic_words(model, None, x0, y, Greedy(1, "argmin"))
            assert word.prompt == (int(loss[:, y].argmin()),)
            assert word.reached == (int(tops(model, rows)[word.prompt[0]]) == y)
            assert word.loss == pytest.approx(float(loss[:, y].min()), abs=1e-5)


def test_greedy_ties_go_to_the_smallest_id() -> None:
    """Every prompt has the same loss, to the last digit."""
    state = State(System(CopyFirst(column=-1).eval(), blacklist=[0, 1]), (4, 5))
    found = Greedy(2).search(Objective(state, (7,)), torch.Generator())
    assert not found.reached and found.last == (2, 2) and found.prompt == (2,)  # of equal losses the shorter prompt


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_solves_exactly_the_reachable_set_of_one_token(kind: str) -> None:
    """And the arg min alone misses pairs of it: another prompt can make y the top choice at a higher CE."""
    missed = 0
    for seed in range(3):
        model = tiny(kind, seed, SMALL)
        for x0 in states(2, seed=seed):
            reach = exact_reach(model, x0, 1)
            found = k_epsilon(model, [(x0, y) for y in range(SMALL)], search=Greedy(1))
            assert {w.y[0]: w.k for w in found.words if w.reached} == reach
            assert set(reachable_set(System(model), x0, 1).prompts) == set(reach)
            argmin = k_epsilon(model, [(x0, y) for y in range(SMALL)], search=Greedy(1, "argmin"))
            assert {w.y[0] for w in argmin.words if w.reached} <= set(reach)
            missed += sum(a.reached and not b.reached for a, b in zip(found.words, argmin.words, strict=True))
    assert missed > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_back_off_is_within_brute_force_of_two_tokens(kind: str) -> None:
    model = tiny(kind, 2, SMALL)
    search = BackOff(1, (2,), iterations=8, candidates=24, k_sub=8)
    hits = total = 0
    for x0 in states(2, seed=5):
        reach = exact_reach(model, x0, 2)
        exact = reachable_set(System(model), x0, 2)
        assert exact.exact and {t: len(u) for t, u in exact.prompts.items()} == reach
        assert exact.within(0) <= exact.within(1) <= exact.within(2) == set(reach)
        found = k_epsilon(model, [(x0, y) for y in range(SMALL)], search=search, seed=3)
        for word in found.words:
            if word.reached:
                assert word.k is not None and word.k >= reach[word.y[0]]
        for share in found.curve():
            true_epsilon = 1 - sum(least <= share.k for least in reach.values()) / SMALL
            assert share.epsilon >= true_epsilon - 1e-12
        shares = [s.share for s in found.curve()]
        assert shares == sorted(shares)
        hits, total = hits + sum(w.reached for w in found.words), total + len(reach)
    assert hits >= 0.75 * total  # a search that finds little would pass all of the above


def test_forward_exploration_is_a_subset_that_verifies() -> None:
    model = tiny("gpt2", 4, SMALL)
    (x0,) = states(1, seed=9)
    exact = exact_reach(model, x0, 2)
    found = reachable_set(System(model), x0, 2, exhaustive=False, starts=10, iterations=4, candidates=16, k_sub=8)
    assert not found.exact and set(found.prompts) <= set(exact)
    assert {t for t, least in exact.items() if least <= 1} <= set(found.prompts)
    for token, prompt in found.prompts.items():
        assert int(tops(model, torch.tensor([[*prompt, *x0]]))) == token
    random = reachable_set(System(model), x0, 2, exhaustive=False, starts=10, iterations=1, candidates=1, k_sub=1)
    assert len(found) >= len(random)


@pytest.mark.parametrize("multi", [False, True])
def test_gradient_is_finite_differences(multi: bool) -> None:
    """Central differences of CE along one-hot directions, float64 GPT-2, h = 1e-5."""
    model = tiny("gpt2", 0, 10).double()
    state = State(System(model), (3, 1, 4))
    y = (5, 9) if multi else (5,)
    u, h = torch.tensor([2, 7]), 1e-5
    gradient = Objective(state, y).gradient(u)
    table = model.get_input_embeddings().weight.detach()
    onehot = torch.nn.functional.one_hot(state.rows(u[None], y[:-1]), 10).double()

    def ce(rows: Tensor) -> float:
        with torch.no_grad():
            logits = model(inputs_embeds=rows @ table).logits[0, -len(y) :]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(y)))

    for i, v in itertools.product(range(2), range(10)):
        step = torch.zeros_like(onehot)
        step[0, i, v] = h
        assert float(gradient[i, v]) == pytest.approx((ce(onehot + step) - ce(onehot - step)) / (2 * h), abs=1e-4)
    assert gradient.abs().max() > 1e-2


def test_scaled_embeddings_have_their_own_gradient() -> None:
    """Where the embedding module scales its rows, a one-hot row times the weight alone would be wrong."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 3.0 * super().forward(ids)

    plain = tiny("gpt2", 0, 10, tie_word_embeddings=False)
    scaled = tiny("gpt2", 0, 10, tie_word_embeddings=False)
    inner = Scaled(10, 32)
    inner.weight.data = plain.get_input_embeddings().weight.data / 3
    scaled.set_input_embeddings(inner)
    u = torch.tensor([2, 7])
    one, other = (Objective(State(System(m.eval()), (3, 1)), (5,)).gradient(u) for m in (plain, scaled))
    assert torch.allclose(one, other, atol=1e-5)


class Watched(Objective):
    """Notes every prompt that is scored."""

    seen: set[int]

    def scores(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = getattr(self, "seen", set()) | set(prompts.flatten().tolist())
        return super().scores(prompts)


@pytest.mark.parametrize("k_sub", [3, 500])
def test_forbidden_ids_are_never_chosen(k_sub: int) -> None:
    """Special ids, blacklisted ids and rows of padding behind the vocabulary; also with k_sub above what is left."""
    model = tiny("llama", 0, 40)  # ten rows more than the tokenizer has tokens
    system = System(model, tokenizer(), blacklist=[5, 6])
    allowed = set(range(3, 30)) - {5, 6}
    assert set(system.allowed.tolist()) == allowed
    state = State(system, (7, 8, 9))
    y = int(state.next_token().argmin())
    for search in (GCG((1, 3), 4, 40, k_sub), RandomPrompts((2,), 200)):
        objective = Watched(state, (y,), budget=300)
        search.search(objective, torch.Generator().manual_seed(0))
        assert objective.seen <= allowed and len(objective.seen) > 3
    assert set(BackOff(2, (3,), 2, 20, k_sub).search(Objective(state, (y,)), torch.Generator()).prompt) <= allowed


def test_random_prompts_draw_the_first_allowed_id() -> None:
    """The published code's random start never does."""
    allowed, generator = torch.arange(4, 8), torch.Generator().manual_seed(0)
    drawn = torch.cat([warm_start((), 10, allowed, generator) for _ in range(20)])
    assert set(drawn.tolist()) == {4, 5, 6, 7}


def test_warm_start_keeps_the_previous_prompt_last() -> None:
    """The published code forgets it where it is longer than the new one."""
    allowed, generator = torch.arange(100), torch.Generator().manual_seed(0)
    assert warm_start((1, 2, 3), 5, allowed, generator).tolist()[2:] == [1, 2, 3]
    assert warm_start((1, 2, 3), 2, allowed, generator).tolist() == [2, 3]
    assert warm_start((1, 2, 3), 3, allowed, generator).tolist() == [1, 2, 3]


def hard_pair(model: Any) -> tuple[State, int]:
    """A pair that no search solves: y's logit is far below all others."""
    with torch.no_grad():
        model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[6] = -50.0
    return State(System(model), (3, 1, 4)), 6


def test_improve_never_gets_worse_and_always_does() -> None:
    state, y = hard_pair(tiny("gpt2", 5, 30, tie_word_embeddings=False))
    worse = 0
    for seed in range(4):
        runs = {}
        for accept in ("improve", "always"):
            search = GCG((3,), 12, 4, 16, accept=accept)  # type: ignore[arg-type]
            found = search.search(Objective(state, (y,)), torch.Generator().manual_seed(seed))
            losses = found.losses[3]
            assert len(losses) == 13 and not found.reached
            assert losses[-1] == pytest.approx(found.loss)
            assert float(state.scores(torch.tensor([found.prompt]), (y,))[0]) == pytest.approx(found.loss, abs=1e-5)
            runs[accept] = losses
        assert all(b <= a for a, b in itertools.pairwise(runs["improve"]))
        worse += any(b > a for a, b in itertools.pairwise(runs["always"]))
    assert worse > 0


def test_published_gcg_tests_its_last_prompt_only() -> None:
    """success="any" stops at the first prompt that works; argmin runs all iterations and tests the last."""
    model = tiny("llama", 5, SMALL)
    stops: dict[str, list[tuple[bool, int]]] = {"any": [], "argmin": []}
    for x0, y in [(first, token) for first in states(2, seed=5) for token in exact_reach(model, first, 2)]:
        for success in ("any", "argmin"):
            search = GCG((2,), 6, 12, 6, success=success, accept="always")  # type: ignore[arg-type]
            found = search.search(Objective(State(System(model), x0), (y,)), torch.Generator().manual_seed(1))
            stops[success].append((found.reached, len(found.losses[2])))
            if found.reached:
                assert int(tops(model, torch.tensor([[*found.prompt, *x0]]))) == y
    assert all(n == 7 for _, n in stops["argmin"])
    assert sum(r for r, _ in stops["any"]) > sum(r for r, _ in stops["argmin"])


def wanted(model: Any, words: Any, text: str, bos: str) -> list[int]:
    """Up to four top choices behind 300 random prompts of two tokens, special ones left out."""
    prompts = torch.randint(3, len(WORDS), (300, 2), generator=torch.Generator().manual_seed(0))
    one, x0 = torch.ones(300, 1, dtype=torch.long), torch.tensor(words(text)["input_ids"][1:]).expand(300, -1)
    rows = torch.cat([one, prompts, x0] if bos == "outer" else [prompts, one, x0], 1)
    return sorted(set(tops(model, rows).tolist()) - {0, 1, 2})[:4]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("bos", ["outer", "inner"])
def test_every_success_verifies_with_a_fresh_pass(kind: str, bos: Any) -> None:
    model, words = tiny(kind, 3, len(WORDS)), tokenizer(bos=True)
    # Targets that some prompt of two tokens makes the top choice, and some that perhaps none does.
    pairs = [(text, y) for text in ("hello", "zz top") for y in (*wanted(model, words, text, bos), 3, 9)]
    searches = (BackOff(2, (3,), 3, 24, 8), BackOff(1, (2,), 3, 24, 8, "argmin", "always"), RandomPrompts((1, 2), 60))
    hits = 0
    for search in searches:
        found = k_epsilon(model, pairs, words, search, bos=bos)
        hits += sum(bool(w.k) for w in found.words)
        for word in found.words:
            head = (1, *word.prompt) if bos == "outer" else (*word.prompt, 1)
            assert word.input_ids == (*head, *word.x0)
            reached = int(tops(model, torch.tensor([word.input_ids]))) == word.y[0]
            assert reached or not word.reached
            if word.reached:
                made = model.generate(**word.inputs(), max_new_tokens=1, do_sample=False)
                assert made[0, -1] == word.y[0]
    assert hits > 0


def test_nothing_to_do_is_no_prompt(model: Any) -> None:
    x0 = (4, 7, 9)
    word = find_magic_words(model, None, x0, int(tops(model, torch.tensor([x0]))))
    assert word.k == 0 and word.prompt == () and word.input_ids == x0 and word.rank == 0 and word.passes == 1


def test_a_model_of_the_last_token_reaches_only_its_argmax() -> None:
    model = last_token_only()
    x0 = (3, 8, 5)
    top = int(tops(model, torch.tensor([x0])))
    assert set(reachable_set(System(model), x0, 2).prompts) == {top}
    explored = reachable_set(System(model), x0, 3, exhaustive=False, starts=4, iterations=2, candidates=8)
    assert set(explored.prompts) == {top}
    others = [(x0, y) for y in range(12) if y != top]
    for search in (BackOff(2, (3,), 3, 16), GCG((1, 2), 3, 16), Greedy(3), RandomPrompts((1, 2), 100)):
        found = k_epsilon(model, others, search=search)
        assert [s.epsilon for s in found.curve()] == [1.0] * (search.longest + 1)
        assert all(w.k is None and w.prompt and "not reached" in str(w) for w in found.words)


def test_a_model_that_copies_the_first_token_reaches_everything() -> None:
    model = CopyFirst().eval()
    found = k_epsilon(model, [((2, 3), y) for y in range(9)], search=Greedy(1))
    assert found.curve()[1].epsilon == 0.0 and found.curve()[1].reached == 9
    assert all(word.prompt == word.y for word in found.words if word.k)
    assert [w.k for w in found.words].count(0) == 1
    gcg = k_epsilon(model, [((2, 3), y) for y in range(9)], search=GCG((1,), 3, 30))
    assert gcg.curve()[1].epsilon == 0.0


# ------------------------------------------------------------------ exact checks: the bound on a head


def random_heads(n: int, seed: int = 0) -> Iterator[tuple[Head, Tensor, Tensor, float]]:
    """Heads of scales 0.1 to 1 with imposed rows, and controls on the sphere of radius M_u."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        d, d_k, m, k = (
            int(torch.randint(low, high, (1,), generator=g)) for low, high in ((2, 9), (1, 7), (1, 8), (1, 9))
        )
        scale, m_u = (float(0.1 + 0.9 * torch.rand(1, generator=g)) for _ in range(2))
        w = [scale * torch.randn(d, d_k, generator=g, dtype=torch.float64) for _ in range(3)]
        x = torch.randn(m, d, generator=g, dtype=torch.float64)
        u = torch.randn(k, d, generator=g, dtype=torch.float64)
        head = Head(*w, causal=bool(torch.rand(1, generator=g) < 0.5))
        yield head, x, 2 * m_u * u / u.norm(dim=1, keepdim=True), 2 * m_u


def test_the_bound_is_never_violated_and_the_printed_form_is() -> None:
    """1000 random heads. The notebook's printed form has s_v in place of s_k in alpha and lacks the factor s_v M_u."""
    violations, largest = 0, 0.0
    for head, x, u, m_u in random_heads(1000):
        y, k = head(x, u), len(u)
        m_x = float(x.norm(dim=1).max())
        stated = attention_bound(head, x, k, m_u, m_x=m_x)
        ours, known = attention_bound(head, x, k, m_u), attention_bound(head, x, k, m_u, controls=u)
        for bound in (stated, ours, known):
            component = bound.orthogonal(y)
            assert (component <= bound.bound * (1 + 1e-9) + 1e-12).all()
            assert not bound.unreachable(y * (1 - 1e-9)).any() and not bound.unreachable(y, "draft").any()
        largest = max(largest, float((component / known.bound.clamp(min=1e-12)).max()))
        # The sharper the quantity, the smaller the bound.
        assert (known.bound <= ours.bound * (1 + 1e-9)).all() and (ours.bound <= stated.bound * (1 + 1e-9)).all()
        s_q, s_v = (float(torch.linalg.matrix_norm(w, 2)) for w in (head.w_q, head.w_v))
        alpha = s_q * s_v * m_u * m_x * head.s
        printed = torch.sigmoid(math.log(k) + alpha - stated.log_d)
        violations += int((stated.orthogonal(y) > printed * (1 + 1e-9)).any())
    assert violations > 0
    assert largest > 0.2  # a bound that is far from everything would be no bound worth testing


def test_the_draft_s_inequality_is_the_wrong_way_round() -> None:
    """As printed ("<="), rows that the head does put out would be called unreachable."""
    wrong = right = 0
    for head, x, u, m_u in random_heads(200, seed=1):
        y, bound = head(x, u), attention_bound(head, x, len(u), m_u)
        against = (y * bound.y_hat).sum(-1) <= 0
        near = (y - (1 - bound.beta)[:, None] * bound.y_hat).norm(dim=-1) <= bound.reach * (1 + 1e-9)
        wrong += int((against & near).sum())
        right += int(bound.unreachable(y, "draft").sum())
    assert wrong > 0 and right == 0
    far = attention_bound(head, x, 1, m_u)
    wanted = -far.y_hat - 10 * far.reach * far.y_hat / far.y_hat.norm(dim=-1, keepdim=True)
    assert far.unreachable(wanted, "draft").all()


def test_the_draft_s_singular_value_is_the_value_matrix_s() -> None:
    """With s_q in place of s_v, rows that the head puts out would be called unreachable."""
    wrong = 0
    for head, x, u, m_u in random_heads(200, seed=2):
        small = Head(0.1 * head.w_q, head.w_k, head.w_v, causal=head.causal)
        y, bound = small(x, u), attention_bound(small, x, len(u), m_u)
        s_q = float(torch.linalg.matrix_norm(small.w_q, 2))
        against = (y * bound.y_hat).sum(-1) <= 0
        wrong += int((against & ((y - (1 - bound.beta)[:, None] * bound.y_hat).norm(dim=-1) > s_q * m_u)).sum())
    assert wrong > 0


def test_limits_of_the_bound() -> None:
    for head, x, u, m_u in random_heads(50, seed=3):
        none = attention_bound(head, x, 0, m_u)
        assert torch.equal(head(x), none.y_hat) and (none.beta == 0).all() and (none.bound == 0).all()
        assert torch.equal(head(x, u[:0]), none.y_hat)
        betas = torch.stack([attention_bound(head, x, k, m_u).beta for k in (1, 2, 4, 10, 10**3, 10**9)])
        assert (betas.diff(dim=0) > 0).all() and (betas[-1] > 1 - 1e-5).all()
        dead = Head(head.w_q, head.w_k, torch.zeros_like(head.w_v), causal=head.causal)
        assert (dead(x, u) == 0).all() and (attention_bound(dead, x, len(u), m_u).bound == 0).all()


def test_the_bound_is_computed_in_logarithms() -> None:
    """exp(alpha) overflows for such a head: the bound is vacuous, not NaN."""
    g = torch.Generator().manual_seed(0)
    head = Head(*(40 * torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(3)))
    x = 5 * torch.randn(3, 6, generator=g, dtype=torch.float64)
    bound = attention_bound(head, x, 2, 5.0)
    direct = 2 * bound.alpha.exp() / (bound.log_d.exp() + 2 * bound.alpha.exp())
    assert direct.isnan().any()
    assert bound.vacuous.any() and bound.bound.isfinite().all()
    small = attention_bound(Head(*(0.1 * w for w in (head.w_q, head.w_k, head.w_v))), 0.01 * x, 1, 0.01)
    assert not small.vacuous.any()


def test_biases_are_in_the_bound() -> None:
    """|q_i|, |k_j| and |v_j| themselves: the singular values alone would be violated."""
    violated = 0
    for head, x, u, m_u in random_heads(200, seed=4):
        g = torch.Generator().manual_seed(len(u))
        biases = [torch.randn(head.w_q.shape[1], generator=g, dtype=torch.float64) for _ in range(3)]
        biased = Head(head.w_q, head.w_k, head.w_v, *biases, causal=head.causal)
        y = biased(x, u)
        for bound in (attention_bound(biased, x, len(u), m_u), attention_bound(biased, x, len(u), m_u, controls=u)):
            assert (bound.orthogonal(y) <= bound.bound * (1 + 1e-9) + 1e-12).all()
        without = attention_bound(head, x, len(u), m_u)
        violated += int((bound.orthogonal(y) > without.bound).any())
        with pytest.raises(InputError, match="biases"):
            attention_bound(biased, x, 1, m_u, m_x=1.0)
    assert violated > 0


def test_the_best_attack_beats_random_controls_and_stays_below_the_bound() -> None:
    for head, x, u, m_u in random_heads(5, seed=5):
        bound, k = attention_bound(head, x, len(u), m_u), len(u)
        attack, controls = best_attack(head, x, k, m_u, steps=60)
        assert (controls.norm(dim=-1) <= m_u * (1 + 1e-9)).all()
        assert float(bound.orthogonal(head(x, controls))[-1]) == pytest.approx(attack)
        assert attack <= float(bound.bound[-1]) * (1 + 1e-9)
        draws = torch.randn(50, k, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        draws = m_u * draws / draws.norm(dim=-1, keepdim=True)
        assert attack >= float(bound.orthogonal(head(x, draws))[:, -1].max()) - 1e-9


def any_model(kind: str) -> Any:
    if kind != "qwen2":
        config = {"num_key_value_heads": 1} if kind == "llama" else {}
        return tiny(kind, 0, 20, **config)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=20, max_position_embeddings=64)
    model = Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:  # its biases begin at 0
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(projection.bias)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_heads_are_the_model_s_own(kind: str) -> None:
    """What the heads give for the rows is what the model's output projection reads; with a prompt too, in layer 0."""
    model = any_model(kind)
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    for layer in (0, 1):
        attention = blocks[layer].attn if kind == "gpt2" else blocks[layer].self_attn
        out = attention.c_proj if kind == "gpt2" else attention.o_proj
        read: list[Tensor] = []
        hook = out.register_forward_pre_hook(lambda module, given, read=read: read.append(given[0].detach()))
        found = model_layer(System(model), (3, 1, 4, 1, 5), layer)
        assert len(found.heads) == model.config.num_attention_heads
        ours = torch.cat([head(found.x) for head in found.heads], -1)
        assert torch.allclose(ours, read[0][0].double(), atol=1e-5)
        if layer == 0 and kind != "gpt2":
            # Rows of x0 do not depend on the prompt here, so the bound holds for the model itself.
            prompts = torch.tensor(list(itertools.product(range(20), repeat=2)))
            rows = torch.cat([prompts, torch.tensor([3, 1, 4, 1, 5]).expand(len(prompts), -1)], 1)
            model(rows)
            theirs = read[-1][:, 2:].double()
            for head, y in zip(found.heads, theirs.chunk(len(found.heads), -1), strict=True):
                bound = attention_bound(head, found.x, 2, found.m_u)
                assert (bound.orthogonal(y) <= bound.bound * (1 + 1e-6) + 1e-6).all()
                assert float(bound.orthogonal(y).max()) > 1e-3
        hook.remove()


def test_attention_table_of_a_model() -> None:
    table = attention_table(System(any_model("llama")), (3, 1, 4), (1, 4), (0, 1), steps=20, restarts=2)
    assert [(r["layer"], r["head"], r["k"]) for r in table] == list(itertools.product((0, 1), (0, 1), (1, 4)))
    for row in table:
        assert 0 < row["attack"] <= row["bound"] * (1 + 1e-9) and row["ratio"] <= 1 + 1e-9
        assert row["vacuous"] == (row["beta"] > 0.999)
    with pytest.raises(InputError, match="Llama kind or GPT-2"):
        attention_table(System(CopyFirst().eval()), (3, 1))


# ------------------------------------------------------------------ many pairs


def test_pairs_of_one_state_share_a_scan_and_keep_their_results() -> None:
    """Searched together or alone, a pair ends the same; together they cost fewer rows."""
    model, search = tiny("llama", 8, SMALL), Greedy(2)
    (x0,) = states(1, seed=2)
    together = System(model)
    found = k_epsilon(together, [(x0, y) for y in range(SMALL)], search=search)
    rows = 0
    for word in found.words:
        alone = System(model)
        (single,) = k_epsilon(alone, [(x0, word.y)], search=search).words
        assert (single.prompt, single.k, single.passes) == (word.prompt, word.k, word.passes)
        rows += alone.forwards
    assert found.forwards < 0.7 * rows


def test_budget_is_kept_and_gcg_starts_again() -> None:
    state, y = hard_pair(tiny("gpt2", 5, 30, tie_word_embeddings=False))
    for search in (BackOff(2, (3,), 5, 20, 8), GCG((1, 2), 3, 20, 8), Greedy(9), RandomPrompts((1, 2))):
        for budget in (70, 500):
            objective = Objective(state, (y,), budget)
            search.search(objective, torch.Generator().manual_seed(0))
            assert objective.passes <= budget
            if not isinstance(search, Greedy):
                assert objective.passes >= budget - 30
    objective = Objective(state, (y,))
    BackOff(2, (3,), 5, 20, 8).search(objective, torch.Generator())
    assert objective.passes == BackOff(2, (3,), 5, 20, 8).cost(30)


class Stub(Objective):
    """Never reached; the loss of a prompt is given by its length and by how many prompts were scored before."""

    def __init__(self, budget: int | None, loss: Any) -> None:
        super().__init__(State(System(tiny("gpt2", 5, 30)), (3, 1, 4)), (6,), budget)
        self.loss, self.lengths = loss, []

    def scores(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += len(prompts)
        self.lengths.append(prompts.shape[1])
        value = self.loss(prompts.shape[1], len(self.lengths))
        return torch.full((len(prompts),), value), torch.zeros(len(prompts), dtype=torch.bool)

    def scan(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(torch.cat([self.allowed[:, None], prompt.expand(len(self.allowed), -1)], 1))

    def gradient(self, prompt: Tensor) -> Tensor:
        self.passes += 3
        return torch.zeros(len(prompt), 30)


def test_gcg_alone_shares_the_budget_over_all_lengths() -> None:
    """With what the back-off search takes, GCG alone searches its longest prompts as long as the others."""
    back_off = BackOff(3, (4, 6), 15, 10, 8)
    budget = back_off.cost(30)
    objective = Stub(budget, lambda length, call: 1.0)
    GCG((1, 2, 3, 4, 6), 15, 10, 8).search(objective, torch.Generator().manual_seed(0))
    counts = [objective.lengths.count(length) for length in (1, 2, 3, 4, 6)]
    assert min(counts) > 2 and max(counts) - min(counts) <= 1, counts
    assert budget - 14 < objective.passes <= budget
    whole = Stub(budget, lambda length, call: 1.0)
    back_off.search(whole, torch.Generator().manual_seed(0))
    assert [whole.lengths.count(length) for length in (4, 6)] == [16, 16]  # its own schedule is not cut


def test_later_runs_keep_what_was_better() -> None:
    """A new round from random prompts, or a longer prompt, that is worse does not replace the best."""
    objective = Stub(200, lambda length, call: 0.1 if call <= 2 else 5.0)
    found = GCG((2, 3), 2, 10, 8).search(objective, torch.Generator().manual_seed(0))
    assert found.loss == pytest.approx(0.1) and len(found.prompt) == 2 and len(found.last) == 3
    assert objective.lengths.count(2) > 4 and len(found.losses[2]) == objective.lengths.count(2)  # rounds began again
    for search in (Greedy(3), BackOff(2, (4,), 2, 10, 8)):
        found = search.search(Stub(None, lambda length, call: float(length)), torch.Generator().manual_seed(0))
        assert found.loss == 1.0 and len(found.prompt) == 1


def word(k: int | None, rank: int, kind: str = "") -> MagicWord:
    return MagicWord((1,), (2,), (3,), k, (3, 1), "", True, 1.0, rank, 1, kind)


def test_statistics_of_many_pairs() -> None:
    words = [word(0, 0, "a"), word(1, 5, "a"), word(4, 9, "b"), word(None, 30, "b")]
    found = Controllability(tuple(words), 6)
    assert [s.share for s in found.curve()] == [0.25, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75]
    assert [s.share for s in found.curve("a")] == [0.5] + [1.0] * 6
    low, high = found.curve()[1].low, found.curve()[1].high
    z, n, p = 1.959964, 4, 0.5  # Wilson's interval, by its formula
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (low, high) == (pytest.approx(0.5 - half, abs=1e-6), pytest.approx(0.5 + half, abs=1e-6))
    assert found.rank_correlation() == pytest.approx(1.0)
    exact = [word(k, 0) for k in (None,) * 20 + (0,) * 20 + (1,) * 20 + (2,) * 10 + (3,) * 5]
    slope = Controllability(tuple(exact), 10).decay()["k<=3"]
    points = [math.log(e) for e in (55 / 75, 35 / 75, 25 / 75, 20 / 75)]
    assert slope == pytest.approx(sum((i - 1.5) * y for i, y in enumerate(points)) / 5)
    record = found.to_json()
    assert record["a"]["reached_by_k"][1] == 1.0 and record["all"]["pairs"] == 4


def test_leaving_unsolved_pairs_out_would_weaken_the_correlation() -> None:
    """Ranks that are never reached are the far ones."""
    words = [word(k, rank) for k, rank in ((1, 3), (2, 2), (1, 4), (2, 1), (None, 50), (None, 60), (None, 70))]
    with_all = Controllability(tuple(words), 6).rank_correlation()
    solved = Controllability(tuple(w for w in words if w.reached), 6).rank_correlation()
    assert with_all is not None and solved is not None and solved < 0 < with_all


def test_search_depends_on_the_seed_and_the_place_alone() -> None:
    model = tiny("gpt2", 2, SMALL)
    pairs = [(x0, y) for x0 in states(3) for y in (1, 2)]
    search = BackOff(1, (2, 3), 3, 8, 4)
    one = k_epsilon(model, pairs, search=search, seed=4)
    assert k_epsilon(model, pairs, search=search, seed=4).words == one.words
    assert k_epsilon(model, pairs[:2], search=search, seed=4).words == one.words[:2]
    assert any(
        a.prompt != b.prompt for a, b in zip(one.words, k_epsilon(model, pairs, search=search).words, strict=True)
    )


def test_dataset_gcg_lowers_the_mean_loss_over_all_pairs() -> None:
    model = tiny("llama", 3, 20)
    pairs = [((3, 4, 5), 7), ((6, EOS), 8), ((EOS, 10, PAD), 7), ((2, 2), 5)]
    system = System(model)
    flat = [(State(system, x0), (y,)) for x0, y in pairs]
    prompts = torch.randint(20, (7, 3), generator=torch.Generator().manual_seed(0))
    slow = [
        sum(float(-model(torch.tensor([[*u, *x0]])).logits[0, -1].log_softmax(-1)[y].detach()) for x0, y in pairs) / 4
        for u in prompts.tolist()
    ]
    assert mean_loss(system, flat, prompts).tolist() == pytest.approx(slow, abs=1e-4)
    found = dataset_gcg(system, pairs, 3, grad_batch=2, iterations=6, candidates=30, k_sub=8)
    assert all(b <= a for a, b in itertools.pairwise(found.losses)) and found.losses[-1] < found.losses[0]
    assert found.loss == pytest.approx(float(mean_loss(system, flat, torch.tensor([found.prompt]))), abs=1e-5)
    hits = [int(tops(model, torch.tensor([[*found.prompt, *x0]]))) == y for x0, y in pairs]
    assert found.reached == sum(hits) / 4
    best = dataset_gcg(system, pairs, 1, grad_batch=4, iterations=3, candidates=200, k_sub=20)
    every = mean_loss(system, flat, torch.arange(20)[:, None])
    assert best.prompt == (int(every.argmin()),)


def test_dataset_gcg_takes_answers_of_several_tokens() -> None:
    system = System(tiny("gpt2", 3, 20))
    found = dataset_gcg(system, [((3, 4), (7, 8)), ((5,), (1,))], 2, iterations=3, candidates=20, multi_token=True)
    assert found.losses[-1] <= found.losses[0]


def test_several_answer_tokens_are_teacher_forced() -> None:
    model = tiny("gpt2", 7, SMALL)
    solved = 0
    for x0 in states(3, seed=4):
        for hint in states(4, length=2, seed=6):
            # Some prompt of two tokens does it: this one.
            made = model.generate(torch.tensor([[*hint, *x0]]), max_new_tokens=2, do_sample=False, eos_token_id=None)
            y = tuple(made[0, -2:].tolist())
            found = find_magic_words(model, None, x0, y, BackOff(2, (3,), 3, 20, 8), multi_token=True)
            assert found.rank is None
            if found.reached:
                solved += 1
                made = model.generate(**found.inputs(), max_new_tokens=2, do_sample=False, eos_token_id=None)
                assert tuple(made[0, -2:].tolist()) == y
    assert solved > 0


# ------------------------------------------------------------------ endpoints


def test_score_only_search_with_all_scores_is_greedy() -> None:
    model, words = tiny("llama", 5, len(WORDS)), tokenizer()
    letters = WORDS[3:29]

    def top(n: int) -> Any:
        def ask(texts: list[str]) -> list[dict[str, float]]:
            rows = torch.tensor([words(t)["input_ids"] for t in texts])
            with torch.no_grad():
                best = model(rows).logits[:, -1].log_softmax(-1).topk(n)
            return [
                {WORDS[i]: float(v) for v, i in zip(values, ids, strict=True)}
                for values, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]

        return ask

    same = 0
    for y in "cmqxz":
        greedy = find_magic_words(model, words, "hello", y, Greedy(2, "argmin"), blacklist=[WORDS.index(" ")])
        scored = score_only_search(top(len(WORDS)), letters, "hello", y, 2)
        assert (scored.reached, scored.known) == (greedy.reached, True) or scored.reached
        if not scored.reached:
            same += scored.prompt == greedy.text
            assert scored.log_p == pytest.approx(-greedy.loss, abs=1e-4)
        if scored.reached and scored.prompt:
            assert int(tops(model, torch.tensor([words(scored.prompt + "hello")["input_ids"]]))) == WORDS.index(y)
        few = score_only_search(top(3), letters, "hello", y, 2, batch=7)
        assert few.requests == scored.requests or few.pieces != scored.pieces
        if not few.known:  # an upper bound of what is not returned
            ids = words(few.prompt + "hello")["input_ids"]
            truth = model(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)[WORDS.index(y)]
            assert few.log_p >= float(truth) - 1e-5
    assert same > 0


def test_score_only_search_prefers_what_is_known() -> None:
    answers = {"x": {"a": -0.1, "b": -3.0}, "px": {"a": -0.1, "c": -3.0}, "qx": {"a": -0.2, "y": -4.0}}
    found = score_only_search(lambda texts: [answers[t] for t in texts], ["p", "q"], "x", "y", 1)
    assert (found.prompt, found.known, found.reached, found.log_p) == ("q", True, False, -4.0)
    assert score_only_search(lambda ts: [{"y": -0.1}] * len(ts), ["p"], "x", "y").prompt == ""
    assert score_only_search(lambda ts: [answers["x"]] * len(ts), ["p", "q"], "x", "y", budget=2).requests == 1


# ------------------------------------------------------------------ data


def test_targets_are_of_their_class(tmp_path: Any) -> None:
    model, words = tiny("gpt2", 1, 40), tokenizer()
    system = System(model, words, blacklist=[4])
    text = "the list is a value of the name and a file that the call returns " * 8
    ids = words(text)["input_ids"]
    pairs = pairs_from_text(system, text, 12, 4, 9)
    assert pairs == pairs_from_text(system, text, 12, 4, 9) != pairs_from_text(system, text, 12, 4, 9, seed=1)
    whole = ",".join(map(str, ids))
    for pair in pairs:
        assert 4 <= len(pair.x0) <= 9 and pair.y[0] not in (0, 1, 2, 4) and pair.y[0] < len(WORDS)
        if pair.kind == "true-next":
            assert ",".join(map(str, (*pair.x0, *pair.y))) in whole
    some = pairs_from_text(system, text, 12, 4, 9, ("uniform",))
    assert [p for p in pairs if p.kind == "uniform"] == some
    (tmp_path / "a.txt").write_text(text)
    assert read_pairs(tmp_path / "a.txt", system, 12, 4, 9) == pairs
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read_pairs(tmp_path / "t.jsonl", system, 12, 4, 9) == pairs
    assert len(pairs_from_text(system, text * 20, 12, 4, 9)) == 36  # long enough to be tokenized in places
    (tmp_path / "a.jsonl").write_text('{"x0": "the list", "y": "z"}\n\n{"x0": "ab", "y": "c", "kind": "mine"}\n')
    one, two = read_pairs(tmp_path / "a.jsonl", system)
    assert (one.kind, two.kind, two.x0, two.y) == ("given", "mine", (3, 4), (5,))
    # JSON may hold U+2028 as it is; a line ends with a line feed alone.
    row = {"x0": "ab", "y": "c", "kind": "my\u2028own"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [pair.kind for pair in read_pairs(tmp_path / "b.jsonl", system)] == ["my\u2028own"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"x0": "a"}\n', "row 1 has neither"),
        ("a.jsonl", '{"x0": "a", "y": ""}\n', "row 1 has neither"),
        ("a.jsonl", "{nothing\n", "line 1"),
        ("a.jsonl", "\n", "at least one row"),
        ("a.jsonl", '{"x0": "a", "y": "b"}\n{"x0": "a", "y": "bc"}\n', "multi_token=True allows more) (row 2"),
        ("a.txt", "too short", "at most 0"),
    ],
)
def test_bad_files(tmp_path: Any, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refused:
        read_pairs(tmp_path / name, System(tiny("gpt2", 1, 40), tokenizer()))
    assert sentence in str(refused.value)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"y": "ab"}, "one token (this is 2"),
        ({"y": 1}, "special and blacklisted"),
        ({"y": 7, "blacklist": [7]}, "special and blacklisted"),
        ({"x0": ""}, "at least one token"),
        ({"x0": []}, "at least one token"),
        ({"x0": "a" * 255}, "at most 256 tokens together"),
        ({"x0": "a" * 300}, "at most 256 tokens together"),
        ({"x0": [99]}, "from 0 to 39"),
        ({"y": 40}, "from 0 to 39"),
        ({"bos": "middle"}, "'outer' or 'inner'"),
        ({"alphabet": 0}, "at least 1"),
        ({"blacklist": range(3, 30)}, "leaves an id"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"x0": "hello", "y": "z"} | arguments
    with pytest.raises(InputError) as refused:
        find_magic_words(tiny("gpt2", 1, 40), tokenizer(), **given)
    assert sentence in str(refused.value)


def test_bad_models_and_searches() -> None:
    small = tiny("gpt2", 0, 20)
    with pytest.raises(InputError, match="at most 20, the rows of the embedding"):
        System(small, tokenizer())
    with pytest.raises(InputError, match=r"model\.eval"):
        System(tiny("gpt2").train())
    with pytest.raises(InputError, match="where there is no tokenizer"):
        find_magic_words(small, None, "text", 3)
    with pytest.raises(InputError, match="at least one pair"):
        k_epsilon(small, [])
    for make in (
        lambda: Greedy(0),
        lambda: Greedy(1, "some"),  # type: ignore[arg-type]
        lambda: GCG((3, 2)),
        lambda: GCG(()),
        lambda: GCG(iterations=0),
        lambda: GCG(accept="never"),  # type: ignore[arg-type]
        lambda: BackOff(4, (4,)),
        lambda: RandomPrompts((1, 2), 1),
        lambda: reachable_set(System(small), (1,), 9, exhaustive=True),
        lambda: dataset_gcg(System(small), [((1,), 2)], 2, start=(1,)),
        lambda: score_only_search(lambda texts: [], ["a"], "x", "y"),
        lambda: score_only_search(lambda texts: [{}], ["a"], "x", "y"),
        lambda: score_only_search(lambda texts: [{"a": 0.0}], [], "x", "y"),
        lambda: attention_bound(Head(*[torch.eye(2)] * 3), torch.eye(2), -1, 1.0),
        lambda: attention_bound(Head(*[torch.eye(2)] * 3), torch.eye(2), 1, math.inf),
        lambda: model_layer(System(small), (1, 2), 5),
    ):
        with pytest.raises(InputError):
            make()


# ------------------------------------------------------------------ hosts


def test_half_precision_is_verified_in_float32() -> None:
    """Logits 1 and 1 + 2^-9 tie in bfloat16, where the smaller id is the top choice: that does not count."""

    class Rounded(nn.Module):
        """Logits b_v + 2^-9 [v = 1], added in the model's own precision."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = CopyFirst(3)
            self.config = self.inner.config

        @property
        def dtype(self) -> torch.dtype:
            return self.inner.dtype

        def get_input_embeddings(self) -> nn.Embedding:
            return self.inner.embedding

        def forward(self, input_ids: Tensor) -> CausalLMOutput:
            small = torch.tensor([0.0, 2.0**-9, 0.0], dtype=self.dtype)
            one = torch.tensor([1.0, 1.0, 0.0], dtype=self.dtype)
            return CausalLMOutput(logits=(one + small).expand(*input_ids.shape, 3))  # type: ignore[arg-type]

    half, full = Rounded().bfloat16().eval(), Rounded().eval()
    row = torch.tensor([[2]])
    assert int(tops(half, row)) == 0 and int(tops(full, row)) == 1
    assert not find_magic_words(half, None, (2,), 0, Greedy(1)).reached
    assert find_magic_words(full, None, (2,), 1, Greedy(1)).k == 0
    model = tiny("llama", 1, SMALL).bfloat16()
    (x0,) = states(1, seed=2)
    assert sum(w.reached for w in k_epsilon(model, [(x0, y) for y in range(SMALL)], search=Greedy(2)).words) > 1


def test_batches_do_not_change_what_is_found() -> None:
    model = tiny("llama", 9, SMALL)
    search = BackOff(1, (2,), 4, 20, 8)
    pairs = [(x0, y) for x0 in states(2) for y in (1, 5, 9)]
    by_size = [k_epsilon(model, pairs, search=search, batch=batch).words for batch in (1, 7, 500)]
    assert [[w.k for w in words] for words in by_size] == [[w.k for w in by_size[0]]] * 3


def test_text_that_does_not_survive_is_flagged() -> None:
    """'ab' is a token of its own here, so the ids a, b do not come back from their text."""
    raw = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3}, [("a", "b")]))
    raw.decoder = decoders.Fuse()
    merging = PreTrainedTokenizerFast(tokenizer_object=raw)
    model = tiny("gpt2", 1, 4)
    flags = {}
    for x0, y in itertools.product(((1, 2), (2, 2), (0, 0)), range(4)):
        found = find_magic_words(model, merging, x0, y, Greedy(1))
        ids = [*found.prompt, *x0]
        flags[tuple(ids)] = found.text_roundtrip
        assert found.text_roundtrip == (not any(pair == (0, 1) for pair in itertools.pairwise(ids)))
    assert set(flags.values()) == {True, False}


def test_saved_and_loaded_models_and_results(tmp_path: Any) -> None:
    model, words = tiny("gpt2", 6, len(WORDS)), tokenizer(bos=True)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    search = BackOff(1, (2,), 3, 20, 8)
    first = find_magic_words(model, words, "hello", "q", search)
    again = find_magic_words(loaded, AutoTokenizer.from_pretrained(tmp_path), "hello", "q", search)
    assert first == again == MagicWord.from_json(first.to_json())


def test_with_momentum_decoding() -> None:
    """A found prompt is an ordinary prefix: other methods decode behind it, and its first greedy token is y."""
    model = tiny("llama", 6, len(WORDS))
    reached = [
        w for w in k_epsilon(model, [("hello", y) for y in range(3, 29)], tokenizer(), Greedy(1)).words if w.k == 1
    ]
    assert reached
    for found in reached[:3]:
        made = model.generate(
            **found.inputs(), max_new_tokens=8, do_sample=False, logits_processor=[MomentumDecoding(alpha=0.0)]
        )
        assert made[0, len(found.input_ids)] == found.y[0]


def test_a_found_prompt_says_that_it_is_adversarial() -> None:
    found = find_magic_words(CopyFirst().eval(), None, (2, 3), 5)
    assert found.k == 1 and "adversarial" in str(found)


def test_classes_of_models_are_plain_transformers() -> None:
    assert isinstance(tiny("gpt2"), GPT2LMHeadModel) and isinstance(tiny("llama"), LlamaForCausalLM)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    untied = LlamaForCausalLM(config).eval()
    assert find_magic_words(untied, None, (1, 2), 3, BackOff(1, (2,), 2, 8, 4)).passes > 17


def test_the_card_s_use_runs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my-language-model").symlink_to(loading.path("docs/tiny"))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(
        catalog.card("magic-word").text.partition("## Use\n")[2].partition("```python\n")[2].partition("```")[0], found
    )
    assert found["word"].y == tuple(found["tokenizer"](" a", add_special_tokens=False)["input_ids"])
    assert found["ids"].shape[1] == len(found["word"].input_ids) + 8 and capsys.readouterr().out


def test_every_exported_name_is_in_the_room() -> None:
    import steersman.language as room

    card = catalog.card("magic-word")
    for path in (card.object, *card.exports):
        assert callable(getattr(room, path.partition(":")[2]))
