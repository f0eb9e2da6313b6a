r"""``scenes``: drawn pictures with captions, a reader that tells what is in a picture, and a text-to-image pipeline.

A *scene* is five attributes, a row of indices into :data:`VALUES`: size (2), colour (6), shape (4), position (5) and
background (6, never the shape's colour), 1200 combinations in all. Its picture has 32x32 RGB pixels in [-1, 1]:

    pixel(p) = (1 - c(p)) background + c(p) colour + shade·p       c(p) = clamp(1/2 - d(p), 0, 1)

where d is the signed distance in pixels from the shape's edge (so edges are anti-aliased), and radius, centre, both
colours and the shade differ from picture to picture. The colours lie inside the cube: a sample that is too saturated
is seen to be. The caption is ``a large red circle on the left on a blue background``; every attribute may go unsaid
(``a shape`` says nothing).

A fixed permutation holds 240 combinations out. Whatever the project trained never saw one of them; each pair of values
occurs in training.

:func:`attributes` reads a picture without any learned part: the background is the frame's median, the shape's colour
the median of the 16 pixels farthest from it, the coverage c its projection between the two; and the shape is the one
that, drawn at the same area and centroid, overlaps c best.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from steersman.errors import InputError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from steersman.reference.image_metrics import PixelPCA

SIDE = 32
SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = ("center", "left", "right", "top", "bottom")
VALUES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "position": POSITIONS, "background": COLOURS}
ATTRIBUTES = tuple(VALUES)
NONE = -1
"""An attribute that a caption leaves unsaid, or that can't be told from a picture."""

SPLITS = ("train", "held-out")
HELD_OUT = 240
PICTURES = {"train": 4, "held-out": 5}  # of each combination, in `images`
SPLIT_SEED = 0

RGB = torch.tensor(
    [
        (0.85, 0.20, 0.20),
        (0.15, 0.70, 0.25),
        (0.20, 0.30, 0.85),
        (0.90, 0.80, 0.20),
        (0.85, 0.85, 0.85),
        (0.12, 0.12, 0.12),
    ]
)
RADIUS = torch.tensor([4.5, 8.0])
CENTRE = torch.tensor(
    [(0, 0), (-5, 0), (5, 0), (0, -5), (0, 5)], dtype=torch.float32
)  # x, y from the middle; y is down
RADIUS_JITTER, CENTRE_JITTER, COLOUR_JITTER, SHADE = 0.5, 1.0, 0.05, 0.04
AREA = torch.tensor([torch.pi, 2.89, 2.2, 2.7664])  # of a shape of radius 1
SINK = torch.tensor([0.0, 0.0, 1 / 3, 0.0])  # how far its centroid lies below its middle

# Where a picture stops being read. Two colours are 0.6 apart at least, two centres 5, the two radii 3.5.
COLOUR_REACH, CENTRE_REACH, RADIUS_REACH, CONTRAST, OVERLAP = 0.3, 3.5, 1.75, 0.25, 0.8

_PHRASES = {"center": "in the center", "left": "on the left", "right": "on the right"} | {
    "top": "at the top",
    "bottom": "at the bottom",
}
_GRAMMAR = re.compile(
    rf"an?(?: (?P<size>{'|'.join(SIZES)}))?(?: (?P<colour>{'|'.join(COLOURS)}))?"
    rf" (?:shape|(?P<shape>{'|'.join(SHAPES)}))(?: (?P<position>{'|'.join(_PHRASES.values())}))?"
    rf"(?: on a (?P<background>{'|'.join(COLOURS)}) background)?"
)
_POSITION = {phrase: name for name, phrase in _PHRASES.items()}


# ------------------------------------------------------------------ scenes and captions


@cache
def _split() -> dict[str, Tensor]:
    grid = torch.cartesian_prod(*(torch.arange(len(v)) for v in VALUES.values()))
    grid = grid[grid[:, 1] != grid[:, 4]]
    grid = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    return {"held-out": grid[:HELD_OUT], "train": grid[HELD_OUT:]}


def combinations(split: Literal["train", "held-out"] = "train") -> Tensor:
    """All scenes of a split (960 or 240, 5), int64, in a fixed order."""
    if split not in SPLITS:
        raise InputError("split", split, f"one of {', '.join(SPLITS)}")
    return _split()[split].clone()


def caption(scene: Sequence[int] | Tensor) -> str:
    """The caption of one scene (5 indices); what is ``NONE`` goes unsaid."""
    row = [int(i) for i in scene]
    for value, (name, values) in zip(row, VALUES.items(), strict=True) if len(row) == 5 else ():
        if not NONE <= value < len(values):
            raise InputError(name, value, f"an index from 0 to {len(values) - 1}, or {NONE}")
    if len(row) != 5:
        raise InputError("scene", tuple(row), f"5 indices ({', '.join(ATTRIBUTES)})")
    said = {name: values[i] for i, (name, values) in zip(row, VALUES.items(), strict=True) if i != NONE}
    words = ["a", said.get("size"), said.get("colour"), said.get("shape", "shape")]
    words.append(_PHRASES[said["position"]] if "position" in said else None)
    words.append(f"on a {said['background']} background" if "background" in said else None)
    return " ".join(word for word in words if word)


def parse(captions: str | Sequence[str]) -> Tensor:
    """What captions say (N, 5): indices, ``NONE`` for what they leave unsaid. The empty caption says nothing.

    Raises:
        InputError: a caption outside the grammar.
    """
    rows = []
    for text in [captions] if isinstance(captions, str) else captions:
        found = _GRAMMAR.fullmatch(text.strip().lower())
        if found is None and text.strip():
            raise InputError("captions", text, "like 'a large red circle on the left on a blue background'")
        said: dict[str, str | None] = found.groupdict() if found else {}
        said["position"] = _POSITION.get(said.get("position") or "")
        rows.append([v.index(s) if (s := said.get(name)) else NONE for name, v in VALUES.items()])
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 5)


def prompts(n: int, split: Literal["train", "held-out"] = "held-out", seed: int = 0) -> list[str]:
    """``n`` whole captions of a split's combinations; each occurs once before any occurs again.

    The draw depends on ``seed`` alone, and fewer prompts are the first ones of more.
    """
    for name, value, low in (("n", n, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(name, value, f"a whole number, at least {low}")
    scenes, rng = combinations(split), torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(scenes), generator=rng) for _ in range(-(-n // len(scenes)))]
    return [caption(scenes[i]) for i in torch.cat(rounds)[:n]]


# ------------------------------------------------------------------ pictures


def _pixels() -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels' centres from the picture's middle, x to the right, y down; each (32, 32)."""
    line = torch.arange(SIDE, dtype=torch.float32) - (SIDE - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def _coverage(shape: Tensor, radius: Tensor, centre: Tensor) -> Tensor:
    """How much of each pixel the shapes (N,) of radii (N,) at centres (N, 2) cover: (N, 32, 32)."""
    px, py = _pixels()
    x, y, r = px - centre[:, 0, None, None], py - centre[:, 1, None, None], radius[:, None, None]
    ax, ay = x.abs(), y.abs()
    distance = torch.stack(
        [
            (x.square() + y.square()).sqrt() - r,
            torch.maximum(ax, ay) - 0.85 * r,
            torch.maximum(y - r, (2 * ax - 1.1 * (y + r)) / (2**2 + 1.1**2) ** 0.5),
            torch.minimum(torch.maximum(ax - 1.1 * r, ay - 0.38 * r), torch.maximum(ay - 1.1 * r, ax - 0.38 * r)),
        ]
    )
    return (0.5 - distance[shape, torch.arange(len(shape))]).clamp(0, 1)


def render(scenes: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (N, 3, 32, 32) in [-1, 1] of whole scenes (N, 5); what differs within a scene comes from ``generator``.

    Raises:
        InputError: scenes of another shape, or with an index out of range.
    """
    _check_scenes(scenes)
    return _draw(scenes, torch.rand(len(scenes), 11, generator=generator))


def _draw(scenes: Tensor, u: Tensor) -> Tensor:
    size, colour, shape, position, background = scenes.T
    u = 2 * u - 1
    radius = RADIUS[size] + RADIUS_JITTER * u[:, 0]
    c = _coverage(shape, radius, CENTRE[position] + CENTRE_JITTER * u[:, 1:3])[:, None]
    front = (RGB[colour] + COLOUR_JITTER * u[:, 3:6])[:, :, None, None]
    back = (RGB[background] + COLOUR_JITTER * u[:, 6:9])[:, :, None, None]
    x, y = _pixels()
    shade = SHADE * (u[:, 9, None, None] * x + u[:, 10, None, None] * y) / (SIDE / 2)
    return 2 * ((1 - c) * back + c * front + shade[:, None]).clamp(0, 1) - 1


def fresh(
    n: int, split: Literal["train", "held-out"] = "train", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``n`` new pictures (n, 3, 32, 32) of a split's combinations, drawn uniformly, and their scenes (n, 5)."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError("n", n, "a whole number, at least 1")
    scenes = combinations(split)
    scenes = scenes[torch.randint(len(scenes), (n,), generator=generator)]
    return render(scenes, generator), scenes


@cache
def _fixed(split: str) -> tuple[Tensor, Tensor]:
    scenes = combinations(split).repeat(PICTURES[split], 1)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(1 + SPLITS.index(split))
    return scenes, torch.rand(len(scenes), 11, generator=rng)


def images(split: Literal["train", "held-out"] = "train") -> Tensor:
    """The fixed pictures of a split: (3840, 3, 32, 32) or (1200, 3, 32, 32), float32 in [-1, 1].

    Each combination comes once before any comes again.
    """
    combinations(split)
    return _draw(*_fixed(split))


def captions(split: Literal["train", "held-out"] = "train") -> list[str]:
    """The whole captions of :func:`images`, in their order."""
    combinations(split)
    return [caption(scene) for scene in _fixed(split)[0]]


def data_fingerprint() -> str:
    """SHA-256 of what the fixed pictures are drawn from: the scenes and the random numbers of both splits."""
    digest = hashlib.sha256()
    for split in SPLITS:
        scenes, u = _fixed(split)
        digest.update(scenes.numpy().astype("<i8").tobytes() + u.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------ reading pictures


@torch.no_grad()
def attributes(images: Tensor, batch: int = 500) -> Tensor:
    """What is in pictures (N, 3, 32, 32) in [-1, 1]: scenes (N, 5) on the cpu, ``NONE`` for what can't be told.

    An attribute can't be told when a colour is more than 0.3 from every named one (of a cube of side 1), the shape
    too faint (contrast under 0.25), its overlap with the best drawn one under 0.8, or its radius or centre off by more
    than half the way to the next one.

    Raises:
        InputError: another shape, or values that are not finite.
    """
    _check_images(images)
    return torch.cat([_read(part.float().cpu()) for part in images.split(batch)])


def _read(images: Tensor) -> Tensor:
    x = (images.clamp(-1, 1) + 1) / 2
    frame = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, 1:-1, 0], x[:, :, 1:-1, -1]], dim=2)
    back = frame.median(2).values
    gap = (x - back[:, :, None, None]).flatten(2)
    far = gap.norm(dim=1).topk(16).indices
    front = x.flatten(2).gather(2, far[:, None].expand(-1, 3, -1)).median(2).values
    axis = front - back
    contrast = axis.norm(dim=1)
    c = _sharpen((gap * axis[:, :, None]).sum(1) / contrast.square().clamp(min=1e-6)[:, None]).view(-1, SIDE, SIDE)

    area = c.sum((1, 2)).clamp(min=1e-6)
    px, py = _pixels()
    centroid = torch.stack([(c * px).sum((1, 2)) / area, (c * py).sum((1, 2)) / area], dim=1)
    overlap, radius, centre = [], [], []
    for k in range(len(SHAPES)):
        r = (area / AREA[k]).sqrt()
        middle = centroid - torch.stack([torch.zeros_like(r), SINK[k] * r], dim=1)
        drawn = _sharpen(_coverage(torch.full((len(x),), k), r, middle))
        overlap.append(torch.minimum(c, drawn).sum((1, 2)) / torch.maximum(c, drawn).sum((1, 2)).clamp(min=1e-6))
        radius.append(r)
        centre.append(middle)
    best = torch.stack(overlap, 1).max(1)
    rows = torch.arange(len(x))
    r, middle = torch.stack(radius, 1)[rows, best.indices], torch.stack(centre, 1)[rows, best.indices]
    there = contrast > CONTRAST

    def nearest(distances: Tensor, reach: float) -> Tensor:
        found = distances.min(1)
        return found.indices.where(found.values <= reach, NONE)

    scene = torch.stack(
        [
            nearest((r[:, None] - RADIUS).abs(), RADIUS_REACH),
            nearest(torch.cdist(front, RGB), COLOUR_REACH),
            best.indices.where(best.values >= OVERLAP, NONE),
            nearest(torch.cdist(middle, CENTRE), CENTRE_REACH),
        ],
        dim=1,
    )
    scene = scene.where(there[:, None], NONE)
    return torch.cat([scene, nearest(torch.cdist(back, RGB), COLOUR_REACH)[:, None]], dim=1)


def _sharpen(coverage: Tensor) -> Tensor:
    """A steeper edge at the same place: shade and noise below 0.3 vanish, above 0.7 too."""
    return (2.5 * (coverage - 0.5) + 0.5).clamp(0, 1)


def accuracy(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Shares of the pictures that show what their captions say.

    Returns:
        for each attribute the share among captions that say it (left out if none does), and ``overall``: the share of
        pictures that are right in all that is said.
    """
    if isinstance(captions, str) or len(captions) != len(images):
        count = 1 if isinstance(captions, str) else len(captions)
        raise InputError("captions", f"{count} captions", f"one for each of the {len(images)} images")
    seen, said = attributes(images), parse(captions)
    right, unsaid = seen == said, said == NONE
    shares = {
        name: right[:, k][~unsaid[:, k]].double().mean().item()
        for k, name in enumerate(ATTRIBUTES)
        if not bool(unsaid[:, k].all())
    }
    return shares | {"overall": (right | unsaid).all(1).double().mean().item()}


@cache
def _pca() -> PixelPCA:
    from steersman.reference.image_metrics import PixelPCA

    return PixelPCA(F.avg_pool2d(images("train")[:1920], 2), components=64)


def features(images: Tensor) -> Tensor:
    """Features (N, 64) for distances between sets of pictures, float64 and differentiable.

    Standardised principal components of the training pictures at half their resolution. Compare pictures of equal
    captions: the held-out combinations alone put :func:`images` of the two splits 6 apart (Frechet distance; two
    sets of 1200 of the same combinations are 1.3 apart).
    """
    _check_images(images)
    return _pca()(F.avg_pool2d(images, 2))


def pipeline() -> StableDiffusionPipeline:
    """The shipped text-to-image pipeline, in float32; an ordinary ``StableDiffusionPipeline``.

    Raises:
        MissingExtra: diffusers or the package ``steersman-reference`` is not installed.
    """
    from steersman.diffusion.images import load_pipeline
    from steersman.reference import loading

    return load_pipeline(loading.folder("scenes") / "pipeline")


# ------------------------------------------------------------------ checks


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE) or not len(images):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError("images", shape, f"of shape (N, 3, {SIDE}, {SIDE})")
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise InputError("images", str(images.dtype), "finite numbers in [-1, 1]")


def _check_scenes(scenes: Any) -> None:
    if not isinstance(scenes, Tensor) or scenes.ndim != 2 or scenes.shape[1] != 5 or scenes.dtype != torch.long:
        shape = tuple(scenes.shape) if isinstance(scenes, Tensor) else type(scenes).__name__
        raise InputError("scenes", shape, f"int64 of shape (N, 5): {', '.join(ATTRIBUTES)}")
    high = torch.tensor([len(v) for v in VALUES.values()])
    if bool(((scenes < 0) | (scenes >= high)).any()):
        raise InputError("scenes", scenes.max(0).values.tolist(), f"indices from 0 to {(high - 1).tolist()}")
