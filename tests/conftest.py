"""Fixtures that many tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every CI run, so that a change is judged by the change; new ones wherever else tests run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


# A shell's background job ignores Ctrl-C, and so would every process that these tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cli(tmp_path: Path):
    """Run the command line in a process of its own, in a temporary folder."""

    def run(*arguments: str, env: dict[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "steersman", *arguments],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


CARD = """
+++
id = "hello"
aliases = ["hi"]
title = "Hello"
family = "sampler"
room = "elsewhere"
host = "torch"
extra = ""
summary = "A method from another package."
verbs = ["compare", "evidence", "apply", "probe"]
benches = ["greetings"]
object = "tiny_plugin.method:hello"
evidence = "tiny_plugin.evidence"
apply = "tiny_plugin.method:apply"
probe = "tiny_plugin.method:probe"
bibtex = "@misc{hello}"
[paper]
title = "Hello"
year = 2026
+++
## When to use it
To greet.
"""

METHOD = """
import warnings


def hello(strength: float = 1.0):
    if strength == 7:
        warnings.warn("mind\\n the greeting")
        warnings.warn("mind the greeting")
    return float(strength)


def apply(subject, input, out, *, seed=0, log, strength: float = 1.0, count: int = 3, name: str | None = None):
    log("greeting")
    if strength < 0:
        from steersman.errors import InputError

        raise InputError("strength", strength, "a number of at least 0")
    (out / "greeting.txt").write_text("hello " * count)
    return {"strength": strength, "input": str(input)}


def probe(subject, input, out, *, seed=0, log, depth: int = 1):
    return {"depth": depth, "politeness": 0.5}
"""

BENCH = """
import os
import time
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import checked_knobs
from steersman import catalog
from steersman.errors import TrialError

silence = lambda: 0.0

class Greetings:
    id = "greetings"
    shape = "Problem"
    default_subject = "digits"
    headline = ("warmth", "calls")
    knobs = {"calls": Knob(int, (1, 2), "calls", low=1, high=50)}
    figures = {"warmth": Figure("", "higher", "quality")}

    def subject(self, spec): return spec
    def baselines(self): return ["silence"]
    def parts(self): return {"silence": PartInfo(silence, "Says nothing.")}
    def check(self, s, setting): pass
    def host(self, s, setting, rng): return {}

    def mount(self, h, part):
        build = silence if part.id == "silence" else catalog.card(part.id).load()
        h["value"] = build(**checked_knobs(build, part))

    def trial(self, h, setting, rng, log):
        time.sleep(float(os.environ.get("TINY_NAP", "0")))
        if h["value"] == 13:
            raise TrialError("the network returned NaN at step 3")
        return {"warmth": h["value"] * setting["calls"] + rng.numpy("noise").normal() * (1 + 0.05 * h["value"])}

    def exhibits(self, comparison): return []
"""

EVIDENCE = """
from steersman.engine.claims import Claim, Effects
from steersman.evidence.study import Study

def studies(scale, seed):
    return {"main": Study("greetings", ("hello:strength=5", "silence"), grid={"calls": [1]}, seeds=6)}

def warmer(c):
    a, b = c.paired("warmth", "hello:strength=5", "silence", calls=1)
    return Effects(a - b)

CLAIMS = [
    Claim("warmer", "Hello is warmer than silence by more than 4.", "here", "main", warmer, 4.0, "seed"),
    Claim("hot", "Hello is warmer than silence by more than 9.", "here", "main", warmer, 9.0, "seed"),
]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """A tiny package that brings a method, a bench and evidence; gives the environment that has it."""
    site = tmp_path / "site"
    cards = site / "tiny_plugin" / "cards"
    cards.mkdir(parents=True)
    for name, text in (("method", METHOD), ("bench", BENCH), ("evidence", EVIDENCE), ("__init__", "")):
        (site / "tiny_plugin" / f"{name}.py").write_text(textwrap.dedent(text))
    (cards / "hello.md").write_text(CARD.lstrip())
    info = site / "tiny_plugin-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "[steersman.cards]\ntiny = tiny_plugin.cards\n\n[steersman.benches]\ngreetings = tiny_plugin.bench:Greetings\n"
    )
    return {"PYTHONPATH": str(site)}
