"""``steersman apply packet-spraying``: does this fabric need packet spraying, and if not, which flow goes where?

Evaluates hashing, hashing with k sub-flows, assigned single paths, plans and ideal spraying on the user's fabric
and job, picks the smallest split that comes within a tolerance of ideal spraying, and writes its flow table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steersman.distributed.packet_spraying.collectives import Step, collective, place
from steersman.distributed.packet_spraying.fabric import LeafSpine, parse_links
from steersman.distributed.packet_spraying.jobs import ALL_REDUCE, load_job
from steersman.distributed.packet_spraying.load import loads
from steersman.distributed.packet_spraying.policies import PLANS, Policy, SinglePathPlanner, policy
from steersman.distributed.packet_spraying.routes import nccl_settings, write_table
from steersman.distributed.packet_spraying.simulate import LIMIT, Evaluation, evaluate
from steersman.errors import InputError, nearest

MANY_FLOWS = 200_000
"""Above it, the policy with the most pieces is left out."""
MANY_HASHED = 1_000_000
"""Sub-flows of a policy that are hashed over all seeds; more than that with one seed only."""


def apply(
    subject: Path | str,
    input: Path | None,
    out: Path,
    *,
    seed: int = 0,
    log: Callable[[str], None],
    collective: str = "all_to_all",
    ranks: int = 0,
    bytes: str = "64MB",
    placement: Literal["packed", "strided", "random"] = "packed",
    form: Literal["step", "permutation"] = "permutation",
    all_reduce: str = "ring",
    group: int = 8,
    stages: int = 2,
    zipf: float = 1.0,
    policy: str = "auto",
    within: float = 0.01,
    max_pieces: int = 0,
    failed: str = "",
    hash: str = "none",
    hash_seeds: int = 5,
    fair: bool = False,
) -> dict[str, Any]:
    """Plan a job on a leaf-spine fabric.

    Args:
        subject: a topology file (YAML, CSV, GraphML), text like ``leaf-spine:leaves=16,spines=16,hosts=16``,
            or ``leaf-spine`` alone (16 x 16 with 256 hosts, 400 Gb/s).
        input: a job (YAML, Kineto trace, NCCL log); without one, the collective that the settings describe.
        out: an existing folder for ``flows.csv``, ``flows.json``, ``plan.json``, ``plan.md``, ``loads.npz``
            and ``load_map.png``.
        seed: of random placements and of the first hash.
        log: gets one line at a time.
        collective, ranks, bytes, placement, form, group, stages, zipf: the job, where ``input`` has none;
            see :func:`steersman.distributed.packet_spraying.collective`.
        all_reduce: algorithm that stands for an all-reduce.
        policy: whose flow table to write; ``auto``: the plan with the smallest split within the tolerance.
        within: tolerance over ideal spraying, as a fraction.
        max_pieces: most pieces of one flow (0: no limit).
        failed: links that are down, ``leaf-spine`` pairs of indices like ``0-3;1-2``.
        hash: the leaves' hash of the 5-tuple (``crc32``, ``crc16``, ``xor``), for UDP source ports; or ``none``.
        hash_seeds: how many hash seeds to average over, where there aren't very many flows.
        fair: whether to compute completion times at max-min fair rates beside the bounds.

    Returns:
        dict: ``recommended``, ``advice``, the plan's counts, and for each policy ``bound_ms``,
        ``over_spraying`` and ``queue_pairs``.

    Raises:
        InputError: whatever can't be planned, in one sentence.
    """
    if isinstance(hash_seeds, bool) or not isinstance(hash_seeds, int) or not 1 <= hash_seeds <= 1000:
        raise InputError("hash_seeds", hash_seeds, "a whole number from 1 to 1000")
    fabric = LeafSpine.load(subject)
    if failed:
        fabric = fabric.with_failed(parse_links(failed))
    rng = np.random.default_rng(seed)
    notes: list[str] = []
    if input is not None:
        found = load_job(input)
        notes += found.notes
        job = found.steps(fabric, all_reduce, rng)
    else:
        job = _described(fabric, collective, ranks, bytes, placement, form, all_reduce, group, stages, zipf, rng)
    flows = sum(map(len, job))
    log(f"fabric: {_sentence(fabric)}")
    log(f"job: {len(job)} steps, {flows} flows")

    start = time.perf_counter()
    planners = _planners(policy, within, max_pieces)
    if flows > MANY_FLOWS and policy != "plan-equal":
        del planners["plan-equal"]
        notes.append(f"plan-equal by host was left out, since there are {flows} flows")
    results = _evaluate(fabric, job, planners, seed, hash_seeds, fair, log)
    notes += dict.fromkeys(note for result in results.values() for note in result[0].notes)
    ideal = results["spray"][0]
    limit = ideal.bound * (1 + within)
    name, advice = _recommend(results, limit, within)
    planned = _planned(results, planners, policy, limit)
    log(advice)

    plans = [planners[planned].assign(fabric, step, seed) for step in job]
    report = write_table(fabric, job, plans, out, hash=None if hash == "none" else hash)
    nccl = nccl_settings(job, plans)
    worst = int(np.argmax(_worst(results["ecmp"], ideal)))
    maps = _load_maps(fabric, job[worst], planners, planned, seed)
    np.savez_compressed(out / "loads.npz", **{k: v for m in maps for k, v in _arrays(m, maps[m])})  # type: ignore[arg-type]
    _draw(maps, job[worst], worst, out / "load_map.png")
    table = {key: _row(values, ideal) for key, values in results.items()}
    summary = {
        "fabric": fabric.describe(),
        "job": {"steps": len(job), "flows": flows, "source": str(input) if input else collective},
        "tolerance": within,
        "recommended": name,
        "advice": advice,
        "planned": planned,
        "flow_table": report,
        "policies": table,
        "nccl": nccl,
        "load_map": {"step": worst, "name": job[worst].name},
        "notes": notes,
        "limits": LIMITS,
        "seconds": time.perf_counter() - start,
    }
    (out / "plan.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "plan.md").write_text(_markdown(fabric, summary), encoding="utf-8")
    for note in notes:
        log(f"note: {note}")
    plan = results[planned][0]
    metrics: dict[str, Any] = {
        "recommended": name,
        "advice": advice,
        "planned": planned,
        "flows": plan.flows,
        "split_flows": plan.split_flows,
        "pieces": plan.pieces,
        "seconds_to_plan": plan.seconds,
        "bound_ms": {key: 1e3 * row["bound"] for key, row in table.items()},
        "over_spraying": {key: row["over_spraying"] for key, row in table.items()},
        "queue_pairs": {key: row["queue_pairs"] for key, row in table.items()},
    }
    if fair:
        metrics["completion_ms"] = {
            key: None if row["completion"] is None else 1e3 * row["completion"] for key, row in table.items()
        }
    return metrics


LIMITS = (
    "A flow model: loads and fair shares, no packets. It can't show what reordering, incast and transport "
    "dynamics add or take away."
)

Results = dict[str, list[Evaluation]]
"""Evaluations by policy, one for each hash seed."""


def _described(
    fabric: LeafSpine,
    name: str,
    ranks: int,
    bytes: str,
    placement: str,
    form: str,
    all_reduce: str,
    group: int,
    stages: int,
    zipf: float,
    rng: np.random.Generator,
) -> list[Step]:
    if all_reduce not in ALL_REDUCE:
        raise InputError("all_reduce", all_reduce, nearest(str(all_reduce), ALL_REDUCE))
    key = name.replace("-", "_")
    every: dict[str, dict[str, Any]] = {
        "all_to_all": {"form": form},
        "hierarchical": {"group": group},
        "pipeline": {"stages": stages},
        "moe": {"zipf": zipf, "rng": rng},
    }
    hosts = place(fabric, ranks, placement, rng)
    return collective(all_reduce if key == "all_reduce" else key, hosts, bytes, **every.get(key, {}))


def _planners(chosen: str, within: float, max_pieces: int) -> dict[str, Policy]:
    """All policies by name, the chosen one among them."""
    names = ["ecmp", "ecmp-2", "ecmp-4", "ecmp-8", "single", "spray"]
    planners: dict[str, Policy] = {name: policy(name) for name in names}
    for plan, bundle in (("plan-equal", "host"), ("plan-equal", "leaf"), ("plan-cut", "leaf"), ("plan-lazy", "leaf")):
        planner = SinglePathPlanner(plan, bundle, within if plan != "plan-equal" else 0.0, max_pieces)
        planners[planner.name] = planner
    if chosen != "auto" and chosen not in planners:
        if chosen.partition(":")[0] not in PLANS and not chosen.startswith("ecmp-"):
            raise InputError("policy", chosen, nearest(chosen, ["auto", *planners, *PLANS]))
        planners[chosen] = policy(chosen)
    return planners


def _evaluate(
    fabric: LeafSpine,
    job: Sequence[Step],
    planners: Mapping[str, Policy],
    seed: int,
    hash_seeds: int,
    fair: bool,
    log: Callable[[str], None],
) -> Results:
    results: Results = {}
    flows = sum(map(len, job))
    for name, planner in planners.items():
        ways = int(name.partition("-")[2] or 1) if name.startswith("ecmp") else 0
        tries = min(hash_seeds, max(1, MANY_HASHED // (flows * ways))) if ways else 1
        # Fair rates cost time in proportion to flows x links: bounds alone where there are too many.
        few = fair and max(map(len, job)) * max(ways, 1) <= LIMIT
        try:
            results[name] = [evaluate(fabric, job, planner, seed=seed + i, fair=few) for i in range(tries)]
        except InputError as error:
            if not name.startswith("plan-equal"):
                raise
            log(f"{name} left out: {error}")
    return results


def _mean(results: Sequence[Evaluation], name: str) -> float:
    return float(np.mean([getattr(result, name) for result in results]))


def _row(results: Sequence[Evaluation], ideal: Evaluation) -> dict[str, Any]:
    """One policy's figures; means over hash seeds, and the range of the ratio."""
    ratio = np.array([result.bound for result in results]) / ideal.bound
    busiest = [r.fabric_bound / ideal.fabric_bound if ideal.fabric_bound > 0 else 1.0 for r in results]
    times = [result.completion for result in results]
    return {
        **results[0].to_json(),
        "bound": _mean(results, "bound"),
        "fabric_bound": _mean(results, "fabric_bound"),
        "completion": None if None in times else float(np.mean([t for t in times if t is not None])),
        "over_spraying": float(ratio.mean()),
        "over_spraying_range": [float(ratio.min()), float(ratio.max())],
        "congestion": float(np.mean(busiest)),
        "hash_seeds": len(results),
    }


def _worst(results: Sequence[Evaluation], ideal: Evaluation) -> np.ndarray:
    """How far each step is from spraying in the first evaluation; steps inside leaves last."""
    used = ideal.step_fabric_bounds > 0
    ratio = np.zeros(ideal.step_bounds.size)
    np.divide(results[0].step_fabric_bounds, ideal.step_fabric_bounds, out=ratio, where=used)
    return ratio * (results[0].step_bounds - ideal.step_bounds + 1e-12)


def _recommend(results: Results, limit: float, within: float) -> tuple[str, str]:
    """The least effort that comes within the tolerance: hashing, assigned paths, splits."""
    percent = f"{100 * within:g}%"
    worst = {name: max(r.bound for r in rs) for name, rs in results.items()}
    ideal = results["spray"][0].bound
    if worst["ecmp"] <= limit:
        return "ecmp", f"Hash-based ECMP is enough: it is within {percent} of ideal packet spraying."
    lazy = results["plan-lazy"][0]
    gain = _mean(results["ecmp"], "bound") / ideal
    if lazy.bound > limit:
        over = 100 * (lazy.bound / ideal - 1)
        return "spray", (
            f"No plan that keeps the limits comes within {percent} of ideal packet spraying "
            f"(the best is {over:.1f}% above it; ECMP takes {gain:.2f} times as long)."
        )
    split = (
        "one assigned path per flow, no flow split"
        if lazy.split_flows == 0
        else f"{lazy.split_flows} of {lazy.flows} flows split, {lazy.pieces} pieces in all"
    )
    return "plan-lazy", (
        f"Packet spraying isn't needed: {split}, within {percent} of ideal spraying "
        f"(ECMP takes {gain:.2f} times as long)."
    )


def _planned(results: Results, planners: Mapping[str, Policy], chosen: str, limit: float) -> str:
    if chosen != "auto":
        if chosen not in results:
            raise InputError("policy", chosen, f"one that this job allows: {', '.join(results)}")
        return chosen
    plans = {name: rs[0] for name, rs in results.items() if name.startswith("plan") or name == "single"}
    good = {name: result for name, result in plans.items() if result.bound <= limit} or plans
    # Fewest pieces; among equals the first of the lazy plan, single paths and the others.
    order = ["plan-lazy", "single", *plans]
    return min(good, key=lambda name: (good[name].pieces, order.index(name)))


# ------------------------------------------------------------------ what is written


def _load_maps(
    fabric: LeafSpine, step: Step, planners: Mapping[str, Policy], planned: str, seed: int
) -> dict[str, np.ndarray]:
    """Load of each leaf-spine link relative to the busiest one under spraying, shape (2, leaves, spines)."""
    # Hashing a million sub-flows again, for a picture, isn't worth its seconds.
    hashed = ["ecmp"] if len(step) > MANY_FLOWS else ["ecmp", "ecmp-8"]
    names = list(dict.fromkeys([*hashed, planned, "spray"]))
    seconds = {n: loads(fabric, step, planners[n].assign(fabric, step, seed)).seconds(fabric) for n in names}
    scale = seconds["spray"].max() or 1.0
    dead = np.broadcast_to(fabric.capacity == 0, (2, *fabric.capacity.shape))
    return {name: np.where(dead, np.nan, value / scale) for name, value in seconds.items()}


def _arrays(name: str, load: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(f"{name}.up", load[0]), (f"{name}.down", load[1])]


def _draw(maps: Mapping[str, np.ndarray], step: Step, number: int, path: Path) -> None:
    """Heat maps: one column a policy, uplinks above downlinks, one colour scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(maps) + 1.2, 5.2))
    axes = figure.subplots(2, len(maps), squeeze=False)
    figure.subplots_adjust(left=0.6 / figure.get_figwidth(), right=0.88, bottom=0.06, top=0.84, wspace=0.08)
    top = max(1.0, *(float(np.nanmax(load)) for load in maps.values()))
    image = None
    for column, (name, load) in enumerate(maps.items()):
        for axis, values in zip(axes[:, column], load, strict=True):
            image = axis.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(f"{name}\nbusiest {np.nanmax(load):.2f}", fontsize=9)
        axes[1, column].set_xlabel("spines", fontsize=8)
    for axis, direction in zip(axes[:, 0], ("leaf to spine", "spine to leaf"), strict=True):
        axis.set_ylabel(f"{direction}\nleaves", fontsize=8)
    assert image is not None
    figure.colorbar(image, cax=figure.add_axes((0.9, 0.06, 0.02, 0.78))).set_label("× busiest link under spraying")
    figure.suptitle(f"Leaf-spine links in step {number} ({step.name})", fontsize=10)
    figure.savefig(path, dpi=100)


def _sentence(fabric: LeafSpine) -> str:
    facts = fabric.describe()
    down = f", {facts['links_down']} links down" if facts["links_down"] else ""
    return (
        f"{fabric.leaves} leaves, {fabric.spines} spines, {fabric.n_hosts} hosts, "
        f"oversubscription {fabric.oversubscription:.2g}:1{down}"
    )


def _markdown(fabric: LeafSpine, summary: Mapping[str, Any]) -> str:
    lines = [
        "# Network plan",
        "",
        summary["advice"],
        "",
        f"Fabric: {_sentence(fabric)}. Job: {summary['job']['steps']} steps, {summary['job']['flows']} flows "
        f"({summary['job']['source']}).",
        "",
        "| policy | bound (ms) | over spraying | range | busiest fabric link | split flows | pieces | queue pairs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in summary["policies"].items():
        low, high = row["over_spraying_range"]
        mark = " **(planned)**" if name == summary["planned"] else ""
        lines.append(
            f"| {name}{mark} | {1e3 * row['bound']:.4g} | {row['over_spraying']:.3f} | {low:.2f}-{high:.2f} | "
            f"{row['congestion']:.3f} | {row['split_flows']} | {row['pieces']} | {row['queue_pairs']} |"
        )
    settings = " ".join(f"{key}={value}" for key, value in summary["nccl"]["environment"].items())
    lines += [
        "",
        "The bound is the time of the busiest link (host links included) plus delays; no schedule ends earlier. "
        "Queue pairs: connections to and from the host that holds the most.",
        "",
        f"`flows.csv` has the planned paths of {summary['planned']}. NCCL: `{settings}`. {summary['nccl']['advice']}",
        "",
        "![loads](load_map.png)",
        "",
        *(f"- {note}" for note in summary["notes"]),
        f"- {summary['limits']}",
        "",
    ]
    return "\n".join(lines)
