"""Language models that users name: folders, hub ids, or factories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from steersman import quiet
from steersman.callables import CODE, load_callable
from steersman.errors import InputError


def load_language_model(spec: str | Path, parameter: str = "subject", dtype: str = "auto") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, in evaluation mode, on the accelerator if there is one.

    Weights load from safetensors, and no remote code runs. Half precision becomes float32 on the CPU, where it is an
    emulation.

    Args:
        spec: a folder, a hub id, or ``file.py:factory`` whose factory returns ``(model, tokenizer)`` and keeps its
            device.
        parameter: what the sentence names.
        dtype: of the weights, as ``float32``; auto is as they were saved.

    Raises:
        InputError: nothing there that loads with all its weights as a causal language model; the sentence says why.
    """
    text = str(spec)
    if CODE.match(text):
        made = load_callable(text, parameter)()
        if not isinstance(made, tuple) or len(made) != 2 or not callable(getattr(made[0], "generate", None)):
            raise InputError(parameter, text, "a factory that returns (model, tokenizer)")
        return made[0].eval(), made[1]
    try:
        with quiet.loading():
            config = AutoConfig.from_pretrained(text)
            if getattr(config, "is_encoder_decoder", False):
                raise InputError(parameter, text, f"a decoder-only model ({config.model_type} is an encoder-decoder)")
            tokenizer = AutoTokenizer.from_pretrained(text)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                text, use_safetensors=True, output_loading_info=True, dtype=dtype
            )
    except InputError:
        raise
    except Exception as error:  # a half-written folder fails in a dozen ways
        line = " ".join(str(error).split()) or type(error).__name__
        raise InputError(parameter, text, f"a model with tokenizer that transformers loads ({line[:200]})") from error
    model, report = loaded
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise InputError(parameter, text, f"a model with all its weights ({len(lacking)} lack, as {lacking[0]})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and model.dtype == torch.float16:
        model = model.float()
    return model.to(device).eval(), tokenizer
