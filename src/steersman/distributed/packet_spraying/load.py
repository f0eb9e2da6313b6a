r"""Assignments of flows to spines, and the load that they put on every link.

With :math:`x_e` the bytes that cross link :math:`e` of capacity :math:`C_e`, no schedule can end a step before

.. math:: T^* = \max_e x_e / C_e

over host links and leaf-spine links, each way: the *bound* of an assignment. The bound over the host links alone
is the same for every assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from steersman.distributed.packet_spraying.collectives import Step
from steersman.distributed.packet_spraying.fabric import LeafSpine

SECONDS = 8e-9
"""Seconds that one byte takes at 1 Gb/s."""

LOCAL, SPREAD = -1, -2
"""In place of a spine: the flow stays inside its leaf; the piece is spread over all working spines."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """Pieces of a step's flows on spines, in the order of the flows.

    Args:
        flow: index of the piece's flow, shape (pieces,), never decreasing.
        spine: spine of the piece, shape (pieces,); :data:`LOCAL` or :data:`SPREAD` where there is none.
        bytes: whole bytes of the piece, shape (pieces,).
    """

    flow: np.ndarray
    spine: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return int(self.flow.size)

    def pieces_per_flow(self, flows: int) -> np.ndarray:
        """Number of pieces of each flow, shape (flows,)."""
        return np.bincount(self.flow, minlength=flows)


@dataclass(frozen=True, eq=False)
class Paths:
    """Where the flows of a step can go in a fabric.

    ``inter`` are the indices of the flows that leave their leaf; ``a`` and ``b`` their leaves; ``pair`` the
    row of their leaf pair in ``capacity`` (Gb/s over each spine) and in ``order`` (working spines first).
    """

    inter: np.ndarray
    a: np.ndarray
    b: np.ndarray
    pair: np.ndarray
    pair_a: np.ndarray
    pair_b: np.ndarray
    capacity: np.ndarray
    order: np.ndarray
    live: np.ndarray
    """Number of working spines of each pair."""
    even: bool
    """Whether every pair's working spines have equal capacity."""

    @property
    def shares(self) -> np.ndarray:
        """What ideal spraying puts on each spine, relative to the pair's best spine: shape (pairs, spines)."""
        return self.capacity / self.capacity.max(axis=1, keepdims=True)


@lru_cache(maxsize=2)
def paths(fabric: LeafSpine, step: Step) -> Paths:
    """The :class:`Paths` of ``step`` in ``fabric``."""
    step.check(fabric)
    a, b = fabric.host_leaf[step.src], fabric.host_leaf[step.dst]
    inter = np.flatnonzero(a != b)
    a, b = a[inter], b[inter]
    code = a * fabric.leaves + b
    used = np.zeros(fabric.leaves**2, dtype=bool)
    used[code] = True
    pairs = np.flatnonzero(used)
    row = np.cumsum(used) - 1
    pair_a, pair_b = np.divmod(pairs, fabric.leaves)
    capacity = fabric.path_capacity(pair_a, pair_b)
    live = capacity > 0
    top = capacity.max(axis=1, initial=0.0, keepdims=True)
    even = bool((~live | (capacity == top)).all())
    order = np.argsort(~live, axis=1, kind="stable")
    return Paths(inter, a, b, row[code], pair_a, pair_b, capacity, order, live.sum(axis=1), even)


@dataclass(frozen=True, eq=False)
class Loads:
    """Bytes on every link of a fabric.

    Args:
        sent, received: host links, shape (hosts,).
        up, down: links from leaf to spine and from spine to leaf, shape (leaves, spines).
    """

    sent: np.ndarray
    received: np.ndarray
    up: np.ndarray
    down: np.ndarray

    def host_bound(self, fabric: LeafSpine) -> float:
        """Seconds that the busiest host link needs."""
        return float(SECONDS * (np.maximum(self.sent, self.received) / fabric.nic_capacity).max())

    def fabric_bound(self, fabric: LeafSpine) -> float:
        """Seconds that the busiest leaf-spine link needs."""
        return float(self.seconds(fabric).max())

    def bound(self, fabric: LeafSpine) -> float:
        """Seconds that the busiest link needs: T*."""
        return max(self.host_bound(fabric), self.fabric_bound(fabric))

    def seconds(self, fabric: LeafSpine) -> np.ndarray:
        """Seconds that each leaf-spine link needs, shape (2, leaves, spines): up, down."""
        gbps = np.where(fabric.capacity > 0, fabric.capacity, 1.0)
        return SECONDS * np.stack([self.up, self.down]) / gbps


def loads(fabric: LeafSpine, step: Step, assignment: Assignment) -> Loads:
    """The bytes that ``assignment`` puts on every link in one run of ``step``."""
    way = paths(fabric, step)
    leaves, spines, n = fabric.leaves, fabric.spines, fabric.n_hosts
    sent = np.bincount(step.src, weights=step.bytes, minlength=n)
    received = np.bincount(step.dst, weights=step.bytes, minlength=n)
    a, b = fabric.host_leaf[step.src], fabric.host_leaf[step.dst]
    pinned = assignment.spine >= 0
    flow, spine, size = assignment.flow[pinned], assignment.spine[pinned], assignment.bytes[pinned]
    up = np.bincount(a[flow] * spines + spine, weights=size, minlength=leaves * spines)
    down = np.bincount(b[flow] * spines + spine, weights=size, minlength=leaves * spines)
    up, down = up.reshape(leaves, spines), down.reshape(leaves, spines)
    spread = assignment.spine == SPREAD
    if spread.any():
        row = np.full(len(step), -1)
        row[way.inter] = way.pair
        total = np.bincount(row[assignment.flow[spread]], weights=assignment.bytes[spread], minlength=way.pair_a.size)
        part = way.shares * total[:, None] / way.shares.sum(axis=1, keepdims=True)
        np.add.at(up, way.pair_a, part)
        np.add.at(down, way.pair_b, part)
    return Loads(sent, received, up, down)
