"""Methods on pipelines: order, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler

from steersman.diffusion import ClassConditionalPipeline, Installable, installed, load_steered, save_steered
from steersman.diffusion import installing as module
from steersman.errors import InputError
from tests.diffusion import tiny


class Scaled(Installable):
    """Multiplies the network's output."""

    def __init__(self, by: float = 2.0) -> None:
        self.by = by

    def attach(self, pipe):
        self.hook = pipe.unet.register_forward_hook(lambda m, a, out: type(out)(sample=out.sample * self.by))

    def detach(self, pipe):
        self.hook.remove()

    def save_pretrained(self, folder):
        folder.mkdir(parents=True)
        (folder / "scaled.json").write_text(json.dumps(self.by))

    @classmethod
    def from_pretrained(cls, folder, offset: float = 0.0):
        return cls(json.loads((folder / "scaled.json").read_text()) + offset)


class Unsaved(Installable):
    def attach(self, pipe): ...

    def detach(self, pipe): ...


@pytest.fixture
def pipe():
    net = tiny.unconditional(num_class_embeds=4).unet
    made = ClassConditionalPipeline(net, DDIMScheduler(clip_sample=False), null_label=3)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe) -> torch.Tensor:
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe([0, 1], latents=latents, num_inference_steps=3, output_type="latent").images


def test_the_last_comes_off_first(pipe):
    plain = draw(pipe)
    first, second = Scaled(2.0).install(pipe), Scaled(0.5).install(pipe)
    assert installed(pipe) == (first, second)
    assert torch.equal(draw(pipe), plain)
    with pytest.raises(InputError, match="first uninstall Scaled"):
        first.uninstall()
    second.uninstall()
    assert not torch.equal(draw(pipe), plain)
    first.uninstall()
    assert torch.equal(draw(pipe), plain) and installed(pipe) == ()


def test_a_failure_is_seen_though_something_is_still_on_top(pipe):
    with pytest.raises(ZeroDivisionError), Scaled().install(pipe):
        Scaled().install(pipe)
        1 / 0  # noqa: B018
    assert installed(pipe) == ()


def test_methods_come_back_where_one_cannot_be_taken_off(pipe):
    class Stuck(Unsaved):
        def detach(self, pipe):
            raise RuntimeError("stuck")

    stuck, scaled = Stuck().install(pipe), Scaled().install(pipe)
    with pytest.raises(RuntimeError, match="stuck"), module.taken_off(pipe):
        pass
    assert installed(pipe) == (stuck, scaled)


def test_a_pipeline_is_loaded_in_half_precision(pipe, tmp_path, monkeypatch):
    Scaled(2.0).install(pipe)
    save_steered(pipe, tmp_path / "saved")
    monkeypatch.setattr(module, "_known", {"Scaled": Scaled}.__getitem__)
    again = load_steered(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert again.unet.dtype == torch.bfloat16 and len(installed(again)) == 1


def test_what_fails_to_attach_is_not_installed(pipe):
    class Failing(Unsaved):
        def attach(self, pipe):
            raise InputError("pipe", "it", "another")

    method = Failing()
    with pytest.raises(InputError):
        method.install(pipe)
    assert installed(pipe) == ()


def test_a_pipeline_is_saved_plain_and_loaded_with_its_methods(pipe, tmp_path, monkeypatch):
    plain = draw(pipe)
    Scaled(2.0).install(pipe)
    Scaled(1.5).install(pipe)
    steered = draw(pipe)
    save_steered(pipe, tmp_path / "saved")
    assert torch.equal(draw(pipe), steered)  # still on it
    monkeypatch.setattr(module, "_known", {"Scaled": Scaled}.__getitem__)
    again = load_steered(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), steered)
    stock = ClassConditionalPipeline.from_pretrained(str(tmp_path / "saved"))
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(draw(stock), plain)
    more = load_steered(tmp_path / "saved", Scaled={"offset": 1.0})
    assert [method.by for method in installed(more)] == [3.0, 2.5]


def test_an_earlier_save_in_the_same_folder_leaves_nothing(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_known", {"Scaled": Scaled}.__getitem__)
    methods = [Scaled(by).install(pipe) for by in (2.0, 1.5)]
    save_steered(pipe, tmp_path)
    methods.pop().uninstall()
    save_steered(pipe, tmp_path)
    assert [p.name for p in (tmp_path / "steering").iterdir()] == ["0"]
    again = load_steered(tmp_path)
    assert [method.by for method in installed(again)] == [2.0]
    save_steered(again, tmp_path)  # where it comes from
    assert [method.by for method in installed(load_steered(tmp_path))] == [2.0]
    methods.pop().uninstall()
    save_steered(pipe, tmp_path)
    assert not (tmp_path / "steering").exists() and installed(load_steered(tmp_path)) == ()
    assert not list(tmp_path.glob(".steering-*"))


def test_what_cannot_be_saved_or_loaded_is_said(pipe, tmp_path):
    Unsaved().install(pipe)
    with pytest.raises(InputError, match=r"pipe='Unsaved' .* save_pretrained"):
        save_steered(pipe, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(InputError, match="one that save_steered wrote"):
        load_steered(tmp_path)
    pipe.save_pretrained(str(tmp_path / "own"))
    (tmp_path / "own" / "steering.json").write_text('[{"class": "Installable", "folder": "../x"}]')
    with pytest.raises(InputError, match=r"folder in steering\.json=.* inside"):
        load_steered(tmp_path / "own")
    (tmp_path / "own" / "steering.json").write_text('[{"class": "Popen", "folder": "x"}]')
    with pytest.raises(InputError, match=r"class in steering\.json='Popen'"):
        load_steered(tmp_path / "own")
    with pytest.raises(InputError, match="override='Other'"):
        load_steered(tmp_path / "own", Other={})
    (tmp_path / "own" / "steering.json").write_text('[{"class": "ClassConditionalPipeline", "folder": "x"}]')
    with pytest.raises(InputError, match="a method that installs itself"):
        load_steered(tmp_path / "own")
