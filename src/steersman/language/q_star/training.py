r"""``steersman apply q-star``: a policy by direct preference optimisation, with its reference on record.

.. math:: L = -\log \sigma\Big(\beta \sum_t \log \frac{\pi(a_t^w|s_t^w)}{\pi_\mathrm{ref}(a_t^w|s_t^w)}
              - \beta \sum_t \log \frac{\pi(a_t^l|s_t^l)}{\pi_\mathrm{ref}(a_t^l|s_t^l)}\Big)

:math:`V^*(s_0)` cancels between two answers to one prompt, so the loss of the token process is the plain one. TRL's
``DPOTrainer`` does it, unchanged.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from steersman import quiet
from steersman.errors import InputError
from steersman.language.loading import load_language_model
from steersman.language.q_star.monitoring import Drift, RewardDriftCallback
from steersman.language.q_star.preferences import Pair, as_pairs, beginnings, sampled_pairs
from steersman.language.q_star.rewards import positive, tokenized
from steersman.language.texts import read_rows
from steersman.language.training import Told, on_its_own

RECORD = "q_star.json"


def apply(
    subject: str | Path,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    attribute: str | None = None,
    scorer: Callable[..., Any] | None = None,
    beta: float = 0.1,
    pairs: int = 2000,
    samples: int = 4,
    prompt_tokens: int = 12,
    new_tokens: int = 64,
    temperature: float = 1.0,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    sft_epochs: float = 0.0,
    lora_rank: int = 0,
    held_out: int = 32,
) -> dict[str, Any]:
    """Tune the language model ``subject`` on preferences; ``out`` becomes an ordinary model folder.

    Args:
        subject: a folder or hub id of a causal language model of transformers: the reference.
        input: .jsonl or .csv with ``prompt``, ``chosen`` and ``rejected``; or with ``text`` (or ``prompt``), from whose
            beginnings the subject writes answers that ``scorer`` tells apart.
        out: where the policy goes; ``q_star.json`` there names the reference, its fingerprint and beta.
        seed: of answers, order and adapters.
        log: gets a line now and then.
        attribute: what the scorer looks for, for the record.
        scorer: whole texts to numbers, the larger the better.
        beta: strength of the KL penalty.
        pairs: at most so many are used, or made.
        samples: answers to a prompt, where pairs are made.
        prompt_tokens: tokens of the longest beginning, where pairs are made.
        new_tokens: tokens of the longest answer, where pairs are made.
        temperature: of the answers, where pairs are made.
        epochs: over the pairs.
        batch_size: pairs of an optimizer step.
        learning_rate: the largest; 5e-7 is usual for models of billions.
        sft_epochs: of training on the chosen answers first; its result is the reference then, in ``out/reference``.
        lora_rank: rank of adapters, which are merged in the end; 0 trains all weights.
        held_out: pairs that are left out of training, to watch rewards drift; 0 watches nothing.

    Returns:
        dict: pairs, steps, losses, and rewards of the held-out pairs before and after.

    Raises:
        InputError: a subject, input or settings that don't fit together.
    """
    positive("beta", beta)
    positive("epochs", epochs)
    positive("learning_rate", learning_rate)
    positive("temperature", temperature)
    least = {
        "pairs": (pairs, 1),
        "samples": (samples, 2),
        "prompt_tokens": (prompt_tokens, 1),
        "held_out": (held_out, 0),
    }
    least |= {"new_tokens": (new_tokens, 2), "batch_size": (batch_size, 1), "lora_rank": (lora_rank, 0)}
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(name, value, f"a whole number of at least {low}")
    if not 0 <= sft_epochs < math.inf:
        raise InputError("sft_epochs", sft_epochs, "a number of at least 0")
    if input is None:
        raise InputError("input", None, "a file with prompt, chosen and rejected, or with text")
    rows = read_rows(input)
    made = not any(row.get("chosen") for row in rows)
    if made and scorer is None:
        allowed = "file.py:name of a function from texts to numbers (or give an input with prompt, chosen and rejected)"
        raise InputError("scorer", None, allowed)
    model, tokenizer = load_language_model(subject, "subject")
    if tokenizer.eos_token_id is None:
        raise InputError("subject", str(subject), "a model whose tokenizer has an end-of-sequence token")
    wanted = pairs + (held_out if made else 0)
    if made:
        assert scorer is not None
        prompts = beginnings(rows, tokenizer, prompt_tokens, seed, input)
        found = sampled_pairs(
            model,
            tokenizer,
            prompts,
            scorer,
            wanted,
            samples=samples,
            new_tokens=new_tokens,
            temperature=temperature,
            seed=seed,
            log=log,
        )
    else:
        found = as_pairs(rows, input)
        random.Random(seed).shuffle(found)
        held_out = min(held_out, len(found) // 10)
        found = found[: pairs + held_out]
    watched, trained = found[:held_out], found[held_out:]
    result = preference_training(
        model,
        tokenizer,
        trained,
        watched,
        beta=beta,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        sft_epochs=sft_epochs,
        lora_rank=lora_rank,
        new_tokens=new_tokens,
        seed=seed,
        log=log,
    )
    named = "reference" if sft_epochs > 0 else str(Path(subject).resolve() if Path(subject).exists() else subject)
    with quiet.loading():
        result.policy.save_pretrained(out)
        tokenizer.save_pretrained(out)
        if sft_epochs > 0:
            result.reference.save_pretrained(out / "reference")
            tokenizer.save_pretrained(out / "reference")
    record = {
        "beta": beta,
        "reference": named,
        "fingerprint": fingerprint(result.reference),
        "attribute": attribute,
        "pairs": len(trained),
        "drift": [asdict(drift) for drift in result.drift],
    }
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    (out / "pairs.jsonl").write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in found))
    metrics: dict[str, Any] = {"pairs": len(trained), "steps": result.steps, "loss_last": result.loss}
    for name in ("chosen", "rejected", "minus_beta_kl", "chosen_log_likelihood"):
        if result.drift:
            metrics[name] = getattr(result.drift[-1], name)
    return metrics


@dataclass(frozen=True)
class Trained:
    """A policy, its reference, how rewards drifted, and the loss of the last tenth of the steps."""

    policy: Any
    reference: Any
    drift: list[Drift]
    steps: int
    loss: float


def preference_training(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair] = (),
    *,
    beta: float = 0.1,
    epochs: float = 1.0,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    sft_epochs: float = 0.0,
    lora_rank: int = 0,
    new_tokens: int = 64,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Trained:
    """DPO by TRL's trainer, as :func:`apply` does it; ``model`` itself is left as it is.

    Raises:
        InputError: a pair in which a token spans prompt and answer, or no pair.
    """
    from datasets import Dataset
    from trl import DPOTrainer

    if not pairs:
        raise InputError("pairs", 0, "at least one pair to train on")
    for side in ("chosen", "rejected"):
        asked, answered = tokenized([p.prompt for p in pairs], [getattr(p, side) for p in pairs], tokenizer)
        longest = 1 + max(len(a) + len(b) for a, b in zip(asked, answered, strict=True))  # the end of the text is added
        limit = getattr(model.config, "max_position_embeddings", None) or longest
        if longest > limit:
            raise InputError("pairs", f"a text of {longest} tokens", f"at most the model's {limit} positions")
    reference = copy.deepcopy(model).float()
    if sft_epochs > 0:
        answers = [(p.prompt, p.chosen) for p in pairs]
        reference = supervised_training(
            reference, tokenizer, answers, sft_epochs, batch_size, learning_rate, seed, log=log
        )
    policy = copy.deepcopy(reference)
    lora = None
    if lora_rank:
        from peft import LoraConfig

        lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with on_its_own(), tempfile.TemporaryDirectory(prefix="steersman-dpo-") as temporary:
        trainer = DPOTrainer(
            policy,
            None if lora_rank else reference,
            _arguments("DPOConfig", temporary, len(pairs), epochs, batch_size, learning_rate, seed, beta=beta),
            train_dataset=Dataset.from_list([p.to_json() for p in pairs]),
            eval_dataset=Dataset.from_list([p.to_json() for p in held_out]) if held_out else None,
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Told(log))
        watch = None
        if held_out:
            watch = RewardDriftCallback(trainer, pairs=len(held_out), new_tokens=new_tokens, seed=seed)
            trainer.add_callback(watch)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        steps = trainer.state.global_step
        trained: Any = trainer.model
        trained = _plain(trained.merge_and_unload() if lora_rank else trained, model)
        _plain(reference, model)
    tail = losses[-max(1, len(losses) // 10) :]
    return Trained(trained.eval(), reference.eval(), watch.history if watch else [], steps, sum(tail) / len(tail))


def supervised_training(
    model: Any,
    tokenizer: Any,
    answers: Sequence[tuple[str, str]],
    epochs: float,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Any:
    """A copy of the model, tuned on (prompt, answer) by TRL's ``SFTTrainer``; the loss is that of the answers."""
    from datasets import Dataset
    from trl import SFTTrainer

    kept = model
    model = copy.deepcopy(model)
    with on_its_own(), tempfile.TemporaryDirectory(prefix="steersman-sft-") as temporary:
        trainer = SFTTrainer(
            model,
            _arguments("SFTConfig", temporary, len(answers), epochs, batch_size, learning_rate, seed),
            train_dataset=Dataset.from_list([{"prompt": prompt, "completion": text} for prompt, text in answers]),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Told(log))
        trainer.train()
        return _plain(trainer.model, kept).eval()


def fingerprint(model: Any) -> str:
    """SHA-256 of a model's weights, by name, in float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _arguments(
    config: str, folder: str, count: int, epochs: float, batch_size: int, learning_rate: float, seed: int, **more: Any
) -> Any:
    import trl

    cuda = torch.cuda.is_available()
    return getattr(trl, config)(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=math.ceil(math.ceil(count / batch_size) * epochs) // 10,  # the first step of a warm-up has rate 0
        max_length=None,
        seed=seed % 2**31,
        use_cpu=not cuda,
        bf16=False,
        gradient_checkpointing=cuda,
        logging_steps=0.1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def _plain(model: Any, like: Any) -> Any:
    """The model as it was before a trainer fused its head, with the settings of the model that it came from."""
    model.__dict__.pop("forward", None)
    model.generation_config = copy.deepcopy(like.generation_config)
    model.config.use_cache = like.config.use_cache
    return model
