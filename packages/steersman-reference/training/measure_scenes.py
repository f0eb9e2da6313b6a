"""Measures the shipped ``scenes`` model and records the figures in its ``provenance.json``.

    python packages/steersman-reference/training/measure_scenes.py

Each row draws one picture for each of the first 240 held-out captions (every held-out combination once) by DDIM, and
records how often ``scenes.attributes`` reads what the caption says, and the distance in ``scenes.features`` from the
held-out pictures of the same captions. The floor compares new drawings of these captions with them in the same way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from steersman.reference import image_metrics, loading, scenes

COUNT = 240
ROWS = [(25, 1.0), (25, 3.0), (25, 7.5), (10, 3.0), (50, 3.0)]


def measure(images: Tensor) -> dict[str, float]:
    real = image_metrics.features(scenes.features, scenes.images("held-out")[:COUNT])
    metrics = image_metrics.feature_metrics(real, image_metrics.features(scenes.features, images))
    shares = scenes.accuracy(images, scenes.captions("held-out")[:COUNT])
    return {k: round(v, 4) for k, v in (shares | metrics).items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=Path, help="where to put the images, by row (.pt)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = scenes.pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts, x = scenes.captions("held-out")[:COUNT], scenes.images("held-out")[:COUNT]

    rng = torch.Generator().manual_seed(2000)
    quality = {"new drawings": measure(scenes.render(scenes.parse(prompts), rng))}
    quality["autoencoded"] = measure(pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample)
    kept = {}
    for steps, scale in ROWS:
        rng = torch.Generator().manual_seed(1000)  # the same noise for each row
        z = torch.randn(COUNT, 4, scenes.SIDE // 2, scenes.SIDE // 2, generator=rng)
        parts = [
            pipe(
                prompts[i : i + 60],
                latents=z[i : i + 60],
                num_inference_steps=steps,
                guidance_scale=scale,
                output_type="pt",
            ).images
            for i in range(0, COUNT, 60)
        ]
        name = f"ddim {steps}, guidance {scale:g}"
        kept[name] = 2 * torch.cat(parts) - 1
        quality[name] = measure(kept[name])
        print(name, json.dumps(quality[name]), flush=True)
    if arguments.samples:
        torch.save(kept, arguments.samples)

    file = loading.folder("scenes") / "provenance.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["quality"] = {"images": COUNT, "seeds": 1, "against": "held-out images", **quality}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
