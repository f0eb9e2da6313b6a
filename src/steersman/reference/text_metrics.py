r"""Measures of generated text.

For a token sequence $x$ and the multiset $G_n(x)$ of its $n$-grams

$$\text{rep-}n(x) = 1 - \frac{|\mathrm{set}(G_n(x))|}{|G_n(x)|}, \qquad
  \mathrm{diversity}(x) = \prod_{n=2}^{4} \bigl(1 - \text{rep-}n(x)\bigr), \qquad
  \text{distinct-}n(x^1..x^B) = \frac{|\bigcup_b \mathrm{set}(G_n(x^b))|}{\sum_b |G_n(x^b)|}.$$

The log-likelihood of a continuation $x_{p+1..T}$ of a prompt $x_{1..p}$ under a language model $q$ is
$\sum_{t>p} \log q(x_t \mid x_{<t})$; its mean over the tokens is called coherence when $q$ is larger than the
model that wrote the text. Loops score high on it: never read it without diversity.

`cluster_divergence` follows MAUVE (Pillutla et al., NeurIPS 2021, arXiv 2102.01454) in all but its features:
texts become vectors, vectors become $k$ clusters, and with the histograms $p$ (reference), $q$ (generated) and
$r_\lambda = \lambda p + (1-\lambda) q$ the value is the area under the curve

$$\bigl(e^{-c\,\mathrm{KL}(q \| r_\lambda)},\; e^{-c\,\mathrm{KL}(p \| r_\lambda)}\bigr), \quad \lambda \in [0, 1],
  \; c = 5,$$

1 for equal histograms and $1/\binom{2c}{c} = 1/252$ for disjoint ones. MAUVE's numbers come from the last
hidden state of GPT-2 large; ours from `hidden_features` of whichever model is given, so they compare contenders
with each other and never with published values.

Tokens come as rows: a sequence of token sequences, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steersman.errors import InputError, MissingExtra, TrialError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Sequence[Sequence[int]]


def rep_n(rows: Rows, n: int) -> np.ndarray:
    """Share of each row's n-grams that repeat an earlier one of the row: 1 - unique / all.

    Args:
        rows: B token sequences.
        n: length of the n-grams, from 1.

    Returns:
        (B,) values in [0, 1); 0 for a row shorter than ``n``.
    """
    row, code = _ngrams(rows, n)
    total = np.bincount(row, minlength=len(rows))
    size = int(code.max(initial=0)) + 1
    unique = np.bincount(np.unique(row * size + code) // size, minlength=len(rows))
    return np.where(total > 0, 1.0 - unique / np.maximum(total, 1), 0.0)


def diversity(rows: Rows) -> np.ndarray:
    """Product over n = 2, 3, 4 of 1 - rep-n, for each row: (B,), 1 without any repetition."""
    return np.prod([1.0 - rep_n(rows, n) for n in (2, 3, 4)], axis=0)


def distinct_n(rows: Rows, n: int) -> float:
    """Different n-grams of all rows together, as a share of all their n-grams.

    Raises:
        InputError: no row has ``n`` tokens.
    """
    _, code = _ngrams(rows, n)
    if not len(code):
        raise InputError("rows", [len(r) for r in rows], f"rows of which one has at least n={n} tokens")
    return len(np.unique(code)) / len(code)


def _ngrams(rows: Rows, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, code) of every n-gram of every row; equal codes are equal n-grams (exact, no hashing)."""
    _check_count("n", n, 1)
    _check_rows("rows", rows, 0)
    owner = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    flat = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
    if len(flat) < n:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    token = np.unique(flat, return_inverse=True)[1]
    code = token
    for k in range(1, n):
        # Ranks stay below the number of tokens, so the product fits 64 bits.
        code = np.unique(code[:-1] * len(flat) + token[k:], return_inverse=True)[1]
    inside = owner[: len(flat) - n + 1] == owner[n - 1 :]
    return owner[: len(code)][inside], code[inside]


# --- loops ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """Tokens ``start`` to ``stop`` (exclusive) say again what was said from token ``source`` on.

    ``source < start``; the two may overlap, as in `abababab`, where the period is ``start - source``.
    """

    start: int
    stop: int
    source: int


def find_loops(ids: Sequence[int], n: int = 4) -> list[Loop]:
    """Repeated passages of at least ``n`` tokens, left to right, without overlap.

    From each position the longest match with an earlier start is taken (the nearest of equals), if it has
    ``n`` tokens, and the search goes on behind it. Every n-gram that occurred before thus lies in a loop, or
    begins in one and ends beyond it.

    Args:
        ids: the tokens, prompt and continuation together (or the continuation alone, to look only there).
        n: the shortest repetition that counts.
    """
    _check_count("n", n, 1)
    _, code = _ngrams([ids], n)
    token = np.asarray(ids, dtype=np.int64)
    earlier: dict[int, list[int]] = {}
    loops: list[Loop] = []
    covered = 0
    for i, gram in enumerate(code.tolist()):
        starts = earlier.setdefault(gram, [])
        if starts and i >= covered:
            length, source = max((_match(token, j, i), j) for j in starts)
            loops.append(Loop(i, i + length, source))
            covered = i + length
        starts.append(i)
    return loops


def _match(token: np.ndarray, source: int, start: int) -> int:
    """Length of the longest common run of ``token[source:]`` and ``token[start:]``."""
    size = len(token) - start
    differs = np.flatnonzero(token[source : source + size] != token[start:])
    return int(differs[0]) if len(differs) else size


def marked_pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, n: int = 4) -> list[tuple[str, bool]]:
    """The decoded text in pieces, each with whether it is inside a loop; joined they are the whole text."""
    if not len(ids):
        return []
    edges, inside = [0], []
    for loop in find_loops(ids, n):
        if loop.start > edges[-1]:
            edges.append(loop.start)
            inside.append(False)
        edges.append(loop.stop)
        inside.append(True)
    if edges[-1] < len(ids):
        edges.append(len(ids))
        inside.append(False)
    # Prefixes are decoded, not pieces: a character's bytes, and the space before a word, may be split.
    whole = str(tokenizer.decode(list(ids)))
    cuts = [len(str(tokenizer.decode(list(ids[:e]))).rstrip("�")) for e in edges[:-1]] + [len(whole)]
    pieces: list[tuple[str, bool]] = []
    for a, b, loop_here in zip(cuts[:-1], cuts[1:], inside, strict=True):
        if a < b and pieces and pieces[-1][1] == loop_here:
            pieces[-1] = (pieces[-1][0] + whole[a:b], loop_here)
        elif a < b:
            pieces.append((whole[a:b], loop_here))
    return pieces


# --- likelihood -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods of B continuations.

    Args:
        total: (B,) sums of log-probabilities, in nats.
        tokens: (B,) numbers of tokens scored.
    """

    total: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(B,) mean log-probability a token, in nats: the coherence of each continuation."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability over all tokens of all rows."""
        return float(np.exp(-self.total.sum() / self.tokens.sum()))


@torch.no_grad()
def log_likelihood(
    model: PreTrainedModel, continuations: Rows, prompts: Rows | None = None, batch_size: int = 16
) -> Likelihood:
    """Log-likelihood of each continuation given its prompt, under a causal language model.

    Rows are padded on the right behind an attention mask, which a causal model's earlier positions cannot
    see; only continuation tokens count. Without a prompt the first token has no prediction and isn't scored,
    as in transformers' own loss.

    Args:
        model: a causal LM of transformers; its vocabulary must be the one of the rows.
        continuations: B token sequences, at least one token each (two without a prompt).
        prompts: B token sequences, or None for none.
        batch_size: rows a forward pass; rows of like length share one.

    Raises:
        InputError: rows of different number, too short, too long for the model, or with unknown tokens.
        TrialError: the model gave a NaN.
    """
    if prompts is None:
        prompts = [[]] * len(continuations)
    if len(prompts) != len(continuations):
        raise InputError("prompts", len(prompts), f"as many as there are continuations ({len(continuations)})")
    for i, (a, b) in enumerate(zip(prompts, continuations, strict=True)):
        if len(b) < (1 if len(a) else 2):
            raise InputError(f"continuations[{i}]", list(b), "at least one token (two without a prompt)")
    rows = [[*a, *b] for a, b in zip(prompts, continuations, strict=True)]
    first = np.array([max(len(a), 1) for a in prompts])
    total = np.zeros(len(rows))
    for batch, ids, mask in _batches(model, rows, batch_size):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        position = torch.arange(1, ids.shape[1], device=ids.device)
        scored = (position >= torch.as_tensor(first[batch], device=ids.device)[:, None]) & mask[:, 1:].bool()
        chosen = logits[scored]
        chosen = torch.log_softmax(chosen if chosen.dtype == torch.float64 else chosen.float(), dim=-1)
        value = chosen.gather(-1, ids[:, 1:][scored][:, None])[:, 0].double()
        if torch.isnan(value).any():
            raise TrialError(f"{type(model).__name__} gave NaN for the likelihood of a text")
        which = scored.nonzero()[:, 0]
        total[batch] = value.new_zeros(len(batch)).index_add_(0, which, value).cpu().numpy()
    return Likelihood(total, np.array([len(r) for r in rows]) - first)


@torch.no_grad()
def hidden_features(
    model: PreTrainedModel, continuations: Rows, prompts: Rows | None = None, batch_size: int = 16
) -> np.ndarray:
    """(B, d) mean over each continuation's tokens of the model's last hidden state, in its prompt's context."""
    if prompts is None:
        prompts = [[]] * len(continuations)
    if len(prompts) != len(continuations):
        raise InputError("prompts", len(prompts), f"as many as there are continuations ({len(continuations)})")
    _check_rows("continuations", continuations, 1)
    rows = [[*a, *b] for a, b in zip(prompts, continuations, strict=True)]
    first = np.array([len(a) for a in prompts])
    features: list[np.ndarray] = [np.empty(0)] * len(rows)
    for batch, ids, mask in _batches(model, rows, batch_size):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        hidden = out.hidden_states[-1].double()
        position = torch.arange(ids.shape[1], device=ids.device)
        weight = ((position >= torch.as_tensor(first[batch], device=ids.device)[:, None]) & mask.bool()).double()
        mean = (hidden * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        for i, vector in zip(batch, mean.cpu().numpy(), strict=True):
            features[i] = vector
    return np.stack(features)


def _batches(model: PreTrainedModel, rows: list[list[int]], batch_size: int) -> Any:
    """(row numbers, ids (b, T), mask (b, T)) with rows of like length together; the model in eval mode."""
    _check_count("batch_size", batch_size, 1)
    _check_rows("rows", rows, 1)
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    longest, highest = max(map(len, rows)), max(max(r) for r in rows)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if longest > limit:
        raise InputError("rows", longest, f"at most {limit} tokens long (the model's positions), prompt included")
    if highest >= vocabulary or min(min(r) for r in rows) < 0:
        raise InputError("rows", highest, f"tokens from 0 to {vocabulary - 1} (the model's vocabulary)")
    order = np.argsort([-len(r) for r in rows], kind="stable")
    training = model.training
    model.eval()
    try:
        for at in range(0, len(rows), batch_size):
            batch = order[at : at + batch_size]
            width = max(len(rows[i]) for i in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for b, i in enumerate(batch):
                ids[b, : len(rows[i])] = torch.as_tensor(rows[i])
                mask[b, : len(rows[i])] = 1
            yield batch, ids.to(model.device), mask.to(model.device)
    finally:
        model.train(training)


# --- divergence from held-out text --------------------------------------------------------------------------


def ngram_divergence(generated: Rows, reference: Rows, n: int = 1) -> float:
    """Jensen-Shannon divergence, in bits, of the n-gram distributions of two sets of texts: 0 to 1.

    The plug-in estimate: it is positive for two finite samples of one source too, the more so the larger
    ``n``. Read it beside the value of held-out text against other held-out text of the same size.
    """
    _check_rows("generated", generated, 0)
    _check_rows("reference", reference, 0)
    row, code = _ngrams([*generated, *reference], n)
    left = row < len(generated)
    if not left.any() or left.all():
        raise InputError("generated, reference", n, f"sets that both have a text of at least n={n} tokens")
    size = int(code.max()) + 1
    q = np.bincount(code[left], minlength=size) / left.sum()
    p = np.bincount(code[~left], minlength=size) / (~left).sum()
    m = (p + q) / 2
    return float(max(0.0, (_kl(p, m) + _kl(q, m)) / (2 * math.log(2))))


def cluster_divergence(
    generated: np.ndarray, reference: np.ndarray, clusters: int | None = None, seed: int = 0
) -> float:
    """MAUVE's area for two sets of feature vectors: 1 for like sets, 1/252 for sets with no cluster in common.

    The vectors of both sets are standardised together, reduced to the principal components that hold 90% of
    their variance, scaled to unit length and clustered by k-means (the best of 5 starts); then `divergence_area`
    of the two histograms. It depends on the sample sizes and on ``clusters``: compare only values with the same.

    Args:
        generated: (B, d) features of generated texts (`hidden_features`).
        reference: (C, d) features of held-out texts.
        clusters: number of clusters; by default a tenth of the smaller set, at least 2.
        seed: of the k-means starts.
    """
    for name, value in (("generated", generated), ("reference", reference)):
        if np.ndim(value) != 2 or len(value) < 2 or not np.isfinite(value).all():
            raise InputError(name, np.shape(value), "a finite (B, d) array of at least 2 feature vectors")
    if np.shape(generated)[1] != np.shape(reference)[1]:
        raise InputError("generated", np.shape(generated), f"of the reference's width ({np.shape(reference)[1]})")
    least = min(len(generated), len(reference))
    k = max(2, least // 10) if clusters is None else clusters
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 2 <= k <= least:
        raise InputError("clusters", clusters, f"a whole number from 2 to {least} (the smaller set)")
    x = np.concatenate([generated, reference]).astype(np.float64)
    x = x - x.mean(0)
    x /= np.maximum(x.std(0), 1e-12)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    kept = 1 + int(np.searchsorted(np.cumsum(s**2), 0.9 * (s**2).sum()))
    x = (u * s)[:, :kept]
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    label = _kmeans(x, int(k), seed)
    q = np.bincount(label[: len(generated)], minlength=k) / len(generated)
    p = np.bincount(label[len(generated) :], minlength=k) / len(reference)
    return divergence_area(p, q)


def divergence_area(p: np.ndarray, q: np.ndarray, scale: float = 5.0, points: int = 1000) -> float:
    """Area under MAUVE's divergence curve of two histograms; symmetric, in [1/252, 1] for scale 5.

    Args:
        p, q: (k,) probabilities.
        scale: c in the exponent.
        points: values of lambda inside (0, 1), besides the ends.
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    for name, value in (("p", p), ("q", q)):
        if value.ndim != 1 or value.shape != p.shape or (value < 0).any() or abs(value.sum() - 1) > 1e-6:
            raise InputError(name, value, "probabilities that sum to 1, p and q of one length")
    weights = np.linspace(0, 1, points + 2)[1:-1]
    mixtures = [w * p + (1 - w) * q for w in weights]
    # From (1, 0), over the curve from lambda = 0 to 1, to (0, 1): what lies under it is bounded by the axes.
    x = np.array([1.0, *(math.exp(-scale * _kl(q, r)) for r in mixtures), 0.0])
    y = np.array([0.0, *(math.exp(-scale * _kl(p, r)) for r in mixtures), 1.0])
    return float(np.trapezoid(y[::-1], x[::-1]))


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) in nats; q > 0 wherever p > 0."""
    inside = p > 0
    return float(np.sum(p[inside] * np.log(p[inside] / q[inside])))


def _kmeans(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Labels of the best of 5 k-means runs."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise MissingExtra("cluster_divergence", "reference") from None
    return KMeans(k, n_init=5, random_state=seed % 2**32).fit_predict(x)


# --- boundaries -------------------------------------------------------------------------------------------


def _check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise InputError(name, value, f"a whole number, at least {low}")


def _check_rows(name: str, rows: Any, least: int) -> None:
    if isinstance(rows, (str, bytes)) or not hasattr(rows, "__len__") or not len(rows):
        raise InputError(name, rows, "a sequence of token sequences, at least one")
    for i, row in enumerate(rows):
        if isinstance(row, (str, bytes)) or not hasattr(row, "__len__"):
            raise InputError(f"{name}[{i}]", row, "a sequence of token numbers")
        if len(row) < least:
            raise InputError(f"{name}[{i}]", row, f"at least {least} token(s) long")
