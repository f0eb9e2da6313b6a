"""What methods that train with the trainers of transformers and TRL share."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from steersman import quiet


@contextmanager
def on_its_own(seed: int | None = None) -> Iterator[None]:
    """A training that prints nothing, and leaves the process's random states and verbosity as they were.

    Args:
        seed: of torch's generators inside; None leaves them. (Trainers seed Python's and numpy's generators of the
            whole process.)
    """
    import datasets

    states = random.getstate(), np.random.get_state()
    bars, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), quiet.loading():
            warnings.simplefilter("ignore", FutureWarning)  # the trainers' own use of names that will go
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])


class Told(TrainerCallback):
    """A line for each tenth of a training, with its loss."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.log(f"step {state.global_step}/{state.max_steps}: loss {float(logs['loss']):.4g}")
