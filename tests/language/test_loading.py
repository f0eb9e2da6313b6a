"""Language models that users name, and sentences where they don't load."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config

from steersman.errors import InputError
from steersman.language.loading import load_language_model
from tests.language.conftest import tiny


@pytest.fixture
def folder(tmp_path):
    model = Tokenizer(WordLevel({f"w{i}": i for i in range(41)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path / "lm")
    tiny("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_a_folder_and_a_factory(folder, tmp_path) -> None:
    model, tokenizer = load_language_model(folder)
    assert model.dtype == torch.bfloat16 and not model.training and tokenizer("w7")["input_ids"] == [7]
    assert load_language_model(folder, dtype="float32")[0].dtype == torch.float32
    code = tmp_path / "mine.py"
    code.write_text(
        "from steersman.language.loading import load_language_model\n"
        f"def make(): return load_language_model({str(folder)!r})\n"
        "def half(): return 3\n"
    )
    assert load_language_model(f"{code}:make")[0].config.vocab_size == 41
    with pytest.raises(InputError, match=r"draft=.*a factory that returns \(model, tokenizer\)"):
        load_language_model(f"{code}:half", "draft")


def test_what_does_not_load(folder, tmp_path) -> None:
    with pytest.raises(InputError, match=r"draft=.*that transformers loads") as caught:
        load_language_model(tmp_path / "nothing", "draft")
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="that transformers loads"):
        load_language_model(folder)
    from safetensors.torch import load_file, save_file

    tiny("gpt2").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"with all its weights \(1 lack"):
        load_language_model(folder)


def test_an_encoder_decoder_is_told(tmp_path) -> None:
    T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"a decoder-only model \(t5 is an encoder-decoder\)"):
        load_language_model(tmp_path)
