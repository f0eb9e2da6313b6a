r"""Completion times: max-min fair rates by progressive filling, and the evaluation of policies over a job.

All connections of a step start together. At any moment each has its max-min fair rate: rates grow together until
a link is full, the connections over it keep their rate, and the others grow on. When a connection ends, the rest
are filled anew; the step ends with its last connection. A sprayed flow is one connection that puts its share of
its rate on every spine. Every link has a fixed delay, added once per step.

The rates of connections that can't be told apart are equal, so connections and links are first sorted into
classes: two connections are in one class if they have equal bytes and cross the same classes of links, two links
if they have equal capacity and carry the same number of each class of connections. A planned all-to-all of a
symmetric fabric has a handful of classes, whatever its size, and its fair rates are exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse

from steersman.distributed.packet_spraying.collectives import Step
from steersman.distributed.packet_spraying.fabric import LeafSpine
from steersman.distributed.packet_spraying.load import LOCAL, SECONDS, SPREAD, Assignment, loads, paths
from steersman.distributed.packet_spraying.policies import Policy, Spray
from steersman.errors import InputError

LIMIT = 100_000
"""Most connections of one step whose fair rates are computed."""


# ------------------------------------------------------------------ links and connections


def incidence(fabric: LeafSpine, step: Step, assignment: Assignment) -> tuple[sparse.csr_array, np.ndarray]:
    """What part of each piece's rate each link carries, and each link's capacity.

    Links are numbered: hosts sending, hosts receiving, uplinks, downlinks.

    Returns:
        A (links, pieces) sparse array, and capacities in bytes per second, shape (links,).
    """
    n, leaves, spines = fabric.n_hosts, fabric.leaves, fabric.spines
    up0, down0 = 2 * n, 2 * n + leaves * spines
    capacity = np.concatenate([fabric.nic_capacity] * 2 + [fabric.capacity.ravel()] * 2) / SECONDS
    flow, spine = assignment.flow, assignment.spine
    src, dst = step.src[flow], step.dst[flow]
    a, b = fabric.host_leaf[src], fabric.host_leaf[dst]
    piece = np.arange(flow.size)
    pinned = np.flatnonzero(spine >= 0)
    rows = [
        src,
        n + dst,
        up0 + a[pinned] * spines + spine[pinned],
        down0 + b[pinned] * spines + spine[pinned],
    ]
    columns = [piece, piece, pinned, pinned]
    weights = [np.ones(flow.size)] * 2 + [np.ones(pinned.size)] * 2
    spread = np.flatnonzero(spine == SPREAD)
    if spread.size:
        way = paths(fabric, step)
        row = np.full(len(step), -1)
        row[way.inter] = way.pair
        share = (way.shares / way.shares.sum(axis=1, keepdims=True))[row[flow[spread]]]
        which, k = np.nonzero(share)
        rows += [up0 + a[spread[which]] * spines + k, down0 + b[spread[which]] * spines + k]
        columns += [spread[which]] * 2
        weights += [share[which, k]] * 2
    matrix = sparse.csr_array(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))),
        shape=(capacity.size, flow.size),
    )
    return matrix, capacity


@dataclass(frozen=True, eq=False)
class Classes:
    """Connections and links sorted into classes that can't be told apart.

    Args:
        matrix: what a link of each class carries of the summed rates of a class of connections' members,
            shape (link classes, connection classes).
        capacity: bytes per second of each link class.
        bytes: of a connection of each class.
        of: class of each connection.
    """

    matrix: sparse.csr_array
    capacity: np.ndarray
    bytes: np.ndarray
    of: np.ndarray


def classes(matrix: sparse.csr_array, capacity: np.ndarray, size: np.ndarray, rounds: int = 12) -> Classes:
    """Sort connections and links into classes by refining signatures until no class splits.

    Where that doesn't come to an end in ``rounds``, every connection is a class of its own.
    """
    used = np.flatnonzero(np.diff(matrix.indptr))
    matrix, capacity = matrix[used], capacity[used]
    link, connection, weight = _triplets(matrix)
    by_connection = np.argsort(connection, kind="stable")
    of_links, of_connections = _classes_of(capacity), _classes_of(size.astype(np.float64))
    counts = (of_links.max() + 1, of_connections.max() + 1)
    kind = _classes_of(weight).astype(np.uint64)
    starts = np.flatnonzero(np.diff(connection[by_connection], prepend=-1))
    settled = False
    for _ in range(rounds):
        seen = _mix(of_links.astype(np.uint64)[link], kind)[by_connection]
        signature = np.add.reduceat(seen, starts)
        of_connections = _classes_of(_mix(signature, of_connections.astype(np.uint64)))
        seen = _mix(of_connections.astype(np.uint64)[connection], kind + np.uint64(1 << 32))
        signature = np.add.reduceat(seen, matrix.indptr[:-1])
        of_links = _classes_of(_mix(signature, of_links.astype(np.uint64)))
        new = (of_links.max() + 1, of_connections.max() + 1)
        if new == counts:
            settled = True
            break
        counts = new
        if counts[1] > size.size // 2:
            break
    if not settled:
        return Classes(matrix, capacity, size.astype(np.float64), np.arange(size.size))
    one_link = np.unique(of_links, return_index=True)[1]
    one_connection = np.unique(of_connections, return_index=True)[1]
    members = sparse.csr_array(
        (np.ones(size.size), (np.arange(size.size), of_connections)), shape=(size.size, int(counts[1]))
    )
    return Classes(
        sparse.csr_array(matrix[one_link] @ members),
        capacity[one_link],
        size[one_connection].astype(np.float64),
        of_connections,
    )


def _triplets(matrix: sparse.csr_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    link = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return link, matrix.indices, matrix.data


def _classes_of(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (a * np.uint64(0x9E3779B97F4A7C15)) ^ ((b + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F))
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
        return x ^ (x >> np.uint64(29))


# ------------------------------------------------------------------ progressive filling


def fair_rates(matrix: sparse.csr_array, capacity: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
    r"""Max-min fair rates of connections over links.

    On link :math:`e` with left-over capacity :math:`C_e` and weights :math:`w_{ej}` of the connections whose rate
    isn't fixed yet, the fair level is :math:`\theta_e = C_e / \sum_j w_{ej}`. A link whose level is lowest on
    the paths of all its connections fixes them at that level. All such links are taken at once.

    Args:
        matrix: :math:`w`, shape (links, connections).
        capacity: shape (links,).
        active: which connections take part (all).

    Returns:
        numpy.ndarray: rates in the unit of ``capacity``, 0 for connections that take no part.
    """
    link, connection, weight = _triplets(matrix)
    n = matrix.shape[1]
    rate, left = np.zeros(n), capacity.astype(np.float64).copy()
    open_ = np.ones(n, dtype=bool) if active is None else active.copy()
    keep = open_[connection]
    link, connection, weight = link[keep], connection[keep], weight[keep]
    while connection.size:
        demand = np.bincount(link, weights=weight, minlength=left.size)
        level = np.full(left.size, np.inf)
        np.divide(np.maximum(left, 0.0), demand, out=level, where=demand > 0)
        lowest = np.full(n, np.inf)
        np.minimum.at(lowest, connection, level[link])
        # A link is a bottleneck where none of its connections meets a lower level (up to rounding).
        meets_lower = lowest[connection] < level[link] * (1 - 1e-12)
        bottleneck = demand > 0
        bottleneck[link[meets_lower]] = False
        fixed = np.zeros(n, dtype=bool)
        fixed[connection[bottleneck[link]]] = True
        rate[fixed] = lowest[fixed]
        done = fixed[connection]
        left -= np.bincount(link[done], weights=weight[done] * rate[connection[done]], minlength=left.size)
        link, connection, weight = link[~done], connection[~done], weight[~done]
    return rate


def progressive_filling(
    matrix: sparse.csr_array, capacity: np.ndarray, size: np.ndarray
) -> Iterator[tuple[float, np.ndarray]]:
    """The phases of a step: (seconds, rates of all connections), from one end of a connection to the next."""
    left = size.astype(np.float64).copy()
    active = left > 0
    while active.any():
        rate = fair_rates(matrix, capacity, active)
        until = np.full(left.size, np.inf)
        np.divide(left, rate, out=until, where=active)
        seconds = float(until.min())
        yield seconds, rate
        left = np.where(active, left - rate * seconds, 0.0)
        # Connections that end together up to rounding end together.
        active &= until > seconds * (1 + 1e-9)


def completion(fabric: LeafSpine, step: Step, assignment: Assignment) -> float:
    """Seconds until the last flow of one run of ``step`` ends at max-min fair rates, without delays of links.

    Raises:
        InputError: more connections than :data:`LIMIT`.
    """
    if len(assignment) > LIMIT:
        raise InputError("sub-flows of a step", len(assignment), f"at most {LIMIT} where fair rates are computed")
    matrix, capacity = incidence(fabric, step, assignment)
    kinds = classes(matrix, capacity, assignment.bytes)
    return sum(seconds for seconds, _ in progressive_filling(kinds.matrix, kinds.capacity, kinds.bytes))


# ------------------------------------------------------------------ evaluation


@dataclass(frozen=True)
class Evaluation:
    """What a policy makes of a job.

    Args:
        policy: its name.
        bound: seconds, the sum of T* over all steps plus ``latency``.
        fabric_bound: seconds, the sum of the busiest leaf-spine links' times.
        host_bound: seconds, the sum of the busiest host links' times.
        latency: seconds of fixed delays.
        completion: seconds at max-min fair rates plus ``latency``; None where it wasn't asked for.
        flows: flows of all different steps.
        split_flows: those in more than one piece.
        pieces: connections of all different steps.
        queue_pairs: connections (to and from) of the host that holds the most, over the whole job.
        seconds: time that planning took.
        step_bounds, step_fabric_bounds: T* of each step, all links and leaf-spine links.
        notes: what the user should know.
    """

    policy: str
    bound: float
    fabric_bound: float
    host_bound: float
    latency: float
    completion: float | None
    flows: int
    split_flows: int
    pieces: int
    queue_pairs: int
    seconds: float
    step_bounds: np.ndarray = field(repr=False)
    step_fabric_bounds: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON."""
        names = (
            "policy",
            "bound",
            "fabric_bound",
            "host_bound",
            "latency",
            "completion",
            "flows",
            "split_flows",
        )
        return {name: getattr(self, name) for name in (*names, "pieces", "queue_pairs", "seconds")}


def evaluate(
    fabric: LeafSpine, job: Sequence[Step], policy: Policy, *, seed: int = 0, fair: bool = False
) -> Evaluation:
    """Plan every step of ``job`` with ``policy`` and add up what it takes.

    Args:
        fabric: where it runs.
        job: steps, one after the other (see :func:`steersman.distributed.packet_spraying.collective`).
        policy: see :func:`steersman.distributed.packet_spraying.policy`.
        seed: of the hash, for policies that have one.
        fair: whether to compute completion times at max-min fair rates beside the bounds.

    Raises:
        InputError: an empty job, or a policy that refuses a step.
    """
    if not job:
        raise InputError("job", list(job), "at least one step")
    bounds, fabric_bounds, host_bounds, fair_times, planning = [], [], [], [], 0.0
    flows = pieces = split = 0
    latency = 0.0
    connections: list[tuple[np.ndarray, np.ndarray]] = []
    notes: dict[str, None] = {}
    for step in job:
        start = time.perf_counter()
        assignment = policy.assign(fabric, step, seed)
        planning += time.perf_counter() - start
        load = loads(fabric, step, assignment)
        bounds.append(load.bound(fabric))
        fabric_bounds.append(load.fabric_bound(fabric))
        host_bounds.append(load.host_bound(fabric))
        if fair:
            fair_times.append(completion(fabric, step, assignment))
        per_flow = assignment.pieces_per_flow(len(step))
        flows, pieces, split = flows + len(step), pieces + len(assignment), split + int((per_flow > 1).sum())
        hops = 4 if (assignment.spine != LOCAL).any() else 2
        latency += step.repeat * hops * fabric.latency
        connections.append((step.src * fabric.n_hosts + step.dst, per_flow))
        if step.spread > 0.1:
            largest = f"by up to {100 * step.spread:.0f}%"
            notes[f"flows of a step differ in size {largest}: only cuts in proportion match spraying"] = None
    live = fabric.capacity[fabric.capacity > 0]
    if live.size and live.min() < live.max():
        notes["links to the spines differ in capacity: cuts are in proportion to capacity"] = None
    repeat = np.array([step.repeat for step in job])
    step_bounds, step_fabric = np.array(bounds), np.array(fabric_bounds)
    return Evaluation(
        policy=policy.name,
        bound=float(repeat @ step_bounds) + latency,
        fabric_bound=float(repeat @ step_fabric),
        host_bound=float(repeat @ np.array(host_bounds)),
        latency=latency,
        completion=float(repeat @ np.array(fair_times)) + latency if fair else None,
        flows=flows,
        split_flows=split,
        pieces=pieces,
        queue_pairs=_queue_pairs(fabric, connections),
        seconds=planning,
        step_bounds=step_bounds,
        step_fabric_bounds=step_fabric,
        notes=tuple(notes),
    )


def _queue_pairs(fabric: LeafSpine, connections: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Connections of the busiest host: for each pair of hosts the most that any step opens between them."""
    pair = np.concatenate([p for p, _ in connections])
    count = np.concatenate([c for _, c in connections])
    if len(connections) > 1:
        order = np.argsort(pair, kind="stable")
        pair, count = pair[order], count[order]
        first = np.flatnonzero(np.diff(pair, prepend=-1))
        pair, count = pair[first], np.maximum.reduceat(count, first)
    src, dst = np.divmod(pair, fabric.n_hosts)
    held = np.bincount(src, weights=count, minlength=fabric.n_hosts)
    return int((held + np.bincount(dst, weights=count, minlength=fabric.n_hosts)).max())


def congestion(evaluation: Evaluation, ideal: Evaluation) -> float:
    """The busiest leaf-spine links' time in relation to ideal spraying's (1 where none is used)."""
    return evaluation.fabric_bound / ideal.fabric_bound if ideal.fabric_bound > 0 else 1.0


def ideal(fabric: LeafSpine, job: Sequence[Step], *, fair: bool = False) -> Evaluation:
    """The evaluation of ideal packet spraying."""
    return evaluate(fabric, job, Spray(), fair=fair)
