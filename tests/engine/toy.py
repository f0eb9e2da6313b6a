"""A bench that is all engine: a trial adds a shared noise to a contender's constant."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from steersman.engine.bench import Figure, Knob
from steersman.engine.contenders import checked_knobs
from steersman.errors import Inapplicable, InputError, TrialError


def constant(value: float = 0.0, nap: float = 0.0, least: int = 0) -> dict[str, float]:
    return {"value": value, "nap": nap, "least": least}


class ToyBench:
    id = "toy"
    shape = "Problem"
    default_subject = "digits"
    headline = ("error", "calls")
    knobs = {
        "calls": Knob(int, (1, 2), "calls", low=1, high=100),
        "mode": Knob(str, "plain", "what goes wrong", choices=("plain", "fail", "stop", "interrupt"), sweep=False),
    }
    figures = {
        "error": Figure("", "lower", "quality"),
        "noise": Figure("", "neither"),
    }

    def __init__(self) -> None:
        self.order: list[tuple[str, int, int]] = []
        self.loads = 0

    def subject(self, spec: str) -> str:
        self.loads += 1
        return spec

    def baselines(self) -> list[str]:
        return ["constant:value=1", "constant:value=2"]

    def parts(self) -> dict[str, Any]:
        return {"constant": constant, "offset": constant}

    def check(self, s: str, setting: Any) -> None:
        if setting["calls"] == 99:
            raise InputError("calls", 99, "anything but 99")

    def host(self, s: str, setting: Any, rng: Any) -> dict[str, Any]:
        return {"parts": []}

    def mount(self, h: dict[str, Any], part: Any) -> None:
        knobs = checked_knobs(constant, part)
        if part.id == "constant" and any(p[0] == "constant" for p in h["parts"]):
            raise InputError("methods", part.id, "the only constant of a contender")
        h["parts"].append((part.id, constant(**knobs)))

    def trial(self, h: dict[str, Any], setting: Any, rng: Any, log: Any) -> dict[str, float]:
        total = sum(p["value"] for _, p in h["parts"])
        nap = sum(p["nap"] for _, p in h["parts"])
        if nap:
            time.sleep(nap)
        if setting["calls"] < max(p["least"] for _, p in h["parts"]):
            raise Inapplicable("needs more calls")
        if setting["mode"] == "fail" and total == 2:
            raise TrialError("the network returned NaN at step 3")
        if setting["mode"] == "interrupt" and total == 2:
            raise KeyboardInterrupt
        noise = float(rng.numpy("noise").normal())
        self.order.append((str(total), setting["calls"], rng.base))
        log.progress(1, 1, "done")
        log.per_item("error", [total, noise])
        log.images("picture", np.full((2, 4, 4), 0.5))
        log.texts("text", [{"prompt": "a", "text": "b"}])
        return {"error": total + noise / setting["calls"], "noise": noise}

    def exhibits(self, comparison: Any) -> list[Any]:
        return []
