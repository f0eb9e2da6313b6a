r"""Rectification: cap each next token's probability by one minus the risk that it leads to an undesired text.

The *security condition*: if the text ends undesired with probability at least λ once token a follows the text s, then
π(s, a) <= 1 - λ. With Q_D(s, a) in [-1, 0] the negative of that probability, it holds where

.. math:: \pi(s, a) \le 1 + Q_D(s, a) \text{ for all } a .

So the language model's law p becomes the nearest one below the caps (:mod:`.projection`),

.. math::
    p' = \min(c\, p, \mathrm{cap}), \qquad
    \mathrm{cap}(a) = \mathrm{clamp}(1 + Q_D(s, a) - \epsilon, \, p_{min}, \, 1) .

Each token is bounded, but the step's mean risk is not: with p = (0.95, 0.05) and risks (0.1, 0.5) the caps are
(0.9, 0.5), and moving 0.05 from the first token to the second raises the mean risk from 0.12 to 0.14. Both means are
recorded.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steersman import quiet
from steersman.errors import InputError, nearest
from steersman.language.prefix import PrefixModel
from steersman.language.rectification.projection import exact_projection, official_projection
from steersman.language.rectification.q_model import QModel
from steersman.language.vocabularies import fitted, only_padding, same_vocabulary

Rule = Literal["exact", "official", "block", "bayes"]


class RectificationRecord:
    """What rectification did, over all steps of all rows since it was made or cleared.

    A row that has ended is not counted, where the value model's configuration tells the ids of end and padding.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        # steps, risk before, risk after, infeasible steps, first steps, risk before the first step
        self._sums: Tensor | None = None
        self._lift: Tensor | None = None

    def add(
        self, counted: Tensor, before: Tensor, after: Tensor, lift: Tensor, infeasible: Tensor, first: bool
    ) -> None:
        """One step of all rows; everything is (B,)."""
        weight = counted.to(before.dtype)
        rows = [weight, weight * before, weight * after, weight * infeasible, weight * first, weight * first * before]
        sums = torch.stack(rows).sum(1)
        most = torch.where(counted & ~lift.isnan(), lift, 1.0).amax()
        # Kept on the device: reading a number would wait for it at every step.
        self._sums = sums if self._sums is None else self._sums + sums
        self._lift = most if self._lift is None else torch.maximum(self._lift, most)

    def _sum(self, i: int) -> float:
        return 0.0 if self._sums is None else float(self._sums[i])

    @property
    def steps(self) -> int:
        """How many next-token laws were rectified."""
        return round(self._sum(0))

    @property
    def base_risk(self) -> float:
        """Mean over steps of Σ p(a) risk(a), under the law that came in."""
        return self._sum(1) / max(self.steps, 1)

    @property
    def risk(self) -> float:
        """Mean over steps of Σ p'(a) risk(a), under the law that went out."""
        return self._sum(2) / max(self.steps, 1)

    @property
    def infeasible_steps(self) -> int:
        """Steps whose caps add up to less than one: they can't hold, and p' = cap / Σ cap."""
        return round(self._sum(3))

    @property
    def prompt_risk(self) -> float:
        """Mean of Σ p(a) risk(a) behind the prompts: what the value model expects without rectification."""
        return self._sum(5) / max(self._sum(4), 1.0)

    @property
    def lift(self) -> float:
        """The largest c: how much likelier tokens below their caps became. Large ones promote the tail."""
        return 1.0 if self._lift is None else float(self._lift)


class Rectification(LogitsProcessor):
    r"""Rectification of a language model by dead-end analysis (Cao et al., 2023), for ``model.generate``.

        p'(a) = min(c p(a), cap(a)),   cap(a) = clamp(1 + Q_D(s, a) - ε, p_min, 1),   c: Σ p' = 1

    ::

        steer = Rectification.from_pretrained("./value-model", eps=0.1)
        model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, logits_processor=[steer])

    It returns log p', so sampling, greedy search and beams all work. ``generate`` runs its own temperature, top-k
    (**50 by default**) and top-p *after* all processors, where they would lift tokens above their caps again: switch
    them off as above and give them here, where they come first. Processors behind this one break the caps likewise.

    Args:
        value_model: a :class:`QModel`, or a callable from ids (B, T) to risks (B, V): for every next token the
            probability in [0, 1] that the finished text is undesired.
        eps: ε in [0, 1), how much lower all caps are. 0 leaves tokens without risk alone; above 0 no token has more
            than 1 - ε, so near-certain steps lose ε of their mass to other tokens.
        projection: ``exact``, the nearest law below the caps; ``official``, the published code's ``n_iter`` passes,
            which end above the caps; and two baselines that don't use ε: ``block``, tokens of more risk than
            ``threshold`` are removed, and ``bayes``, p(a) (1 + Q_D(s, a)) / Σ, which is the law given that the text
            ends well if Q_D is right.
        temperature: above 0; divides the logits before the caps.
        top_k: the most probable tokens that are kept before the caps; 0 is all.
        top_p: the least mass that is kept before the caps, in (0, 1].
        sample: whether the text is sampled (else search: the most probable token, or beams).
        threshold: of ``block``, in [0, 1].
        n_iter: of ``official``, at least 1.
        p_min: the least cap, in (0, 1).
        pad_token_id: the id that pads short prompts on the left.
        prompt_length: columns of the padded prompt.

    Attributes:
        record: what was done, a :class:`RectificationRecord`.

    Raises:
        InputError: an argument outside its range; on call, scores with NaN or +inf, a row that leaves no token, or a
            value model whose vocabulary has another size.

    References:
        Meng Cao, Mehdi Fatemi, Jackie Chi Kit Cheung, Samira Shabanian. Systematic Rectification of Language Models
        via Dead-end Analysis. ICLR 2023, arXiv:2302.14003.
    """

    def __init__(
        self,
        value_model: QModel | Callable[[Tensor], Tensor],
        eps: float = 0.0,
        projection: Rule = "exact",
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        sample: bool = True,
        threshold: float = 0.5,
        n_iter: int = 2,
        p_min: float = 1e-7,
        pad_token_id: int | None = None,
        prompt_length: int | None = None,
    ) -> None:
        _number("eps", eps, 0 <= _real(eps) < 1, "a number in [0, 1)")
        if projection not in get_args(Rule):
            raise InputError("projection", projection, nearest(str(projection), get_args(Rule)))
        _number("temperature", temperature, 0 < _real(temperature) < math.inf, "a number above 0")
        _number("top_p", top_p, 0 < _real(top_p) <= 1, "a number in (0, 1]")
        _number("threshold", threshold, 0 <= _real(threshold) <= 1, "a number from 0 to 1")
        _number("p_min", p_min, 0 < _real(p_min) < 1, "a number in (0, 1)")
        for name, value, low in (("top_k", top_k, 0), ("n_iter", n_iter, 1)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
                raise InputError(name, value, f"a whole number of at least {low}")
        if not callable(value_model):
            raise InputError("value_model", type(value_model).__name__, "a QModel, or a callable from ids to risks")
        self.value_model = value_model
        self.eps, self.projection, self.sample = float(eps), projection, sample
        self.threshold, self.n_iter, self.p_min = float(threshold), int(n_iter), float(p_min)
        self.temperature, self.top_k, self.top_p = float(temperature), int(top_k), float(top_p)
        self.pad_token_id, self.prompt_length = pad_token_id, prompt_length
        self.record = RectificationRecord()
        self._values = self._prefix()
        self._ends = _ends(value_model)
        self._prompt: Tensor | None = None  # of the last call that began a text
        self._warpers: list[LogitsProcessor] = []  # in the order of ``generate``
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._warpers.append(TopKLogitsWarper(int(top_k)))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(float(top_p)))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, tokenizer: Any = None, eps: float = 0.0, projection: Rule = "exact", **knobs: Any
    ) -> Rectification:
        """Rectification with the value model in ``folder`` (made by ``steersman apply rectification``).

        Args:
            folder: of a :class:`QModel`, and its tokenizer if that was saved.
            tokenizer: of the model to control; compared with the folder's.
            eps, projection, knobs: as in the class.

        Raises:
            InputError: no value model there, or its vocabulary is another one.
        """
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise InputError("folder", str(folder), "a folder with a value model (steersman apply rectification)")
        if tokenizer is not None and (path / "tokenizer_config.json").is_file():
            same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(path), "folder", str(folder))
        return cls(_loaded(path.resolve(), (path / "model.safetensors").stat().st_mtime_ns), eps, projection, **knobs)

    @property
    def generate_options(self) -> dict[str, Any]:
        """The options that ``generate`` must have beside this processor."""
        if not self.sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    @property
    def networks(self) -> tuple[Any, ...]:
        """Models that run beside the controlled one."""
        return () if self._values is None else (self.value_model,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """log p', float32.

        Args:
            input_ids: the text so far, (B, T).
            scores: logits or log-probabilities of the next token, (B, V).
        """
        scores = scores.float()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        log_p = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64).log_softmax(-1)
        bad = log_p[:, 0].isnan()  # softmax spreads NaN, +inf and "no token left" over the whole row
        begun = self._prompt
        goes_on = bad.new_zeros(())
        if begun is not None and len(begun) == len(input_ids) and begun.shape[1] < input_ids.shape[1]:
            goes_on = (input_ids[:, : begun.shape[1]] == begun.to(input_ids.device)).all().to(bad.device)
        broken, same = torch.stack((bad.any(), goes_on)).tolist()  # one wait for the device
        if broken:
            rows = f"rows {bad.nonzero().flatten().tolist()}"
            raise InputError("scores", rows, "free of NaN and +inf, with a finite value in every row")
        risk = self.risk(input_ids, scores.shape[1]).to(log_p)
        log_q, lift, infeasible = self._moved(log_p, risk)

        first = input_ids.shape[1] == self.prompt_length if self.prompt_length is not None else not same
        if not same:
            self._prompt = input_ids.clone()
        counted = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        if self._ends and not first and input_ids.shape[1]:
            counted = ~torch.isin(input_ids[:, -1], torch.tensor(self._ends, device=scores.device))
        before, after = ((x.exp() * risk).sum(-1) for x in (log_p, log_q))
        self.record.add(counted, before, after, lift, infeasible, first)
        return log_q.float()

    def risk(self, input_ids: Tensor, size: int | None = None) -> Tensor:
        """-Q_D(s, a) clipped to [0, 1] for every next token a, (B, V).

        Args:
            input_ids: the text so far, (B, T).
            size: V of the model to control; the value model's padding rows are cut or filled up.
        """
        if self._values is None:
            risk = self.value_model(input_ids)
            if size is not None and risk.shape != (len(input_ids), size):
                raise InputError(
                    "value_model", tuple(risk.shape), f"a callable that gives risks {len(input_ids), size}"
                )
            return risk.clamp(0, 1)
        values = self._values(input_ids).logits
        if size is not None and size != values.shape[1]:
            if not only_padding(size, values.shape[1]):
                name = f"values of {values.shape[1]} tokens"
                raise InputError("value_model", name, f"a model with the same vocabulary ({size} tokens)")
            values = fitted(values, size)
        return -values.clamp(-1, 0).to(input_ids.device)

    def _moved(self, log_p: Tensor, risk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p', the lift c and which rows have no law below the caps."""
        if self.projection in ("exact", "official"):
            cap = (1 - risk - self.eps).clamp(self.p_min, 1.0)
            exact = exact_projection(log_p, cap)
            if self.projection == "exact":
                return exact
            log_q = official_projection(log_p, cap, self.n_iter)
            lift = (log_q - log_p).nan_to_num(neginf=-math.inf, nan=-math.inf).amax(-1).exp()
            return log_q, lift, exact.infeasible
        support = log_p > -math.inf
        if self.projection == "block":
            kept = support & (risk <= self.threshold)
            infeasible = ~kept.any(-1)
            least = risk.masked_fill(~support, math.inf).amin(-1, keepdim=True)
            kept = torch.where(infeasible[:, None], support & (risk == least), kept)
            weighted = log_p.masked_fill(~kept, -math.inf)
        else:
            weighted = log_p + (1 - risk).log()
            infeasible = (weighted == -math.inf).all(-1)
            weighted = torch.where(infeasible[:, None], log_p, weighted)
        return weighted.log_softmax(-1), (-weighted.logsumexp(-1)).exp(), infeasible

    def _prefix(self) -> PrefixModel | None:
        if not isinstance(self.value_model, PreTrainedModel):
            return None
        return PrefixModel(self.value_model, pad_token_id=self.pad_token_id, prompt_length=self.prompt_length)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_values": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._values = self._prefix()

    def figures(self) -> dict[str, float]:
        """The record as numbers by name, for reports; it begins anew."""
        r = self.record
        found = {
            "base_risk": r.base_risk,
            "risk": r.risk,
            "lift": r.lift,
            "infeasible": r.infeasible_steps / max(r.steps, 1),
            "prompt_risk": r.prompt_risk,
        }
        r.clear()
        self._prompt = None
        return found

    def __repr__(self) -> str:
        return f"Rectification({type(self.value_model).__name__}, eps={self.eps}, projection={self.projection!r})"


@lru_cache(maxsize=4)
def _loaded(folder: Path, changed: int) -> QModel:
    """The value model in a folder; the same object for all batches of a comparison."""
    with quiet.loading():
        model = QModel.from_pretrained(folder, use_safetensors=True)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _ends(value_model: Any) -> list[int]:
    """Ids behind which a text has ended."""
    config = getattr(value_model, "config", None)
    found: list[int] = []
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def _real(value: Any) -> float:
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan


def _number(name: str, value: Any, good: bool, allowed: str) -> None:
    if not good:
        raise InputError(name, value, allowed)
