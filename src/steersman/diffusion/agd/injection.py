"""Where adapters sit: forward hooks on a frozen diffusers network.

Hooks leave the network's modules, names and weights as they are, so that its ``state_dict``, LoRA, IP-Adapter and
ControlNet go on as before. A hook before the network notes scale and condition, one on its own time embedder (and class
embedder) notes tau(t) (and y), and one on each target adds the adapter's output.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steersman.diffusion.agd.adapters import FORMS, MAX_TOKENS, Adapter, Conditions, LowRankAdapter, ScaleEmbedding
from steersman.errors import InputError, nearest

Arch = Literal["attention", "additive", "mlp_gate", "learned_pos_emb", "lora", "full"]
ARCHS: tuple[str, ...] = get_args(Arch)
Placement = Literal["all", "official"]
TENSORS, RECORD, WEIGHTS = "agd.safetensors", "agd_config.json", "agd_weights.safetensors"
SHARE = 0.02
"""Of a network's weights, that adapters of the default width have at most."""
SCALE_WIDTH = 16
"""Width of s(omega) in the baselines."""

_TARGETS = (r"\.attn2$", r"\.attn$", r"\.attn1$", r"attentions\.\d+$", r"resnets\.\d+$")
_TIME = (
    "time_embedding",
    "time_text_embed.timestep_embedder",
    "adaln_single.emb.timestep_embedder",
    "transformer_blocks.0.norm1.emb.timestep_embedder",
)
_LABEL = ("class_embedding", "transformer_blocks.0.norm1.emb.class_embedder")
_LORA = r"\.to_(q|k|v|out\.0)$"


@dataclass(frozen=True)
class AGDConfig:
    """What adapters are, and where.

    Args:
        arch: attention (networks with prompts), additive (class-conditional ones), mlp_gate or learned_pos_emb, see
            :mod:`~steersman.diffusion.agd.adapters`. Baselines: lora (low-rank weights of the attention layers and the
            scale in the time embedding) and full (all weights, and the scale in the time embedding).
        hidden_dim: d, even; the rank of lora. None is the largest multiple of 8, up to 320 in U-Nets and 256 in
            transformers, whose adapters have at most 2% of the network's weights (and at least 8).
        target_modules: ends of the targets' names, as PEFT matches them. None is the cross-attention of each block
            (``attn2``), or where there is none the attention, or where there is none the residual blocks.
        placement: all, or official: without the last attention of each up block, as the authors' loops have it.
        timestep: whether adapters are told the time.
        condition: whether they are told prompt or label.
        cfg_mult: m, factor of omega before its code; above 1 it makes neighbouring scales unlike each other.
        dropout: from 0 to below 1.
        num_heads: of the attention; divides d.
        scale_by: of the attention: q k^T is divided by the root of d (hidden_dim, as the authors do for any number of
            heads) or of a head's width (head_dim).

    Raises:
        InputError: a value outside these.
    """

    arch: Arch = "attention"
    hidden_dim: int | None = None
    target_modules: tuple[str, ...] | None = None
    placement: Placement = "all"
    timestep: bool = True
    condition: bool = True
    cfg_mult: float = 1.0
    dropout: float = 0.0
    num_heads: int = 1
    scale_by: Literal["hidden_dim", "head_dim"] = "hidden_dim"

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise InputError("arch", self.arch, f"one of {', '.join(ARCHS)}")
        d = self.hidden_dim
        if d is not None and (isinstance(d, bool) or not isinstance(d, int) or d < 2 or d % 2):
            raise InputError("hidden_dim", d, "an even number from 2, or None")
        if isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", (self.target_modules,))
        elif self.target_modules is not None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.placement not in get_args(Placement):
            raise InputError("placement", self.placement, "all or official")
        if not (isinstance(self.cfg_mult, (int, float)) and 0 < self.cfg_mult < math.inf):
            raise InputError("cfg_mult", self.cfg_mult, "a finite number above 0")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise InputError("dropout", self.dropout, "a number from 0 to below 1")
        n = self.num_heads
        if isinstance(n, bool) or not isinstance(n, int) or n < 1 or (d is not None and d % n):
            raise InputError("num_heads", n, "a whole number from 1 that divides hidden_dim")
        if self.scale_by not in ("hidden_dim", "head_dim"):
            raise InputError("scale_by", self.scale_by, "hidden_dim or head_dim")
        if self.arch == "attention" and not self.timestep and not self.condition:
            wanted = "True, or condition=True: over the scale's token alone softmax is 1, and q and k learn nothing"
            raise InputError("timestep", False, wanted)


@dataclass(frozen=True)
class Anatomy:
    """What of a network adapters depend on.

    Args:
        network: its class.
        targets: by module name, widths of input and output.
        time, label: names and widths of the embedders; None where not used.
        prompt: width of prompt tokens, None where not used.
    """

    network: str
    targets: Mapping[str, tuple[int, int]]
    time: tuple[str, int] | None
    label: tuple[str, int] | None
    prompt: int | None

    @classmethod
    def of(cls, network: nn.Module, config: AGDConfig) -> Anatomy:
        """Find it.

        Raises:
            InputError: no target, or a target whose widths are not known; a network without a time embedder.
        """
        modules = dict(network.named_modules())
        names = _targets(network, modules, config)
        time = _embedder(modules, _TIME)
        baseline = config.arch in ("lora", "full")
        if time is None and (config.timestep or baseline):
            raise InputError("network", type(network).__name__, "one with a time embedder (or timestep=False)")
        label = _embedder(modules, _LABEL) if config.condition and not baseline else None
        prompt = _prompt_width(network) if config.condition and not baseline else None
        if config.arch == "attention" and not config.timestep and label is None and prompt is None:
            raise InputError("timestep", False, "True for this network: it has neither labels nor prompts")
        widths = {name: _widths(name, modules[name]) for name in names}
        return cls(type(network).__name__, widths, time if config.timestep or baseline else None, label, prompt)

    def check(self, network: nn.Module, config: AGDConfig) -> None:
        """
        Raises:
            InputError: the network is of other shapes; the sentence has the first difference.
        """
        try:
            found = Anatomy.of(network, replace(config, target_modules=tuple(self.targets) or None))
        except InputError as error:
            raise InputError("network", type(network).__name__, f"like the one it was made with ({error})") from None
        for name, wanted in self.targets.items():
            if tuple(found.targets.get(name, ())) != tuple(wanted):
                shape = f"{name} of widths {wanted[0]} and {wanted[1]}"
                there = f"widths {found.targets[name]}" if name in found.targets else "none"
                raise InputError("network", type(network).__name__, f"one with {shape} (here: {there})")
        for what in ("time", "label", "prompt"):
            mine, theirs = getattr(self, what), getattr(found, what)
            mine = tuple(mine) if isinstance(mine, (list, tuple)) else mine
            if mine != theirs:
                raise InputError("network", f"its {what} embedding {theirs}", f"as it was made with: {mine}")


def _targets(network: nn.Module, modules: Mapping[str, nn.Module], config: AGDConfig) -> list[str]:
    if config.arch == "full":
        return []
    if config.target_modules is not None:
        names: list[str] = []
        for end in config.target_modules:
            found = [name for name in modules if name == end or name.endswith("." + end)]
            if not found:
                known = [n for n, m in modules.items() if isinstance(m, (Attention, ResnetBlock2D))]
                raise InputError("target_modules", end, f"the end of a module's name: {nearest(end, known)}")
            names.extend(name for name in found if name not in names)
        return names
    patterns = (_LORA,) if config.arch == "lora" else _TARGETS
    for pattern in patterns:
        names = [name for name in modules if re.search(pattern, "." + name)]
        if config.placement == "official":
            last = getattr(getattr(network, "config", None), "layers_per_block", None)
            names = [n for n in names if not re.search(rf"up_blocks\.\d+\.attentions\.{last}(\.|$)", n)]
        if names:
            return names
    raise InputError("network", type(network).__name__, "one with attention or residual blocks (or target_modules)")


def _widths(name: str, module: nn.Module) -> tuple[int, int]:
    d_in: Any = getattr(module, "query_dim", None)
    if d_in is not None:
        d_out: Any = getattr(module, "out_dim", d_in)
        return int(d_in), int(d_out)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, ResnetBlock2D):
        return module.in_channels, module.out_channels
    raise InputError("target_modules", name, f"attention, residual blocks or linear layers ({type(module).__name__})")


def _embedder(modules: Mapping[str, nn.Module], names: tuple[str, ...]) -> tuple[str, int] | None:
    for name in names:
        module = modules.get(name)
        if module is None:
            continue
        if isinstance(module, nn.Embedding):
            return name, module.embedding_dim
        table = getattr(module, "embedding_table", None)
        if table is not None:
            return name, table.embedding_dim
        last = [m for m in module.modules() if isinstance(m, nn.Linear)]
        if last:
            return name, last[-1].out_features
    return None


def _prompt_width(network: nn.Module) -> int | None:
    config = getattr(network, "config", None) or {}
    for name in ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim"):
        width = config.get(name)
        width = width[0] if isinstance(width, (list, tuple)) else width
        if width is not None and "encoder_hidden_states" in inspect.signature(type(network).forward).parameters:
            return int(width)
    return None


class AGDAdapters(nn.Module):
    """The adapters of one network, and their hooks while they are on it.

        adapters = inject_agd(unet, AGDConfig(arch="attention"))
        adapters.set_agd(guidance_scale=4.0)

    Args:
        config: what they are.
        anatomy: of the network.
        seed: of the initial weights and of the Fourier features.
    """

    def __init__(self, config: AGDConfig, anatomy: Anatomy, seed: int = 0) -> None:
        super().__init__()
        self.config, self.anatomy = config, anatomy
        d = config.hidden_dim
        assert d is not None
        time, label = (None if part is None else part[1] for part in (anatomy.time, anatomy.label))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if config.arch in ("lora", "full"):
                assert time is not None
                parts: list[nn.Module] = [LowRankAdapter(d, *widths) for widths in anatomy.targets.values()]
                self.embedding: nn.Module | None = ScaleEmbedding(SCALE_WIDTH, time, config.cfg_mult)
            else:
                form = FORMS[config.arch]
                parts = [form(config, *widths, time, label, anatomy.prompt) for widths in anatomy.targets.values()]
                self.embedding = None
        self.adapters = nn.ModuleList(parts)
        self.weights: dict[str, Tensor] = {}
        """All weights of the student (full): they take the network's place while this is on it."""
        self.enabled = True
        self.guard: Callable[[Tensor, Mapping[str, Any]], None] | None = None
        self._omega = torch.ones(1)
        self._network: list[nn.Module] = []  # in a list, so that it does not become a part of this
        self._hooks: list[Any] = []
        self._own: dict[str, Tensor] = {}
        self._now: Conditions | None = None
        self._single = False

    # ---------------------------------------------------------------- scale

    def set_agd(self, guidance_scale: float | Tensor) -> None:
        """Set omega: a number, or (B,) one a row of the network's calls."""
        omega = torch.as_tensor(guidance_scale, dtype=torch.float32).flatten()
        if not len(omega) or not bool(omega.isfinite().all()):
            raise InputError("guidance_scale", guidance_scale, "a finite number, or one a row")
        self._omega = omega.detach()
        for adapter in self.adapters:
            if isinstance(adapter, Adapter):
                adapter.forget()

    @property
    def guidance_scale(self) -> Tensor:
        return self._omega

    def share(self, network: nn.Module) -> float:
        """Trainable numbers, as a share of the network's."""
        own = sum(p.numel() for p in self.parameters())
        whole = sum(p.numel() for p in network.parameters())
        return (own + (whole if self.config.arch == "full" else 0)) / whole

    # ---------------------------------------------------------------- hooks

    @property
    def network(self) -> nn.Module | None:
        """What it is on."""
        return self._network[0] if self._network else None

    def attach(self, network: nn.Module) -> None:
        """Hook onto a network of the same shapes.

        Raises:
            InputError: it is on one, or the network is of other shapes.
        """
        if self._network:
            raise InputError("network", type(network).__name__, "given to adapters that are on none (remove() first)")
        self.anatomy.check(network, self.config)
        modules = dict(network.named_modules())
        self._network = [network]
        self._hooks = [network.register_forward_pre_hook(self._before, with_kwargs=True)]
        if self.anatomy.time is not None:
            self._hooks.append(modules[self.anatomy.time[0]].register_forward_hook(self._time))
        if self.anatomy.label is not None:
            self._hooks.append(modules[self.anatomy.label[0]].register_forward_hook(self._label))
        for name, adapter in zip(self.anatomy.targets, self.adapters, strict=True):
            self._hooks.append(modules[name].register_forward_hook(self._adding(adapter), with_kwargs=True))
        if self.weights:
            self._own = {name: p.data for name, p in network.named_parameters()}
            for name, p in network.named_parameters():
                p.data = self.weights[name].to(p.device, p.dtype)

    def remove(self) -> None:
        """Off the network, which is as it was."""
        while self._hooks:
            self._hooks.pop().remove()
        if self._own:
            assert self.network is not None
            for name, p in self.network.named_parameters():
                p.data = self._own[name]
        self._network, self._own, self._now = [], {}, None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The network's own outputs, for as long as the context lasts."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled:
            return
        given = _bound(network, args, kwargs)
        x = given["sample"] if "sample" in given else given["hidden_states"]
        if self.guard is not None:
            self.guard(x, given)
        omega = self._omega
        if len(omega) not in (1, len(x)):
            both = ", as both branches of guidance are evaluated" if len(x) == 2 * len(omega) else ""
            wanted = f"one, or one for each row (this call has {len(x)} rows{both})"
            raise InputError("guidance_scale", f"{len(omega)} scales", wanted)
        parameter = next(self.parameters())
        if parameter.device != x.device:
            self.to(x.device)
        dtype = next(self.parameters()).dtype
        prompt = given.get("encoder_hidden_states") if self.anatomy.prompt is not None else None
        if prompt is not None and self.config.arch == "attention" and prompt.shape[1] + 3 > MAX_TOKENS:
            raise InputError("prompt", f"{prompt.shape[1]} tokens", f"at most {MAX_TOKENS - 3} (or condition=False)")
        # The objects are compared, not their values: a pipeline gives the same ones at each step of a run.
        key = (tuple(omega.tolist()), prompt, given.get("class_labels")) if not torch.is_grad_enabled() else None
        self._now = Conditions(omega.to(x.device, dtype), prompt=None if prompt is None else prompt.to(dtype), key=key)
        t = given["timestep"]
        self._single = not isinstance(t, Tensor) or t.ndim == 0 or len(t) == 1 or t.stride() == (0,)

    def _time(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self.enabled or self._now is None:
            return None
        tau = output.detach()
        dtype = next(self.parameters()).dtype
        self._now.tau = (tau[:1] if self._single else tau).to(dtype)
        if self.embedding is None:
            return None
        return output + self.embedding(output, self._now).to(output.dtype)

    def _label(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.enabled and self._now is not None:
            self._now.label = output.detach().to(next(self.parameters()).dtype)

    def _adding(self, adapter: nn.Module) -> Callable[..., Any]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self.enabled or self._now is None:
                return None
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
            A = adapter(tokens.to(next(adapter.parameters()).dtype), self._now)
            if y.ndim == 4:
                A = A.transpose(1, 2)
                A = A.unflatten(2, y.shape[2:]) if A.shape[2] > 1 or y[0, 0].numel() == 1 else A[..., None]
            y = y + A.to(y.dtype)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return after

    # ---------------------------------------------------------------- files

    def named(self) -> dict[str, Tensor]:
        """Everything that is saved, weights and Fourier features, by the target's name."""
        found: dict[str, Tensor] = {}
        for name, adapter in zip(self.anatomy.targets, self.adapters, strict=True):
            found |= {f"{name}.{key}": value for key, value in adapter.state_dict().items()}
        if self.embedding is not None:
            found |= {f"omega_embedding.{key}": value for key, value in self.embedding.state_dict().items()}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write ``agd.safetensors`` and ``agd_config.json``.

        Args:
            folder: where.
            facts: what else the record has (the range of the training's scales, the negative prompt).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.named(), folder / TENSORS)
        if self.weights:
            save_file({k: v.cpu().contiguous() for k, v in self.weights.items()}, folder / WEIGHTS)
        record = {"config": asdict(self.config), "anatomy": asdict(self.anatomy), **facts}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AGDAdapters:
        """The adapters in a folder, on no network yet (:meth:`attach`).

        Raises:
            InputError: it can't be read.
        """
        adapters, _ = read(folder)
        return adapters


def read(folder: str | Path) -> tuple[AGDAdapters, dict[str, Any]]:
    """Adapters and the facts of their record.

    Raises:
        InputError: it can't be read, or tensors are missing.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text())
        tensors = load_file(folder / TENSORS)
        weights = load_file(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
        known = {f.name for f in fields(AGDConfig)}
        config = AGDConfig(**{k: v for k, v in record.pop("config").items() if k in known})
        a = record.pop("anatomy")
        pairs = {name: (None if a[name] is None else (str(a[name][0]), int(a[name][1]))) for name in ("time", "label")}
        targets = {name: (int(w[0]), int(w[1])) for name, w in a["targets"].items()}
        anatomy = Anatomy(a["network"], targets, pairs["time"], pairs["label"], a["prompt"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError("folder", str(folder), f"one that adapters were saved to ({reason})") from None
    adapters = AGDAdapters(config, anatomy)
    wanted = adapters.named()
    for name, value in wanted.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise InputError("folder", str(folder), f"one with {name} of shape {tuple(value.shape)} in {TENSORS}")
    for name, adapter in zip(anatomy.targets, adapters.adapters, strict=True):
        adapter.load_state_dict({key: tensors[f"{name}.{key}"] for key in adapter.state_dict()})
    if adapters.embedding is not None:
        adapters.embedding.load_state_dict(
            {key: tensors[f"omega_embedding.{key}"] for key in adapters.embedding.state_dict()}
        )
    adapters.weights = weights
    return adapters.eval(), record


def inject_agd(network: nn.Module, config: AGDConfig | None = None, seed: int = 0) -> AGDAdapters:
    """Put fresh adapters on a network, whose weights are frozen.

    Args:
        network: a ``UNet2DConditionModel``, ``UNet2DModel``, ``DiTTransformer2DModel``, or another of diffusers with an
            attention and a time embedder.
        config: what adapters; by default attention where the network takes prompts, else additive.
        seed: of their weights.

    Returns:
        AGDAdapters: on the network, in training mode; ``remove()`` takes them off.

    Raises:
        InputError: no targets.
    """
    if not isinstance(network, nn.Module):
        raise InputError("network", type(network).__name__, "a torch module")
    config = resolved(network, config)
    adapters = AGDAdapters(config, Anatomy.of(network, config), seed)
    network.requires_grad_(False)
    adapters.attach(network)
    return adapters.train()


def resolved(network: nn.Module, config: AGDConfig | None) -> AGDConfig:
    """``config`` with a width."""
    if config is None:
        config = AGDConfig(arch="attention" if _prompt_width(network) is not None else "additive")
    if config.hidden_dim is not None:
        return config
    whole = sum(p.numel() for p in network.parameters())
    anatomy = Anatomy.of(network, config)
    step = 8 * config.num_heads // math.gcd(8, config.num_heads)
    low, high = 1, max(1, (320 if "UNet" in type(network).__name__ else 256) // step)
    while low < high:
        middle = (low + high + 1) // 2
        with torch.device("meta"):
            trial = AGDAdapters(replace(config, hidden_dim=middle * step), anatomy)
        if sum(p.numel() for p in trial.parameters()) <= SHARE * whole:
            low = middle
        else:
            high = middle - 1
    return replace(config, hidden_dim=low * step)


def _bound(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return dict(kwargs)
    names = [name for name in inspect.signature(type(network).forward).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | dict(kwargs)
