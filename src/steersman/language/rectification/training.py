r"""Offline SARSA: how likely a text that begins so ends undesired, learned from finished texts.

A trajectory is a prompt and its continuation y_1..y_T with one reward R in [-1, 0] at the end (-1: undesired). States
are the tokens so far, actions the next token, and the value of a token under the model that wrote the texts obeys

.. math::
    Q_D(s_t, y_{t+1}) = \gamma\, Q_D(s_{t+1}, y_{t+2}) \text{ in expectation,} \qquad Q_D(s_{T-1}, y_T) = R .

The loss is the squared distance to these targets, taken from a slowly following head Q̄ and clipped to [-1, 0],

.. math::
    L = \frac{1}{N} \sum_t \bigl( Q(s_t, y_{t+1}) - \mathrm{clip}(\gamma \bar Q(s_{t+1}, y_{t+2}), -1, 0) \bigr)^2 ,
    \qquad \bar Q \leftarrow (1 - \tau) \bar Q + \tau Q \text{ after every optimizer step.}

One-step targets carry the end backwards a token at a time. Targets of SARSA(λ) carry it further at once and have the
same fixed point, see :func:`sarsa_targets`; λ = 0 is the published method.

It evaluates the model that wrote, and no better policy: with the maximum over next tokens in the target (Q-learning)
the value would be 0 wherever one good continuation exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback

from steersman.errors import InputError
from steersman.language.rectification.q_model import QModel


def sarsa_targets(
    target_values: Tensor, counted: Tensor, reward: Tensor, gamma: float = 1.0, lam: float = 0.0
) -> Tensor:
    r"""What each taken action's value should be, (B, A): R at the last, and before it

    .. math:: G_t = \mathrm{clip}(\gamma [(1 - \lambda)\, \bar Q(s_{t+1}, a_{t+1}) + \lambda\, G_{t+1}], -1, 0) .

    Args:
        target_values: Q̄(s_t, a_t) of the taken actions, (B, A).
        counted: which of them are real actions, (B, A): one run in each row, padding on either side.
        reward: R in [-1, 0], (B,).
        gamma: discount, in (0, 1].
        lam: λ in [0, 1]: 0 is the published one-step target, 1 the discounted reward itself.
    """
    last = counted & ~F.pad(counted[:, 1:], (0, 1))
    target, reward = torch.zeros_like(target_values), reward.to(target_values)
    following = torch.zeros_like(reward)
    for t in reversed(range(target.shape[1])):
        if t + 1 < target.shape[1]:
            following = (1 - lam) * target_values[:, t + 1] + lam * target[:, t + 1]
        target[:, t] = torch.where(last[:, t], reward, (gamma * following).clamp(-1, 0))
    return target


def sarsa_loss(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    reward: Tensor,
    prompt_length: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.0,
) -> Tensor:
    """The mean squared distance of the taken actions' values to their targets.

    Args:
        model: a :class:`QModel` with a target head (or a wrapper of one).
        input_ids, attention_mask: whole texts, (B, T), padded on either side.
        reward: of each text, (B,).
        prompt_length: how many tokens of each text are a prompt that nobody chose, (B,); None counts all but the first.
        gamma, lam: of the targets.
    """
    mask = attention_mask.bool()
    # The action at column t is the token at t + 1.
    actions = F.pad(input_ids[:, 1:], (0, 1)).clamp(min=0)
    counted = F.pad(mask[:, :-1] & mask[:, 1:], (0, 1))
    if prompt_length is not None:
        place = mask.long().cumsum(1)  # of the state's last token in its text, from 1
        counted = counted & (place >= prompt_length.to(place)[:, None])
    # What padding holds must not even reach the embedding.
    ids = input_ids.masked_fill(~mask, 0)
    output = model(input_ids=ids, attention_mask=attention_mask, actions=actions.masked_fill(~counted, 0))
    target = sarsa_targets(output.target_values, counted, reward, gamma, lam)
    errors = (output.values - target).square().masked_fill(~counted, 0.0)
    return errors.sum() / counted.sum().clamp(min=1)


def collate(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Rows ``input_ids``, ``reward``, and optionally ``attention_mask`` and ``prompt_length``, as one padded batch."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], filling: int) -> list[int]:
        gap = [filling] * (width - len(values))
        return [*gap, *values] if side == "left" else [*values, *gap]

    batch = {
        "input_ids": torch.tensor([padded(list(row["input_ids"]), pad_token_id) for row in rows]),
        "attention_mask": torch.tensor(
            [padded(list(row.get("attention_mask", [1] * len(row["input_ids"]))), 0) for row in rows]
        ),
        "reward": torch.tensor([float(row["reward"]) for row in rows]),
    }
    if all("prompt_length" in row for row in rows):
        batch["prompt_length"] = torch.tensor([int(row["prompt_length"]) for row in rows])
    return batch


class DeadEndTrainer(Trainer):
    r"""Trainer of transformers that learns a :class:`QModel` by offline SARSA.

    ::

        arguments = TrainingArguments("./runs", learning_rate=3e-4)
        DeadEndTrainer(QModel.from_trunk("gpt2"), arguments, train_dataset=rows).train()

    A dataset has columns ``input_ids``, ``attention_mask``, ``reward`` (in [-1, 0], of the finished text) and, where
    texts have prompts that nobody chose, ``prompt_length`` (their tokens). Everything else of ``Trainer`` is as ever:
    accelerators, accumulation, checkpoints (they hold the target head too).

    Args:
        model: the value model.
        args: transformers' TrainingArguments. As published: 3 epochs, batches of 64, learning rate 3e-4, linear
            schedule with 500 warm-up steps, no weight decay.
        gamma: discount, in (0, 1].
        lam: λ in [0, 1] of the targets; 0 as published. Above 0 the end is felt many tokens earlier at once, which
            small data need (our addition: SARSA(λ) has the same fixed point).
        tau: weight of the head in the target head's updates, in (0, 1].
        include_prompt: whether the prompt's tokens are actions too, as in the published code. Prompts are chosen, often
            by how bad they are, and their tokens' values would be those of the choice.
        kwargs: as for ``Trainer``.

    Raises:
        InputError: gamma or tau out of range, a model that is no QModel, or, on the way, a reward outside [-1, 0].
    """

    def __init__(
        self,
        model: QModel,
        args: Any = None,
        *,
        gamma: float = 1.0,
        lam: float = 0.0,
        tau: float = 0.1,
        include_prompt: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, QModel):
            raise InputError("model", type(model).__name__, "a QModel")
        for name, value in (("gamma", gamma), ("tau", tau)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise InputError(name, value, "a number in (0, 1]")
        if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam <= 1:
            raise InputError("lam", lam, "a number from 0 to 1")
        self.gamma, self.lam, self.tau, self.include_prompt = gamma, lam, tau, include_prompt
        model.begin_target()
        pad = model.config.pad_token_id or 0
        kwargs.setdefault("data_collator", lambda rows: collate(rows, pad))
        super().__init__(model, args, **kwargs)
        self.args.remove_unused_columns = False  # the loss reads columns that no forward names
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Polyak(tau))

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The SARSA loss of a batch."""
        reward = inputs["reward"]
        if not bool(((reward >= -1) & (reward <= 0)).all()):
            bad = reward[~((reward >= -1) & (reward <= 0))][0].item()
            raise InputError("reward", bad, "a number in [-1, 0]")
        prompt = None if self.include_prompt else inputs.get("prompt_length")
        loss = sarsa_loss(model, inputs["input_ids"], inputs["attention_mask"], reward, prompt, self.gamma, self.lam)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The loss alone: values have no labels beside it."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


class _Polyak(TrainerCallback):
    def __init__(self, tau: float) -> None:
        self.tau = tau

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        while not isinstance(model, QModel):  # DistributedDataParallel and torch.compile wrap it
            model = getattr(model, "_orig_mod", None) or model.module
        model.follow(self.tau)
