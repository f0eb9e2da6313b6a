r"""Load-balancing policies: which spine carries which bytes of which flow.

A *bundle* is a set of :math:`r` flows that may use the same :math:`s` spines. Ideal packet spraying puts
:math:`1/s` of every flow on every spine, so that each uplink carries :math:`rf/s` for flows of size :math:`f`.
The planner reaches the same load with whole flows and a minimum of cuts. With

.. math:: q = \lfloor r/s \rfloor, \qquad m = r \bmod s, \qquad g = \gcd(r, s)

* *equal pieces* (Addanki, Goyal and Marinos, 2024, Theorem 1): :math:`q` whole flows to each spine; each of the
  other :math:`m` flows is split into :math:`s/g` pieces of :math:`fg/s`, of which each spine gets :math:`m/g`.
  That makes :math:`qs + ms/g` pieces.
* *cut*: the flows lie end to end on a line of length :math:`rf`, which is cut at the multiples of :math:`rf/s`;
  the k-th section goes to the k-th spine. Of the :math:`s-1` cuts, :math:`g-1` fall on borders between flows,
  which makes :math:`r+s-g` pieces. Unequal flows and unequal capacities (sections in proportion to capacity)
  change nothing in this argument.

A bundle is all flows from one host to one leaf (``bundle="host"``: every host can plan alone) or from one leaf
to one leaf (``bundle="leaf"``: fewer pieces, one central planner). Balanced bundles balance uplinks and
downlinks at once. Whole flows alone can do no better than :math:`\lceil d/s \rceil f` on a leaf with :math:`d`
equal flows; a bipartite edge colouring (König) reaches that on all links at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from steersman.distributed.packet_spraying.collectives import Step
from steersman.distributed.packet_spraying.fabric import LeafSpine
from steersman.distributed.packet_spraying.load import LOCAL, SPREAD, Assignment, Paths, loads, paths
from steersman.errors import InputError, nearest

_BLOCK = 1 << 15

BUNDLES = ("host", "leaf")
PLANS = ("plan-lazy", "plan-cut", "plan-equal", "plan-whole")


class Policy(Protocol):
    """Anything that assigns a step's flows to spines."""

    @property
    def name(self) -> str: ...

    def assign(self, fabric: LeafSpine, step: Step, seed: int = 0) -> Assignment: ...


# ------------------------------------------------------------------ building assignments


def _whole(step: Step, spine: np.ndarray, inter: np.ndarray) -> Assignment:
    """Every flow in one piece: ``spine`` for the flows ``inter``, none for the others."""
    spines = np.full(len(step), LOCAL, dtype=np.int64)
    spines[inter] = spine
    return Assignment(np.arange(len(step)), spines, step.bytes)


def _merged(step: Step, inter: np.ndarray, flow: np.ndarray, spine: np.ndarray, size: np.ndarray) -> Assignment:
    """Pieces of the inter-leaf flows together with the untouched local flows, in the order of the flows."""
    local = np.ones(len(step), dtype=bool)
    local[inter] = False
    rest = np.flatnonzero(local)
    flow = np.concatenate([flow, rest])
    order = np.argsort(flow, kind="stable")
    spine = np.concatenate([spine, np.full(rest.size, LOCAL)])
    size = np.concatenate([size, step.bytes[rest]])
    return Assignment(flow[order], spine[order], size[order])


def _split(size: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split whole ``size`` into ``parts`` nearly equal whole pieces; the remainder goes to the first ones.

    Returns:
        (index, number, bytes) of each piece.
    """
    index = np.repeat(np.arange(size.size), parts)
    number = np.arange(index.size) - np.repeat(np.cumsum(parts) - parts, parts)
    base, extra = np.divmod(size, parts)
    return index, number, base[index] + (number < extra[index])


# ------------------------------------------------------------------ baselines


@dataclass(frozen=True)
class Ecmp:
    """Hash-based equal-cost multipath: each sub-flow goes to a working spine that its 5-tuple hashes to.

    Args:
        k: equal sub-flows per flow, each with its own source port (1: plain ECMP).

    Raises:
        InputError: ``k`` isn't a whole number from 1 to 256.
    """

    k: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= 256:
            raise InputError("k", self.k, "a whole number from 1 to 256")

    @property
    def name(self) -> str:
        return "ecmp" if self.k == 1 else f"ecmp-{self.k}"

    def assign(self, fabric: LeafSpine, step: Step, seed: int = 0) -> Assignment:
        """A spine for every sub-flow; ``seed`` stands for the switches' hash seed."""
        way = paths(fabric, step)
        pair = np.full(len(step), -1)
        pair[way.inter] = way.pair
        # In blocks that fit into the processor's cache: an all-to-all has millions of sub-flows.
        blocks = [self._block(way, step, pair, at, seed) for at in range(0, len(step), _BLOCK)]
        return Assignment(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))

    def _block(self, way: Paths, step: Step, pair: np.ndarray, at: int, seed: int) -> tuple[np.ndarray, ...]:
        size = step.bytes[at : at + _BLOCK]
        flow, number, amount = _split(size, np.minimum(self.k, size))
        flow += at
        row = pair[flow]
        spine = np.full(flow.size, LOCAL, dtype=np.int64)
        out = np.flatnonzero(row >= 0)
        row, leaving = row[out], flow[out]
        hashed = _hash(seed, step.src[leaving], step.dst[leaving], number[out])
        slot = (hashed % way.live[row].astype(np.uint64)).astype(np.int64)
        spine[out] = way.order[row, slot]
        return flow, spine, amount


@dataclass(frozen=True)
class Spray:
    """Ideal packet spraying: every working spine carries its share of every flow (1/s where links are equal)."""

    name = "spray"

    def assign(self, fabric: LeafSpine, step: Step, seed: int = 0) -> Assignment:
        """All inter-leaf flows spread over all working spines; ``seed`` plays no part."""
        way = paths(fabric, step)
        return _whole(step, np.full(way.inter.size, SPREAD), way.inter)


@dataclass(frozen=True)
class SinglePath:
    """One path per flow, greedily: the spine whose fuller link (uplink or downlink) is least loaded.

    Flows are taken in rounds: the largest of every leaf pair, then the second largest, and so on.
    """

    name = "single"

    def assign(self, fabric: LeafSpine, step: Step, seed: int = 0) -> Assignment:
        """One spine for every flow; ``seed`` plays no part."""
        way = paths(fabric, step)
        size = step.bytes[way.inter]
        by_pair = np.lexsort((-size, way.pair))
        turn = np.empty(size.size, dtype=np.int64)
        turn[by_pair] = _rank(way.pair[by_pair])
        shift = (way.b - way.a) % fabric.leaves
        order = np.lexsort((shift, turn))
        # Flows of one round and one leaf distance share no link, so that they are placed together.
        change = np.flatnonzero(np.diff(turn[order]) | np.diff(shift[order])) + 1
        gbps = np.where(fabric.capacity > 0, fabric.capacity, 1.0)
        dead = np.where(fabric.capacity > 0, 0.0, np.inf)
        up, down = dead.copy(), dead.copy()
        spine = np.empty(size.size, dtype=np.int64)
        for wave in np.split(order, change):
            if wave.size == 0:
                continue
            a, b, f = way.a[wave], way.b[wave], size[wave]
            after_up, after_down = up[a] + f[:, None] / gbps[a], down[b] + f[:, None] / gbps[b]
            best = (np.maximum(after_up, after_down) + 1e-9 * (after_up + after_down)).argmin(axis=1)
            up[a, best] += f / gbps[a, best]
            down[b, best] += f / gbps[b, best]
            spine[wave] = best
        return _whole(step, spine, way.inter)


# ------------------------------------------------------------------ the planner


@dataclass(frozen=True)
class SinglePathPlanner:
    """Single paths with a minimum of flow splitting that match ideal packet spraying.

    Args:
        policy: ``plan-equal`` and ``plan-cut``: see the module's text. ``plan-whole``: no splits, flows
            spread by edge colouring, the best that whole equal flows can do. ``plan-lazy``: for each step
            whole flows (``plan-whole``; greedy single paths where flows or links are unequal) if their
            slowest link, host links included, is within ``within`` of ideal spraying's, otherwise the cut
            of leaf bundles.
        bundle: ``host`` or ``leaf``, for ``plan-equal`` and ``plan-cut``.
        within: allowed excess over ideal spraying, as a fraction. Cuts move to a border between flows where
            that overfills no section by more.
        max_pieces: most pieces of one flow (at least 2; 0: no limit). Equal pieces beyond it fall back to
            cuts; where a flow is still cut too often, its smallest pieces join its others and some imbalance
            stays.

    Raises:
        InputError: an argument out of range.

    Reference: Addanki, Goyal and Marinos, "Challenging the Need for Packet Spraying in Large-Scale Distributed
    Training", arXiv:2407.00550, 2024, Algorithm 1 and Theorem 1.
    """

    policy: str = "plan-lazy"
    bundle: str = "host"
    within: float = 0.0
    max_pieces: int = 0

    def __post_init__(self) -> None:
        if self.policy not in PLANS:
            raise InputError("policy", self.policy, nearest(str(self.policy), PLANS))
        if self.bundle not in BUNDLES:
            raise InputError("bundle", self.bundle, nearest(str(self.bundle), BUNDLES))
        if isinstance(self.within, bool) or not isinstance(self.within, (int, float)) or not 0 <= self.within <= 1:
            raise InputError("within", self.within, "a fraction from 0 to 1 (0.01: one percent)")
        limit = self.max_pieces
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0 or limit == 1:
            raise InputError("max_pieces", limit, "a whole number of at least 2 (0: no limit)")

    @property
    def name(self) -> str:
        by_leaf = self.policy in ("plan-equal", "plan-cut") and self.bundle == "leaf"
        return f"{self.policy}:bundle=leaf" if by_leaf else self.policy

    def assign(self, fabric: LeafSpine, step: Step, seed: int = 0) -> Assignment:
        """The plan of one step; ``seed`` plays no part.

        Raises:
            InputError: ``plan-equal`` with a bundle of unequal flows or unequal capacities, ``plan-whole``
                with unequal flows, links or failed links.
        """
        way = paths(fabric, step)
        if way.inter.size == 0:
            return _whole(step, np.empty(0, dtype=np.int64), way.inter)
        if self.policy == "plan-whole":
            return _colouring(fabric, step, way)
        if self.policy == "plan-lazy":
            return self._lazy(fabric, step, way)
        return self._bundles(fabric, step, way, self.bundle)

    def _lazy(self, fabric: LeafSpine, step: Step, way: Paths) -> Assignment:
        target = loads(fabric, step, Spray().assign(fabric, step)).bound(fabric) * (1 + self.within)
        # Cuts fall on whole bytes: a link may carry one byte more for each of its bundles.
        target += 8e-9 * fabric.leaves / way.capacity[way.capacity > 0].min()
        equal = step.uniform and fabric.uniform
        whole = _colouring(fabric, step, way) if equal else SinglePath().assign(fabric, step)
        if loads(fabric, step, whole).bound(fabric) <= target:
            return whole
        return self._bundles(fabric, step, way, "leaf")

    def _bundles(self, fabric: LeafSpine, step: Step, way: Paths, bundle: str) -> Assignment:
        size = step.bytes[way.inter]
        start = step.src[way.inter] if bundle == "host" else way.a
        key = start * fabric.leaves + way.b
        # Largest first within a bundle; the order of equal flows is kept.
        order = np.argsort(key, kind="stable") if step.uniform else np.lexsort((-size, key))
        key, size, pair = key[order], size[order], way.pair[order]
        first = np.flatnonzero(np.diff(key, prepend=key[0] - 1))
        count = np.diff(first, append=key.size)
        bundle_of = np.repeat(np.arange(first.size), count)
        bundle_pair = pair[first]
        s = way.live[bundle_pair]
        # Which spine comes first changes no load, only who shares a link with whom.
        if way.even:
            turn = _rank_in_leaf(fabric)[step.src[way.inter][order][first]] if bundle == "host" else way.b[order][first]
        else:
            turn = np.zeros(first.size, dtype=np.int64)
        alike = np.maximum.reduceat(size, first) == np.minimum.reduceat(size, first)
        if self.policy == "plan-equal":
            if not alike.all():
                raise InputError("policy", "plan-equal", "plan-cut where the flows of a bundle differ in size")
            if not way.even:
                raise InputError("policy", "plan-equal", "plan-cut where the links to the spines differ in capacity")
            parts = s // np.gcd(count, s)
            equal = (parts <= self.max_pieces) if self.max_pieces else np.ones(first.size, dtype=bool)
        else:
            # Where s divides the number of equal flows, both ways make the same whole pieces.
            parts, equal = np.ones_like(s), alike & (count % s == 0) & way.even
        line = _Line(size, first, count, bundle_of)
        pieces = [
            _equal_pieces(line, np.flatnonzero(equal), s, parts),
            _cut_pieces(line, np.flatnonzero(~equal), way, bundle_pair, turn, self.within, self.max_pieces),
        ]
        flow, slot, amount = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        owner = bundle_of[flow]
        spine = way.order[bundle_pair[owner], (slot + turn[owner]) % s[owner]]
        return _merged(step, way.inter, way.inter[order[flow]], spine, amount)


@dataclass(frozen=True, eq=False)
class _Line:
    """Flows end to end, bundle after bundle: sizes, and first flow and number of flows of each bundle."""

    size: np.ndarray
    first: np.ndarray
    count: np.ndarray
    bundle_of: np.ndarray

    def only(self, bundles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(flows, their number within their bundle, their bundle's place in ``bundles``)."""
        place = np.full(self.first.size, -1)
        place[bundles] = np.arange(bundles.size)
        flows = np.flatnonzero(place[self.bundle_of] >= 0)
        owner = self.bundle_of[flows]
        return flows, flows - self.first[owner], place[owner]


Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(flow on the line, slot, bytes) of each piece."""


def _equal_pieces(line: _Line, bundles: np.ndarray, s: np.ndarray, parts: np.ndarray) -> Pieces:
    """q whole flows to each of the s slots; the m left-over flows in s/g pieces, dealt round the slots."""
    flows, number, place = line.only(bundles)
    of = bundles[place]
    whole = (line.count[of] // s[of]) * s[of]
    left = number >= whole
    index, piece, amount = _split(line.size[flows], np.where(left, np.minimum(parts[of], line.size[flows]), 1))
    slot = np.where(left[index], (number - whole)[index] * parts[of][index] + piece, number[index])
    return flows[index], slot % s[of][index], amount


def _cut_pieces(
    line: _Line,
    bundles: np.ndarray,
    way: Paths,
    bundle_pair: np.ndarray,
    turn: np.ndarray,
    within: float,
    max_pieces: int,
) -> Pieces:
    """Cut the line of each bundle at the cumulative shares of its slots."""
    flows, _, place = line.only(bundles)
    if flows.size == 0:
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, empty
    size = line.size[flows]
    start = np.cumsum(size) - size
    end = int(start[-1] + size[-1])
    offset = start[np.flatnonzero(np.diff(place, prepend=-1))]
    total = np.diff(offset, append=end)
    pairs = bundle_pair[bundles]
    live, spines = way.live[pairs], way.order.shape[1]
    k = np.arange(1, spines)
    if way.even:
        section = np.minimum(k, live[:, None]) * total[:, None] // live[:, None]
    else:
        weight = np.take_along_axis(way.capacity[pairs], way.order[pairs], axis=1)
        share = np.cumsum(weight, axis=1)
        section = np.rint(total[:, None] * (share[:, :-1] / share[:, -1:])).astype(np.int64)
    cut = offset[:, None] + section
    if within and spines > 1:
        cut = _to_borders(cut, offset, total, start, end, within)
    cut = cut.ravel()
    point = np.unique(np.concatenate([start, cut, [end]]))
    head, amount = point[:-1], np.diff(point)
    flow = np.searchsorted(start, head, side="right") - 1
    # Each bundle has exactly (spines - 1) cuts, some of them at its end, where a link is down.
    slot = np.searchsorted(cut, head, side="right") - place[flow] * (spines - 1)
    if max_pieces:
        flow, slot, amount = _fewer(flow, slot, amount, size, max_pieces)
    return flows[flow], slot, amount


def _to_borders(
    cut: np.ndarray, offset: np.ndarray, total: np.ndarray, start: np.ndarray, end: int, within: float
) -> np.ndarray:
    """Move cuts to the nearest border between flows, by at most within/2 of the smaller section beside them.

    A section moves at both ends, hence it grows to at most (1 + within) times its share.
    """
    ends = np.concatenate([offset[:, None], cut, (offset + total)[:, None]], axis=1)
    section = np.diff(ends, axis=1)
    reach = np.floor(within / 2 * np.minimum(section[:, :-1], section[:, 1:])).astype(np.int64)
    border = np.append(start, end)
    after = np.searchsorted(border, cut)
    high, low = border[after], border[np.maximum(after - 1, 0)]
    near = np.where(high - cut <= cut - low, high, low)
    return np.where(np.abs(near - cut) <= reach, near, cut)


def _fewer(
    flow: np.ndarray, slot: np.ndarray, amount: np.ndarray, size: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the ``limit`` largest pieces of each flow and share out the others' bytes in proportion."""
    largest = np.lexsort((-amount, flow))
    rank = np.empty(flow.size, dtype=np.int64)
    rank[largest] = _rank(flow[largest])
    kept = rank < limit
    flow, slot, amount = flow[kept], slot[kept], amount[kept]
    first = np.flatnonzero(np.diff(flow, prepend=-1))
    owner = np.repeat(np.arange(first.size), np.diff(first, append=flow.size))
    upto = np.cumsum(amount)
    before = (upto - amount)[first]
    kept_total = np.add.reduceat(amount, first)
    whole = size[flow[first]]
    # Pieces end at the same fractions of the whole flow as before at those of what was kept.
    edge = np.rint((upto - before[owner]) / kept_total[owner] * whole[owner]).astype(np.int64)
    previous = np.where(np.arange(flow.size) == first[owner], 0, np.append(0, edge[:-1]))
    return flow, slot, edge - previous


def _colouring(fabric: LeafSpine, step: Step, way: Paths) -> Assignment:
    """Whole equal flows on spines such that a leaf with d flows has at most ceil(d/s) on any link.

    Flows between two leaves beyond a multiple of s form a bipartite multigraph of source and target leaves.
    A leaf with more than s of them is split into leaves of at most s; a colouring of the edges with s colours,
    which König's theorem promises, puts each colour at most once on each.
    """
    if not step.uniform:
        raise InputError("policy", "plan-whole", "plan-cut where the flows of a step differ in size")
    if not fabric.uniform:
        raise InputError("policy", "plan-whole", "plan-cut where links are down or differ in capacity")
    s = fabric.spines
    order = np.argsort(way.pair, kind="stable")
    pair = way.pair[order]
    number = _rank(pair)
    flows = np.bincount(pair, minlength=way.pair_a.size)
    whole = flows // s * s
    spine = (number + way.pair_b[pair]) % s
    left = np.flatnonzero(number >= whole[pair])
    if left.size:
        u, v = way.pair_a[pair[left]], way.pair_b[pair[left]]
        spine[left] = edge_colouring(_pieces_of(u, s), _pieces_of(v, s), s)
    result = np.empty(order.size, dtype=np.int64)
    result[order] = spine
    return _whole(step, result, way.inter)


def _pieces_of(vertex: np.ndarray, limit: int) -> np.ndarray:
    """Vertices split so that none has more than ``limit`` edges: the vertex of each edge."""
    order = np.argsort(vertex, kind="stable")
    part = np.empty(vertex.size, dtype=np.int64)
    part[order] = _rank(vertex[order]) // limit
    return vertex * (vertex.size // limit + 2) + part


def edge_colouring(u: np.ndarray, v: np.ndarray, colours: int) -> np.ndarray:
    """A proper colouring of the edges (u, v) of a bipartite multigraph whose degrees are at most ``colours``.

    Edges are coloured one after the other. Where no colour is free at both ends, with ``i`` free at u and
    ``j`` free at v, the two colours are swapped along the path of i and j that starts at v (it can't end
    at u, since the graph is bipartite), after which ``i`` is free at both.
    """
    u = np.unique(u, return_inverse=True)[1].tolist()
    v = np.unique(v, return_inverse=True)[1].tolist()
    everything = (1 << colours) - 1
    free_u, free_v = [everything] * (max(u) + 1), [everything] * (max(v) + 1)
    at_u: list[dict[int, int]] = [{} for _ in free_u]
    at_v: list[dict[int, int]] = [{} for _ in free_v]
    colour = [0] * len(u)
    for edge, (x, y) in enumerate(zip(u, v, strict=True)):
        both = free_u[x] & free_v[y]
        if both:
            i = (both & -both).bit_length() - 1
        else:
            i = (free_u[x] & -free_u[x]).bit_length() - 1
            j = (free_v[y] & -free_v[y]).bit_length() - 1
            path, here, want, on_v = [], y, i, True
            while True:
                step_edge = (at_v if on_v else at_u)[here].get(want)
                if step_edge is None:
                    break
                path.append(step_edge)
                here = u[step_edge] if on_v else v[step_edge]
                want, on_v = (j if want == i else i), not on_v
            for e in path:
                del at_u[u[e]][colour[e]], at_v[v[e]][colour[e]]
                free_u[u[e]] |= 1 << colour[e]
                free_v[v[e]] |= 1 << colour[e]
            for e in path:
                colour[e] = j if colour[e] == i else i
                at_u[u[e]][colour[e]] = at_v[v[e]][colour[e]] = e
                free_u[u[e]] &= ~(1 << colour[e])
                free_v[v[e]] &= ~(1 << colour[e])
        colour[edge] = i
        at_u[x][i] = at_v[y][i] = edge
        free_u[x] &= ~(1 << i)
        free_v[y] &= ~(1 << i)
    return np.array(colour)


# ------------------------------------------------------------------ by name


def policy(name: str, **options: Any) -> Policy:
    """A policy by name: ``ecmp``, ``ecmp-2`` ... ``ecmp-256``, ``single``, ``spray`` or a ``plan-...``.

    Args:
        name: the name; ``plan-cut:bundle=leaf`` is understood as well.
        **options: arguments of :class:`SinglePathPlanner`.

    Raises:
        InputError: an unknown name or option.
    """
    base, _, rest = str(name).partition(":")
    for pair in filter(None, rest.split(":")):
        key, _, value = pair.partition("=")
        options[key] = value if key in ("policy", "bundle") else float(value) if key == "within" else int(value)
    if base in PLANS:
        known = ("bundle", "within", "max_pieces")
        for option in options:
            if option not in known:
                raise InputError(f"option of {base}", option, nearest(option, known))
        return SinglePathPlanner(base, **options)
    if options:
        raise InputError(f"option of {base}", sorted(options)[0], "left out: only plans have options")
    if base == "spray":
        return Spray()
    if base == "single":
        return SinglePath()
    if base == "ecmp":
        return Ecmp()
    if base.startswith("ecmp-") and base[5:].isdigit():
        return Ecmp(int(base[5:]))
    raise InputError("policy", name, nearest(base, ["ecmp", "ecmp-8", "single", "spray", *PLANS]))


def _rank(sorted_keys: np.ndarray) -> np.ndarray:
    """Position of each element within its run of equal keys."""
    if sorted_keys.size == 0:
        return np.empty(0, dtype=np.int64)
    first = np.flatnonzero(np.diff(sorted_keys, prepend=sorted_keys[0] - 1))
    length = np.diff(first, append=sorted_keys.size)
    return np.arange(sorted_keys.size) - np.repeat(first, length)


def _rank_in_leaf(fabric: LeafSpine) -> np.ndarray:
    """Position of each host among the hosts of its leaf."""
    order = np.argsort(fabric.host_leaf, kind="stable")
    rank = np.empty(fabric.n_hosts, dtype=np.int64)
    rank[order] = _rank(fabric.host_leaf[order])
    return rank


def _hash(seed: int, *fields: np.ndarray) -> np.ndarray:
    """A 64-bit hash of a seed and whole-number columns (the finaliser of SplitMix64 after each)."""
    state = np.zeros(1, dtype=np.uint64)
    for column in (np.array([seed & (2**64 - 1)], dtype=np.uint64), *fields):
        state = (state ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
