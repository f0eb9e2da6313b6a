"""Measures the shipped ``digits`` model and records the figures in its ``provenance.json``.

    python packages/steersman-reference/training/measure_digits.py

Each seed draws 597 images with the held-out images' labels by DDIM, and compares them with the held-out
images in the features of both classifiers. The floor compares training images of the same labels with
them in the same way. (Labels being matched, neither set's class shares fluctuate as an independent draw's
would: the unbiased kernel distance lies below 0.) ``nearest`` is the median distance (root mean square per
pixel) to the closest training image: for samples well below that of held-out images, the model would have
memorised.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from steersman.reference import digits, image_metrics, loading

STEPS = (5, 10, 20, 50, 100)


def measure(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    held_out, _ = digits.images("held-out")
    train, _ = digits.images("train")
    figures = {}
    for which in digits.CLASSIFIERS:
        model = digits.classifier(which)
        real = image_metrics.features(model.features, held_out)
        fake = image_metrics.features(model.features, images)
        scores = image_metrics.feature_metrics(real, fake)
        figures |= {f"{name}_{which}": value for name, value in scores.items()}
        figures[f"accuracy_{which}"] = image_metrics.class_accuracy(model, images, labels)
    gaps = torch.cdist(images.flatten(1), train.flatten(1)) / 8
    figures["nearest"] = gaps.topk(2, largest=False).values[:, 0].median().item()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=Path, help="where to put the first seed's images, by steps (.pt)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    held_out, labels = digits.images("held-out")
    n = len(labels)
    pipe = digits.pipeline()
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)

    quality: dict[str, dict[str, float]] = {}
    draws = []
    for seed in range(arguments.seeds):
        rng = torch.Generator().manual_seed(2000 + seed)
        draws.append(measure(digits.matched(labels, rng), labels))
    quality["training images"] = {k: round(statistics.mean(d[k] for d in draws), 4) for k in draws[0]}
    # A training image's nearest training image is itself: the held-out images give the scale.
    quality["training images"].pop("nearest")
    quality["held-out images"] = {"nearest": round(measure(held_out, labels)["nearest"], 4)}
    kept = {}
    for steps in STEPS:
        rows = []
        for seed in range(arguments.seeds):
            rng = torch.Generator().manual_seed(1000 + seed)
            x = pipe(labels, num_inference_steps=steps, generator=rng, output_type="latent").images
            rows.append(measure(x, labels))
            if seed == 0:
                kept[steps] = x
        quality[f"ddim {steps}"] = {k: round(statistics.mean(r[k] for r in rows), 4) for k in rows[0]}
        print(steps, json.dumps(quality[f"ddim {steps}"]), flush=True)
    if arguments.samples:
        torch.save(kept, arguments.samples)

    file = loading.folder("digits") / "provenance.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["quality"] = {"images": n, "seeds": arguments.seeds, "against": "held-out images", **quality}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
