"""Methods that put themselves on a diffusers pipeline and take themselves off again.

Guidance needs both network outputs, steering needs the scheduler's step, a quantised network replaces layers: none
of these is a component that a pipeline could be saved with. So they are *installed*, one on top of the other, and
what is saved is the plain pipeline with a list of what was on it:

    CFGPlusPlus(scale=0.6).install(pipe)
    save_steered(pipe, "my-pipeline")
    pipe = load_steered("my-pipeline")
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from steersman import catalog
from steersman.errors import InputError, nearest

INDEX = "steering.json"
_ATTRIBUTE = "_steersman_installed"


class Installable:
    """A method on a pipeline: ``method.install(pipe)``, ``method.uninstall()``; or ``with method.install(pipe):``.

    A subclass writes :meth:`attach` and :meth:`detach`, which may be called in turn any number of times; and
    ``save_pretrained(folder)`` and a classmethod ``from_pretrained(folder)``, if it is to be saved with a pipeline.

    Attributes:
        branches: in how many branches the pipeline must evaluate the network: 2 (its ``guidance_scale`` above 1), 1
            (``guidance_scale=1``), or None if the method does not care.
    """

    branches: ClassVar[int | None] = None
    _pipe: Any = None

    def attach(self, pipe: Any) -> None:
        """Put the method on ``pipe``; nothing of it may stay if this raises.

        Raises:
            InputError: the method can't work on this pipeline.
        """
        raise NotImplementedError

    def detach(self, pipe: Any) -> None:
        """Leave ``pipe`` as it was before :meth:`attach`."""
        raise NotImplementedError

    def install(self, pipe: Any) -> Self:
        """Put the method on ``pipe``, on top of what is there.

        Raises:
            InputError: it is on a pipeline already, or can't work on this one.
        """
        name = type(self).__name__
        if self._pipe is not None:
            raise InputError(
                "pipe", type(pipe).__name__, f"given to a {name} that is on no pipeline (uninstall it first)"
            )
        self.attach(pipe)
        self._pipe = pipe
        pipe.__dict__.setdefault(_ATTRIBUTE, []).append(self)
        return self

    def uninstall(self) -> None:
        """Take the method off its pipeline.

        Raises:
            InputError: it is on none, or another method was installed on top of it.
        """
        name, pipe = type(self).__name__, self._pipe
        if pipe is None:
            raise InputError("method", name, "one that is installed on a pipeline")
        stack = installed(pipe)
        if stack[-1] is not self:
            raise InputError("method", name, f"the one on top: first uninstall {type(stack[-1]).__name__}")
        self.detach(pipe)
        pipe.__dict__[_ATTRIBUTE].pop()
        self._pipe = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if failure and failure[0] is not None and self._pipe is not None:
            # What was put on top goes, too: the failure is to be seen, not a refusal.
            for method in reversed(installed(self._pipe)):
                if method is self:
                    break
                method.uninstall()
        self.uninstall()


@runtime_checkable
class Saved(Protocol):
    """What can be saved with a pipeline."""

    def save_pretrained(self, folder: Any) -> Any: ...


def installed(pipe: Any) -> tuple[Installable, ...]:
    """The methods on ``pipe``, the first that was installed first."""
    return tuple(getattr(pipe, _ATTRIBUTE, ()))


@contextmanager
def taken_off(pipe: Any) -> Iterator[None]:
    """The plain pipeline, for as long as the context lasts; then all methods are on it again, in the same order."""
    stack = installed(pipe)
    try:
        for method in reversed(stack):
            method.uninstall()
        yield
    finally:
        for method in stack:
            if method._pipe is None:
                method.install(pipe)


def save_steered(pipe: Any, folder: str | Path) -> None:
    """Save the plain pipeline, as diffusers does, and beside it what is installed on it.

    Args:
        pipe: a pipeline with any number of installed methods; it has them afterwards, too.
        folder: where; ``DiffusionPipeline.from_pretrained`` reads the plain pipeline in it. An earlier save's folder
            ``steering`` is replaced.

    Raises:
        InputError: a method can't be saved.
    """
    folder, stack = Path(folder), installed(pipe)
    for method in stack:
        if not isinstance(method, Saved):
            raise InputError("pipe", type(method).__name__, "with methods that have save_pretrained")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    # Written beside an earlier save and put in its place when whole: a method may have been loaded from there.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".steering-") as made:
        for i, method in enumerate(stack):
            method.save_pretrained(Path(made) / str(i))  # type: ignore[attr-defined]
            entries.append({"class": type(method).__name__, "folder": f"steering/{i}"})
        shutil.rmtree(folder / "steering", ignore_errors=True)
        if stack:
            (folder / "steering").mkdir()
        for i in range(len(stack)):
            (Path(made) / str(i)).rename(folder / "steering" / str(i))
    with taken_off(pipe):
        pipe.save_pretrained(str(folder))
    (folder / INDEX).write_text(json.dumps(entries, indent=1) + "\n")


def load_steered(
    folder: str | Path, *, torch_dtype: Any = None, device: Any = None, **overrides: dict[str, Any]
) -> Any:
    """The pipeline that :func:`save_steered` wrote, with its methods installed again, in the same order.

    Args:
        folder: where it is.
        torch_dtype, device: of the pipeline before the methods are installed; by default diffusers' (float32, the CPU).
        overrides: keyword arguments of a class's ``from_pretrained``, by the class's name: what can't be saved, like
            ``FKSteering={"reward": score}``.

    Raises:
        InputError: no such folder, a class that isn't one of the room's, or an override without its class.
    """
    from steersman.diffusion.images import load_pipeline

    folder = Path(folder)
    try:
        entries = json.loads((folder / INDEX).read_text())
        classes = [(str(entry["class"]), folder / str(entry["folder"])) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError("folder", str(folder), f"one that save_steered wrote ({reason})") from None
    for _, own in classes:
        if not own.resolve().is_relative_to(folder.resolve()):
            raise InputError("folder in steering.json", str(own), f"inside {folder}")
    for name in overrides:
        if name not in [found for found, _ in classes]:
            raise InputError("override", name, nearest(name, [found for found, _ in classes]))
    pipe = load_pipeline(folder)
    if torch_dtype is not None or device is not None:
        pipe.to(device, torch_dtype)
    for name, own in classes:
        kind = _known(name)
        kind.from_pretrained(own, **overrides.get(name, {})).install(pipe)
    return pipe


def _known(name: str) -> Any:
    """The installable class of that name: the room's, or a card's of another package."""
    from steersman import diffusion

    if name in diffusion.__all__:
        found = getattr(diffusion, name)
    else:
        objects = {card.object.partition(":")[2]: card for card in catalog.cards().values()}
        if name not in objects:
            raise InputError("class in steering.json", name, nearest(name, [*diffusion.__all__, *objects]))
        found = objects[name].load()
    if not (isinstance(found, type) and issubclass(found, Installable)):
        raise InputError("class in steering.json", name, "a method that installs itself")
    return found
