"""One rank: ``python -m steersman.cluster.worker FUNCTION ARGUMENTS.json [FOLDER]``.

FUNCTION is ``package.module:function`` or ``file.py:function``, called with the keyword arguments of the JSON
file once the gloo process group is up. Its result goes to ``FOLDER/rank<r>.json``, or without a folder to the
terminal, one JSON line a rank. :func:`steersman.cluster.launch.launch` starts it so; so can torchrun:

    torchrun --nproc-per-node 2 -m steersman.cluster.worker train.py:main arguments.json results
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from steersman.cluster.launch import FUNCTION, write_json
from steersman.errors import InputError, TrialError


def load(function: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` or ``file.py:function`` names.

    Raises:
        InputError: it names none.
    """
    found = FUNCTION.match(function)
    if not found:
        raise InputError("function", function, "package.module:function or file.py:function")
    place, name = found["module"], found["name"]
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise InputError("function", function, f"file.py:function with a file that exists (no file {path})")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise InputError("function", function, f"in a module that can be imported ({error})") from None
    value = getattr(module, name, None)
    if not callable(value):
        raise InputError("function", function, f"a function that {place} defines")
    return value


def main(function: str, arguments: str, folder: str | None = None) -> None:
    """Join the group, run the function, hand over its result."""
    rank = int(os.environ.get("RANK", 0))
    watcher = threading.Thread(target=_end_with_launcher, daemon=True)
    if os.environ.get("STEERSMAN_RANKS"):
        watcher.start()
    try:
        result = _run(function, json.loads(Path(arguments).read_text()), rank)
        if folder is None:
            print(json.dumps({"rank": rank, "result": result}), flush=True)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_json(Path(folder) / f"rank{rank}.json", result)
    except BaseException as error:
        traceback.print_exc()
        if folder is not None:
            name, message = type(error).__name__, str(error).strip()
            first = (message.splitlines() or [""])[0]
            line = first if isinstance(error, (TrialError, InputError)) else f"{name}: {first}"
            record = {"type": name, "message": message, "line": line, "time": time.time()}
            write_json(Path(folder) / f"rank{rank}.error", record)
        # If this failed because the launcher and the other ranks were killed, what this rank started must end too.
        if watcher.is_alive():
            watcher.join(0.2)
        # A failed group may hang in its destructors; the other ranks need the connections closed now.
        _leave(1)
    # The interpreter is not torn down: a gloo thread that still holds a finished DDP bucket would want the
    # lock of an interpreter that is gone, and abort a rank that has done its work.
    atexit._run_exitfuncs()
    _leave(0)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(function: str, arguments: dict[str, Any], rank: int) -> Any:
    # Loaded before anything heavy: a function that can't be found fails at once on every rank.
    call = load(function)

    import torch.distributed as dist

    seconds = float(os.environ.get("STEERSMAN_TIMEOUT", 600))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=1)
    result = call(**arguments)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _end_with_launcher() -> None:
    os.read(0, 1)  # returns when the launcher's end of the pipe is closed
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m steersman.cluster.worker FUNCTION ARGUMENTS.json [FOLDER]")
    main(*sys.argv[1:])
