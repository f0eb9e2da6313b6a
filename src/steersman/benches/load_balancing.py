r"""Load balancing of collectives on a leaf-spine fabric: who keeps the links even, and at what price.

A trial lets one policy choose spines for every flow of a collective, and compares the busiest links with those
under ideal packet spraying (every flow spread evenly over all working spines):

.. math:: \text{congestion} = \frac{\sum_i \max_e x_{ie}/C_e}{\sum_i \max_e x^*_{ie}/C_e}, \qquad
          \text{bound ratio} = \frac{\sum_i T_i + \text{delays}}{\sum_i T^*_i + \text{delays}}

over the steps i of the collective; congestion looks at leaf-spine links e only, the bound at host links too. The
price of a policy is the connections (queue pairs) that it opens. It is a flow model: no packets, no reordering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steersman import catalog
from steersman.distributed.packet_spraying import (
    PLACEMENTS,
    Ecmp,
    Evaluation,
    LeafSpine,
    Policy,
    SinglePath,
    Spray,
    Step,
    collective,
    congestion,
    evaluate,
    ideal,
    load_job,
    loads,
    parse_bytes,
    place,
)
from steersman.engine.bench import Figure, Knob, PartInfo
from steersman.engine.contenders import Part, checked_knobs
from steersman.engine.streams import Streams
from steersman.errors import Inapplicable, InputError, TrialError
from steersman.report.blocks import Block, LoadMap, Note

if TYPE_CHECKING:
    from steersman.engine.bench import Setting, TrialLog
    from steersman.engine.comparison import Comparison

COLLECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "ring": ("ring", {}),
    "double-binary-tree": ("double_binary_tree", {}),
    "halving-doubling": ("halving_doubling", {}),
    "recursive-doubling": ("recursive_doubling", {}),
    "all-to-all": ("all_to_all", {"form": "step"}),
    "all-to-all-permutation": ("all_to_all", {"form": "permutation"}),
    "moe": ("moe", {}),
}


@dataclass(frozen=True, eq=False)
class Task:
    """A job on a fabric, and ideal spraying's evaluation of it."""

    fabric: LeafSpine
    job: list[Step]
    best: Evaluation
    shown: int
    """The step whose links are shown: where hashing with this seed is furthest from spraying."""


@dataclass
class Subject:
    """A fabric; tasks by everything that they depend on, made once."""

    fabric: LeafSpine
    tasks: dict[str, Task] = field(default_factory=dict)


@dataclass
class Host:
    """A task without a policy."""

    task: Task
    policy: Policy | None = None


class LoadBalancing:
    """See the module's text."""

    id = "load-balancing"
    shape: Literal["Problem"] = "Problem"
    default_subject = "leaf-spine"
    headline = ("bound_ratio", "queue_pairs")
    knobs: Mapping[str, Knob] = {
        "collective": Knob(str, ("halving-doubling",), "what the ranks do", choices=tuple(COLLECTIVES)),
        "size": Knob(str, "64MB", "message of each rank (1MB, 64MiB, ...)"),
        "ranks": Knob(int, 0, "how many ranks (0: one on every host)", low=0),
        "placement": Knob(str, "packed", "which hosts they are on", choices=PLACEMENTS),
        "oversubscription": Knob(float, None, "host capacity to uplink capacity of a leaf (the fabric's own)", low=0.1),
        "failed_links": Knob(int, 0, "leaf-spine links that are down, drawn at random", low=0),
        "unequal": Knob(float, 0.0, "sizes of a step's flows differ by up to this fraction", low=0, high=100),
        "zipf": Knob(float, 1.0, "exponent of the experts' popularity (moe)", low=0, high=5),
        "job": Knob(str, None, "a job file (YAML, profiler trace, NCCL log) in place of the collective", sweep=False),
        "fair": Knob(bool, False, "also compute completion times at max-min fair rates", sweep=False),
    }
    figures: Mapping[str, Figure] = {
        "congestion": Figure("× spraying", "lower", "quality", "busiest leaf-spine link, over ideal spraying's"),
        "bound_ratio": Figure("× spraying", "lower", "quality", "time of the busiest link, over ideal spraying's"),
        "fair_ratio": Figure("× spraying", "lower", "quality", "completion at max-min fair rates, over spraying's"),
        "step_congestion": Figure("× spraying", "lower", "info", "mean over the steps of each step's congestion"),
        "bound_ms": Figure("ms", "lower", "info", "time of the busiest link of every step, and delays"),
        "fair_ms": Figure("ms", "lower", "info", "completion at max-min fair rates, and delays"),
        "host_bound_ms": Figure("ms", "neither", "info", "time of the busiest host link: no policy can be below it"),
        "queue_pairs": Figure("", "lower", "cost", "connections to and from the host that holds the most"),
        "pieces": Figure("", "lower", "cost", "sub-flows for each flow"),
        "split": Figure("", "lower", "cost", "share of flows in more than one piece"),
        "plan_s": Figure("s", "lower", "cost", "seconds to choose all paths"),
    }

    # ---------------------------------------------------------------- subject

    def subject(self, spec: str) -> Subject:
        return Subject(LeafSpine.load(spec))

    def check(self, s: Subject, setting: Setting) -> None:
        parse_bytes(setting["size"])
        self._task(s, setting, Streams(0))

    def _task(self, s: Subject, setting: Setting, rng: Streams) -> Task:
        # Without anything drawn, all seeds share a job; only the step to show depends on the hash seed.
        drawn = setting["placement"] == "random" or setting["failed_links"] or setting["unequal"]
        drawn = drawn or setting["collective"] == "moe" or setting["job"] is not None
        key = json.dumps([dict(setting), rng.base if drawn else None], sort_keys=True, default=str)
        if key not in s.tasks:
            fabric = _fabric(s.fabric, setting, rng)
            job = _job(fabric, setting, rng)
            best = ideal(fabric, job, fair=setting["fair"])
            hashed = evaluate(fabric, job, Ecmp(), seed=rng.seed("ecmp"))
            used = best.step_fabric_bounds > 0
            ratio = np.zeros(len(job))
            np.divide(hashed.step_fabric_bounds, best.step_fabric_bounds, out=ratio, where=used)
            s.tasks[key] = Task(fabric, job, best, int(ratio.argmax()))
        return s.tasks[key]

    # ---------------------------------------------------------------- contenders

    def baselines(self) -> list[str]:
        return ["ecmp", "ecmp-k:k=8", "single", "spray"]

    def parts(self) -> Mapping[str, PartInfo]:
        return {
            "ecmp": PartInfo(_plain(Ecmp), "hash-based equal-cost multipath, one path a flow", ""),
            "ecmp-k": PartInfo(_sub_flows, "hash-based, k sub-flows a flow", "NCCL_IB_QPS_PER_CONNECTION={k=8}"),
            "single": PartInfo(
                _plain(SinglePath), "one path a flow, the least loaded", "SinglePath().assign(fabric, step)"
            ),
            "spray": PartInfo(_plain(Spray), "ideal packet spraying over all spines"),
        }

    def host(self, s: Subject, setting: Setting, rng: Streams) -> Host:
        return Host(self._task(s, setting, rng))

    def mount(self, h: Host, part: Part) -> None:
        if h.policy is not None:
            raise InputError("methods", part.id, f"one policy for all flows ({h.policy.name} is there already)")
        own = self.parts().get(part.id)
        build = own.build if own else catalog.card(part.id).load()
        made = build(**checked_knobs(build, part))
        if not hasattr(made, "assign"):
            raise InputError("methods", part.id, "a method with assign(fabric, step, seed)")
        h.policy = made

    # ---------------------------------------------------------------- trial

    def trial(self, h: Host, setting: Setting, rng: Streams, log: TrialLog) -> dict[str, float]:
        if h.policy is None:
            raise TrialError("no policy was mounted")
        task, seed = h.task, rng.seed("ecmp")
        try:
            found = evaluate(task.fabric, task.job, h.policy, seed=seed, fair=setting["fair"])
        except InputError as error:
            # A policy that refuses a job (equal pieces of unequal flows) is no mistake of the user.
            raise Inapplicable(str(error)) from error
        best, step = task.best, task.job[task.shown]
        used = best.step_fabric_bounds > 0
        by_step = found.step_fabric_bounds[used] / best.step_fabric_bounds[used]
        shown = loads(task.fabric, step, h.policy.assign(task.fabric, step, seed)).seconds(task.fabric)
        scale = best.step_fabric_bounds[task.shown] or 1.0
        up, down = np.where(task.fabric.capacity == 0, np.nan, shown / scale)
        log.arrays("links", up=up, down=down, steps=by_step)
        figures = {
            "congestion": congestion(found, best),
            "step_congestion": float(by_step.mean()) if by_step.size else 1.0,
            "bound_ratio": found.bound / best.bound,
            "bound_ms": 1e3 * found.bound,
            "host_bound_ms": 1e3 * found.host_bound,
            "queue_pairs": found.queue_pairs,
            "pieces": found.pieces / found.flows,
            "split": found.split_flows / found.flows,
            "plan_s": found.seconds,
        }
        if found.completion is not None and best.completion is not None:
            figures |= {"fair_ms": 1e3 * found.completion, "fair_ratio": found.completion / best.completion}
        return figures

    def exhibits(self, comparison: Comparison) -> list[Block]:
        blocks: list[Block] = []
        varying = [name for name, values in comparison.config["grid"].items() if len(values) > 1]
        for setting in comparison.settings:
            short = {name: setting[name] for name in varying}
            links = comparison.saved("links", **setting)
            up, down = ({label: arrays[way] for label, arrays in links.items()} for way in ("up", "down"))
            if up:
                caption = "The step in which hashing is furthest from spraying; one seed."
                blocks.append(LoadMap("Load of every link", up, down, ideal=1.0, caption=caption, setting=short))
        blocks.append(
            Note(
                "A flow model: what a link carries, and fair shares of it. It can't show what packets add: "
                "reordering under spraying, incast, the transport's dynamics. All-to-all in one step averages "
                "collisions out over many flows; as permutation steps it shows them."
            )
        )
        return blocks


def _plain(policy: type[Any]) -> Any:
    """A baseline without knobs."""

    def build() -> Policy:
        return policy()

    return build


def _sub_flows(k: int = 8) -> Policy:
    """Hashing with k sub-flows."""
    return Ecmp(k)


def _fabric(fabric: LeafSpine, setting: Setting, rng: Streams) -> LeafSpine:
    if setting["oversubscription"] is not None:
        scale = fabric.oversubscription / setting["oversubscription"]
        fabric = replace(fabric, uplink=fabric.capacity * scale, failed=())
    count = setting["failed_links"]
    if count:
        links = np.argwhere(fabric.capacity > 0)
        if count >= len(links):
            raise InputError("failed_links", count, f"fewer than the fabric's {len(links)} working links")
        chosen = rng.numpy("failed links").permutation(len(links))[:count]
        fabric = fabric.with_failed((int(a), int(k)) for a, k in links[chosen])
    return fabric


def _job(fabric: LeafSpine, setting: Setting, rng: Streams) -> list[Step]:
    if setting["job"] is not None:
        return load_job(Path(setting["job"])).steps(fabric, rng=rng.numpy("job"))
    name, options = COLLECTIVES[setting["collective"]]
    if name == "moe":
        options = {"zipf": setting["zipf"], "rng": rng.numpy("experts")}
    hosts = place(fabric, setting["ranks"], setting["placement"], rng.numpy("placement"))
    job = collective(name, hosts, setting["size"], **options)
    if not setting["unequal"]:
        return job
    draw = rng.numpy("sizes")
    return [
        replace(step, bytes=np.rint(step.bytes * (1 + setting["unequal"] * draw.random(len(step))))) for step in job
    ]
