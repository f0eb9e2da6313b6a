r"""The reward of every token that a policy and its reference imply.

In the token decision process (state: the prompt and the tokens so far; action: the next token) the optimum of the
KL-regularised problem, with :math:`V^*(\text{end}) = 0`, is

.. math::
    \pi^*(a|s) = \exp\big((Q^*(s, a) - V^*(s)) / \beta\big), \qquad
    Q^*(s_t, a_t) = r(s_t, a_t) + \beta \log \pi_\mathrm{ref}(a_t|s_t) + V^*(s_{t+1}),

so that a policy trained on preferences (DPO) is itself an optimal soft Q-function of some reward, and

.. math::
    \hat r(s_t, a_t) = \beta \log \frac{\pi(a_t|s_t)}{\pi_\mathrm{ref}(a_t|s_t)}
                     = r(s_t, a_t) + V^*(s_{t+1}) - V^*(s_t)

is that reward up to a potential: the **advantage** of the token. It has the same optimal policy and the same
preferences between answers to one prompt. Every class of rewards that Bradley-Terry or Plackett-Luce can't tell apart
has exactly one member of this form, with values 0 at the ends, given :math:`\beta` and the reference. Two models with
other values give other maps of one task: compare maps only within one policy, reference and beta.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steersman.errors import InputError
from steersman.language.loading import load_language_model
from steersman.language.vocabularies import same_size, same_vocabulary

Rows = Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class TokenRewards:
    r"""Token rewards :math:`\hat r` of B answers.

    Args:
        prompts: token ids of the prompts.
        completions: token ids of the answers, n_b each.
        rewards: B tensors (n_b,) in float32 (float64 for float64 models); 0 where a token is not ``defined``.
        policy, reference: log-probabilities of the tokens, B tensors (n_b,).
        defined: B tensors (n_b,), false where a token is impossible (log-probability -inf) under either model.
        beta: :math:`\beta`.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[Tensor]
    policy: list[Tensor]
    reference: list[Tensor]
    defined: list[Tensor]
    beta: float

    @property
    def totals(self) -> Tensor:
        r"""(B,) sums over the tokens: the implicit reward of each answer, as DPO has it."""
        return torch.stack([row.sum() for row in self.rewards])

    @property
    def cumulative(self) -> list[Tensor]:
        r"""B tensors (n_b,): :math:`\sum_{j \le t} \hat r_j`, which is :math:`V^*(s_{t+1}) - V^*(s_0)` and the reward
        so far."""
        return [row.cumsum(0) for row in self.rewards]

    @property
    def scaled(self) -> list[Tensor]:
        """The rewards divided by the largest magnitude among all rows: numbers from -1 to 1 for colours."""
        largest = max((float(row.abs().max()) for row in self.rewards if len(row)), default=0.0)
        return [row / largest if largest > 0 else row for row in self.rewards]


def token_rewards(
    policy: Any,
    reference: Any,
    prompts: Rows,
    completions: Rows,
    beta: float = 0.1,
    *,
    tokenizer: Any = None,
    reference_tokenizer: Any = None,
    end: bool = False,
    batch_size: int = 16,
) -> TokenRewards:
    r"""The reward of every token of answers (Rafailov et al., 2024, eq. 8):

        r_t = beta (log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t))

    Log-probabilities are taken in float32, of float64 logits in float64. Log-probabilities that come out of bfloat16
    models have noise of some hundredths, times beta: more than real values where beta is small.

    Args:
        policy: a causal language model of transformers, tuned on preferences.
        reference: what it was tuned from. A model; a folder or hub id; None where ``policy`` is a PEFT model, for its
            base; or log-probabilities that were logged, a sequence of numbers for each answer.
        prompts: B texts, or B sequences of token ids (special tokens among them).
        completions: B answers, as texts that go on from the prompts or as token ids.
        beta: strength of the KL penalty that the policy was tuned with, above 0.
        tokenizer: the policy's; needed for texts.
        reference_tokenizer: the reference's, to be compared with it.
        end: whether to add the end-of-sequence token to answers, as training does; needs ``tokenizer``.
        batch_size: rows of a forward pass.

    Raises:
        InputError: beta that isn't positive, rows that don't fit together or the model, a text whose answer shares a
            token with its prompt, other vocabularies.

    References:
        Rafael Rafailov, Joey Hejna, Ryan Park, Chelsea Finn. From r to Q*: Your Language Model is Secretly a
        Q-Function. COLM 2024, arXiv:2404.12358.
    """
    positive("beta", beta)
    asked, answers = tokenized(prompts, completions, tokenizer, end)
    ours = log_probabilities(policy, asked, answers, batch_size)
    theirs = _reference_log_probabilities(policy, reference, asked, answers, batch_size, tokenizer, reference_tokenizer)
    rewards, defined = [], []
    for mine, other in zip(ours, theirs, strict=True):
        known = mine.isfinite() & other.isfinite()  # -inf less -inf is nothing
        rewards.append(torch.where(known, beta * (mine - other), 0.0))
        defined.append(known)
    return TokenRewards(asked, answers, rewards, ours, theirs, defined, float(beta))


def tokenized(
    prompts: Rows, completions: Rows, tokenizer: Any = None, end: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and answers; texts are read together, as in training.

    Raises:
        InputError: rows of different number or kind, an empty answer, or a token that spans prompt and answer.
    """
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        raise InputError("completions", completions, "a sequence of as many answers as there are prompts")
    if not len(prompts):
        raise InputError("prompts", prompts, "at least one prompt")
    if end and (tokenizer is None or tokenizer.eos_token_id is None):
        raise InputError("end", end, "false where there is no tokenizer with an end-of-sequence token")
    asked: list[list[int]] = []
    answers: list[list[int]] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(prompt, str) and isinstance(completion, str):
            if tokenizer is None:
                raise InputError("tokenizer", None, "the policy's tokenizer where prompts are texts")
            first = list(tokenizer(prompt, verbose=False)["input_ids"])
            whole = list(tokenizer(prompt + completion, verbose=False)["input_ids"])
            if whole[: len(first)] != first:
                text = f"{prompt[-20:]}|{completion[:20]}"
                allowed = "a text in which no token spans the end of the prompt (end prompts where tokens end)"
                raise InputError(f"completions[{i}]", text, allowed)
            rest = whole[len(first) :]
        elif isinstance(prompt, str) or isinstance(completion, str):
            raise InputError(f"completions[{i}]", completion, "a text where the prompt is one, else token ids")
        else:
            first, rest = [*map(int, prompt)], [*map(int, completion)]  # type: ignore[arg-type]
        if end and rest[-1:] != [tokenizer.eos_token_id]:
            rest.append(tokenizer.eos_token_id)
        if not rest:
            raise InputError(f"completions[{i}]", completion, "an answer of at least one token")
        if not first:
            raise InputError(f"prompts[{i}]", prompt, "a prompt of at least one token")
        asked.append(first)
        answers.append(rest)
    return asked, answers


@torch.no_grad()
def log_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int = 16
) -> list[Tensor]:
    """log p of each token of each answer behind its prompt: B tensors (n_b,) on the CPU.

    Raises:
        InputError: a row longer than the model takes, or a token that it doesn't have.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError("batch_size", batch_size, "a whole number of at least 1")
    config = model.config.get_text_config()
    rows = [[*a, *b] for a, b in zip(prompts, completions, strict=True)]
    longest, limit = max(map(len, rows)), getattr(config, "max_position_embeddings", None) or math.inf
    if longest > limit:
        raise InputError("completions", longest, f"at most {limit} tokens long with the prompt (the model's positions)")
    highest = max(map(max, rows))
    if highest >= config.vocab_size or min(map(min, rows)) < 0:
        raise InputError("completions", highest, f"token ids from 0 to {config.vocab_size - 1}")
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    training = model.training
    model.eval()
    try:
        for at in range(0, len(rows), batch_size):
            batch = order[at : at + batch_size]
            ids, mask = right_padded([rows[i] for i in batch], model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for b, i in enumerate(batch):  # one answer at a time in float32: all at once are gigabytes
                said = slice(len(prompts[i]), len(rows[i]))
                found[i] = of_tokens(logits[b, said.start - 1 : said.stop - 1], ids[b, said]).cpu()
    finally:
        model.train(training)
    return found


def of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax of (..., T, V) logits at (..., T) tokens, in float32 or float64."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def right_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Rows as ids (B, T) and attention mask (B, T): what comes last can't be seen from before."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


@contextmanager
def without_adapter(policy: Any) -> Iterator[Any]:
    """A PEFT model as its base.

    Raises:
        InputError: it isn't one.
    """
    if not hasattr(policy, "disable_adapter"):
        allowed = "a model, a folder, a hub id or log-probabilities (the policy has no adapter)"
        raise InputError("reference", None, allowed)
    with policy.disable_adapter():
        yield policy


def positive(parameter: str, value: Any) -> float:
    """``value`` as a float.

    Raises:
        InputError: not a finite number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(parameter, value, "a number above 0")
    return float(value)


def joint_logratio(parts: Sequence[tuple[Any, Any, Mapping[str, Tensor]]]) -> Tensor:
    r"""Log-ratio of policies that work in a chain, as a generator whose text a renderer reads:

        log prod_i pi_i(y_i | x_i) / ref_i(y_i | x_i) = sum_i sum_t log pi_i(y_it | .) - log ref_i(y_it | .)

    One preference on the final output then trains all of them, by the plain DPO loss on this sum (section 5.3).

    Args:
        parts: for each model (policy, reference, tokens); tokens are tensors (B, T) ``input_ids``, ``attention_mask``
            and ``completion_mask``, as TRL's collator makes them. Row b of every part belongs to chain b.

    Returns:
        Tensor: (B,), with gradients for the policies.

    Raises:
        InputError: no part, a part without these tensors, or parts with other numbers of rows.
    """
    if not parts:
        raise InputError("parts", parts, "at least one (policy, reference, tokens)")
    sums = []
    for i, (policy, reference, tokens) in enumerate(parts):
        lacking = [n for n in ("input_ids", "attention_mask", "completion_mask") if n not in tokens]
        if lacking:
            raise InputError(f"parts[{i}]", sorted(tokens), f"tokens with {lacking[0]}")
        same_size(policy, reference, f"parts[{i}]")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        answered = tokens["completion_mask"][:, 1:].bool()
        ours = of_tokens(policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], ids[:, 1:])
        with torch.no_grad():
            theirs = of_tokens(
                reference(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], ids[:, 1:]
            )
        sums.append(torch.where(answered, ours - theirs, 0.0).sum(1))
        if len(sums[i]) != len(sums[0]):
            raise InputError(f"parts[{i}]", len(sums[i]), f"as many rows as the first part has ({len(sums[0])})")
    return torch.stack(sums).sum(0)


class ImplicitReward:
    r"""Reward function of TRL's GRPO and RLOO trainers: :math:`\sum_t \hat r_t` of each completion.

    ::

        GRPOTrainer(model, reward_funcs=[ImplicitReward(policy, reference, tokenizer, beta=0.1)], ...)

    Args:
        policy, reference, beta: as in :func:`token_rewards`.
        tokenizer: the policy's; conversations are read with its chat template.
        batch_size: rows of a forward pass.
    """

    def __init__(self, policy: Any, reference: Any, tokenizer: Any, beta: float = 0.1, *, batch_size: int = 16) -> None:
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.beta, self.batch_size = positive("beta", beta), batch_size
        self.__name__ = "implicit_reward"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """One number a completion. ``completion_ids``, which the trainers give, spare reading the texts again."""
        ids = kwargs.get("completion_ids")
        if len(prompts) and not isinstance(prompts[0], str):
            template = self.tokenizer.apply_chat_template
            asked = [list(template(p, add_generation_prompt=True, tokenize=True, return_dict=False)) for p in prompts]
            if ids is None:
                whole = [
                    list(template([*p, *c], tokenize=True, return_dict=False))
                    for p, c in zip(prompts, completions, strict=True)
                ]
                ids = [row[len(first) :] for row, first in zip(whole, asked, strict=True)]
            prompts = asked
        elif ids is not None:
            prompts = [list(self.tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts]
        found = token_rewards(
            self.policy,
            self.reference,
            prompts,
            completions if ids is None else [list(map(int, row)) for row in ids],
            self.beta,
            tokenizer=self.tokenizer,
            batch_size=self.batch_size,
        )
        return [float(value) for value in found.totals]


def _reference_log_probabilities(
    policy: Any,
    reference: Any,
    prompts: list[list[int]],
    completions: list[list[int]],
    batch_size: int,
    tokenizer: Any,
    reference_tokenizer: Any,
) -> list[Tensor]:
    if reference is None:
        with without_adapter(policy) as base:
            return log_probabilities(base, prompts, completions, batch_size)
    if isinstance(reference, (str, Path)):
        reference, reference_tokenizer = load_language_model(reference, "reference")
    if not callable(reference):  # logged
        logged = [torch.as_tensor(row) for row in reference]
        logged = [row if row.dtype == torch.float64 else row.float() for row in logged]
        if [tuple(row.shape) for row in logged] != [(len(row),) for row in completions]:
            shapes = [tuple(row.shape) for row in logged]
            raise InputError("reference", shapes, "a log-probability for every token of every answer")
        if any(bool((row > 1e-6).any() or row.isnan().any()) for row in logged):
            raise InputError("reference", "numbers above 0, or NaN", "log-probabilities, at most 0")
        return logged
    if tokenizer is not None and reference_tokenizer is not None:
        same_vocabulary(tokenizer, reference_tokenizer, "reference")
    same_size(policy, reference, "reference")
    return log_probabilities(reference, prompts, completions, batch_size)
