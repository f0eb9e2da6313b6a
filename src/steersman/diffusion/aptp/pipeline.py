r"""A pipeline that sends each prompt to its expert.

A batch of prompts is split by expert; each expert takes its own prompts through the ordinary diffusers pipeline in one
call, and the images come back in the prompts' order. An expert is a network of its own, so under classifier-free
guidance both halves of a batch run through it, and nothing needs to be repeated.

Noise is of the prompt, not of its row: without ``latents``, image i starts from a generator whose seed is a hash of the
call's seed, the prompt, and how many images of this prompt came before. So a prompt's image depends neither on the
order of prompts nor on what else is in the batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from steersman.diffusion.aptp.captions import Embedding, PooledText, checked_captions, embed_all
from steersman.diffusion.aptp.gates import GateLayout
from steersman.diffusion.aptp.routing import Router
from steersman.diffusion.aptp.surgery import load_pruned, moved
from steersman.diffusion.aptp.training import RECORD, ROUTER
from steersman.errors import InputError

Routing = Literal["learned", "random"]
ROUTINGS = ("learned", "random")


class RoutedUNet(nn.Module):
    """Experts in one module, one of which is in use: what hooks on ``pipe.unet`` see.

    Args:
        experts: by number.
    """

    def __init__(self, experts: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(k): expert for k, expert in experts.items()})
        self.in_use = next(iter(self.experts))

    def use(self, k: int) -> None:
        """The expert that calls go to from now on."""
        self.in_use = str(k)

    @property
    def expert(self) -> Any:
        """The one in use."""
        return self.experts[self.in_use]

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The expert's output."""
        return self.expert(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("experts", "in_use"):
                raise
            return getattr(self.expert, name)


class PromptRoutedPipeline:
    """A text-to-image pipeline with experts in its network's place; called as the wrapped pipeline is.

    ``scheduler`` is the wrapped pipeline's at first, and can be set: any sampler works. ``unet`` is a module that holds
    the experts, so what installs itself on a pipeline (guidance) works on this one.

    Args:
        pipe: a ``StableDiffusionPipeline`` (whose text encoder, VAE and so on are used); it is not changed.
        experts: networks by number.
        router: which of them a prompt goes to.
        embedding: texts -> (B, d); None is the pipeline's text encoder, pooled.
        macs: share of the whole network's multiply-adds that each expert takes.
        routing: ``learned``; or ``random``, a control: experts at random, each as often as in training.
        official_eval_noise: route as the authors' code does, by gates with noise that depends on a prompt's row.

    Raises:
        InputError: no experts, or a setting out of range.
    """

    def __init__(
        self,
        pipe: Any,
        experts: Mapping[int, nn.Module],
        router: Router,
        embedding: Embedding | None = None,
        *,
        macs: Mapping[int, float] | None = None,
        routing: Routing = "learned",
        official_eval_noise: bool = False,
    ) -> None:
        if not experts:
            raise InputError("experts", "none", "at least one")
        _check(routing, official_eval_noise)
        self.router, self.routing, self.official_eval_noise = router, routing, official_eval_noise
        self.macs = dict(macs or {})
        self.embedding: Embedding = embedding or PooledText(pipe)
        self.pipe = copy.copy(pipe)
        self.pipe.unet = RoutedUNet(experts)

    @staticmethod
    def check_settings(routing: str = "learned", official_eval_noise: bool = False, **settings: Any) -> None:
        """Refuse settings of ``apply`` and :meth:`mount` that can't be, before anything is made.

        Raises:
            InputError: a value that is not allowed.
        """
        from steersman.diffusion.aptp.artefact import check

        _check(routing, official_eval_noise)
        check(**settings)

    @classmethod
    def mount(
        cls,
        pipe: Any,
        folder: str | Path,
        *,
        routing: Routing = "learned",
        official_eval_noise: bool = False,
        embedding: Embedding | None = None,
    ) -> PromptRoutedPipeline:
        """``pipe`` with the experts in ``folder``, which :meth:`PromptRoutedPruner.save` (or ``apply``) wrote.

        Args:
            embedding: needed where the experts were made with one of the user's own.

        Raises:
            InputError: files that can't be read, or experts of another pipeline.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            state = load_file(folder / ROUTER)
            layout = GateLayout(pipe.unet, record["ff_groups"])
            K, D = state["codebook"].shape
            if layout.size != D:
                raise InputError("folder", str(folder), f"experts of this pipeline (of {layout.size} gates, not {D})")
            router = Router(
                layout,
                state["predictor.weight"].shape[1],
                K,
                temperature=record["temperature"],
                offset=record["offset"],
            )
            router.load_state_dict(state)
            numbers = [int(k) for k in record["experts"]]
            macs = {int(k): float(v) for k, v in record["macs"].items()}
            own = record["own_embedding"]
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError("folder", str(folder), f"one that pruned experts were saved to ({reason})") from error
        if embedding is None and not own:
            raise InputError("embedding", None, "given: these experts were made with embeddings of your own")
        unet = pipe.unet
        experts = {k: moved(load_pruned(folder / f"expert_{k}")[0], unet) for k in numbers}
        return cls(
            pipe,
            experts,
            router.to(unet.device),
            embedding,
            macs=macs,
            routing=routing,
            official_eval_noise=official_eval_noise,
        )

    # -------------------------------------------------------------- as the wrapped pipeline

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not yet set
            raise AttributeError(name)
        return getattr(self.pipe, name)

    @property
    def scheduler(self) -> Any:
        """Of this pipeline; setting it leaves the wrapped pipeline's as it is."""
        return self.pipe.scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.pipe.scheduler = value

    @property
    def unet(self) -> RoutedUNet:
        """The experts."""
        return self.pipe.unet

    def to(self, *arguments: Any, **keywords: Any) -> PromptRoutedPipeline:
        """Moves experts, router and the parts that are shared with the wrapped pipeline."""
        self.pipe.to(*arguments, **keywords)
        self.unet.to(*arguments, **keywords)
        self.router.to(self.unet.device)
        return self

    def footprint(self) -> int:
        """Bytes of the weights that take the place of the network's: all experts, and the router."""
        tensors = [*self.unet.state_dict().values(), *self.router.state_dict().values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    # -------------------------------------------------------------- routing

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The expert of each prompt.

        Raises:
            InputError: an empty prompt, which says nothing that could be routed.
        """
        texts = checked_captions(prompts)
        alive = sorted(int(k) for k in self.unet.experts)
        if self.routing == "random":
            share = torch.cumsum(self.router.usage[alive].double().cpu(), 0)
            u = torch.tensor([_hash("routing", text) / 2**63 for text in texts], dtype=torch.float64)
            return [alive[min(i, len(alive) - 1)] for i in torch.searchsorted(share / share[-1], u).tolist()]
        if self.official_eval_noise:
            z = torch.as_tensor(self.embedding(texts)).float().cpu()
        else:
            z = embed_all(self.embedding, texts)
        return self.router.route(z.to(self.router.codebook.device), self.official_eval_noise).tolist()

    def multiply_adds(self, prompts: Sequence[str]) -> float:
        """Mean share of the whole network's multiply-adds that these prompts take."""
        return float(np.mean([self.macs[k] for k in self.route(prompts)]))

    # -------------------------------------------------------------- the call

    @torch.no_grad()
    def __call__(self, prompt: str | Sequence[str] | None = None, **keywords: Any) -> Any:
        """See the class; arguments are those of the wrapped pipeline.

        Args:
            prompt: one text, or a list.
            keywords: ``negative_prompt``, ``latents`` and ``generator`` may hold one for each prompt (or image).

        Raises:
            InputError: an empty prompt, embeddings in place of prompts, lists of another length.
        """
        if prompt is None or ("prompt_embeds" in keywords and keywords["prompt_embeds"] is not None):
            raise InputError("prompt", prompt, "given as text: the router reads it")
        prompts = checked_captions([prompt] if isinstance(prompt, str) else list(prompt))
        each = keywords.get("num_images_per_prompt") or 1
        given = dict(keywords)
        return_dict = given.pop("return_dict", True)
        generators = self._generators(prompts, each, given.pop("generator", None))
        latents, negative = given.pop("latents", None), given.pop("negative_prompt", None)
        count = len(prompts) * each
        if latents is not None and len(latents) != count:
            raise InputError("latents", tuple(latents.shape), f"of {count} rows, one for each image")
        if isinstance(negative, (list, tuple)) and len(negative) != len(prompts):
            raise InputError("negative_prompt", f"{len(negative)} texts", f"one text, or {len(prompts)}")
        experts = self.route(prompts)
        images: Any = [None] * count
        flags: list[Any] | None = [None] * count
        kind: Any = None
        for k in sorted(set(experts)):
            rows = [i for i, expert in enumerate(experts) if expert == k]
            all_rows = [i * each + j for i in rows for j in range(each)]
            mine = dict(given)
            if latents is not None:
                mine["latents"] = latents[all_rows]
            if negative is not None:
                mine["negative_prompt"] = negative if isinstance(negative, str) else [negative[i] for i in rows]
            self.unet.use(k)
            out = self.pipe(
                prompt=[prompts[i] for i in rows],
                generator=[generators[i] for i in all_rows],
                return_dict=True,
                **mine,
            )
            kind = type(out)
            for i, image in zip(all_rows, out.images, strict=True):
                images[i] = image
            unsafe = getattr(out, "nsfw_content_detected", None)
            if unsafe is None:
                flags = None
            elif flags is not None:
                for i, flag in zip(all_rows, unsafe, strict=True):
                    flags[i] = flag
        if isinstance(images[0], Tensor):
            images = torch.stack(images)
        elif isinstance(images[0], np.ndarray):
            images = np.stack(images)
        if not return_dict:
            return images, flags
        return kind(images=images, nsfw_content_detected=flags)

    def _generators(self, prompts: list[str], each: int, given: Any) -> list[torch.Generator]:
        """One for each image: those given, or one that is seeded by the prompt."""
        count = len(prompts) * each
        if isinstance(given, (list, tuple)):
            if len(given) != count:
                raise InputError("generator", f"a list of {len(given)}", f"one generator, or {count} of them")
            return list(given)
        device = "cpu" if given is None else given.device
        base = int(torch.randint(2**62, (1,), generator=given, device=device))
        before: dict[str, int] = {}
        found = []
        for text in prompts:
            for _ in range(each):
                place = before[text] = before.get(text, -1) + 1
                found.append(torch.Generator(device).manual_seed(_hash(str(base), text, str(place))))
        return found


def _hash(*texts: str) -> int:
    """63 bits."""
    digest = hashlib.blake2b("\x1f".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# Recorded under the room's name, where it is exported, not under this file's.
PromptRoutedPipeline.__module__ = "steersman.diffusion"


def _check(routing: str, official_eval_noise: bool) -> None:
    if routing not in ROUTINGS:
        raise InputError("routing", routing, f"one of {', '.join(ROUTINGS)}")
    if not isinstance(official_eval_noise, bool):
        raise InputError("official_eval_noise", official_eval_noise, "true or false")
