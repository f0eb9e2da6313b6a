"""Files of prompts and labels, in one place."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDIMScheduler

from steersman.diffusion import ClassConditionalPipeline
from steersman.diffusion.asked import Asked, asked_of, read_asked, read_prompts, takes_prompts
from steersman.errors import InputError
from tests.diffusion import tiny

FILES = {
    "a.txt": ("a cat\n\n a dog\n", (["a cat", "a dog"], None)),
    "b.txt": ("3\n1\n", (["3", "1"], [3, 1])),
    "c.csv": ("prompt,note\na cat,x\n", (["a cat"], None)),
    "d.jsonl": ('{"label": 3}\n\n{"label": 1}\n', (None, [3, 1])),
    "e.jsonl": ('{"prompt": "a cat", "tag": "x"}\n', (["a cat"], None)),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_all_kinds(tmp_path, name):
    text, (prompts, labels) = FILES[name]
    (tmp_path / name).write_text(text)
    assert read_asked(tmp_path / name) == Asked(prompts, labels)
    if prompts:
        assert read_prompts(tmp_path / name) == prompts
    else:
        with pytest.raises(InputError, match=r"prompts=.*at least one prompt"):
            read_prompts(tmp_path / name)


def test_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 1)), captions=np.array(["a", "b"]), labels=np.array([1, 2]))
    assert read_asked(tmp_path / "x.npz") == Asked(["a", "b"], [1, 2])


@pytest.mark.parametrize(
    ("name", "text"),
    [("no.txt", None), ("x.txt", " \n"), ("x.csv", "picture\n1\n"), ("x.jsonl", "{"), ("x.jsonl", "[1]\n"),
     ("x.npz", "?"), ("x.jsonl", '{"label": "one"}\n'), ("x.csv", "")],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"source=.*with at least one prompt or label"):
        read_asked(tmp_path / name, "source")


def test_what_a_pipeline_is_asked_for(tmp_path):
    text = tiny.stable_diffusion()
    classes = ClassConditionalPipeline(tiny.unconditional(num_class_embeds=4).unet, DDIMScheduler(), null_label=3)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "labels.txt").write_text("2\n0\n")
    (tmp_path / "null.txt").write_text("3\n")
    assert takes_prompts(text) and not takes_prompts(classes)
    assert asked_of(text, tmp_path / "prompts.txt") == ["a cat"]
    assert asked_of(text, tmp_path / "labels.txt") == ["2", "0"]  # a prompt may be a number
    assert asked_of(classes, None) == [0, 1, 2]
    assert asked_of(classes, tmp_path / "labels.txt") == [2, 0]
    for pipe, file, sentence in (
        (text, None, "prompts for this pipeline"),
        (classes, tmp_path / "prompts.txt", "class numbers for this pipeline"),
        (classes, tmp_path / "null.txt", "labels from 0 to 2"),
        (tiny.unconditional(), None, "others have no guidance"),
    ):
        with pytest.raises(InputError, match=sentence):
            asked_of(pipe, file)
