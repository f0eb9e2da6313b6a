"""Trains the reference subject ``scenes``: an ordinary ``StableDiffusionPipeline`` for captioned 32x32 pictures.

    python packages/steersman-reference/training/train_scenes.py --threads 1 --scratch /tmp/steersman-scenes

The same machine type, versions and number of threads give the same files. A run that was interrupted goes on
from its last checkpoint in ``--scratch``, and ends with the same files as well. The choices:

- Every picture is fresh from ``scenes.fresh("train")``; no network sees one twice, nor a held-out combination.
- The autoencoder halves the resolution (latents 4x16x16), which makes the U-Net four times cheaper. It minimises
  squared error plus a small Kullback-Leibler term, and has no attention: a flat picture has nothing far away to say.
- The text encoder is trained together with the U-Net. Captions are whole in about half of the cases, else
  attributes go unsaid; one in ten is empty, for classifier-free guidance; one in ten has a word of random letters
  in it, so that words which the grammar lacks are passed over. Letters are tokens: nothing is unknown.
- Betas: linear from 1e-4 to 0.02 over T=1000. Alpha-bar ends at 4e-5, so that a standard normal start is exact; a
  picture's flat colours are still seen at a signal-to-noise ratio where a photograph's details are long gone.
- Epsilon prediction. Times are stratified over the batch, which takes most of the loss' variance out. There are
  four parts. The squared error of the first is unweighted, which leaves little weight to the noisy times where a
  caption decides what goes where. The second weighs it by min(1 / alpha-bar, 20): up to the limit that is the error
  of v. Within 400 steps size, colours and shape came out right, but positions stayed at chance: convolutions know
  only from the padding where they are, and words that nothing answers to learn nothing. So in the third part, heads
  that are thrown away tell where a cell is and what will be there from the U-Net's middle, and what was said from
  the text's last token. Positions began to follow the captions after 700 steps of it; the fourth gives them time.
- Two resolutions (16x16, 8x8), attention at 8x8. Matrix products run in bfloat16 (1.8 times as fast
  on this processor), weights and optimizer in float32.
- An exponential average of the weights, started after the warm-up, is what is saved (half precision).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from steersman.reference import scenes

HERE = Path(__file__).resolve()
OUT = HERE.parents[1] / "src" / "steersman_reference" / "scenes"
SEEDS = {"vae": 1, "unet": 0}
TOKENS = 24
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
VAE_BATCH, VAE_STEPS, VAE_RATE, KL_WEIGHT = 16, 4000, 2e-3, 1e-4
BATCH, STEPS, LEARNING_RATE = 64, 5376, 1e-3
EMPTY, STRANGE = 0.1, 0.1  # shares of captions that are empty, that have a strange word in them
UNSAID = torch.tensor([0.15, 0.1, 0.1, 0.15, 0.15])  # how often each attribute goes unsaid
CHUNK = 64  # batches that are drawn and encoded at a time
HEAVIEST = 20.0  # weight of an error


@dataclass(frozen=True)
class Part:
    """A stretch of the training that has its own learning rate: linear up to the peak, then a cosine.

    Args:
        begin: its first step.
        plan: the step that its cosine was laid out for.
        warm_up: steps up to the peak.
        origin: where the cosine begins.
        ema: of the average that is saved.
        weighted: by min(1 / alpha-bar, HEAVIEST).
        hints: the side tasks of `Hints`.
    """

    begin: int
    plan: int
    warm_up: int
    origin: int
    ema: float
    weighted: bool
    hints: bool

    def rate(self, step: int) -> float:
        turn = math.pi * max(0, step - self.origin) / max(1, self.plan - self.origin)
        return min((step - self.begin + 1) / self.warm_up, 1.0) * (0.01 + 0.99 * 0.5 * (1 + math.cos(turn)))


PARTS = (
    Part(0, 3600, 250, 250, 0.999, weighted=False, hints=False),
    Part(2688, 4480, 64, 2688, 0.997, weighted=True, hints=False),
    Part(3456, 4864, 64, 3456, 0.997, weighted=True, hints=True),
    Part(4224, STEPS, 16, 4224, 0.997, weighted=True, hints=True),
)


# ------------------------------------------------------------------ networks


def tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in which each word of the grammar is a token, and every letter is one too."""
    words = sorted({w for split in scenes.SPLITS for text in scenes.captions(split) for w in text.split()} | {"shape"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges)]
    vocabulary = {s: i for i, s in enumerate(dict.fromkeys([*symbols, BEGIN, END]))}
    made = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    for word in words:
        assert len(made(word, add_special_tokens=False)["input_ids"]) == 1, word
    return made


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=scenes.SIDE,
        latent_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=64,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def network() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=scenes.SIDE // 2,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,  # the number of heads, in spite of its name
        norm_num_groups=8,
        cross_attention_dim=64,
    )


def schedule() -> DDIMScheduler:
    # steps_offset and clip_sample as StableDiffusionPipeline wants them.
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


# ------------------------------------------------------------------ autoencoder


def train_vae(steps: int) -> tuple[AutoencoderKL, dict]:
    torch.manual_seed(SEEDS["vae"])
    rng = torch.Generator().manual_seed(SEEDS["vae"])
    vae = autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_RATE, total_steps=steps, pct_start=0.1)
    running, history, start = [], [], time.perf_counter()
    for step in range(steps):
        x, _ = scenes.fresh(VAE_BATCH, "train", rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            error = F.mse_loss(vae.decode(posterior.sample(rng)).sample.float(), x)
        loss = error + KL_WEIGHT * posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay.step()
        running.append(error.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            history.append({"step": step + 1, "squared_error": round(sum(running) / len(running), 6)})
            running.clear()
            print(f"vae {time.perf_counter() - start:7.1f} s", json.dumps(history[-1]), flush=True)
    vae.eval().requires_grad_(False)
    # What is saved has half precision; everything below works with that.
    for p in vae.parameters():
        p.copy_(p.half())
    z = vae.encode(scenes.images("train")).latent_dist
    vae.register_to_config(scaling_factor=round(1 / z.mean.std().item(), 5))
    x, text = scenes.images("held-out"), scenes.captions("held-out")
    back = vae.decode(vae.encode(x).latent_dist.mode()).sample
    facts = {
        "steps": steps,
        "batch": VAE_BATCH,
        "learning_rate": VAE_RATE,
        "kl_weight": KL_WEIGHT,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "training": history,
        "held_out_squared_error": round(F.mse_loss(back, x).item(), 6),
        "held_out_accuracy": round(scenes.accuracy(back, text)["overall"], 4),
        "latent_std": [round(s, 4) for s in z.mean.std((0, 2, 3)).tolist()],
        "posterior_std": round(z.std.mean().item(), 4),
    }
    return vae, facts


@torch.no_grad()
def encode(vae: AutoencoderKL, x: Tensor, rng: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        parts = [vae.encode(part).latent_dist.sample(rng).float() for part in x.split(256)]
    return torch.cat(parts) * vae.config.scaling_factor


# ------------------------------------------------------------------ text and U-Net


def say(scene: Tensor, rng: torch.Generator) -> tuple[str, Tensor]:
    """A training caption (whole or not, sometimes empty, sometimes with a strange word in it), and what it says."""
    empty, strange, whole = (torch.rand(3, generator=rng) < torch.tensor([EMPTY, STRANGE, 0.25])).tolist()
    unsaid = torch.rand(5, generator=rng) < UNSAID
    said = scene if whole else scene.masked_fill(unsaid, scenes.NONE)
    words = scenes.caption(said).split()
    letters = torch.randint(26, (int(torch.randint(2, 7, (), generator=rng)),), generator=rng)
    at = int(torch.randint(len(words) + 1, (), generator=rng))
    if empty:
        return "", torch.full_like(said, scenes.NONE)
    if strange:
        words.insert(at, "".join(chr(97 + i) for i in letters.tolist()))
    return " ".join(words), said


def tokens(words: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    return words(list(texts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def stratified_times(rows: int, rng: torch.Generator) -> Tensor:
    """One uniform time from each of ``rows`` equal parts of 0..999, in random order."""
    u = (torch.arange(rows) + torch.rand(rows, generator=rng)) / rows
    return (u[torch.randperm(rows, generator=rng)] * 1000).long().clamp(max=999)


class Model(nn.Module):
    """Text encoder and U-Net, which are trained and averaged together."""

    def __init__(self, words: CLIPTokenizer) -> None:
        super().__init__()
        self.text, self.unet = text_encoder(words), network()
        # Plain products: on a processor the fused attention's backward took a third of a step. It isn't saved.
        self.unet.set_attn_processor(AttnProcessor())
        self.seen: dict[str, Tensor] = {}
        self.unet.mid_block.register_forward_hook(lambda m, _, out: self.seen.update(middle=out))
        self.text.register_forward_hook(lambda m, _, out: self.seen.update(text=out.last_hidden_state))

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.text(ids).last_hidden_state).sample


class Hints(nn.Module):
    """Side tasks, for the training only: each is a linear map of what the networks have computed anyway.

    where: the U-Net's middle -> the cell's own coordinates        what: the same -> the clean latents, 8x8
    said:  the text's last token -> the attributes, or that one went unsaid
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [len(v) + 1 for v in scenes.VALUES.values()]
        self.where, self.what = nn.Conv2d(96, 2, 1), nn.Conv2d(96, 4, 1)
        self.said = nn.Linear(64, sum(self.sizes))

    def forward(self, model: Model, z: Tensor, said: Tensor) -> Tensor:
        middle, last = model.seen["middle"].float(), model.seen["text"][:, -1].float()
        line = torch.linspace(-1, 1, middle.shape[-1])
        cells = torch.stack(torch.meshgrid(line, line, indexing="ij"))
        where = F.mse_loss(self.where(middle), cells.expand(len(z), -1, -1, -1))
        what = F.mse_loss(self.what(middle), F.avg_pool2d(z, 2))
        parts = zip(self.said(last).split(self.sizes, 1), (said + 1).T, strict=True)
        return 0.3 * where + 0.5 * what + 0.1 * sum(F.cross_entropy(logits, k) for logits, k in parts)


@torch.no_grad()
def epsilon_loss(
    model: Model, words: CLIPTokenizer, vae: AutoencoderKL, noise: DDIMScheduler, split: str, count: int = 480
) -> float:
    """Mean squared error of epsilon on pictures of a split with whole captions, with fixed times and noise."""
    rng = torch.Generator().manual_seed(1234)
    z = encode(vae, scenes.images(split)[:count], rng)
    ids = tokens(words, scenes.captions(split)[:count])
    t, eps = stratified_times(count, rng), torch.randn(z.shape, generator=rng)
    model.eval()
    x = noise.add_noise(z, eps, t)
    error = sum((model(x[i], t[i], ids[i]) - eps[i]).square().sum().item() for i in torch.arange(count).split(120))
    return error / z.numel()


def train_unet(
    steps: int, vae: AutoencoderKL, words: CLIPTokenizer, scratch: Path | None, save_every: int = 250
) -> tuple[Model, DDIMScheduler, dict]:
    torch.manual_seed(SEEDS["unet"])  # initial weights
    rng = torch.Generator().manual_seed(SEEDS["unet"])  # pictures, captions, times, noise
    model, noise = Model(words), schedule()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)

    def part(step: int) -> Part:
        return [p for p in PARTS if p.begin <= step][-1]

    hints = Hints()
    aside = torch.optim.AdamW(hints.parameters(), lr=LEARNING_RATE)
    # A part's first step still has the rate of the part before: that is set when a step ends.
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: part(max(0, step - 1)).rate(step))
    history: list[dict] = []
    running: list[float] = []
    first, spent, start = 0, 0.0, time.perf_counter()
    checkpoint = scratch / f"unet-{steps}.pt" if scratch else None
    if checkpoint and checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        decay.load_state_dict(state["decay"])
        hints.load_state_dict(state["hints"])
        aside.load_state_dict(state["aside"])
        rng.set_state(state["rng"])
        first, spent, history, running = state["step"], state["seconds"], state["history"], state["running"]
        print(f"goes on from step {first}", flush=True)

    drawn: list[tuple[Tensor, ...]] = []
    for step in range(first, steps):
        if step % CHUNK == 0:
            x, scene = scenes.fresh(CHUNK * BATCH, "train", rng)
            z = encode(vae, x, rng)
            texts, said = zip(*(say(row, rng) for row in scene), strict=True)
            drawn = list(zip(*(v.split(BATCH) for v in (z, tokens(words, texts), torch.stack(said))), strict=True))
        z, ids, said = drawn[step % CHUNK]
        now = part(step)
        t, eps = stratified_times(BATCH, rng), torch.randn(z.shape, generator=rng)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(noise.add_noise(z, eps, t), t, ids)
        error = loss = F.mse_loss(out.float(), eps)
        if now.weighted:
            weight = (1 / noise.alphas_cumprod[t]).clamp(max=HEAVIEST)
            loss = (weight * (out.float() - eps).square().mean((1, 2, 3))).mean()
        if now.hints:
            loss = loss + hints(model, z, said)
            aside.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        if now.hints:
            aside.step()
        running.append(error.item())
        if not math.isfinite(running[-1]):
            raise SystemExit(f"the loss is {running[-1]} at step {step}")
        with torch.no_grad():
            keep = now.ema if step >= PARTS[0].warm_up else 0.0
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            record = {
                "step": step + 1,
                "batch_loss": round(sum(running) / len(running), 5),
                "train": round(epsilon_loss(average, words, vae, noise, "train"), 5),
                "held_out": round(epsilon_loss(average, words, vae, noise, "held-out"), 5),
            }
            running.clear()
            history.append(record)
            print(f"{spent + time.perf_counter() - start:7.1f} s", json.dumps(record), flush=True)
        # Only between chunks: what is left of one is not in the checkpoint.
        if checkpoint and (step + 1) % (CHUNK * max(1, save_every // CHUNK)) == 0:
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"hints": hints.state_dict(), "aside": aside.state_dict()}
            state |= {"decay": decay.state_dict(), "rng": rng.get_state(), "step": step + 1, "history": history}
            state |= {"running": running, "seconds": spent + time.perf_counter() - start}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    facts = {
        "steps": steps,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "parts": [asdict(p) for p in PARTS],
        "empty_captions": EMPTY,
        "parameters": {
            "unet": sum(p.numel() for p in average.unet.parameters()),
            "text_encoder": sum(p.numel() for p in average.text.parameters()),
        },
        "seconds": round(spent + time.perf_counter() - start, 1),
        "epsilon_loss": history,
    }
    return average, noise, facts


# ------------------------------------------------------------------ files


def save(folder: Path, vae: AutoencoderKL, words: CLIPTokenizer, model: Model, noise: DDIMScheduler) -> None:
    """An ordinary pipeline folder: float16 on disk, float32 once loaded."""
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model.text.eval(),
        tokenizer=words,
        unet=model.unet.half(),
        scheduler=noise,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    # transformers loads weights in the precision that their configuration names: that stays float32.
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    # The classic pair of files beside tokenizer.json.
    bpe = json.loads(words.backend_tokenizer.to_str())["model"]
    merges = [" ".join(m) for m in bpe["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"], indent=0) + "\n", encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the U-Net; fewer for a trial run")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS, help="fewer for a trial run")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints, to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    out, scratch = arguments.out, arguments.scratch

    words = tokenizer()
    kept = scratch / f"vae-{arguments.vae_steps}" if scratch else None
    if kept and (kept / "facts.json").exists():
        vae = AutoencoderKL.from_pretrained(kept).eval().requires_grad_(False)
        facts = json.loads((kept / "facts.json").read_text(encoding="utf-8"))
    else:
        vae, facts = train_vae(arguments.vae_steps)
        print("vae", json.dumps(facts), flush=True)
        if kept:
            vae.save_pretrained(kept)
            (kept / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    training = {"vae": facts}
    model, noise, training["unet"] = train_unet(arguments.steps, vae, words, scratch)
    save(out / "pipeline", vae, words, model, noise)

    record = {
        "subject": "scenes",
        "default": "pipeline",
        "license": "Apache-2.0 (weights); data: drawn by steersman.reference.scenes",
        "script": {"file": f"training/{HERE.name}", "sha256": sha256(HERE)},
        "data": {
            "source": "steersman.reference.scenes",
            "fingerprint": scenes.data_fingerprint(),
            "train": len(scenes.combinations("train")),
            "split_seed": scenes.SPLIT_SEED,
        },
        "seeds": SEEDS,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "diffusers", "transformers", "tokenizers", "numpy", "safetensors")},
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
