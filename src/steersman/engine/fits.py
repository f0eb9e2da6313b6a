"""Fit once, evaluate often: results of training, cached in the run folder by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Fits:
    """A cache of fitted things, one folder each.

    A fit is made in a temporary folder and renamed when it is whole, so that a kill leaves no half fit.

    Args:
        root: where the fits live.
        scope: what all keys share (bench and subject).
    """

    def __init__(self, root: Path, scope: str) -> None:
        self.root, self.scope = root, scope

    def get(self, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The folder of the fit ``key``; ``make(folder)`` fills it when there is none yet.

        ``fit.json`` in the folder records the key and the seconds that it took.
        """
        text = json.dumps({"scope": self.scope, **key}, sort_keys=True, default=str)
        folder = self.root / hashlib.sha256(text.encode()).hexdigest()[:16]
        if folder.is_dir():
            return folder
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        start = time.perf_counter()
        try:
            make(partial)
            record = {"key": json.loads(text), "seconds": time.perf_counter() - start}
            (partial / "fit.json").write_text(json.dumps(record, indent=1) + "\n")
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return folder

    @staticmethod
    def seconds(folder: Path) -> float:
        """How long the fit in ``folder`` took when it was made."""
        return float(json.loads((folder / "fit.json").read_text())["seconds"])
