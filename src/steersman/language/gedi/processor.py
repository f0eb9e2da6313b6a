"""GeDi's law of the next token, as a processor of transformers' ``generate``."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from steersman.errors import InputError
from steersman.language.gedi.codes import ControlCodes
from steersman.language.gedi.conditional import BestOf, ClassConditional, PosteriorScorer
from steersman.language.prefix import PrefixModel
from steersman.language.texts import opening_of
from steersman.language.vocabularies import fitted, same_vocabulary

REMOVED = 10_000.0
"""What a removed token loses, as published: it can be taken where a later processor forbids all that were kept."""
LEAST = -1e4  # of a log posterior: 0 times minus infinity is no number
TIE = 1e-6  # posteriors nearer than this are equal


def class_log_posterior(
    log_likelihood: Tensor, tokens: Tensor, alpha: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    r"""log P(c | x), by Bayes' rule with likelihoods normalised by length.

    .. math:: P(c \mid x_{1:t}) = \frac{e^{b_c} \, P(x_{1:t} \mid c)^{\alpha / t}}
                                       {\sum_{c'} e^{b_{c'}} \, P(x_{1:t} \mid c')^{\alpha / t}}

    Where no class can have said the text (all likelihoods 0), it is the prior.

    Args:
        log_likelihood: log P(x | c), classes first, (K, ...).
        tokens: t, what broadcasts to it; 1 is Bayes' rule without normalisation.
        alpha: the exponent, at least 0.
        bias: b, what broadcasts to ``log_likelihood``; None is 0.

    Returns:
        Log-probabilities over the first dimension, (K, ...).
    """
    logits = alpha * log_likelihood / tokens
    logits = logits.masked_fill(logits.isneginf().all(0, keepdim=True), 0.0)
    return (logits if bias is None else logits + bias).log_softmax(0)


def remove_unlikely(scores: Tensor, log_posterior: Tensor, rho: float, tau: float) -> Tensor:
    r"""GeDi's filter: take away tokens that are improbable in the wanted class.

    With tokens in ascending order of their posterior, and P the softmax of ``scores``,

    .. math:: \text{token } i \text{ is removed if} \quad \sum_{j \le i} P(x_j) < 1 - \rho \quad\text{and}\quad
              P(c \mid x_i) < \tau

    so that what is kept holds more than :math:`\rho` of P, with all tokens of a posterior of at least :math:`\tau`. Of
    posteriors that are equal to within 1e-6 the less probable token comes first; forbidden tokens (-inf) come
    before all. The last is always kept.

    Args:
        scores: weighted log-probabilities, (B, V) float32.
        log_posterior: of the wanted class, by token, (B, V).
        rho: least mass kept, 0 to 1. With 1 nothing is removed.
        tau: posterior from which on a token is always kept, above 0 and below 1.

    Returns:
        ``scores``, less :data:`REMOVED` for the tokens that are removed, (B, V).
    """
    if rho == 1:
        return scores
    # One sort by two keys: the rounded posterior, then the bits of the score, whose order as whole numbers is that of
    # the floats once those below zero are turned round.
    bits = scores.contiguous().view(torch.int32).long()
    bits = torch.where(bits < 0, -(2**31) - bits, bits)
    rounded = (log_posterior.exp() / TIE).round().long().masked_fill(scores.isneginf(), -1)
    order = (rounded * 2**33 + bits).argsort(dim=-1, stable=True)
    mass = scores.softmax(-1).gather(-1, order).cumsum(-1)
    drop = (mass < 1 - rho) & (log_posterior.gather(-1, order) < math.log(tau))
    drop[..., -1] = False
    removed = torch.zeros_like(drop).scatter(-1, order, drop)
    return torch.where(removed, scores - REMOVED, scores)


class GeDi(LogitsProcessor):
    r"""Generative discriminator guidance (Krause et al., 2021), for ``model.generate``.

    A class-conditional language model, the guide, classifies every candidate for the next token with one pass under
    each code,

    .. math:: \log P_w(x_t) = \log P_{LM}(x_t \mid x_{<t}) + \omega \log P_\theta(c \mid x_{1:t}) + \text{const.}

    with the posterior of :func:`class_log_posterior` and the filter of :func:`remove_unlikely`. t counts all tokens
    behind the control code, those of the prompt and of a keyword included. ::

        steer = GeDi.from_pretrained("my-guide", attribute="sentiment=positive")
        model.generate(**inputs, logits_processor=[steer])

    The scores it returns are unnormalised log-probabilities. It is a pure function of the prefix: batches, beams,
    permuted rows and speculation trees get the same answers. It needs nothing of the base model but its scores, of
    which any may be -inf (an endpoint that gives the most probable tokens only).

    ``generate`` applies its own ``repetition_penalty`` to the base model's law, before this. In the published order the
    penalty comes last: ``logits_processor=[GeDi(...), ShiftLogits(10.0), RepetitionPenaltyLogitsProcessor(1.2)]``.

    Args:
        guide: a class-conditional causal language model with the base's vocabulary, in evaluation mode. In float32:
            omega multiplies its rounding.
        desired_ids: the control code of the wanted class, one id; or the code and the tokens of a keyword behind it,
            which are scored with the text.
        undesired_ids: the same of the other class; or a list of such lists, for several other classes.
        omega: weight of the posterior, at least 0.
        rho: share of the mass that the filter keeps at least, 0 to 1; 1 is no filter. (The authors' ``filter_p`` is
            1 - rho.)
        tau: posterior from which on a token is never removed, between 0 and 1 (the authors' ``target_p``).
        alpha: the guide's learned scale of log-likelihoods (the authors' ``logit_scale``), at least 0.
        bias: the guide's learned bias of each class, the wanted one first; empty is none.
        class_bias: added to the bias of the wanted class (0; 2 for detoxification, as published). tau moves with it,
            to sigmoid(logit(tau) + class_bias).
        normalise: whether likelihoods are taken to the power alpha / t, as published, or alpha (plain Bayes' rule; then
            early evidence doesn't fade as the text grows).
        pad_token_id: the id that pads short prompts on the left. The run of it that opens a row is left out.
        prompt_length: columns of the padded prompt; limits that run.

    Raises:
        InputError: an argument outside its range, or a guide in training mode. On call: scores with NaN or +inf or with
            no token left, or a text longer than the guide takes.

    References:
        Ben Krause, Akhilesh Deepak Gotmare, Bryan McCann, Nitish Shirish Keskar, Shafiq Joty, Richard Socher, Nazneen
        Fatema Rajani. GeDi: Generative Discriminator Guided Sequence Generation. Findings of EMNLP 2021,
        arXiv:2009.06367.
    """

    def __init__(
        self,
        guide: Any,
        desired_ids: int | Sequence[int],
        undesired_ids: int | Sequence[int] | Sequence[Sequence[int]],
        *,
        omega: float = 30.0,
        rho: float = 0.2,
        tau: float = 0.8,
        alpha: float = 1.0,
        bias: Sequence[float] = (),
        class_bias: float = 0.0,
        normalise: bool = True,
        pad_token_id: int | None = None,
        prompt_length: int | None = None,
    ) -> None:
        self.omega = _number("omega", omega, "a number of at least 0", lambda x: 0 <= x < math.inf)
        self.rho = _number("rho", rho, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self.tau = _number("tau", tau, "a number above 0 and below 1", lambda x: 0 < x < 1)
        self.alpha = _number("alpha", alpha, "a number of at least 0", lambda x: 0 <= x < math.inf)
        self.class_bias = _number("class_bias", class_bias, "a finite number", math.isfinite)
        self.normalise = normalise
        if getattr(guide, "training", False):
            raise InputError("guide", type(guide).__name__, "in evaluation mode (guide.eval())")
        vocabulary = guide.config.get_text_config().vocab_size
        others: Any = undesired_ids
        others = [others] if isinstance(others, numbers.Integral) else list(others)
        if not isinstance(undesired_ids, numbers.Integral) and all(isinstance(i, numbers.Integral) for i in others):
            others = [others]  # one code, and the keyword behind it
        self.codes = [_code("desired_ids", desired_ids, vocabulary)]
        self.codes += [_code("undesired_ids", code, vocabulary) for code in others]
        if len(self.codes) < 2 or len(set(self.codes)) < len(self.codes):
            raise InputError("undesired_ids", undesired_ids, f"codes other than {list(self.codes[0])}")
        if len(bias) not in (0, len(self.codes)) or not all(map(math.isfinite, bias)):
            raise InputError("bias", bias, f"{len(self.codes)} numbers, the wanted class first")
        self.bias = [float(b) for b in bias] or [0.0] * len(self.codes)
        self.guide = guide
        self.prefixes = PrefixModel(
            guide, pad_token_id=pad_token_id, prompt_length=prompt_length, opening=self.codes, totals=True
        )
        self._opened: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        attribute: str | None = None,
        undesired: str | None = None,
        omega: float = 30.0,
        rho: float = 0.2,
        tau: float = 0.8,
        class_bias: float = 0.0,
        normalise: bool = True,
        pad_token_id: int | None = None,
        prompt_length: int | None = None,
        tokenizer: Any = None,
        mode: str = "guided",
    ) -> GeDi | ClassConditional | BestOf:
        """The processor of a guide that ``steersman apply gedi`` (or :class:`GeDiTrainer`) saved.

        Args:
            folder: the guide's folder.
            attribute: what is wanted, as ``sentiment=positive``; None is what the guide was made for. A guide with
                keywords takes any word, also one that it wasn't trained with.
            undesired: the value that it is told from; None is all others.
            tokenizer: the base model's; refused if its vocabulary isn't the guide's.
            mode: ``guided``; or, to compare with, what the same guide does without guiding: ``conditional`` writes
                itself (a :class:`ClassConditional`), ``best-of-4`` ranks finished texts (a :class:`BestOf`, of any
                number).

        Raises:
            InputError: no guide there, an attribute that it wasn't trained on, another vocabulary.
        """
        codes = ControlCodes.load(folder)
        guide, own = codes.guide(folder)
        if tokenizer is not None:
            same_vocabulary(tokenizer, own, "guide", str(folder))
        wanted, others, bias = codes.contrast(attribute, undesired, own)
        if mode == "conditional":
            return ClassConditional(guide, (*wanted, *opening_of(own)))
        count = mode.removeprefix("best-of-") if mode.startswith("best-of-") else ""
        if mode != "guided" and not (count.isdecimal() and int(count) > 1):
            raise InputError("mode", mode, "guided, conditional, or best-of-4 (or another number of at least 2)")
        steer = cls(
            guide,
            wanted,
            others,
            omega=omega,
            rho=rho,
            tau=tau,
            alpha=codes.logit_scale,
            bias=bias,
            class_bias=class_bias,
            normalise=normalise,
            pad_token_id=pad_token_id,
            prompt_length=prompt_length,
        )
        return BestOf(int(count), PosteriorScorer(steer, own)) if count else steer

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """log P_LM + omega log P(c | x), removed tokens far down, float32.

        Args:
            input_ids: the text so far, (B, T).
            scores: logits or log-probabilities of the next token, (B, V).
        """
        base = scores.float().log_softmax(-1)
        bad = base[:, 0].isnan()  # softmax spreads NaN, +inf and "no token left" over the whole row
        if bool(bad.any()):
            rows = f"rows {bad.nonzero().flatten().tolist()}"
            raise InputError("scores", rows, "free of NaN and +inf, with a finite value in every row")
        posterior = self.next_log_posterior(input_ids, scores.shape[1]).to(base.device)
        return remove_unlikely(base + self.omega * posterior, posterior, self.rho, self._threshold)

    @torch.no_grad()
    def next_log_posterior(self, input_ids: Tensor, vocab_size: int) -> Tensor:
        """log P(c | x_1..t) of the wanted class with every token as the next one, (B, V) float32.

        Args:
            input_ids: the text so far, (B, T).
            vocab_size: V; tokens that the guide doesn't have get the prior.
        """
        total_KB, tokens_KB, logits = self._behind(input_ids)
        law_KBV = fitted(logits, vocab_size).log_softmax(-1).unflatten(0, (len(self.codes), -1))
        return self._log_posterior(total_KB[..., None] + law_KBV, tokens_KB[..., None] + 1)[0].clamp(min=LEAST)

    @torch.no_grad()
    def posterior(self, input_ids: Tensor) -> Tensor:
        """P(c | x) of the wanted class for each whole text, (B,) float32; the prior for an empty one."""
        total_KB, tokens_KB, _ = self._behind(input_ids)
        return self._log_posterior(total_KB, tokens_KB.clamp(min=1))[0].exp()

    @property
    def networks(self) -> tuple[Any, ...]:
        """The models that run beside the one that writes."""
        return (self.guide,)

    @property
    def _threshold(self) -> float:
        """tau, moved with the bias of the wanted class."""
        return (
            1 / (1 + math.exp(-math.log(self.tau / (1 - self.tau)) - self.class_bias)) if self.class_bias else self.tau
        )

    def _log_posterior(self, log_likelihood: Tensor, tokens: Tensor) -> Tensor:
        bias = torch.tensor(self.bias, device=log_likelihood.device)
        bias[0] += self.class_bias
        bias = bias.view(-1, *[1] * (log_likelihood.ndim - 1))
        return class_log_posterior(
            log_likelihood, tokens if self.normalise else torch.ones_like(tokens), self.alpha, bias
        )

    def _behind(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log P(text | code) and the number of scored tokens, (K, B) each, and the guide's logits behind, (KB, V)."""
        shape = (len(self.codes), len(input_ids))
        if not input_ids.shape[1]:
            keyword_K, scored_K, opened_KV = self._opening()
            law_KBV = opened_KV.repeat_interleave(len(input_ids), 0)
            return keyword_K[:, None].expand(shape), scored_K[:, None].expand(shape), law_KBV
        step = self.prefixes(input_ids)
        assert step.totals is not None
        total_KB, tokens_KB = step.totals.view(shape), step.tokens.expand(shape)
        if any(len(code) > 1 for code in self.codes):
            keyword_K, scored_K, _ = self._opening()
            total_KB, tokens_KB = total_KB + keyword_K[:, None], tokens_KB + scored_K[:, None]
        return total_KB, tokens_KB, step.logits

    def _opening(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each code: log P(keyword | code), the keyword's number of tokens, and the logits behind (K, V)."""
        if self._opened is None:
            device, totals, logits = self.guide.device, [], []
            for code in self.codes:
                ids = torch.tensor([code], device=device)
                out = self.guide(ids, attention_mask=torch.ones_like(ids)).logits[0].float()
                totals.append(out[:-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
                logits.append(out[-1])
            scored = torch.tensor([len(code) - 1 for code in self.codes], device=device)
            self._opened = torch.stack(totals), scored, torch.stack(logits)
        return self._opened


class ShiftLogits(LogitsProcessor):
    r"""Scores moved so that the largest of each row is ``maximum``: :math:`s - \max s + m`.

    A repetition penalty divides scores, and so depends on where their zero is; log-probabilities are all negative.
    GeDi's authors move the maximum to 10 first. Behind it, transformers' ``RepetitionPenaltyLogitsProcessor`` penalises
    a token once, however often it occurred (the authors' once for each occurrence).

    Args:
        maximum: m.
    """

    def __init__(self, maximum: float = 10.0) -> None:
        self.maximum = _number("maximum", maximum, "a finite number", math.isfinite)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores - scores.amax(-1, keepdim=True) + self.maximum


def _number(name: str, value: Any, allowed: str, within: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not within(value):
        raise InputError(name, value, allowed)
    return float(value)


def _code(name: str, value: Any, vocabulary: int) -> tuple[int, ...]:
    ids = [value] if isinstance(value, numbers.Integral) else list(value)
    if not ids or not all(isinstance(i, numbers.Integral) and 0 <= int(i) < vocabulary for i in ids):
        raise InputError(name, value, f"token ids of the guide, from 0 to {vocabulary - 1}")
    return tuple(int(i) for i in ids)
