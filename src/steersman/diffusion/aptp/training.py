r"""Pruning a network into experts: the router is trained, the network is cut, each expert is fine-tuned.

1. *Router.* The network stays as it is; predictor and codebook learn. Each prompt of a batch gets a code by transport,
   and runs through the network under that code's soft gates, with fresh noise in each step. (In the first steps prompts
   run through their own gates, so that the predictor starts from the denoising loss.)
2. *Pruning.* The router gives each training prompt to a code; the codes' gates are hardened so that the multiply-adds,
   weighted by how many prompts go where, are the budget's; the network is cut for each.
3. *Fine-tuning.* Each expert learns on the images of its own prompts, and from the whole network.

A. Ganjdanesh, R. Shirkavand, S. Gao, H. Huang, ICLR 2025, arXiv:2406.12042, sections 3 and 4.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from steersman.diffusion import autoencoder
from steersman.diffusion.aptp import losses
from steersman.diffusion.aptp.captions import Embedding, PooledText, checked_captions, embed_all
from steersman.diffusion.aptp.costs import MultiplyAdds
from steersman.diffusion.aptp.gates import OFFSET, TEMPERATURE, GateLayout, gated
from steersman.diffusion.aptp.routing import (
    EPSILON,
    ITERATIONS,
    Router,
    magnitudes,
    potentials,
    sinkhorn,
    within_budget,
)
from steersman.diffusion.aptp.surgery import cut, save_pruned
from steersman.errors import InputError, TrialError

Architecture = Literal["learned", "random", "magnitude", "whole"]
ARCHITECTURES = ("learned", "random", "magnitude", "whole")
ROUTER, RECORD = "router.safetensors", "aptp.json"


@dataclass
class APTPConfig:
    """Settings of :class:`PromptRoutedPruner`; the defaults are those of the paper's Stable Diffusion 2.1 on COCO.

    Args:
        budget: p, the share of all multiply-adds that is left, on average over prompts.
        experts: K; 1 is one network for all prompts.
        architecture: ``learned``; or, for comparison, ``random`` or ``magnitude`` (one network each), or ``whole``
            (nothing is pruned), which skip the router's training.
        transport: assign by transport in training; without, by the largest cosine.
        balanced: in use, offset the codes' similarities so that the training prompts are spread equally (ours).
        last_draw: cut by the codes' gates of the last training step, noise included, as the authors' code does; the
            budget is then met by chance only.
        by_macs: gates count by their share of the multiply-adds when architectures are compared.
        steps, batch_size: of the router's training; K at most a batch, and transport wants 4K.
        shrink: images of the router's training are averaged over squares of so many pixels (the paper trains the router
            at 256 pixels for a network of 512): each step costs 1/shrink² of the work.
        warm_start: first steps in which prompts run through their own gates.
        learning_rate: of AdamW for predictor and codebook.
        scale_learning_rate: times sqrt(batch size), for the experts', too.
        warmup: steps of a linear warm-up; then constant.
        temperature, offset: T and b of the gates.
        epsilon, iterations: of the transport.
        snr_gamma: γ of the loss's weights; None has none.
        distillation, blocks, resource, contrastive, spread, peak: λ_d, λ_b, λ_r, λ_c, λ_s, λ_m.
        resource_form: log, mae or mse.
        contrastive_temperature: τ.
        ff_groups: gates of a feed-forward layer, at most.
        finetune_steps, finetune_batch_size, finetune_learning_rate, finetune_warmup: of each expert's training.
        finetune_denoising, finetune_distillation, finetune_blocks: weights of its losses (0.01, 0.5, 0.5 for CC3M).
        caption_dropout: share of captions that are left out in fine-tuning, for classifier-free guidance.
        seed: of everything random.
    """

    budget: float = 0.6
    experts: int = 8
    architecture: Architecture = "learned"
    transport: bool = True
    balanced: bool = False
    last_draw: bool = False
    by_macs: bool = False
    steps: int = 5000
    batch_size: int = 64
    shrink: int = 1
    warm_start: int = 500
    learning_rate: float = 2e-4
    scale_learning_rate: bool = True
    warmup: int = 100
    temperature: float = TEMPERATURE
    offset: float = OFFSET
    epsilon: float = EPSILON
    iterations: int = ITERATIONS
    snr_gamma: float | None = losses.SNR_GAMMA
    distillation: float = 0.2
    blocks: float = 0.2
    resource: float = 2.0
    contrastive: float = 100.0
    spread: float = 0.1
    peak: float = 0.1
    resource_form: Literal["log", "mae", "mse"] = "log"
    contrastive_temperature: float = 0.03
    ff_groups: int = 32
    finetune_steps: int = 30_000
    finetune_batch_size: int = 128
    finetune_learning_rate: float = 1e-5
    finetune_warmup: int = 250
    finetune_denoising: float = 1.0
    finetune_distillation: float = 0.2
    finetune_blocks: float = 0.2
    caption_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {
            "experts": 1,
            "steps": 0,
            "batch_size": 1,
            "shrink": 1,
            "warm_start": 0,
            "warmup": 0,
            "iterations": 1,
            "ff_groups": 1,
            "finetune_steps": 0,
            "finetune_batch_size": 1,
            "finetune_warmup": 0,
            "seed": 0,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(name, value, f"a whole number from {least}")
        for name in ("distillation", "blocks", "resource", "contrastive", "spread", "peak", "finetune_denoising"):
            self._real(name, 0, math.inf)
        for name in ("finetune_distillation", "finetune_blocks", "learning_rate", "finetune_learning_rate"):
            self._real(name, 0, math.inf)
        for name in ("temperature", "epsilon", "contrastive_temperature"):
            self._real(name, 1e-6, math.inf)
        self._real("budget", 1e-6, 1.0)
        self._real("caption_dropout", 0, 1.0)
        if self.snr_gamma is not None:
            self._real("snr_gamma", 1e-6, math.inf)
        if self.architecture not in ARCHITECTURES:
            raise InputError("architecture", self.architecture, f"one of {', '.join(ARCHITECTURES)}")
        if self.resource_form not in losses.RESOURCE:
            raise InputError("resource_form", self.resource_form, f"one of {', '.join(losses.RESOURCE)}")
        if self.architecture != "learned" and self.experts != 1:
            allowed = f"1 for an architecture that is {self.architecture}: it is one network for all prompts"
            raise InputError("experts", self.experts, allowed)
        if self.experts > self.batch_size:
            allowed = f"at most the batch size, {self.batch_size}: transport can't fill more codes than it has prompts"
            raise InputError("experts", self.experts, allowed)

    def _real(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InputError(name, value, f"a number from {low:g} to {high:g}")


class PromptRoutedPruner:
    """Adaptive Prompt-Tailored Pruning of a text-to-image pipeline's U-Net; see the module.

        pruner = PromptRoutedPruner(pipe, budget=0.7, experts=4)
        pruner.fit(images, captions)            # the router
        pruner.prune()                          # the experts
        pruner.finetune()                       # on their own prompts
        pruner.save("my-experts")

    Args:
        pipe: a ``StableDiffusionPipeline``, or one with ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` and a
            ``scheduler`` with ``alphas_cumprod``. It is not changed.
        config: an :class:`APTPConfig`; its fields may also be given as keyword arguments.
        embedding: texts -> (B, d), what the router reads; None is the text encoder's pooled output.
        progress: gets a line now and then.

    Attributes:
        layout, costs: the network's gates and multiply-adds.
        router: after :meth:`fit`.
        experts: after :meth:`prune`, by their number.
        history: one entry for each step of the router's training.

    Raises:
        InputError: a bad setting, a network with unknown blocks, a budget out of reach.
    """

    def __init__(
        self,
        pipe: Any,
        config: APTPConfig | None = None,
        *,
        embedding: Embedding | None = None,
        progress: Callable[[str], None] | None = None,
        **arguments: Any,
    ) -> None:
        if config is not None and arguments:
            raise InputError("config", sorted(arguments), "given whole, or as keyword arguments, not both")
        self.config = config or _config(arguments)
        for name in ("unet", "vae", "tokenizer", "text_encoder", "scheduler"):
            if getattr(pipe, name, None) is None:
                raise InputError("pipe", type(pipe).__name__, f"a text-to-image pipeline with {name}")
        if getattr(pipe, "text_encoder_2", None) is not None:
            raise InputError("pipe", type(pipe).__name__, "a pipeline with one text encoder")
        alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, Tensor):
            name = type(pipe.scheduler).__name__
            raise InputError("scheduler", name, "one that has alphas_cumprod, as DDIMScheduler")
        self.kind = str(pipe.scheduler.config.get("prediction_type", "epsilon"))
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise InputError("prediction_type", self.kind, "epsilon, v_prediction or sample")
        self.pipe, self.alphas = pipe, alphas.double().cpu()
        self.unet: Any = pipe.unet
        self.text = PooledText(pipe)
        self.embedding: Embedding = embedding or self.text
        self.own_embedding = embedding is None
        self.progress = progress or (lambda line: None)
        self.layout = GateLayout(self.unet, self.config.ff_groups)
        self.costs = MultiplyAdds(self.unet, self.layout, pipe.tokenizer.model_max_length)
        self.target = self.costs.target(self.config.budget)
        self.router: Router | None = None
        self.experts: dict[int, Any] = {}
        self.history: list[dict[str, float]] = []
        self.finetuning: dict[int, float] = {}
        self._latents: Tensor | None = None
        self._captions: list[str] = []
        self._z: Tensor | None = None

    # -------------------------------------------------------------- stage 1

    def fit(self, images: Tensor, captions: Sequence[str]) -> PromptRoutedPruner:
        """Train the router.

        Args:
            images: (n, 3, H, W) in [-1, 1], of the pipeline's size; or latents (n, C, h, w).
            captions: of the images.

        Raises:
            InputError: images of another size, fewer than a batch, an empty caption.
            TrialError: a loss that is not finite.
        """
        c = self.config
        self._captions = checked_captions(captions, len(images))
        if len(images) < c.batch_size:
            raise InputError("images", f"{len(images)} images", f"at least a batch, {c.batch_size}")
        self._latents = encoded(self.pipe, images)
        small = self._latents if c.shrink == 1 or c.architecture != "learned" else self._shrunk(images)
        self._z = embed_all(self.embedding, self._captions)
        generator = torch.Generator().manual_seed(c.seed)
        router = Router(
            self.layout,
            self._z.shape[1],
            c.experts,
            by_macs=c.by_macs,
            costs=self.costs,
            temperature=c.temperature,
            offset=c.offset,
            generator=generator,
        ).to(self.unet.device)
        self.router, self.experts, self.history = router, {}, []
        if c.architecture != "learned":
            return self
        if c.transport and c.experts > 1 and c.batch_size < 4 * c.experts:
            warnings.warn(
                f"transport balances {c.experts} experts over batches of {c.batch_size}: with fewer than 4 prompts an "
                "expert that means little",
                stacklevel=2,
            )
        rate = c.learning_rate * (math.sqrt(c.batch_size) if c.scale_learning_rate else 1.0)
        parameters = list(router.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        with _frozen(self.unet):
            for step in range(c.steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / max(c.warmup, 1))
                entry = self._router_step(router, optimizer, step, small, generator)
                self.history.append(entry)
                if (step + 1) % max(c.steps // 10, 1) == 0:
                    self.progress(
                        f"router {step + 1}/{c.steps}: loss {entry['loss']:.4g}, multiply-adds {entry['ratio']:.3f} of "
                        f"{self.target:.3f}, codes in use {entry['codes']:.0f}, predictor's gradient "
                        f"{entry['predictor_gradient']:.2g}"
                    )
        return self

    def _router_step(
        self, router: Router, optimizer: Any, step: int, latents: Tensor, generator: torch.Generator
    ) -> dict[str, float]:
        c, device = self.config, self.unet.device
        assert self._z is not None
        rows = torch.randperm(len(latents), generator=generator)[: c.batch_size]
        z = self._z[rows].to(device)
        own = router.soft(router.logits(z), generator)
        codes = router.soft(router.codebook, generator)
        w, w_codes = router.comparable(own), router.comparable(codes)
        router.drawn.copy_(codes.detach())
        index, gates = None, own
        if step >= c.warm_start or c.experts == 1:  # one code is all there is to learn
            S = (w @ w_codes.T).detach()
            index = (sinkhorn(S, c.epsilon, c.iterations) if c.transport else S).argmax(1)
            gates = codes[index]
        batch = self._noised(latents, rows, generator)
        s, s_blocks, t, t_blocks = self._both(batch, gates)
        R = self.costs.ratio(gates)
        parts = {
            "denoising": losses.denoising_loss(s, batch.target, batch.weights),
            "distillation": c.distillation * F.mse_loss(s, t),
            "blocks": c.blocks * _between(s_blocks, t_blocks),
            "resource": c.resource * losses.resource_loss(R.mean(), self.target, c.resource_form),
            "spread": -c.spread * R.std() if len(R) > 1 else 0 * R.sum(),
            "peak": c.peak * (1 - R.max()),
        }
        if c.experts > 1:
            parts["contrastive"] = c.contrastive * losses.contrastive_loss(z, w, c.contrastive_temperature)
        loss = torch.stack([*parts.values()]).sum()
        if not bool(loss.isfinite()):
            raise TrialError(f"the router's loss is not finite at step {step + 1}: lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        gradient = router.predictor.weight.grad
        entry = {
            "step": step + 1,
            "loss": float(loss.detach()),
            "ratio": float(R.detach().mean()),
            "codes": float("nan") if index is None else float(len(index.unique())),
            "predictor_gradient": 0.0 if gradient is None else float(gradient.norm()),
            **{name: float(value.detach()) for name, value in parts.items()},
        }
        optimizer.step()
        return entry

    # -------------------------------------------------------------- stage 2

    def prune(self) -> dict[int, UNet2DConditionModel]:
        """Cut the network into experts whose multiply-adds, by the training prompts' use of them, are the budget's.

        Codes that no training prompt goes to make no expert (with a warning); prompts that later belong to one go to
        the nearest other expert.

        Returns:
            the experts by number.
        """
        router = self._fitted()
        c = self.config
        router.potentials.zero_()
        if c.balanced:
            router.potentials.copy_(potentials(self._similarity(router)))
        index = self._assigned(router)
        usage = torch.bincount(index, minlength=c.experts).double() / len(index)
        if c.architecture == "learned":
            margins = self.layout.margins(router.codebook.detach().cpu(), offset=c.offset)
        elif c.architecture == "random":
            margins = torch.rand(1, self.layout.size, generator=torch.Generator().manual_seed(c.seed + 1))
            margins[:, self.layout.n_width :] = torch.inf  # whole blocks are not drawn, as in the authors' code
        elif c.architecture == "magnitude":
            margins = magnitudes(self.unet, self.layout)[None]
        else:
            margins = torch.full((1, self.layout.size), torch.inf)
        if c.architecture == "whole":
            gates = self.layout.ones()
        elif c.architecture == "learned" and c.last_draw:
            gates = (router.drawn.cpu() >= 0.5).float()
        else:
            gates = within_budget(margins, self.costs, c.budget, usage)
        router.architectures.copy_(gates)
        router.usage.copy_(usage)
        router.alive.copy_(usage > 0)
        dead = (usage == 0).nonzero()[:, 0].tolist()
        if dead:
            warnings.warn(
                f"no training prompt goes to experts {', '.join(map(str, dead))}: they are left out, and prompts that "
                "belong to them go to the nearest other expert",
                stacklevel=2,
            )
        self.experts = {
            k: cut(self.unet, self.layout, gates[k].cpu()) for k in range(c.experts) if bool(router.alive[k])
        }
        shares = (self.costs(gates.cpu()) / self.costs.total).tolist()
        for k in self.experts:
            self.progress(f"expert {k}: {shares[k]:.3f} of the multiply-adds, {float(usage[k]):.3f} of the prompts")
        return self.experts

    def _assigned(self, router: Router) -> Tensor:
        """The code of each training prompt, before any is found empty."""
        return (self._similarity(router) + router.potentials.cpu()).argmax(1)

    def _similarity(self, router: Router) -> Tensor:
        assert self._z is not None
        return torch.cat([router.similarity(part.to(self.unet.device)).cpu() for part in self._z.split(1024)])

    @property
    def macs(self) -> dict[int, float]:
        """Share of all multiply-adds that each expert takes."""
        gates = self._fitted().architectures.cpu()
        return {k: float(self.costs(gates[k : k + 1])[0] / self.costs.total) for k in self.experts}

    # -------------------------------------------------------------- stage 3

    def finetune(self, steps: int | None = None) -> dict[int, float]:
        """Train each expert on the images of its prompts, with the whole network as the teacher.

        Args:
            steps: of each expert; None is the configuration's.

        Returns:
            the mean loss of the last tenth of each expert's steps.
        """
        c, router = self.config, self._fitted()
        steps = c.finetune_steps if steps is None else steps
        if not self.experts:
            raise InputError("experts", "none", "made first (call prune)")
        assert self._latents is not None
        index = self._assigned(router)
        generator = torch.Generator().manual_seed(c.seed + 2)
        rate = c.finetune_learning_rate * (math.sqrt(c.finetune_batch_size) if c.scale_learning_rate else 1.0)
        for k, expert in self.experts.items():
            rows = (index == k).nonzero()[:, 0]
            expert.requires_grad_(True)
            optimizer = torch.optim.AdamW(expert.parameters(), lr=rate, weight_decay=0.0)
            found: list[float] = []
            with _frozen(self.unet):
                for step in range(steps):
                    for group in optimizer.param_groups:
                        group["lr"] = rate * min(1.0, (step + 1) / max(c.finetune_warmup, 1))
                    chosen = rows[torch.randint(len(rows), (c.finetune_batch_size,), generator=generator)]
                    batch = self._noised(self._latents, chosen, generator, c.caption_dropout)
                    s, s_blocks, t, t_blocks = self._both(batch, None, expert)
                    loss = (
                        c.finetune_denoising * losses.denoising_loss(s, batch.target, batch.weights)
                        + c.finetune_distillation * F.mse_loss(s, t)
                        + c.finetune_blocks * _between(s_blocks, t_blocks)
                    )
                    if not bool(loss.isfinite()):
                        raise TrialError(f"the loss of expert {k} is not finite at step {step + 1}")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    found.append(float(loss.detach()))
            expert.requires_grad_(False)
            self.finetuning[k] = float(np.mean(found[-max(len(found) // 10, 1) :])) if found else math.nan
            self.progress(f"expert {k}: {steps} steps on {len(rows)} images, loss {self.finetuning[k]:.4g}")
        return self.finetuning

    # -------------------------------------------------------------- what comes out

    def pipeline(self, **knobs: Any) -> Any:
        """The routed pipeline, a :class:`~steersman.diffusion.aptp.PromptRoutedPipeline`."""
        from steersman.diffusion.aptp.pipeline import PromptRoutedPipeline

        if not self.experts:
            raise InputError("experts", "none", "made first (call prune)")
        return PromptRoutedPipeline(self.pipe, self.experts, self._fitted(), self.embedding, macs=self.macs, **knobs)

    def report(self) -> dict[str, Any]:
        """Multiply-adds, sizes and use of the experts."""
        router, macs = self._fitted(), self.macs
        usage = {k: float(router.usage[k]) for k in self.experts}
        shares = np.array([*usage.values()])
        whole = sum(p.numel() for p in self.unet.parameters())
        return {
            "experts": len(self.experts),
            "multiply_adds": sum(usage[k] * macs[k] for k in self.experts) / sum(usage.values()),
            "multiply_adds_of": {str(k): macs[k] for k in self.experts},
            "usage": {str(k): usage[k] for k in self.experts},
            "usage_entropy": float(-(shares * np.log(np.maximum(shares, 1e-300))).sum()),
            "parameters_of": {str(k): sum(p.numel() for p in e.parameters()) / whole for k, e in self.experts.items()},
            "predictor_gradient": self.history[-1]["predictor_gradient"] if self.history else 0.0,
            "finetuning_loss": {str(k): loss for k, loss in self.finetuning.items()},
        }

    def save(self, folder: str | Path) -> None:
        """One folder for each expert, ``router.safetensors`` and ``aptp.json``."""
        folder, router = Path(folder), self._fitted()
        if not self.experts:
            raise InputError("experts", "none", "made first (call prune)")
        folder.mkdir(parents=True, exist_ok=True)
        gates = router.architectures.cpu()
        for k, expert in self.experts.items():
            save_pruned(expert, self.layout, gates[k], folder / f"expert_{k}")
        save_file({n: v.detach().cpu().contiguous() for n, v in router.state_dict().items()}, folder / ROUTER)
        record = {
            "format": 1,
            "experts": sorted(self.experts),
            "ff_groups": self.layout.ff_groups,
            "temperature": router.temperature,
            "offset": router.offset,
            "own_embedding": self.own_embedding,
            "macs": {str(k): v for k, v in self.macs.items()},
            "config": asdict(self.config),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    # -------------------------------------------------------------- pieces

    def _shrunk(self, images: Tensor) -> Tensor:
        """Latents of images averaged over squares."""
        s, side = self.config.shrink, images.shape[-2:]
        # The network halves its input once a level.
        least = 2 ** (len(self.unet.config.block_out_channels) - 1)
        factor = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        if any(n % (s * factor * least) for n in side) or images.shape[1] != self.pipe.vae.config.in_channels:
            raise InputError(
                "shrink", s, f"1, or a divisor of the images' size that leaves a multiple of {factor * least}"
            )
        return encoded(self.pipe, F.avg_pool2d(images, s), self.pipe.unet.config.sample_size // s)

    def _fitted(self) -> Router:
        if self.router is None:
            raise InputError("pruner", "not fitted", "fitted first (call fit)")
        return self.router

    def _noised(self, latents: Tensor, rows: Tensor, generator: torch.Generator, dropout: float = 0.0) -> _Batch:
        device, dtype = self.unet.device, self.unet.dtype
        x = latents[rows]
        t = torch.randint(len(self.alphas), (len(rows),), generator=generator)
        ε = torch.randn(x.shape, generator=generator)
        α, σ = (v.float()[:, None, None, None] for v in (self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()))
        target = {"epsilon": ε, "sample": x, "v_prediction": α * ε - σ * x}[self.kind]
        snr = self.alphas[t] / (1 - self.alphas[t]).clamp_min(1e-12)
        # Nothing can be told from noise alone: where the schedule ends at SNR 0, the weight's limit is 1.
        weights = losses.snr_weights(snr.clamp_min(1e-8), self.kind, self.config.snr_gamma).float()
        texts = [self._captions[i] for i in rows.tolist()]
        if dropout:
            left_out = torch.rand(len(rows), generator=generator) < dropout
            texts = ["" if out else text for out, text in zip(left_out.tolist(), texts, strict=True)]
        return _Batch(
            (α * x + σ * ε).to(device, dtype),
            t.to(device),
            self.text.states(texts).to(device, dtype),
            target.to(device),
            weights.to(device),
        )

    def _both(
        self, batch: _Batch, gates: Tensor | None, expert: Any = None
    ) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """Outputs and blocks' activations of the pruned network and of the whole one."""
        with torch.no_grad(), _activations(self.unet) as theirs:
            t = self.unet(batch.x, batch.t, encoder_hidden_states=batch.states).sample
        network = self.unet if expert is None else expert
        with _activations(network) as ours:
            if gates is None:
                s = network(batch.x, batch.t, encoder_hidden_states=batch.states).sample
            else:
                with gated(network, self.layout, gates):
                    s = network(batch.x, batch.t, encoder_hidden_states=batch.states).sample
        return s, ours, t, theirs


@dataclass(frozen=True)
class _Batch:
    x: Tensor
    t: Tensor
    states: Tensor
    target: Tensor
    weights: Tensor


def _between(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """The mean over blocks of the mean squared difference."""
    return torch.stack([F.mse_loss(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]).mean()


@contextmanager
def _activations(unet: Any) -> Iterator[list[Tensor]]:
    """What the network's blocks return, in their order."""
    found: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    blocks = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]
    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _frozen(unet: Any) -> Iterator[None]:
    """In evaluation mode and without gradients of its weights; afterwards as it was."""
    training, flags = unet.training, [(p, p.requires_grad) for p in unet.parameters()]
    try:
        unet.eval().requires_grad_(False)
        yield
    finally:
        unet.train(training)
        for p, flag in flags:
            p.requires_grad_(flag)


@torch.no_grad()
def encoded(pipe: Any, images: Tensor, size: Any = None, batch: int = 16) -> Tensor:
    """Latents (n, C, h, w), float32 on the CPU, of images in [-1, 1]; latents come back as they are.

    Raises:
        InputError: of another size than the pipeline's, or not finite.
    """
    config, vae = pipe.unet.config, pipe.vae
    size = config.sample_size if size is None else size
    latent = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = (vae.config.in_channels, latent[1] * factor, latent[2] * factor)
    if not isinstance(images, Tensor) or images.ndim != 4 or tuple(images.shape[1:]) not in (latent, pixels):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError("images", shape, f"of shape (n, {', '.join(map(str, pixels))}), or latents {latent}")
    if not bool(images.isfinite().all()):
        raise InputError("images", "pixels", "finite (there are NaN or infinities)")
    if tuple(images.shape[1:]) == latent:
        return images.float().cpu()
    with autoencoder.upcast(vae):
        return torch.cat([autoencoder.encode(vae, part).cpu() for part in images.split(batch)]).float()


def _config(arguments: dict[str, Any]) -> APTPConfig:
    try:
        return APTPConfig(**arguments)
    except TypeError:
        unknown = sorted(set(arguments) - set(APTPConfig.__dataclass_fields__))
        raise InputError(
            "arguments", unknown, f"fields of APTPConfig: {', '.join(APTPConfig.__dataclass_fields__)}"
        ) from None
