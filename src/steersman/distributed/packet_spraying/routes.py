r"""Flow tables: which piece of which flow goes over which spine, and how a host can make it go there.

Where a leaf picks the spine by a hash of the 5-tuple, a sender picks it through the UDP source port of its RoCEv2
queue pair (``mlx5dv_modify_qp_udp_sport`` and its kin). Given the hash, :func:`source_ports` finds ports that
reach the planned spines. The hashes here are affine over GF(2): the hash of a 5-tuple is that of its addresses
xor that of its port, so that one table of 16384 ports serves all flows.
"""

from __future__ import annotations

import binascii
import csv
import ipaddress
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steersman.distributed.packet_spraying.collectives import Step
from steersman.distributed.packet_spraying.fabric import LeafSpine
from steersman.distributed.packet_spraying.load import Assignment
from steersman.errors import InputError, nearest

PORTS = range(49152, 65536)
"""UDP source ports of RoCEv2."""
ROCE = 4791
"""UDP destination port of RoCEv2."""


def _xor16(data: bytes) -> int:
    words = struct.unpack(f">{len(data) // 2}H", data)
    value = 0
    for word in words:
        value ^= word
    return value


HASHES: dict[str, Callable[[bytes], int]] = {
    "crc32": zlib.crc32,
    "crc16": lambda data: binascii.crc_hqx(data, 0),
    "xor": _xor16,
}
"""Hashes of the 5-tuple: CRC-32 (IEEE 802.3), CRC-16 (CCITT, initial value 0), xor of the 16-bit words."""

COLUMNS = ("step", "src", "dst", "piece", "pieces", "bytes", "spine")


def five_tuple(source: str, target: str, port: int) -> bytes:
    """Addresses, protocol 17 (UDP, padded to 16 bits) and ports in network order, 14 bytes."""
    packed = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(target).packed
    return packed + struct.pack(">HHH", 17, port, ROCE)


def spine_of(fabric: LeafSpine, source: int, target: int, port: int, hash: str) -> int:
    """The spine that a leaf picks: the working spines of the leaf pair, indexed by hash modulo their number."""
    known = addresses(fabric)
    value = _hash_named(hash)(five_tuple(known[source], known[target], port))
    a, b = fabric.host_leaf[[source, target]]
    live = np.flatnonzero(fabric.path_capacity(a[None], b[None])[0] > 0)
    return int(live[value % live.size])


def addresses(fabric: LeafSpine) -> Sequence[str]:
    """The hosts' addresses, 10.0.0.1 and up where the fabric gives none.

    Raises:
        InputError: an address that isn't IPv4.
    """
    if not fabric.addresses:
        return [str(ipaddress.IPv4Address(0x0A000001 + i)) for i in range(fabric.n_hosts)]
    for address in fabric.addresses:
        try:
            ipaddress.IPv4Address(address)
        except ValueError:
            raise InputError("address", address, "an IPv4 address") from None
    return fabric.addresses


def source_ports(fabric: LeafSpine, step: Step, plan: Assignment, hash: str = "crc32") -> np.ndarray:
    """A UDP source port for every piece such that the hash sends it over its spine.

    Pieces of one flow that share a spine get different ports.

    Returns:
        numpy.ndarray: ports, shape (pieces,); 0 where there is no spine or none of the ports reaches it.

    Raises:
        InputError: an unknown hash.
    """
    function = _hash_named(hash)
    ip = [ipaddress.IPv4Address(a).packed for a in addresses(fabric)]
    zero = struct.pack(">HHH", 17, 0, ROCE)
    base = function(bytes(8) + zero)
    # Affine: h(x ^ y) = h(x) ^ h(y) ^ h(0) with the constant fields in h(0).
    from_source = np.array([function(p + bytes(4) + zero) ^ base for p in ip], dtype=np.uint64)
    from_target = np.array([function(bytes(4) + p + zero) ^ base for p in ip], dtype=np.uint64)
    from_port = np.array([function(bytes(8) + struct.pack(">HHH", 17, p, ROCE)) for p in PORTS], dtype=np.uint64)
    ports = np.zeros(len(plan), dtype=np.int64)
    todo = np.flatnonzero(plan.spine >= 0)
    src, dst = step.src[plan.flow[todo]], step.dst[plan.flow[todo]]
    host_hash = from_source[src] ^ from_target[dst]
    capacity = fabric.capacity
    a, b = fabric.host_leaf[src], fabric.host_leaf[dst]
    live = (capacity[a] > 0) & (capacity[b] > 0)
    want = live.cumsum(axis=1)[np.arange(todo.size), plan.spine[todo]] - 1
    count = live.sum(axis=1).astype(np.uint64)
    # The j-th piece of a flow on one spine takes the j-th port that fits.
    key = plan.flow[todo] * fabric.spines + plan.spine[todo]
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    skip = np.empty(todo.size, dtype=np.int64)
    skip[order] = np.arange(todo.size) - np.repeat(first, np.diff(first, append=todo.size))
    for port, port_hash in zip(PORTS, from_port, strict=True):
        if todo.size == 0:
            break
        hit = ((host_hash ^ port_hash) % count).astype(np.int64) == want
        done = hit & (skip == 0)
        ports[todo[done]] = port
        skip = skip - hit
        keep = ~done
        todo, host_hash, count, want, skip = todo[keep], host_hash[keep], count[keep], want[keep], skip[keep]
    return ports


def _hash_named(name: str) -> Callable[[bytes], int]:
    if name not in HASHES:
        raise InputError("hash", name, nearest(str(name), HASHES))
    return HASHES[name]


# ------------------------------------------------------------------ tables


def columns(
    fabric: LeafSpine, job: Sequence[Step], plans: Sequence[Assignment], *, hash: str | None = None
) -> dict[str, list[Any]]:
    """The flow table: :data:`COLUMNS`, then ``udp_source_port`` where a hash is given.

    The spine is empty for flows inside a leaf and ``all`` for sprayed ones.
    """
    spines = [*fabric.spine_names, "all", ""]  # indexed by spine, SPREAD (-2) and LOCAL (-1)
    table: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    if hash is not None:
        table["udp_source_port"] = []
    for number, (step, plan) in enumerate(zip(job, plans, strict=True)):
        per_flow = plan.pieces_per_flow(len(step))
        piece = np.arange(len(plan)) - np.repeat(np.cumsum(per_flow) - per_flow, per_flow)
        table["step"] += [number] * len(plan)
        table["src"] += [fabric.host_names[i] for i in step.src[plan.flow].tolist()]
        table["dst"] += [fabric.host_names[i] for i in step.dst[plan.flow].tolist()]
        table["piece"] += piece.tolist()
        table["pieces"] += per_flow[plan.flow].tolist()
        table["bytes"] += plan.bytes.tolist()
        table["spine"] += [spines[k] for k in plan.spine.tolist()]
        if hash is not None:
            table["udp_source_port"] += [port or "" for port in source_ports(fabric, step, plan, hash).tolist()]
    return table


def write_table(
    fabric: LeafSpine, job: Sequence[Step], plans: Sequence[Assignment], folder: Path, *, hash: str | None = None
) -> dict[str, int]:
    """Write ``flows.csv`` and ``flows.json`` (one array a column, and the steps) into ``folder``.

    Returns:
        dict: numbers of ``rows`` and, where a hash is given, of ``ports_missing``.
    """
    table = columns(fabric, job, plans, hash=hash)
    with (folder / "flows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    steps = [{"name": step.name, "repeat": step.repeat, "flows": len(step)} for step in job]
    # dumps, not dump: the encoder in C takes the whole of it at once.
    text = json.dumps({"hash": hash, "steps": steps, "columns": table})
    (folder / "flows.json").write_text(text, encoding="utf-8")
    report = {"rows": len(table["step"])}
    if hash is not None:
        pairs = zip(table["spine"], table["udp_source_port"], strict=True)
        report["ports_missing"] = sum(port == "" and spine not in ("", "all") for spine, port in pairs)
    return report


def nccl_settings(job: Sequence[Step], plans: Sequence[Assignment]) -> dict[str, Any]:
    """What NCCL can do of a plan with its own settings: even splits over several queue pairs.

    Returns:
        dict: ``environment`` (variables to set), ``even`` (whether all pieces of every flow are equal, so that
        NCCL's split is the planned one), ``most_pieces`` and ``advice`` (one sentence).
    """
    most, even = 1, True
    for step, plan in zip(job, plans, strict=True):
        per_flow = plan.pieces_per_flow(len(step))
        most = max(most, int(per_flow.max()))
        share = step.bytes[plan.flow] / per_flow[plan.flow]
        even = even and bool((np.abs(plan.bytes - share) <= 1).all())
    environment = {"NCCL_IB_QPS_PER_CONNECTION": most, "NCCL_IB_SPLIT_DATA_ON_QPS": int(most > 1)}
    if most == 1:
        advice = "One queue pair per connection is enough; each needs its source port from the flow table."
    elif even:
        advice = f"NCCL splits evenly over {most} queue pairs; each needs its source port from the flow table."
    else:
        advice = (
            f"The plan's pieces are unequal (up to {most} per flow), while NCCL splits evenly: "
            "use policy plan-equal, or a transport that sizes its own pieces."
        )
    return {"environment": environment, "even": even, "most_pieces": most, "advice": advice}
