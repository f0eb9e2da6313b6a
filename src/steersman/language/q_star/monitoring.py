r"""How implicit rewards drift while a policy is trained on preferences.

The mean implicit reward of a law c of answers is a difference of divergences,

.. math:: \mathbb E_c\Big[\beta \log \frac{\pi}{\pi_\mathrm{ref}}\Big]
          = \beta\,[\mathrm{KL}(c \,\|\, \pi_\mathrm{ref}) - \mathrm{KL}(c \,\|\, \pi)]
          \le \beta\, \mathrm{KL}(c \,\|\, \pi_\mathrm{ref}).

On the reference's own answers it is :math:`-\beta\,\mathrm{KL}(\pi_\mathrm{ref}\|\pi)`, below 0 as soon as the policy
has moved. So where the reference was tuned on the chosen answers to the end (c is the reference's law), their reward
must fall; where it was not, it may rise first, up to the bound. The fall of the chosen is a tendency, not a theorem.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from steersman.errors import InputError
from steersman.language.q_star.rewards import log_probabilities, right_padded, without_adapter


@dataclass(frozen=True)
class Drift:
    r"""Implicit rewards at one step of training, means over answers.

    Args:
        step: of the optimizer.
        chosen, rejected: :math:`\sum_t \hat r_t` of the pairs' answers.
        sampled: the same of answers that the reference wrote: estimates
            :math:`-\beta\,\mathrm{KL}(\pi_\mathrm{ref}\|\pi)`.
        minus_beta_kl: that number again, from :math:`\sum_t \mathrm{KL}(\pi_\mathrm{ref}(\cdot|s_t)\|\pi(\cdot|s_t))`
            along these answers, which varies less.
        chosen_log_likelihood: :math:`\sum_t \log \pi` of chosen answers.
    """

    step: int
    chosen: float
    rejected: float
    sampled: float
    minus_beta_kl: float
    chosen_log_likelihood: float


class RewardDriftCallback(TrainerCallback):
    r"""Measures :class:`Drift` whenever TRL's ``DPOTrainer`` logs, on fixed pairs and fixed answers of the reference.

    ::

        trainer = DPOTrainer(model, ref_model, args, train_dataset=..., eval_dataset=held_out)
        trainer.add_callback(RewardDriftCallback(trainer))

    Numbers go to the trainer's log as ``drift/chosen`` and so on (and so to its trackers), and to ``history``. The
    reference is the trainer's, or the policy without its adapter.

    Args:
        trainer: the DPO trainer.
        pairs: rows of the evaluation data (or, without any, of the training data) to watch, from the first.
        new_tokens: the longest answer that the reference writes.
        seed: of these answers.

    Raises:
        InputError: a number out of range, or a trainer without tokenized pairs.

    References:
        Rafailov et al., From r to Q*, section 5.3: the decline of chosen likelihoods.
    """

    def __init__(self, trainer: Any, *, pairs: int = 32, new_tokens: int = 64, seed: int = 0) -> None:
        for name, value in (("pairs", pairs), ("new_tokens", new_tokens)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise InputError(name, value, "a whole number of at least 1")
        data = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        if not {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(getattr(data, "column_names", None) or ()):
            raise InputError("trainer", type(trainer).__name__, "a DPOTrainer with pairs in memory")
        rows = [data[i] for i in range(min(pairs, len(data)))]
        self.trainer = trainer
        self.prompts = [row["prompt_ids"] for row in rows]
        self.answers = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        self.new_tokens, self.seed = new_tokens, seed
        self.history: list[Drift] = []
        self._reference: list[Tensor] | None = None
        self._samples: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the reference write, and measures before the first step."""
        if self._reference is None:
            with self._as_reference() as reference:
                self._reference = log_probabilities(reference, [*self.prompts] * 2, self.answers)
                self._samples = sampled(
                    reference, self.prompts, self.new_tokens, self.trainer.processing_class, self.seed
                )
        self._measure(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Measures, once a step."""
        ours = any(name.startswith("drift/") for name in logs or ())
        if not ours and self._reference is not None and self.history[-1].step != state.global_step:
            self._measure(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures the result."""
        if self.history[-1].step != state.global_step:
            self._measure(state.global_step)

    @torch.no_grad()
    def _measure(self, step: int) -> None:
        assert self._reference is not None
        policy, beta, n = self.trainer.model, self.trainer.beta, len(self.prompts)
        ours = log_probabilities(policy, [*self.prompts] * 2, self.answers)
        rewards = [beta * float((a - b).sum()) for a, b in zip(ours, self._reference, strict=True)]
        kl, ratios = self._divergence(policy)
        found = Drift(
            step,
            sum(rewards[:n]) / n,
            sum(rewards[n:]) / n,
            beta * sum(ratios) / n,
            -beta * sum(kl) / n,
            sum(float(row.sum()) for row in ours[:n]) / n,
        )
        self.history.append(found)
        names = ("chosen", "rejected", "sampled", "minus_beta_kl", "chosen_log_likelihood")
        self.trainer.log({f"drift/{name}": getattr(found, name) for name in names})

    def _divergence(self, policy: Any) -> tuple[list[float], list[float]]:
        """Of each answer that the reference wrote: the sum of KL(ref || policy) by token, and the log-ratio."""
        kl: list[float] = []
        ratios: list[float] = []
        training = policy.training
        policy.eval()
        for at in range(0, len(self.prompts), 16):
            prompts, answers = self.prompts[at : at + 16], self._samples[at : at + 16]
            ids, mask = right_padded([[*a, *b] for a, b in zip(prompts, answers, strict=True)], policy.device)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            ours = policy(**inputs).logits
            with self._as_reference() as reference:
                theirs = reference(**inputs).logits
            for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                # One answer at a time in float32: all at once are gigabytes.
                said = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
                q, p = (logits[b, said].float().log_softmax(-1) for logits in (ours, theirs))
                kl.append(float((p.exp() * (p - q)).nansum()))  # where p is 0, nothing
                ratios.append(float((q - p).gather(-1, ids[b, len(prompt) :][: len(answer), None]).sum()))
        policy.train(training)
        return kl, ratios

    def _as_reference(self) -> Any:
        if self.trainer.ref_model is not None:
            return nullcontext(self.trainer.ref_model)
        policy = self.trainer.model
        if "ref" in getattr(policy, "peft_config", {}):  # TRL keeps a copy of an adapter that it trains further
            return _with_adapter(policy, "ref")
        return without_adapter(policy)


@contextmanager
def _with_adapter(policy: Any, name: str) -> Iterator[Any]:
    active = policy.active_adapter
    policy.set_adapter(name)
    try:
        yield policy
    finally:
        policy.set_adapter(active)


@torch.no_grad()
def sampled(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    tokenizer: Any,
    seed: int,
    batch_size: int = 64,
    temperature: float = 1.0,
) -> list[list[int]]:
    """An answer of the model's own law (at temperature 1) to each prompt, up to and with the end-of-sequence token.

    An answer is cut where the model has no more positions.

    Raises:
        InputError: a prompt that leaves no position.
    """
    end = tokenizer.eos_token_id
    pad = next((t for t in (tokenizer.pad_token_id, end, tokenizer.bos_token_id) if t is not None), 0)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[int]] = [[]] * len(prompts)
    training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            width = max(len(prompts[i]) for i in batch)
            limit = getattr(model.config, "max_position_embeddings", None) or width + new_tokens
            if width >= limit:
                raise InputError("prompts", f"a prompt of {width} tokens", f"fewer than the model's {limit} positions")
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros_like(ids)
            for b, i in enumerate(batch):
                ids[b, width - len(prompts[i]) :] = torch.as_tensor(prompts[i])
                mask[b, width - len(prompts[i]) :] = 1
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=temperature,
                max_new_tokens=min(new_tokens, limit - width),
                eos_token_id=end,
                pad_token_id=pad,
            )
            for i, row in zip(batch, out[:, width:].tolist(), strict=True):
                found[i] = row[: row.index(end) + 1] if end in row else row
    model.train(training)
    return found
