"""Trains the reference subject ``digits``: a class-conditional U-Net and two classifiers.

    python packages/steersman-reference/training/train_digits.py --threads 1

The same machine type, versions and number of threads give the same files. The choices:

- Betas: linear from 1e-4 to 0.02 over T=1000, diffusers' and the original samplers' default. Alpha-bar
  ends at 4e-5, so that a standard normal start is exact for every sampler; a cosine schedule's last beta
  (0.999) would make epsilon prediction singular there.
- Epsilon prediction, the mean squared error unweighted. Times are stratified over the batch, which takes
  most of the loss' variance out.
- 0.7M parameters: two resolutions (8x8, 4x4), attention at 4x4, dropout 0.1 because 1200 images are few.
- Labels are dropped with probability 0.1 to the null label 10.
- An exponential average of the weights, started after the warm-up, is what is saved (half precision).
- The classifiers also learn to reconstruct the image from their features, by a decoder that is thrown away.
  Features of a plain classifier collapse towards ten points (of the perceptron's variance under 3% was
  within classes), and distances in them hardly see how an image looks.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn
from torch.nn import functional as F

from steersman.diffusion.pipelines import ClassConditionalPipeline
from steersman.reference import digits

HERE = Path(__file__).resolve()
OUT = HERE.parents[1] / "src" / "steersman_reference" / "digits"
SEED = 0
BATCH, STEPS, WARM_UP, LEARNING_RATE, EMA = 64, 7000, 250, 1.5e-3, 0.998
LABEL_DROPOUT = 0.1
RECONSTRUCTION = 10.0
CLASSIFIERS = {
    "a": {"seed": 1, "settings": {"kind": "convolutional", "width": 32, "features": 64}, "epochs": 40},
    "b": {"seed": 2, "settings": {"kind": "perceptron", "width": 128, "features": 48}, "epochs": 80},
}


def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        dropout=0.1,
        num_class_embeds=digits.CLASSES + 1,
    )


def schedule() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
    )


def stratified_times(rows: int, rng: torch.Generator) -> torch.Tensor:
    """One uniform time from each of ``rows`` equal parts of 0..999, in random order."""
    u = (torch.arange(rows) + torch.rand(rows, generator=rng)) / rows
    return (u[torch.randperm(rows, generator=rng)] * 1000).long().clamp(max=999)


@torch.no_grad()
def epsilon_loss(unet: UNet2DModel, noise: DDIMScheduler, split: str, repeats: int = 2) -> float:
    """Mean squared error of epsilon on a split, with fixed times and noise."""
    rng = torch.Generator().manual_seed(1234)
    x0, y = digits.images(split)
    unet.eval()
    total = 0.0
    for _ in range(repeats):
        t, eps = stratified_times(len(x0), rng), torch.randn(x0.shape, generator=rng)
        x = noise.add_noise(x0, eps, t)
        for rows in torch.arange(len(x0)).split(300):
            out = unet(x[rows], t[rows], class_labels=y[rows]).sample
            total += (out - eps[rows]).square().sum().item()
    return total / (repeats * x0.numel())


def train_unet(steps: int) -> tuple[UNet2DModel, DDIMScheduler, dict]:
    torch.manual_seed(SEED)  # initial weights and dropout
    rng = torch.Generator().manual_seed(SEED)  # batches, times, noise, dropped labels
    x0, y0 = digits.images("train")
    unet, noise = network(), schedule()
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)

    def rate(step: int) -> float:
        if step < WARM_UP:
            return (step + 1) / WARM_UP
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))

    schedule_ = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    history, running, start = [], [], time.perf_counter()
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(x0), generator=rng)])
        rows, order = order[:BATCH], order[BATCH:]
        x, y = x0[rows], y0[rows]
        t, eps = stratified_times(BATCH, rng), torch.randn(x.shape, generator=rng)
        dropped = torch.rand(BATCH, generator=rng) < LABEL_DROPOUT
        unet.train()
        out = unet(noise.add_noise(x, eps, t), t, class_labels=y.masked_fill(dropped, digits.NULL_LABEL)).sample
        loss = F.mse_loss(out, eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule_.step()
        running.append(loss.item())
        with torch.no_grad():
            keep = EMA if step >= WARM_UP else 0.0
            for a, p in zip(average.parameters(), unet.parameters(), strict=True):
                a.lerp_(p, 1 - keep)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            record = {
                "step": step + 1,
                "batch_loss": round(sum(running) / len(running), 5),
                "train": round(epsilon_loss(average, noise, "train"), 5),
                "held_out": round(epsilon_loss(average, noise, "held-out"), 5),
            }
            running.clear()
            history.append(record)
            print(f"{time.perf_counter() - start:7.1f} s", json.dumps(record), flush=True)
    facts = {
        "steps": steps,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "ema": EMA,
        "label_dropout": LABEL_DROPOUT,
        "parameters": sum(p.numel() for p in average.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "epsilon_loss": history,
    }
    return average, noise, facts


def train_classifier(seed: int, settings: dict, epochs: int) -> tuple[digits.Classifier, dict]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    x0, y0 = digits.images("train")
    model = digits.Classifier(**settings)
    decoder = nn.Sequential(nn.Linear(settings["features"], 128), nn.GELU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW([*model.parameters(), *decoder.parameters()], lr=2e-3, weight_decay=1e-2)
    batches = len(x0) // 60
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x0), generator=rng).split(60):
            # A little noise keeps the features smooth in the images.
            x = x0[rows] + 0.1 * torch.randn(x0[rows].shape, generator=rng)
            features = model.features(x)
            loss = F.cross_entropy(model.head(features), y0[rows])
            loss = loss + RECONSTRUCTION * F.mse_loss(decoder(features), x0[rows].flatten(1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
    # What the features are standardised by: mean and variance over the clean training images, once.
    model.eval()
    with torch.no_grad():
        raw = model.body(x0)
        model.standardise.running_mean.copy_(raw.mean(0))
        model.standardise.running_var.copy_(raw.var(0))
        facts = {"epochs": epochs, "seconds": round(time.perf_counter() - start, 1)}
        features = model.features(x0)
        means = torch.stack([features[y0 == k].mean(0) for k in range(digits.CLASSES)])
        facts["variance_within_classes"] = round((features - means[y0]).square().mean().item(), 4)
        facts["reconstruction"] = round(F.mse_loss(decoder(features), x0.flatten(1)).item(), 4)
        for split in ("train", "held-out"):
            x, y = digits.images(split)
            logits = model(x)
            facts[split.replace("-", "_")] = {
                "accuracy": round((logits.argmax(1) == y).double().mean().item(), 4),
                "cross_entropy": round(F.cross_entropy(logits, y).item(), 4),
            }
    return model, facts


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer for a trial run")
    parser.add_argument("--only", choices=("unet", "classifiers"), help="keep the other as it is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    out = arguments.out

    training = {}
    if arguments.only:
        training = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["training"]
    if arguments.only != "unet":
        for name, plan in CLASSIFIERS.items():
            model, facts = train_classifier(**plan)
            model.save(out / f"classifier-{name}")
            training[f"classifier-{name}"] = facts
            print(name, json.dumps(facts), flush=True)
    if arguments.only != "classifiers":
        unet, noise, facts = train_unet(arguments.steps)
        pipe = ClassConditionalPipeline(unet.half(), noise, null_label=digits.NULL_LABEL)
        pipe.save_pretrained(out / "pipeline", safe_serialization=True)
        training["unet"] = facts

    record = {
        "subject": "digits",
        "default": "pipeline",
        "license": "Apache-2.0 (weights); data: UCI Optical Recognition of Handwritten Digits, CC BY 4.0",
        "script": {"file": f"training/{HERE.name}", "sha256": sha256(HERE)},
        "data": {
            "source": "sklearn.datasets.load_digits",
            "fingerprint": digits.data_fingerprint(),
            "train": digits.TRAIN,
            "split_seed": digits.SPLIT_SEED,
        },
        "seeds": {"unet": SEED, **{k: plan["seed"] for k, plan in CLASSIFIERS.items()}},
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "diffusers", "numpy", "scikit-learn", "safetensors")},
        },
        "machine": platform.machine(),
        "threads": arguments.threads,
        "training": training,
        "files": {
            f.relative_to(out).as_posix(): sha256(f)
            for f in sorted(out.rglob("*"))
            if f.is_file() and f.name != "provenance.json"
        },
    }
    (out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
