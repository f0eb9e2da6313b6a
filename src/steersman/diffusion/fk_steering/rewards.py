r"""Where rewards come from: a function, ``file.py:name``, an HTTP scorer, or a regression on noisy inputs.

A reward needs no gradient. It is called with images (n, C, H, W) in [0, 1], and with ``prompts`` or ``labels`` where it
has parameters of these names; it returns n numbers. An HTTP scorer gets a POST of the JSON object

    {"images": [PNG in base64, ...], "prompts": [text, ...] or null, "labels": [number, ...] or null}

and answers ``{"rewards": [number, ...]}``, with null for an image that it has no reward for.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steersman.callables import CODE, load_callable
from steersman.errors import InputError, TrialError

OnError = Literal["stop", "skip"]
CONTEXT = ("prompts", "labels")
"""What a reward may ask for beside images."""


class HTTPReward:
    """Rewards of a server, see the module's text.

    Args:
        url: http://... or https://...
        timeout: seconds for a request.

    Raises:
        InputError: another kind of address, or a timeout that is not above 0.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError("reward", url, "an address that begins with http:// or https://")
        if not 0 < timeout < math.inf:
            raise InputError("timeout", timeout, "a number of seconds above 0")
        self.url, self.timeout = url, timeout

    def __call__(
        self, images: Tensor, prompts: Sequence[str] | None = None, labels: Sequence[int] | None = None
    ) -> list[float]:
        body = {
            "images": [_png(image) for image in images],
            "prompts": None if prompts is None else list(prompts),
            "labels": None if labels is None else [int(label) for label in labels],
        }
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                found = json.load(answer)["rewards"]
            return [math.nan if value is None else float(value) for value in found]
        except TimeoutError:
            raise TrialError(f"{self.url} did not answer within {self.timeout:g} s") from None
        except (urllib.error.URLError, OSError) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise TrialError(f"{self.url} did not answer within {self.timeout:g} s") from None
            raise TrialError(f"{self.url} could not be asked ({error})") from None
        except (ValueError, TypeError, KeyError) as error:
            wanted = '{"rewards": [number, ...]}'
            raise TrialError(f"{self.url} did not answer with {wanted} ({type(error).__name__}: {error})") from None


def _png(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1] as PNG in base64."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def load_reward(source: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` names.

    Raises:
        InputError: no such function, or neither of that form nor an address.
    """
    if not CODE.match(source):
        raise InputError("reward", source, "file.py:name, or the http(s) address of a scorer")
    return load_callable(source, "reward")


class Reward:
    """r(x_0), checked: one finite number for each image, or a sentence that names the particle.

    Args:
        source: a callable, ``file.py:name``, or the address of a scorer.
        micro_batch: images of one call; None is all at once.
        on_error: what is done where a call fails, takes too long, or returns something else than finite numbers.
            ``stop`` raises. ``skip`` gives the particle NaN, which :class:`FeynmanKac` takes as "nobody could score
            it", and goes on with the others: a call that failed is repeated image by image.
        timeout: seconds for a call; None is no limit for a callable, and 60 for a scorer. A callable that takes longer
            is left running in its thread.

    Raises:
        InputError: a source that can't be loaded, or a setting out of range.
    """

    def __init__(
        self,
        source: Callable[..., Any] | str,
        micro_batch: int | None = None,
        on_error: OnError = "stop",
        timeout: float | None = None,
    ) -> None:
        whole = isinstance(micro_batch, int) and not isinstance(micro_batch, bool)
        if micro_batch is not None and not (whole and micro_batch >= 1):
            raise InputError("micro_batch", micro_batch, "a whole number from 1, or None")
        if on_error not in ("stop", "skip"):
            raise InputError("on_error", on_error, "stop or skip")
        if timeout is not None and not 0 < timeout < math.inf:
            raise InputError("timeout", timeout, "a number of seconds above 0, or None")
        self.text = source if isinstance(source, str) else None
        self.micro_batch, self.on_error, self.timeout = micro_batch, on_error, timeout
        self.calls = 0
        """Images scored so far."""
        if isinstance(source, str):
            if source.startswith(("http://", "https://")):
                self.function: Callable[..., Any] = HTTPReward(source, 60.0 if timeout is None else timeout)
            else:
                self.function = load_reward(source)
        elif callable(source):
            self.function = source
        else:
            raise InputError("reward", source, "a function, file.py:name, or the http(s) address of a scorer")
        parameters = _parameters(self.function)
        self.wants = {
            name: parameters[name].default is inspect.Parameter.empty for name in CONTEXT if name in parameters
        }
        """What it asks for, and whether it can't do without."""

    def __call__(self, images: Tensor, names: Sequence[str], **context: Sequence[Any] | None) -> Tensor:
        """Rewards (n,) in float64 on the CPU.

        Args:
            images: (n, C, H, W).
            names: what to call each particle in a sentence.
            context: prompts and labels, where they are known, one for each image.

        Raises:
            InputError: the reward asks for prompts or labels that nobody knows, or returned something else than n
                finite numbers (with ``on_error="stop"``).
            TrialError: it failed or took too long (with ``on_error="stop"``).
        """
        for name, needed in self.wants.items():
            if needed and context.get(name) is None:
                told = self.text or _name(self.function)
                raise InputError("reward", told, f"one without {name} (none are known here)")
        asked = {name: context[name] for name in self.wants if context.get(name) is not None}
        size = self.micro_batch or len(images)
        parts = [self._chunk(images, names, asked, i, min(i + size, len(images))) for i in range(0, len(images), size)]
        return torch.cat(parts)

    def _chunk(self, images: Tensor, names: Sequence[str], asked: dict[str, Any], i: int, j: int) -> Tensor:
        self.calls += j - i
        try:
            found = self._ask(images[i:j], {name: value[i:j] for name, value in asked.items()})
            values = torch.as_tensor(found).detach().double().cpu()
        except Exception as error:
            if self.on_error == "stop" and j - i == 1:
                raise TrialError(f"the reward of {names[i]} could not be computed: {_sentence(error)}") from error
            if j - i == 1:
                return torch.full((1,), math.nan, dtype=torch.float64)
            # Once more, one by one: to lose only those that fail, or to name the one that does.
            return torch.cat([self._chunk(images, names, asked, row, row + 1) for row in range(i, j)])
        if values.shape != (j - i,):
            shape = tuple(values.shape)
            if self.on_error == "stop":
                many = names[i] if j - i == 1 else f"{names[i]} to {names[j - 1]}"
                raise InputError("reward", f"of shape {shape}", f"one number per image, shape ({j - i},) ({many})")
            return torch.full((j - i,), math.nan, dtype=torch.float64)
        bad = ~values.isfinite()
        if self.on_error == "stop" and bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise InputError("reward", float(values[row]), f"a finite number ({names[i + row]})")
        return torch.where(bad, math.nan, values)

    def _ask(self, images: Tensor, asked: dict[str, Any]) -> Any:
        if self.timeout is None or isinstance(self.function, HTTPReward):
            return self.function(images, **asked)
        answer: list[Any] = []

        def work() -> None:
            try:
                with torch.no_grad():  # a thread has its own
                    answer.append((self.function(images, **asked), None))
            except BaseException as error:
                answer.append((None, error))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not answer:
            raise TrialError(f"it took longer than {self.timeout:g} s")
        value, error = answer[0]
        if error is not None:
            raise error
        return value


class LearnedReward:
    r"""r_φ(x_t, t): a regression of the reward on noisy inputs, for the scored steps on the way.

    min_φ E ( f_φ(x_t, t) - exp(λ r(x_0)) )²    or    E ( f_φ(x_t, t) - r(x_0) )²     x_t = α_t x_0 + σ_t ε, t uniform

    The first has E[exp(λ r(x_0)) | x_t] as its optimum, whose logarithm over λ makes the ideal potentials; the second
    has E[r(x_0) | x_t], a lower bound of that (Jensen), and is easier to fit (arXiv 2501.06848, section 4.1).

    Args:
        network: f_φ, called with x_t (B, ...) and timesteps (B,), returns (B,) or (B, 1).
        of: ``reward`` or ``exponential``.
        scale: λ of ``exponential``.

    Raises:
        InputError: a setting out of range.
    """

    def __init__(self, network: torch.nn.Module, of: Literal["reward", "exponential"] = "reward", scale: float = 1.0):
        if of not in ("reward", "exponential"):
            raise InputError("of", of, "reward or exponential")
        if not 0 < scale < math.inf:
            raise InputError("scale", scale, "a finite number above 0")
        self.network, self.of, self.scale = network, of, float(scale)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """r_φ, (B,), at x_t and timesteps (B,)."""
        f = self.network(x, t).reshape(len(x))
        return f if self.of == "reward" else f.double().clamp_min(1e-12).log() / self.scale

    def fit(
        self,
        x0: Tensor,
        reward: Tensor,
        scheduler: Any,
        steps: int = 1000,
        batch: int = 128,
        learning_rate: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> list[float]:
        """Train the network; returns the loss of each step.

        Args:
            x0: clean samples (N, ...), latents where the pipeline has them.
            reward: r of each, (N,).
            scheduler: with ``add_noise`` and ``config.num_train_timesteps``.
            steps, batch, learning_rate: of Adam.
            generator: on the CPU.

        Raises:
            InputError: shapes that don't fit, or rewards that are not finite.
        """
        if reward.shape != (len(x0),) or not bool(reward.isfinite().all()):
            raise InputError("reward", tuple(reward.shape), f"{len(x0)} finite numbers, one for each of x0")
        target = reward if self.of == "reward" else (self.scale * reward.double()).exp()
        target = target.to(x0)
        optimiser = torch.optim.Adam(self.network.parameters(), learning_rate)
        losses = []
        last = int(scheduler.config.num_train_timesteps)
        for _ in range(steps):
            rows = torch.randint(len(x0), (batch,), generator=generator)
            t = torch.randint(last, (batch,), generator=generator).to(x0.device)
            x = x0[rows.to(x0.device)]
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            f = self.network(scheduler.add_noise(x, noise, t), t).reshape(batch)
            loss = (f - target[rows.to(x0.device)]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return losses


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0].rstrip(".") if lines else ""
    return first if isinstance(error, TrialError) else f"{type(error).__name__}: {first}"
