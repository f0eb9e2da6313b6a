"""Latents and images: shifts, means by channel, and VAEs that overflow in half precision."""

from __future__ import annotations

import pytest
import torch

from steersman.diffusion import DDIMScheduler, FKSteering, autoencoder, dpm_ot
from steersman.diffusion.agd import applying as agd
from steersman.diffusion.aptp import training as aptp
from steersman.diffusion.cfg_pp import AveragePool, invert, restore
from steersman.diffusion.ptq4dm import method as ptq4dm
from tests.diffusion import tiny


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return tiny._vae().eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 1.5, "shift_factor": 0.06},
        {"scaling_factor": 0.7, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
@torch.no_grad()
def test_what_was_encoded_is_decoded_where_the_vae_says(vae, settings):
    vae.register_to_config(**settings)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = vae.encode(x).latent_dist.mode()
    z = autoencoder.encode(vae, x)
    assert not torch.allclose(z, plain, atol=1e-3)
    torch.testing.assert_close(autoencoder.decode(vae, z), vae.decode(plain).sample, rtol=1e-5, atol=1e-5)


def half_sdxl():
    """With a VAE whose weights float16 can hold, and its first products not."""
    pipe = tiny.sdxl().to(torch.float16)
    with torch.no_grad():
        for part in (pipe.vae.encoder, pipe.vae.decoder):
            part.conv_in.bias.fill_(6e4)
            part.conv_in.weight.copy_(part.conv_in.weight.sign() * 3e4)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {name: value.half() for name, value in tiny.XL_EMBEDS.items()} | {"height": 16, "width": 16}


def test_a_vae_that_overflows_runs_in_float32_also_where_gradients_are_taken():
    pipe, asked = half_sdxl()
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert not bool(pipe.vae.encode(x.half()).latent_dist.mode().isfinite().all())
        assert bool(autoencoder.encode(pipe.vae, x).isfinite().all())
    assert bool(invert(pipe, x, num_inference_steps=2, **asked).isfinite().all())
    assert bool(restore(pipe, x[..., ::2, ::2], AveragePool(2), num_inference_steps=2, **asked).isfinite().all())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, eta=1.0)
    with FKSteering(lambda images: images.mean((1, 2, 3)), particles=2, gradient=0.5).install(pipe):
        more = {"num_images_per_prompt": 2, "num_inference_steps": 3, "output_type": "latent"}
        assert bool(pipe(**asked, **more).images.isfinite().all())
    assert pipe.vae.dtype == torch.float16


METHODS = pytest.mark.parametrize(
    "encoded", [agd._encoded, aptp.encoded, dpm_ot._encoded, ptq4dm._encoded], ids=["agd", "aptp", "dpm-ot", "ptq4dm"]
)


@METHODS
def test_methods_that_learn_from_images_encode_them_as_pipelines_do(encoded):
    pipe = tiny.stable_diffusion()
    x = torch.rand(18, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in x.split(16)])
    assert torch.equal(encoded(pipe, x), plain * pipe.vae.config.scaling_factor)
    pipe.vae.register_to_config(shift_factor=0.06, scaling_factor=1.5)
    assert torch.equal(encoded(pipe, x), (plain - 0.06) * 1.5)


@METHODS
def test_methods_that_learn_from_images_take_vaes_that_overflow(encoded):
    pipe, _ = half_sdxl()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = encoded(pipe, x)
    assert bool(z.isfinite().all()) and z.dtype == torch.float32
    assert pipe.vae.dtype == torch.float16
