r"""Collectives as steps of flows.

A job is a list of steps; a step is a set of flows (source host, destination host, bytes) that start together,
and ends when its last flow ends. With :math:`n` ranks and a message of :math:`S` bytes per rank:

==================  ====================================================================================
ring                :math:`2(n-1)` steps of :math:`S/n` to the next rank (reduce-scatter, all-gather: half)
halving-doubling    distances :math:`n/2, n/4, \dots, 1` with :math:`S/2, S/4, \dots, S/n`, then back
recursive doubling  distances :math:`1, 2, \dots, n/2`, each with all :math:`S`
double binary tree  two trees with :math:`S/2` each, pipelined: all edges up in one step, all down in one
all-to-all          :math:`n-1` flows of :math:`S/n` per rank, in one step or as :math:`n-1` permutations
==================  ====================================================================================

Flows are arrays, never objects: an all-to-all of 1024 ranks has a million of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steersman.distributed.packet_spraying.fabric import LeafSpine
from steersman.errors import InputError, nearest

PLACEMENTS = ("packed", "strided", "random")


@dataclass(frozen=True, eq=False)
class Step:
    """Flows that start together.

    Args:
        src, dst: host indices, shape (flows,).
        bytes: whole bytes of each flow, shape (flows,), or one number for all.
        repeat: how many times the step runs, one after the other, with the same flows.
        name: what it is, for reports.

    Raises:
        InputError: no flow, arrays of unequal length, a flow to its own source, or bytes below 1.
    """

    src: np.ndarray
    dst: np.ndarray
    bytes: np.ndarray
    repeat: int = 1
    name: str = ""
    uniform: bool = field(init=False)
    """Whether all flows have the same number of bytes."""

    def __post_init__(self) -> None:
        src = np.atleast_1d(np.asarray(self.src)).astype(np.int64)
        dst = np.atleast_1d(np.asarray(self.dst)).astype(np.int64)
        size = np.asarray(self.bytes)
        if src.ndim != 1 or src.shape != dst.shape or src.size == 0:
            raise InputError(
                "flows", f"{src.shape} and {dst.shape}", "at least one flow, each with a source and a target"
            )
        if size.shape not in ((), src.shape):
            raise InputError("bytes", f"array of shape {size.shape}", f"one number, or one for each flow ({src.size})")
        if size.dtype.kind not in "iuf" or not np.isfinite(size).all() or (size != np.floor(size)).any():
            raise InputError("bytes", size.flat[0], "whole numbers of bytes")
        if (size < 1).any():
            raise InputError("bytes", int(size.min()), "at least 1 for each flow")
        if (src == dst).any():
            raise InputError("flow", f"{src[src == dst][0]} to itself", "between two different hosts")
        if isinstance(self.repeat, bool) or not isinstance(self.repeat, (int, np.integer)) or self.repeat < 1:
            raise InputError("repeat", self.repeat, "a whole number of at least 1")
        object.__setattr__(self, "src", src)
        object.__setattr__(self, "dst", dst)
        object.__setattr__(self, "bytes", np.array(np.broadcast_to(size.astype(np.int64), src.shape)))
        object.__setattr__(self, "uniform", bool((self.bytes == self.bytes[0]).all()))

    def __len__(self) -> int:
        return int(self.src.size)

    @property
    def spread(self) -> float:
        """How much the largest flow exceeds the smallest one, as a fraction."""
        return float(self.bytes.max() / self.bytes.min() - 1)

    def check(self, fabric: LeafSpine) -> None:
        """Refuse flows between hosts that ``fabric`` doesn't have.

        Raises:
            InputError: a host index out of range.
        """
        low, high = min(self.src.min(), self.dst.min()), max(self.src.max(), self.dst.max())
        if low < 0 or high >= fabric.n_hosts:
            raise InputError("host", int(high if low >= 0 else low), f"from 0 to {fabric.n_hosts - 1}")


def place(fabric: LeafSpine, ranks: int = 0, how: str = "packed", rng: np.random.Generator | None = None) -> np.ndarray:
    """The host of each rank.

    Args:
        fabric: where the ranks run.
        ranks: how many; 0 stands for one on every host.
        how: ``packed`` fills leaf after leaf, ``strided`` deals the ranks round the leaves, ``random``
            draws hosts without replacement.
        rng: for ``random``.

    Returns:
        numpy.ndarray: host indices, shape (ranks,).

    Raises:
        InputError: more ranks than hosts, fewer than 2, or an unknown ``how``.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, (int, np.integer)) or ranks < 0:
        raise InputError("ranks", ranks, "a whole number of at least 2 (0: all hosts)")
    count = int(ranks) or fabric.n_hosts
    if not 2 <= count <= fabric.n_hosts:
        raise InputError("ranks", count, f"from 2 to the number of hosts ({fabric.n_hosts})")
    if how not in PLACEMENTS:
        raise InputError("placement", how, nearest(str(how), PLACEMENTS))
    by_leaf = np.argsort(fabric.host_leaf, kind="stable")
    if how == "packed":
        return by_leaf[:count]
    if how == "strided":
        leaf = fabric.host_leaf[by_leaf]
        turn = np.arange(leaf.size) - np.searchsorted(leaf, leaf)
        return by_leaf[np.lexsort((leaf, turn))][:count]
    if rng is None:
        raise InputError("rng", rng, "a numpy.random.Generator where the placement is random")
    return rng.permutation(fabric.n_hosts)[:count]


# ------------------------------------------------------------------ the collectives


def ring(hosts: np.ndarray, bytes: int, passes: int = 2) -> list[Step]:
    """A ring: ``passes * (n - 1)`` steps in which every rank sends S/n to the next (all-reduce: 2 passes)."""
    n = hosts.size
    return [_equal(hosts, np.roll(hosts, -1), _share(bytes, n), passes * (n - 1), "ring")]


def halving_doubling(hosts: np.ndarray, bytes: int) -> list[Step]:
    """Recursive halving, then doubling: partners at distance n/2, n/4, ..., 1 swap S/2, S/4, ..., S/n, and back."""
    n = _power_of_two(hosts, "halving_doubling")
    rank, steps = np.arange(n), []
    distance, size = n // 2, bytes
    while distance >= 1:
        size = _share(size, 2)
        # The doubling phase repeats the halving phase's exchanges in reverse order, with the same sizes.
        steps.append(_equal(hosts, hosts[rank ^ distance], size, 2, f"distance {distance}"))
        distance //= 2
    return steps


def recursive_doubling(hosts: np.ndarray, bytes: int) -> list[Step]:
    """Recursive doubling: partners at distance 1, 2, ..., n/2 swap all S bytes (fewest steps, for short messages)."""
    n = _power_of_two(hosts, "recursive_doubling")
    rank = np.arange(n)
    distances = [1 << i for i in range(n.bit_length() - 1)]
    return [_equal(hosts, hosts[rank ^ d], bytes, 1, f"distance {d}") for d in distances]


def double_binary_tree(hosts: np.ndarray, bytes: int) -> list[Step]:
    """Two complementary trees that carry S/2 each (Sanders, Speck and Träff, 2009), pipelined.

    In each tree the ranks are numbered in order, so that every second rank is a leaf; the second tree mirrors
    the first (even n) or shifts it by one (odd n), so that no rank is an inner node of both. Pipelined over
    chunks, all edges of both trees carry data at once: one step towards the roots, one step back.
    """
    n = hosts.size
    child, parent = _in_order_tree(n)
    move = (lambda i: n - 1 - i) if n % 2 == 0 else (lambda i: (i + 1) % n)
    children = hosts[np.concatenate([child, move(child)])]
    parents = hosts[np.concatenate([parent, move(parent)])]
    size = _share(bytes, 2)
    return [
        _equal(children, parents, size, 1, "up the trees"),
        _equal(parents, children, size, 1, "down the trees"),
    ]


def all_to_all(hosts: np.ndarray, bytes: int, form: str = "step") -> list[Step]:
    """All-to-all: every rank sends S/n to every other rank.

    Args:
        hosts: host of each rank.
        bytes: S.
        form: ``step``: all flows at once; ``permutation``: n - 1 steps, in the t-th of which rank i sends to
            rank i + t. The one-step form hides collisions, because many flows average out on every link; the
            permutation form shows them.
    """
    n = hosts.size
    size = _share(bytes, n)
    if form == "permutation":
        return [_equal(hosts, np.roll(hosts, -t), size, 1, f"shift {t}") for t in range(1, n)]
    if form != "step":
        raise InputError("form", form, nearest(str(form), ("step", "permutation")))
    i, j = np.divmod(np.arange(n * n), n)
    off = i != j
    return [_equal(hosts[i[off]], hosts[j[off]], size, 1, "all-to-all")]


def hierarchical(hosts: np.ndarray, bytes: int, group: int = 8) -> list[Step]:
    """Hierarchical all-reduce: reduce-scatter inside groups, all-reduce across them, all-gather inside.

    Consecutive ``group`` ranks form a group; the m-th ranks of all groups form a ring with S/group bytes.
    """
    n = hosts.size
    if isinstance(group, bool) or not isinstance(group, (int, np.integer)) or group < 1 or n % group or group == n:
        raise InputError("group", group, f"a divisor of the number of ranks ({n}), below it")
    table = hosts.reshape(n // group, group)
    inside = _share(bytes, group)
    steps = []
    if group > 1:
        neighbour = np.roll(table, -1, axis=1).ravel()
        steps.append(_equal(hosts, neighbour, inside, 2 * (group - 1), "inside groups"))
    across = np.roll(table, -1, axis=0).ravel()
    steps.append(_equal(hosts, across, _share(inside, n // group), 2 * (n // group - 1), "across groups"))
    return steps


def pipeline(hosts: np.ndarray, bytes: int, stages: int = 2) -> list[Step]:
    """Pipeline send: rank i of every stage but the last sends S bytes to rank i of the next stage, at once."""
    n = hosts.size
    if isinstance(stages, bool) or not isinstance(stages, (int, np.integer)) or stages < 2 or n % stages:
        raise InputError("stages", stages, f"a divisor of the number of ranks ({n}), at least 2")
    width = n // stages
    return [_equal(hosts[:-width], hosts[width:], bytes, 1, "to the next stage")]


def chain(hosts: np.ndarray, bytes: int) -> list[Step]:
    """Broadcast or reduce along a chain, pipelined over chunks: every rank but the last sends S to the next."""
    return [_equal(hosts[:-1], hosts[1:], bytes, 1, "chain")]


def moe(
    hosts: np.ndarray,
    bytes: int,
    traffic: np.ndarray | None = None,
    zipf: float = 1.0,
    rng: np.random.Generator | None = None,
) -> list[Step]:
    """Mixture-of-experts dispatch and combine.

    Args:
        hosts: host of each rank; each holds one expert.
        bytes: bytes that each rank dispatches in total, where ``traffic`` isn't given.
        traffic: bytes from rank i to the expert of rank j, shape (n, n); zeros and the diagonal send nothing.
        zipf: exponent of the experts' popularity, in an order that ``rng`` draws.
        rng: for the order of popularity.
    """
    n = hosts.size
    if traffic is None:
        if not np.isfinite(zipf) or zipf < 0:
            raise InputError("zipf", zipf, "a number of at least 0")
        weight = np.arange(1, n + 1) ** -float(zipf)
        if rng is not None:
            weight = rng.permutation(weight)
        traffic = np.broadcast_to(np.maximum(np.rint(bytes * weight / weight.sum()), 1), (n, n))
    traffic = np.asarray(traffic)
    if traffic.shape != (n, n):
        raise InputError("traffic", f"array of shape {traffic.shape}", f"an array of {n} x {n} bytes")
    if traffic.dtype.kind not in "iuf" or not np.isfinite(traffic).all() or (traffic < 0).any():
        raise InputError("traffic", traffic.ravel()[:3].tolist(), "an array of bytes, at least 0")
    i, j = np.nonzero(traffic * ~np.eye(n, dtype=bool))
    if i.size == 0:
        raise InputError("traffic", "nothing off the diagonal", "a matrix with bytes between different ranks")
    size = np.rint(traffic[i, j])
    return [
        Step(hosts[i], hosts[j], size, 1, "dispatch to experts"),
        Step(hosts[j], hosts[i], size, 1, "combine"),
    ]


COLLECTIVES: dict[str, Callable[..., list[Step]]] = {
    "ring": ring,
    "all_reduce": ring,
    "reduce_scatter": lambda hosts, bytes: ring(hosts, bytes, passes=1),
    "all_gather": lambda hosts, bytes: ring(hosts, bytes, passes=1),
    "halving_doubling": halving_doubling,
    "recursive_doubling": recursive_doubling,
    "double_binary_tree": double_binary_tree,
    "all_to_all": all_to_all,
    "hierarchical": hierarchical,
    "pipeline": pipeline,
    "broadcast": chain,
    "reduce": chain,
    "moe": moe,
}


def collective(name: str, hosts: np.ndarray | Sequence[int], bytes: int | str, **options: Any) -> list[Step]:
    """The steps of a collective.

    Args:
        name: one of :data:`COLLECTIVES` (dashes may stand for underscores).
        hosts: host of each rank (see :func:`place`).
        bytes: message S per rank, a whole number or text like ``64MB`` or ``16MiB``.
        **options: what the collective's function takes beside: ``form`` of ``all_to_all``, ``group`` of
            ``hierarchical``, ``stages`` of ``pipeline``, ``traffic``, ``zipf`` and ``rng`` of ``moe``.

    Returns:
        list[Step]: what runs one after the other.

    Raises:
        InputError: an unknown name or option, fewer than 2 ranks, a host that has two ranks, or what the
            collective refuses.
    """
    key = str(name).replace("-", "_")
    if key not in COLLECTIVES:
        raise InputError("collective", name, nearest(key, COLLECTIVES))
    hosts = np.asarray(hosts)
    if hosts.ndim != 1 or hosts.size < 2 or np.unique(hosts).size != hosts.size:
        raise InputError("ranks", hosts.tolist()[:8], "at least 2 ranks, each on its own host")
    size = parse_bytes(bytes)
    allowed = _options(key)
    for option in options:
        if option not in allowed:
            raise InputError(f"option of {key}", option, nearest(option, allowed) if allowed else "left out")
    return COLLECTIVES[key](hosts, size, **options)


def parse_bytes(value: int | str) -> int:
    """Whole bytes from a number or from text like ``64MB``, ``16MiB`` or ``1e6``.

    Raises:
        InputError: not a positive size.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1000**power, f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", str(value).lower())
    try:
        size = float(match[1]) * units[match[2]] if match and not isinstance(value, bool) else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 1 <= size <= 2**50:
        raise InputError("bytes", value, "a size from 1 byte to 1 PiB, such as 67108864, '64MB' or '64MiB'")
    return round(size)


def _equal(src: np.ndarray, dst: np.ndarray, size: int, repeat: int, name: str) -> Step:
    """A step of flows of ``size`` bytes each."""
    return Step(src, dst, np.full(src.size, size), repeat, name)


def _options(key: str) -> tuple[str, ...]:
    return {
        "all_to_all": ("form",),
        "hierarchical": ("group",),
        "pipeline": ("stages",),
        "moe": ("traffic", "zipf", "rng"),
    }.get(key, ())


def _share(total: int, parts: int) -> int:
    """Bytes of one of ``parts`` equal chunks, the last one padded."""
    return -(-int(total) // int(parts))


def _power_of_two(hosts: np.ndarray, name: str) -> int:
    n = int(hosts.size)
    if n & (n - 1):
        raise InputError("ranks", n, f"a power of two for {name}")
    return n


def _in_order_tree(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(child, parent) edges of the in-order binary tree on ranks 0..n-1, in which even ranks are leaves.

    Counted from 1, the root of the positions lo..hi is the one with the most trailing zero bits; its
    children are the roots of the two sides. Odd positions (even ranks) are roots of themselves only.
    """
    edges, stack = [], [(1, n, 0)]
    while stack:
        low, high, parent = stack.pop()
        if low > high:
            continue
        bit = ((low - 1) ^ high).bit_length() - 1
        root = high >> bit << bit
        if parent:
            edges.append((root - 1, parent - 1))
        stack += [(low, root - 1, root), (root + 1, high, root)]
    child, parent_of = np.array(edges).T
    return child, parent_of
