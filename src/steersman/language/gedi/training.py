r"""GeDi training: a class-conditional language model that is a good classifier by Bayes' rule.

With the mean negative log-likelihood of a text of T tokens under each code,

.. math:: \ell_c = -\frac{1}{T} \sum_{t=1}^{T} \log P_\theta(x_t \mid x_{<t}, c),

    L = \lambda \underbrace{\ell_{y}}_{L_g} + (1 - \lambda) \underbrace{\bigl(-\log \mathrm{softmax}_c(-\alpha \ell_c +
        b_c)_y\bigr)}_{L_d}

where y is the text's class, and the scale :math:`\alpha` and the biases b are learned with the model. :math:`\lambda =
1` is a plain class-conditional language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from steersman.errors import InputError
from steersman.language.gedi.codes import ControlCodes


def hybrid_loss(
    nll: Tensor, labels: Tensor, gen_weight: float, logit_scale: Tensor | float = 1.0, bias: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """The hybrid loss, and the class logits.

    Args:
        nll: mean negative log-likelihood of each text under each code, (N, K).
        labels: y, (N,).
        gen_weight: lambda, 0 to 1.
        logit_scale, bias: alpha, and b (K,).

    Returns:
        The loss, a number, and the class logits, (N, K).
    """
    logits = -logit_scale * nll + bias
    generative = nll.gather(1, labels[:, None]).mean()
    return gen_weight * generative + (1 - gen_weight) * F.cross_entropy(logits, labels), logits


class GenerativeClassifier(nn.Module):
    """A causal language model with its scale and biases, as :class:`GeDiTrainer` trains it.

    Args:
        guide: the language model.
        classes: K.
        gen_weight: lambda.
        learn_scale, learn_bias: whether alpha and b are trained; else they stay 1 and 0.
    """

    def __init__(self, guide: Any, classes: int, gen_weight: float, learn_scale: bool, learn_bias: bool) -> None:
        super().__init__()
        self.guide, self.gen_weight = guide, gen_weight
        self.logit_scale = nn.Parameter(torch.ones(()), requires_grad=learn_scale)
        self.bias = nn.Parameter(torch.zeros(classes), requires_grad=learn_bias)

    def nll(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean negative log-likelihood of all but each row's first token, (N, K).

        Args:
            input_ids: code and text, padded on the right, (N, K, T).
            attention_mask: 1 where there is a token.
        """
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        counted = mask[:, 1:].bool()
        # Logits of what is padding are never made floats: most rows are shorter than the longest.
        logits = self.guide(ids, attention_mask=mask, use_cache=False).logits[:, :-1][counted].float()
        each = torch.zeros(counted.shape, dtype=torch.float32, device=ids.device)
        each = each.masked_scatter(counted, F.cross_entropy(logits, ids[:, 1:][counted], reduction="none"))
        return (each.sum(1) / counted.sum(1)).unflatten(0, input_ids.shape[:2])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        nll = self.nll(input_ids, attention_mask)
        loss, logits = hybrid_loss(nll, labels, self.gen_weight, self.logit_scale, self.bias)
        return {"loss": loss, "logits": logits, "nll": nll}


class Coded:
    """Makes a batch of texts under all codes.

    With a code for each value, a text stands once under each, and its class is its own value. With keywords it stands
    under true and false twice: with its own word (class true), and with another trained value's word, drawn evenly
    (class false).

    Args:
        codes: what the codes are.
        tokenizer: where keywords are words of, and what pads.
        seed: of the other words.
    """

    def __init__(self, codes: ControlCodes, tokenizer: Any, seed: int = 0) -> None:
        self.codes, self.pad = codes, tokenizer.pad_token_id or 0
        self.generator = torch.Generator().manual_seed(seed)
        self.openings: list[list[list[int]]] = []
        if codes.keywords:
            self.openings = [[codes.opening(v, true, tokenizer) for true in (True, False)] for v in codes.values]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows: list[list[int]] = []
        labels: list[int] = []
        for example in examples:
            ids, label = list(example["input_ids"]), int(example["label"])
            if not self.codes.keywords:
                rows += [[code, *ids] for code in self.codes.ids]
                labels.append(label)
                continue
            away = int(torch.randint(1, len(self.openings), (), generator=self.generator))
            for value, is_so in ((label, True), ((label + away) % len(self.openings), False)):
                rows += [[*opening, *ids] for opening in self.openings[value]]
                labels.append(0 if is_so else 1)
        width = max(map(len, rows))
        ids_ = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids_)
        for i, row in enumerate(rows):
            ids_[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        shape = (len(labels), len(self.codes.ids), width)
        return {"input_ids": ids_.view(shape), "attention_mask": mask.view(shape), "labels": torch.tensor(labels)}


def tokenized(
    tokenizer: Any, texts: Sequence[str], labels: Sequence[int], classes: int, length: int = 192
) -> list[dict[str, Any]]:
    """Texts as :class:`GeDiTrainer` takes them: what the tokenizer puts in front, at most ``length`` tokens, and the
    end of the sequence where the text is whole.

    Args:
        labels: the index of each text's value, 0 to ``classes`` - 1.

    Raises:
        InputError: a label out of range, or an empty text.
    """
    end = tokenizer.eos_token_id
    found = []
    for text, label in zip(texts, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
            raise InputError("labels", label, f"whole numbers from 0 to {classes - 1}")
        if not isinstance(text, str) or not text.strip():
            raise InputError("texts", text, "texts that aren't empty")
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if end is not None and ids[-1] != end:
            ids.append(end)
        found.append({"input_ids": ids[:length], "label": label})
    return found


class GeDiTrainer(Trainer):
    """transformers' ``Trainer`` with the hybrid loss. ::

        data = tokenized(tokenizer, texts, labels, classes=2)
        codes = ControlCodes.choose(tokenizer, "sentiment", ["negative", "positive"], "positive", keywords=False)
        trainer = GeDiTrainer(guide, args, codes, data, processing_class=tokenizer)
        trainer.train()
        trainer.save_model("my-guide")           # GeDi.from_pretrained("my-guide")

    Classes are drawn evenly, however many texts each has: Bayes' rule takes them for equally likely.

    Args:
        guide: the causal language model to train, in float32 or under autocast.
        args: transformers' arguments.
        codes: control codes among the tokens that there are.
        train_dataset, eval_dataset: from :func:`tokenized`.
        processing_class: the tokenizer.
        gen_weight: lambda; the authors' script for topics has 0.8, and 1 is a plain class-conditional model.
        learn_scale: learn alpha.
        learn_bias: learn b.
        options: of ``Trainer``.

    Raises:
        InputError: lambda out of range, no text of some class, or a label that no code has.
    """

    def __init__(
        self,
        guide: Any,
        args: TrainingArguments,
        codes: ControlCodes,
        train_dataset: Sequence[Mapping[str, Any]],
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        gen_weight: float = 0.6,
        learn_scale: bool = True,
        learn_bias: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(gen_weight, bool) or not isinstance(gen_weight, (int, float)) or not 0 <= gen_weight <= 1:
            raise InputError("gen_weight", gen_weight, "a number from 0 to 1")
        self.codes = codes
        classes = len(codes.values)
        self.per_class = torch.bincount(torch.tensor([row["label"] for row in train_dataset]), minlength=classes)
        if len(self.per_class) > classes:
            raise InputError("labels", len(self.per_class) - 1, f"whole numbers from 0 to {classes - 1}")
        for value, count in zip(codes.values, self.per_class.tolist(), strict=True):
            if not count:
                raise InputError("texts", f"none with {codes.column}={value}", "at least one of each value")
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        model = GenerativeClassifier(guide, len(codes.ids), float(gen_weight), learn_scale, learn_bias)
        super().__init__(
            model,
            args,
            Coded(codes, processing_class, args.seed),
            train_dataset,  # type: ignore[arg-type]
            eval_dataset,  # type: ignore[arg-type]
            processing_class=processing_class,
            compute_metrics=_measured,
            **options,
        )

    @property
    def classifier(self) -> GenerativeClassifier:
        return self.accelerator.unwrap_model(self.model)  # type: ignore[no-any-return]

    def learned_codes(self) -> ControlCodes:
        """The codes with the scale and the biases as they are now."""
        found = self.classifier
        bias = found.bias.tolist() if found.bias.requires_grad else []
        return self.codes.learned(found.logit_scale.item(), bias)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        weights = [1 / float(self.per_class[row["label"]]) for row in data]
        return WeightedRandomSampler(weights, len(weights), generator=torch.Generator().manual_seed(self.args.seed))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """An ordinary folder of transformers, and the codes."""
        folder = Path(output_dir or self.args.output_dir or ".")
        save_guide(self.classifier.guide, self.processing_class, self.learned_codes(), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        codes = ControlCodes.load(resume_from_checkpoint)
        guide, _ = ControlCodes.guide(resume_from_checkpoint)
        self.classifier.guide.load_state_dict(guide.state_dict())
        with torch.no_grad():
            self.classifier.logit_scale.fill_(codes.logit_scale)
            if codes.bias:
                self.classifier.bias.copy_(torch.tensor(codes.bias))


def save_guide(guide: Any, tokenizer: Any, codes: ControlCodes, folder: str | Path) -> None:
    """A guide as :meth:`GeDi.from_pretrained` reads it."""
    guide.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    codes.save(folder)


def _measured(predictions: Any) -> dict[str, float]:
    """Accuracy by Bayes' rule, and the mean negative log-likelihood under the true code."""
    (logits, nll), labels = predictions.predictions, predictions.label_ids
    true = nll[range(len(labels)), labels]
    return {"accuracy": float((logits.argmax(1) == labels).mean()), "nll": float(true.mean())}
