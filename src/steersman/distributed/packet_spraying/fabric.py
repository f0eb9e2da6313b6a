r"""Leaf-spine fabrics: :math:`\ell` leaves, :math:`s` spines, one link from every leaf to every spine.

An inter-leaf flow from host :math:`i` on leaf :math:`a` to host :math:`j` on leaf :math:`b` chooses one spine
:math:`k`; it loads the host link of :math:`i`, the uplink :math:`(a, k)`, the downlink :math:`(k, b)` and the
host link of :math:`j`. A flow inside a leaf loads the two host links only. Capacities are kept per direction
and per link, so failed links (capacity 0) and unequal ones are the same kind of thing.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from steersman.errors import InputError, MissingExtra, nearest

LATENCY = 500e-9
"""Seconds per link: the fixed delay of a hop."""

_TEXT = "leaf-spine:leaves=16,spines=16,hosts=16,uplink=400,nic=400"
_KEYS = ("leaves", "spines", "hosts", "uplink", "nic", "latency", "failed", "links")


@dataclass(frozen=True, eq=False)
class LeafSpine:
    """A two-tier leaf-spine fabric.

    Args:
        leaves: number of leaves, at least 1.
        spines: number of spines, at least 1.
        hosts: hosts of each leaf (a number), or the leaf of each host (a sequence of leaf indices).
        uplink: capacity of leaf-spine links in Gb/s, each way: a number, or an array of shape
            (leaves, spines) in which 0 stands for a link that is missing or failed.
        nic: capacity of host links in Gb/s, each way: a number, or one for each host.
        latency: seconds for each link of a path, at least 0.
        failed: ``(leaf, spine)`` pairs whose link is down in both directions.
        host_names, leaf_names, spine_names: names in exports; default ``host0``, ``leaf0``, ``spine0``, ...
        addresses: IPv4 address of each host, for the hash of the flow table; default 10.0.0.1 and up.

    Raises:
        InputError: a count below 1, a capacity that isn't positive, a failed link that doesn't exist, or
            links so that two leaves with hosts share no working spine.
    """

    leaves: int = 16
    spines: int = 16
    hosts: int | Sequence[int] | np.ndarray = 16
    uplink: float | Sequence[Sequence[float]] | np.ndarray = 400.0
    nic: float | Sequence[float] | np.ndarray = 400.0
    latency: float = LATENCY
    failed: tuple[tuple[int, int], ...] = ()
    host_names: tuple[str, ...] = ()
    leaf_names: tuple[str, ...] = ()
    spine_names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    host_leaf: np.ndarray = field(init=False, repr=False)
    """Leaf of each host, shape (hosts,)."""
    capacity: np.ndarray = field(init=False, repr=False)
    """Gb/s of each leaf-spine link, each way, shape (leaves, spines); 0: no working link."""
    nic_capacity: np.ndarray = field(init=False, repr=False)
    """Gb/s of each host link, each way, shape (hosts,)."""

    def __post_init__(self) -> None:
        for name in ("leaves", "spines"):
            _count(name, getattr(self, name))
        if isinstance(self.hosts, (int, np.integer)) and not isinstance(self.hosts, bool):
            _count("hosts", self.hosts)
            host_leaf = np.repeat(np.arange(self.leaves), int(self.hosts))
        else:
            host_leaf = np.asarray(self.hosts)
            if host_leaf.ndim != 1 or host_leaf.size == 0 or host_leaf.dtype.kind not in "iu":
                raise InputError("hosts", self.hosts, "a whole number of at least 1, or the leaf of each host")
            if host_leaf.min() < 0 or host_leaf.max() >= self.leaves:
                raise InputError("hosts", self.hosts, f"leaf indices from 0 to {self.leaves - 1}")
        capacity = _capacities("uplink", self.uplink, (self.leaves, self.spines), zero=True)
        nic = _capacities("nic", self.nic, (host_leaf.size,), zero=False)
        for pair in self.failed:
            if len(tuple(pair)) != 2 or not (0 <= pair[0] < self.leaves and 0 <= pair[1] < self.spines):
                allowed = f"pairs (leaf, spine) with leaf below {self.leaves} and spine below {self.spines}"
                raise InputError("failed", pair, allowed)
            capacity[pair[0], pair[1]] = 0.0
        if not (isinstance(self.latency, (int, float)) and math.isfinite(self.latency) and self.latency >= 0):
            raise InputError("latency", self.latency, "a number of seconds, at least 0")
        for name, count, stem in (
            ("host_names", host_leaf.size, "host"),
            ("leaf_names", self.leaves, "leaf"),
            ("spine_names", self.spines, "spine"),
        ):
            names = tuple(getattr(self, name)) or tuple(f"{stem}{i}" for i in range(count))
            if len(names) != count or len(set(names)) != count:
                raise InputError(name, names, f"{count} names that all differ")
            object.__setattr__(self, name, names)
        if self.addresses and len(self.addresses) != host_leaf.size:
            raise InputError("addresses", self.addresses, f"one address for each of {host_leaf.size} hosts")
        object.__setattr__(self, "host_leaf", host_leaf.astype(np.int64))
        object.__setattr__(self, "capacity", capacity)
        object.__setattr__(self, "nic_capacity", nic)
        self._check_connected()

    def _check_connected(self) -> None:
        used = np.unique(self.host_leaf)
        if used.size < 2:
            return
        live = self.capacity[used] > 0
        shared = live.astype(np.int64) @ live.T.astype(np.int64)
        np.fill_diagonal(shared, 1)
        if (shared == 0).any():
            a, b = (int(used[i]) for i in np.argwhere(shared == 0)[0])
            down = [
                f"{self.leaf_names[i]}-{self.spine_names[k]}"
                for i in sorted({a, b})
                for k in np.flatnonzero(self.capacity[i] == 0)
            ]
            allowed = (
                f"links that leave a working spine between every two leaves with hosts "
                f"({self.leaf_names[a]} and {self.leaf_names[b]} share none)"
            )
            raise InputError("failed", ", ".join(down), allowed)

    @property
    def n_hosts(self) -> int:
        """Number of hosts."""
        return int(self.host_leaf.size)

    @cached_property
    def uniform(self) -> bool:
        """Whether all leaf-spine links work and are equal, so that every uplink can stand for any other."""
        return bool((self.capacity == self.capacity.flat[0]).all())

    @cached_property
    def oversubscription(self) -> float:
        """Largest ratio, over the leaves, of host capacity to uplink capacity."""
        hosts = np.bincount(self.host_leaf, weights=self.nic_capacity, minlength=self.leaves)
        up = self.capacity.sum(axis=1)
        return float((hosts[hosts > 0] / np.maximum(up[hosts > 0], 1e-300)).max())

    def path_capacity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Gb/s of the path over each spine between leaves ``a`` and ``b``: shape (len(a), spines)."""
        return np.minimum(self.capacity[a], self.capacity[b])

    def with_failed(self, links: Iterable[tuple[int, int]]) -> LeafSpine:
        """The same fabric with more failed ``(leaf, spine)`` links."""
        return replace(self, failed=(*self.failed, *((a, k) for a, k in links)))

    def describe(self) -> dict[str, Any]:
        """Its figures as plain JSON."""
        live = self.capacity[self.capacity > 0]
        return {
            "leaves": self.leaves,
            "spines": self.spines,
            "hosts": self.n_hosts,
            "uplink_gbps": [float(live.min()), float(live.max())] if live.size else [],
            "nic_gbps": [float(self.nic_capacity.min()), float(self.nic_capacity.max())],
            "oversubscription": self.oversubscription,
            "links_down": int((self.capacity == 0).sum()),
            "latency_s_per_link": self.latency,
        }

    # ------------------------------------------------------------- reading

    @classmethod
    def load(cls, source: str | Path) -> LeafSpine:
        """A fabric from a YAML, CSV or GraphML file, or from text like ``leaf-spine:leaves=4,spines=4,hosts=8``.

        YAML has either the arguments of this class (``leaves: 16``, ``uplink: 400``, ``failed: [[0, 3]]``),
        or ``links`` (``{leaf, spine, gbps}`` each) and ``hosts`` (``{host, leaf, gbps, address}`` each).
        CSV has the columns ``host, leaf, spine, gbps`` (``address`` if wanted): a line with a spine is a
        leaf-spine link, a line with a host is a host's link. In GraphML, nodes carry ``role`` (host, leaf or
        spine) and edges ``gbps``.

        Raises:
            InputError: the file doesn't describe a leaf-spine fabric; the sentence says what is wrong.
        """
        text = str(source)
        if text == "leaf-spine" or text.startswith("leaf-spine:"):
            return cls._from_text(text)
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in _READERS)
            if len(found) != 1:
                raise InputError("topology", text, f"a file, or a folder with one of {', '.join(_READERS)}")
            path = found[0]
        if not path.is_file():
            raise InputError("topology", text, f"a file that exists, or text like {_TEXT!r}")
        if path.suffix.lower() not in _READERS:
            raise InputError("topology", text, f"a file that ends in {', '.join(_READERS)}")
        try:
            return _READERS[path.suffix.lower()](cls, path)
        except UnicodeDecodeError:
            raise InputError("topology", text, "a text file in UTF-8") from None

    @classmethod
    def _from_text(cls, text: str) -> LeafSpine:
        values: dict[str, Any] = {}
        for pair in filter(None, text.partition(":")[2].split(",")):
            key, equals, value = (word.strip() for word in pair.partition("="))
            if not equals:
                raise InputError("topology", text, f"text like {_TEXT!r}")
            if key == "failed":  # failed=0-3;1-2
                values[key] = parse_links(value)
            else:
                values[key] = _number(key, value)
        return cls._from_counts(values)

    @classmethod
    def _from_counts(cls, values: Mapping[str, Any]) -> LeafSpine:
        known = [k for k in _KEYS if k != "links"]
        for key in values:
            if key not in known:
                raise InputError("topology key", key, nearest(str(key), known))
        given = dict(values)
        for key in ("leaves", "spines", "hosts"):
            if key in given and isinstance(given[key], float) and given[key].is_integer():
                given[key] = int(given[key])
        if "failed" in given:
            links = given["failed"]
            if not isinstance(links, Sequence) or not all(
                isinstance(p, Sequence) and len(p) == 2 and all(isinstance(i, int) for i in p) for p in links
            ):
                raise InputError("failed", links, "a list of [leaf, spine] pairs of indices")
            given["failed"] = tuple((p[0], p[1]) for p in links)
        return cls(**given)

    @classmethod
    def from_links(
        cls,
        links: Iterable[tuple[str, str, float]],
        hosts: Iterable[tuple[str, str, float, str]],
        latency: float = LATENCY,
        failed: Iterable[tuple[str, str]] = (),
    ) -> LeafSpine:
        """A fabric from named links.

        Args:
            links: ``(leaf, spine, gbps)``; parallel links of the same pair add up.
            hosts: ``(host, leaf, gbps, address)``; the address may be empty.
            latency: seconds for each link.
            failed: ``(leaf, spine)`` names of links that are down.

        Raises:
            InputError: no link, no host, a host on two leaves, a switch that is leaf and spine, or whatever
                the class refuses.
        """
        links, hosts, failed = list(links), list(hosts), list(failed)
        if not links or len({spine for _, spine, _ in links}) == 0:
            raise InputError("topology", "no leaf-spine links", "a fabric with at least one spine")
        if not hosts:
            raise InputError("topology", "no hosts", "a fabric with at least one host")
        leaf_names = list(dict.fromkeys([leaf for leaf, _, _ in links] + [leaf for _, leaf, _, _ in hosts]))
        spine_names = list(dict.fromkeys(spine for _, spine, _ in links))
        both = set(leaf_names) & set(spine_names)
        if both:
            allowed = "a leaf or a spine, not both: only two-tier leaf-spine fabrics can be planned"
            raise InputError("switch", sorted(both)[0], allowed)
        leaf_of = {name: i for i, name in enumerate(leaf_names)}
        spine_of = {name: i for i, name in enumerate(spine_names)}
        capacity = np.zeros((len(leaf_names), len(spine_names)))
        for leaf, spine, gbps in links:
            if not (isinstance(gbps, (int, float)) and math.isfinite(gbps) and gbps > 0):
                raise InputError(f"gbps of link {leaf}-{spine}", gbps, "a positive number")
            capacity[leaf_of[leaf], spine_of[spine]] += gbps
        seen: dict[str, str] = {}
        for host, leaf, _, _ in hosts:
            if host in seen:
                where = f"on one leaf only (it is listed on {seen[host]} and on {leaf})"
                raise InputError("host", host, where if seen[host] != leaf else "listed once")
            seen[host] = leaf
        unknown = [pair for pair in failed if pair[0] not in leaf_of or pair[1] not in spine_of]
        if unknown:
            raise InputError("failed", unknown[0], "a (leaf, spine) pair of names from the links")
        addresses = [address for _, _, _, address in hosts]
        return cls(
            leaves=len(leaf_names),
            spines=len(spine_names),
            hosts=[leaf_of[leaf] for _, leaf, _, _ in hosts],
            uplink=capacity,
            nic=[gbps for _, _, gbps, _ in hosts],
            latency=latency,
            failed=tuple((leaf_of[a], spine_of[b]) for a, b in failed),
            host_names=tuple(seen),
            leaf_names=tuple(leaf_names),
            spine_names=tuple(spine_names),
            addresses=tuple(addresses) if all(addresses) else (),
        )

    def to_networkx(self) -> Any:
        """The fabric as a ``networkx.Graph`` with ``role`` on nodes and ``gbps`` on edges."""
        graph = _networkx().Graph()
        graph.add_nodes_from(self.leaf_names, role="leaf")
        graph.add_nodes_from(self.spine_names, role="spine")
        for i, name in enumerate(self.host_names):
            graph.add_node(name, role="host")
            graph.add_edge(name, self.leaf_names[self.host_leaf[i]], gbps=float(self.nic_capacity[i]))
        for a, k in np.argwhere(self.capacity > 0):
            graph.add_edge(self.leaf_names[a], self.spine_names[k], gbps=float(self.capacity[a, k]))
        return graph

    @classmethod
    def from_networkx(cls, graph: Any, latency: float = LATENCY) -> LeafSpine:
        """The fabric in a ``networkx.Graph`` whose nodes carry ``role`` and whose edges carry ``gbps``.

        Raises:
            InputError: a node without a role, or an edge other than host-leaf and leaf-spine.
        """
        role = {}
        for node, values in graph.nodes(data=True):
            role[node] = values.get("role")
            if role[node] not in ("host", "leaf", "spine"):
                raise InputError(f"role of node {node}", role[node], "host, leaf or spine")
        links, hosts = [], []
        for u, v, values in graph.edges(data=True):
            a, b = sorted((u, v), key=lambda node: ("host", "leaf", "spine").index(role[node]))
            gbps = _number(f"gbps of link {a}-{b}", values.get("gbps"))
            if (role[a], role[b]) == ("leaf", "spine"):
                links.append((str(a), str(b), gbps))
            elif (role[a], role[b]) == ("host", "leaf"):
                hosts.append((str(a), str(b), gbps, str(graph.nodes[a].get("address", ""))))
            else:
                allowed = "host-leaf or leaf-spine: only two-tier leaf-spine fabrics can be planned"
                raise InputError("link", f"{role[a]} {a} - {role[b]} {b}", allowed)
        return cls.from_links(links, hosts, latency)


def parse_links(text: str) -> tuple[tuple[int, int], ...]:
    """Pairs from text like ``0-3;1-2`` (leaf-spine indices; commas separate as well).

    Raises:
        InputError: anything else.
    """
    pairs = []
    for piece in filter(None, re.split(r"[;,\s]+", text.strip())):
        match = re.fullmatch(r"(\d+)-(\d+)", piece)
        if not match:
            raise InputError("failed", text, "leaf-spine pairs of indices like '0-3;1-2'")
        pairs.append((int(match[1]), int(match[2])))
    return tuple(pairs)


def _read_yaml(cls: type[LeafSpine], path: Path) -> LeafSpine:
    values = read_yaml(path, "topology")
    if not isinstance(values, Mapping):
        raise InputError("topology", str(path), "YAML with leaves, spines and hosts, or links and hosts")
    if "links" not in values:
        return cls._from_counts(values)
    for key in values:
        if key not in ("links", "hosts", "latency", "failed"):
            raise InputError("topology key", key, nearest(str(key), ("links", "hosts", "latency", "failed")))
    links = [_entry("links", row, ("leaf", "spine", "gbps")) for row in values["links"] or []]
    hosts = [_entry("hosts", row, ("host", "leaf", "gbps")) for row in values.get("hosts") or []]
    failed = values.get("failed") or ()
    if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in failed):
        raise InputError("failed", failed, "a list of [leaf, spine] pairs of names")
    return cls.from_links(
        [(str(r["leaf"]), str(r["spine"]), _number("gbps", r["gbps"])) for r in links],
        [(str(r["host"]), str(r["leaf"]), _number("gbps", r["gbps"]), str(r.get("address", ""))) for r in hosts],
        _number("latency", values.get("latency", LATENCY)),
        [(str(a), str(b)) for a, b in failed],
    )


def _read_csv(cls: type[LeafSpine], path: Path) -> LeafSpine:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = [c.strip().lower() for c in reader.fieldnames or ()]
        reader.fieldnames = columns
        missing = [c for c in ("host", "leaf", "spine", "gbps") if c not in columns]
        if missing:
            raise InputError("topology", str(path), f"CSV with the columns host, leaf, spine, gbps (no {missing[0]})")
        links, hosts = [], []
        for number, row in enumerate(reader, start=2):
            cell = {k: (v or "").strip() for k, v in row.items() if k is not None and isinstance(v, str)}
            if not any(cell.values()):
                continue
            where = f"line {number} of {path.name}"
            if not cell.get("leaf") or bool(cell.get("host")) == bool(cell.get("spine")):
                raise InputError(where, ",".join(cell.values()), "a leaf with either a spine or a host")
            gbps = _number(f"gbps in {where}", cell.get("gbps"))
            if cell.get("spine"):
                links.append((cell["leaf"], cell["spine"], gbps))
            else:
                hosts.append((cell["host"], cell["leaf"], gbps, cell.get("address", "")))
    return cls.from_links(links, hosts)


def _read_graphml(cls: type[LeafSpine], path: Path) -> LeafSpine:
    try:
        graph = _networkx().read_graphml(path)
    except (ValueError, KeyError, SyntaxError) as error:
        raise InputError("topology", str(path), f"GraphML that networkx can read ({error})") from None
    return cls.from_networkx(graph)


_READERS = {".yaml": _read_yaml, ".yml": _read_yaml, ".csv": _read_csv, ".graphml": _read_graphml}


def read_yaml(path: Path, parameter: str) -> Any:
    """The content of a YAML (or JSON) file.

    Raises:
        InputError: it isn't valid; the sentence says where.
        MissingExtra: PyYAML is not installed.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("reading YAML", "distributed") from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "its content"
        raise InputError(parameter, str(path), f"valid YAML (error at {where})") from None


def _networkx() -> Any:
    try:
        import networkx
    except ModuleNotFoundError as error:
        raise MissingExtra("fabrics as graphs", "distributed") from error
    return networkx


def _entry(section: str, row: Any, keys: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(row, Mapping) or any(key not in row for key in keys):
        raise InputError(f"entry of {section}", row, f"a mapping with {', '.join(keys)}")
    return row


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise InputError(name, value, "a number")
    return number


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(name, value, "a whole number of at least 1")


def _capacities(name: str, value: Any, shape: tuple[int, ...], *, zero: bool) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full((), np.nan)
    if array.shape not in ((), shape):
        size = " x ".join(map(str, shape))
        raise InputError(name, f"array of shape {array.shape}", f"a number, or an array of {size} numbers in Gb/s")
    low_ok = array.ndim > 0 and zero
    if not np.isfinite(array).all() or (array < 0).any() or (not low_ok and (array == 0).any()):
        bad = array[~np.isfinite(array) | (array <= 0)]
        raise InputError(name, float(bad.flat[0]), "a positive number of Gb/s")
    return np.array(np.broadcast_to(array, shape))
