r"""Jobs from files: collectives in YAML, a torch profiler (Kineto) trace, or an NCCL debug log.

A job file has ``collectives``, what runs one after the other, and may place the ranks::

    ranks: 256                # default: one on every host
    placement: packed         # packed, strided or random
    collectives:
      - {op: all_reduce, bytes: 64MB, count: 10}                    # on all ranks
      - {op: all_to_all, bytes: 16MB, form: permutation}
      - {op: all_gather, bytes: 8MB, group_size: 8}                 # groups of 8 neighbours, at once
      - {op: ring, bytes: 1MB, ranks: [0, 1, 2, 3]}                 # these ranks only
      - {op: moe, traffic: traffic.csv}                             # a square matrix of bytes

A trace is what one rank saw. Groups other than its own are taken to run the same collective at the same time
where its group is an arithmetic progression of ranks (tensor-, data- and pipeline-parallel meshes are).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steersman.distributed.packet_spraying.collectives import COLLECTIVES, Step, collective, parse_bytes, place
from steersman.distributed.packet_spraying.fabric import LeafSpine, read_yaml
from steersman.errors import InputError, nearest

ALL_REDUCE = ("ring", "halving_doubling", "recursive_doubling", "double_binary_tree")
"""Algorithms that may stand for an all-reduce."""

_JOB_KEYS = ("ranks", "placement", "collectives")
_CALL_KEYS = ("op", "bytes", "count", "ranks", "group_size", "form", "group", "stages", "traffic", "zipf")
_DTYPES = {
    **dict.fromkeys(("byte", "char", "bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("half", "bfloat16", "short", "c10::half", "c10::bfloat16"), 2),
    **dict.fromkeys(("float", "int"), 4),
    **dict.fromkeys(("double", "long", "long int", "complexfloat"), 8),
}
_NCCL_BYTES = (1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1)
"""Bytes of ncclDataType_t: int8, uint8, int32, uint32, int64, uint64, half, float, double, bfloat16, fp8 twice."""


@dataclass(frozen=True)
class Call:
    """One collective of a job, ``count`` times.

    Args:
        op: a name in :data:`COLLECTIVES`, or ``sends`` (with ``flows``).
        bytes: message S per rank.
        groups: ranks of each group that runs it at the same time; None: one group of all ranks.
        count: how many times.
        options: of the collective.
        flows: (source rank, target rank, bytes) of ``sends``.
    """

    op: str
    bytes: int = 0
    groups: tuple[tuple[int, ...], ...] | None = None
    count: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    flows: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Job:
    """Collectives that run one after the other.

    Args:
        calls: the collectives.
        ranks: how many ranks; 0: one on every host.
        placement: see :func:`place`.
        notes: what the reader of the file left out or took for granted.
    """

    calls: tuple[Call, ...]
    ranks: int = 0
    placement: str = "packed"
    notes: tuple[str, ...] = ()

    def steps(self, fabric: LeafSpine, all_reduce: str = "ring", rng: np.random.Generator | None = None) -> list[Step]:
        """The job on a fabric.

        Args:
            fabric: where its ranks run.
            all_reduce: the algorithm that stands for an all-reduce.
            rng: for random placements and expert popularity.

        Raises:
            InputError: more ranks than hosts, a rank that doesn't exist, or what a collective refuses.
        """
        if all_reduce not in ALL_REDUCE:
            raise InputError("all_reduce", all_reduce, nearest(str(all_reduce), ALL_REDUCE))
        hosts = place(fabric, self.ranks, self.placement, rng)
        steps = []
        for call in self.calls:
            for step in self._of(call, hosts, all_reduce, rng):
                repeat = step.repeat * call.count
                steps.append(Step(step.src, step.dst, step.bytes, repeat, f"{call.op} {step.name}".strip()))
        return steps

    @staticmethod
    def _of(call: Call, hosts: np.ndarray, all_reduce: str, rng: np.random.Generator | None) -> Iterable[Step]:
        def where(ranks: Sequence[int]) -> np.ndarray:
            index = np.asarray(ranks, dtype=np.int64)
            if index.size and (index.min() < 0 or index.max() >= hosts.size):
                raise InputError("rank", int(index.max()), f"below the number of ranks ({hosts.size})")
            return hosts[index]

        if call.op == "sends":
            src, dst, size = np.array(call.flows).T
            return [Step(where(src), where(dst), size)]
        name = all_reduce if call.op == "all_reduce" else call.op
        options = dict(call.options) | ({"rng": rng} if name == "moe" and rng is not None else {})
        groups = [hosts] if call.groups is None else [where(group) for group in call.groups]
        lists = [collective(name, group, call.bytes or 1, **options) for group in groups]
        return [
            Step(
                np.concatenate([s.src for s in together]),
                np.concatenate([s.dst for s in together]),
                np.concatenate([s.bytes for s in together]),
                together[0].repeat,
                together[0].name,
            )
            for together in zip(*lists, strict=True)
        ]


def load_job(path: str | Path) -> Job:
    """A job from a YAML file, a Kineto trace (``.json``, ``.json.gz``) or an NCCL log (anything else).

    Raises:
        InputError: no such file, or nothing in it that can be planned.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError("job", str(path), "a file that exists: YAML, a profiler trace or an NCCL log")
    if path.suffix.lower() in (".yaml", ".yml"):
        return _from_yaml(path)
    if path.name.lower().endswith((".json", ".json.gz")):
        return _from_kineto(path)
    return _from_nccl(path)


# ------------------------------------------------------------------ YAML


def _from_yaml(path: Path) -> Job:
    values = read_yaml(path, "job")
    if not isinstance(values, Mapping) or not isinstance(values.get("collectives"), Sequence):
        raise InputError("job", str(path), "YAML with a list of collectives")
    for key in values:
        if key not in _JOB_KEYS:
            raise InputError("job key", key, nearest(str(key), _JOB_KEYS))
    ranks = values.get("ranks", 0)
    calls = []
    for entry in values["collectives"]:
        if not isinstance(entry, Mapping) or "op" not in entry:
            raise InputError("entry of collectives", entry, "a mapping with op and bytes")
        for key in entry:
            if key not in _CALL_KEYS:
                raise InputError("key of a collective", key, nearest(str(key), _CALL_KEYS))
        op = str(entry["op"]).replace("-", "_")
        if op not in COLLECTIVES:
            raise InputError("op", entry["op"], nearest(op, COLLECTIVES))
        if "bytes" not in entry and "traffic" not in entry:
            raise InputError("bytes", None, f"given for {op}")
        count = entry.get("count", 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError("count", count, "a whole number of at least 1")
        options = {key: entry[key] for key in ("form", "group", "stages", "zipf") if key in entry}
        if "traffic" in entry:
            options["traffic"] = _matrix(path.parent / str(entry["traffic"]))
        size = parse_bytes(entry["bytes"]) if "bytes" in entry else 0
        calls.append(Call(op, size, _groups(entry, ranks), count, options))
    if not calls:
        raise InputError("collectives", [], "at least one collective")
    return Job(tuple(calls), ranks, str(values.get("placement", "packed")))


def _groups(entry: Mapping[str, Any], ranks: Any) -> tuple[tuple[int, ...], ...] | None:
    if "ranks" in entry:
        group = entry["ranks"]
        if not isinstance(group, Sequence) or not all(isinstance(r, int) for r in group):
            raise InputError("ranks", group, "a list of ranks")
        return (tuple(group),)
    if "group_size" in entry:
        size = entry["group_size"]
        if not isinstance(size, int) or size < 2 or not isinstance(ranks, int) or not ranks or ranks % size:
            raise InputError("group_size", size, f"a divisor of the job's ranks ({ranks}), at least 2")
        return tuple(tuple(range(first, first + size)) for first in range(0, ranks, size))
    return None


def _matrix(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError("traffic", str(path), "a CSV file that exists, a square matrix of bytes")
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise InputError("traffic", str(path), f"a square matrix of numbers ({error})") from None


# ------------------------------------------------------------------ traces


def operation(name: str) -> str | None:
    """The collective that a library's name for it stands for; None if it can't be planned."""
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    for pattern, op in (
        ("reducescatter", "reduce_scatter"),
        ("allreduce", "all_reduce"),
        ("allgather", "all_gather"),
        ("alltoall", "all_to_all"),
        ("broadcast", "broadcast"),
        ("send", "sends"),
    ):
        if pattern in key and "recv" not in key:
            return op
    return "reduce" if key.endswith("reduce") else None


def mesh_groups(ranks: Sequence[int], world: int) -> tuple[tuple[int, ...], ...]:
    """The groups that a process mesh forms beside ``ranks``: all its translations, if it is a progression.

    >>> mesh_groups([0, 2], 4)
    ((0, 2), (1, 3))
    """
    n = len(ranks)
    stride = ranks[1] - ranks[0] if n > 1 else 1
    block = stride * n
    if stride < 1 or list(ranks) != list(range(ranks[0], ranks[0] + block, stride)) or world % block:
        return (tuple(ranks),)
    starts = (first + offset for first in range(0, world, block) for offset in range(stride))
    return tuple(tuple(range(start, start + block, stride)) for start in starts)


def _from_kineto(path: Path) -> Job:
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8") as file:
                trace = json.load(file)
        else:
            trace = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, EOFError) as error:
        raise InputError("job", str(path), f"a JSON trace of the torch profiler ({error})") from None
    events = trace.get("traceEvents") if isinstance(trace, Mapping) else None
    if not isinstance(events, list):
        raise InputError("job", str(path), "a JSON trace of the torch profiler, with traceEvents")
    info = trace.get("distributedInfo") or {}
    told = [e for e in events if isinstance(e, Mapping) and "Collective name" in (e.get("args") or {})]
    # On a GPU both the call and its kernel carry the arguments: the kernels are what crossed the network.
    kernels = [e for e in told if e.get("cat") in ("kernel", "gpu_user_annotation")]
    told = kernels or told
    read = _with_arguments if told else _with_shapes
    chosen = told or [e for e in events if isinstance(e, Mapping) and str(e.get("name")).startswith("c10d::")]
    calls: list[Call] = []
    skipped: dict[str, int] = {}
    world = int(info.get("world_size") or 0)
    for event in sorted(chosen, key=lambda e: e.get("ts", 0)):
        call, name = read(event, info)
        world = max(world, *(r + 1 for g in (call.groups or ()) for r in g), 0) if call else world
        if call:
            calls.append(call)
        else:
            skipped[name] = skipped.get(name, 0) + 1
    if not calls:
        raise InputError("job", str(path), "a trace with collectives (profile with record_shapes=True)")
    notes = [f"left out: {count} x {name}" for name, count in sorted(skipped.items())]
    if not told:
        notes.append("the trace names no groups and no types of lists: all ranks, 4 bytes an element")
    spread = [_everywhere(call, world) for call in calls]
    if any(a.groups != b.groups for a, b in zip(calls, spread, strict=True)):
        notes.append("groups like the trace's own are taken to run the same collectives at the same time")
    return Job(_together(spread), world, notes=tuple(notes))


def _everywhere(call: Call, world: int) -> Call:
    if call.groups is None or call.op == "sends":
        return call
    groups = tuple(g for own in call.groups for g in mesh_groups(own, world))
    return Call(call.op, call.bytes, groups, call.count, call.options)


def _with_arguments(event: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[Call | None, str]:
    """A call from an event that carries the arguments of its collective."""
    arguments = event["args"]
    name = str(arguments["Collective name"])
    op = operation(name)
    sent = int(arguments.get("In msg nelems") or 0)
    received = int(arguments.get("Out msg nelems") or 0)
    size = _DTYPES.get(str(arguments.get("dtype", "float")).lower(), 4)
    group = _group(arguments, info)
    if op is None or max(sent, received) < 1:
        return None, name
    if op == "sends":
        target, source = arguments.get("Dst Rank"), arguments.get("Src Rank", info.get("rank", 0))
        if target is None:
            return None, name
        return Call("sends", flows=((int(source), int(target), sent * size),)), name
    elements = max(sent, received) if op in ("all_gather", "reduce_scatter") else sent or received
    if group is not None and len(group) < 2:
        return None, f"{name} of one rank"
    return Call(op, elements * size, (group,) if group else None), name


def _group(arguments: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[int, ...] | None:
    listed = str(arguments.get("Process Group Ranks", ""))
    if listed and "..." not in listed:
        ranks = tuple(int(r) for r in re.findall(r"\d+", listed))
        if ranks:
            return ranks
    for group in info.get("pg_config") or ():
        if str(group.get("pg_name")) == str(arguments.get("Process Group Name")) and group.get("ranks"):
            return tuple(int(r) for r in group["ranks"])
    size = int(arguments.get("Group size") or 0)
    return tuple(range(size)) if size else None


def _with_shapes(event: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[Call | None, str]:
    """A call from a ``c10d::`` operator that carries the shapes of its inputs."""
    name = str(event.get("name"))
    arguments = event.get("args") or {}
    op = operation(name)
    counts = [_elements(dims) for dims in arguments.get("Input Dims") or ()]
    if op in (None, "sends") or not counts or max(counts) < 1:
        return None, name
    types = [str(t).lower() for t in arguments.get("Input type") or ()]
    # The base forms of gather, scatter and all-to-all take (output, input); S is the larger of the two.
    size = _DTYPES.get(types[int(np.argmax(counts))], 4) if len(types) == len(counts) else 4
    return Call(str(op), max(counts) * size), name


def _elements(dims: Any) -> int:
    if not isinstance(dims, Sequence) or not dims:
        return 0
    if all(isinstance(d, int) for d in dims):
        return int(np.prod(dims))
    return sum(_elements(d) for d in dims)


_INIT = re.compile(
    r"(?P<process>\S+:\d+):\d+ \[\d+\] NCCL INFO .*?comm (?P<comm>0x[0-9a-f]+) rank (?P<rank>\d+) n[rR]anks (?P<n>\d+)"
    r"(?:.*?commId (?P<id>0x[0-9a-f]+))?"
)
_CALLED = re.compile(
    r"(?P<process>\S+:\d+):\d+ \[\d+\] NCCL INFO (?P<op>\w+): opCount (?P<number>[0-9a-f]+) .*?count (?P<count>\d+) "
    r"datatype (?P<type>\d+) .*?root (?P<root>\d+) comm (?P<comm>0x[0-9a-f]+) \[nranks=(?P<n>\d+)\]"
)


def _from_nccl(path: Path) -> Job:
    """A job from a log written with ``NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,COLL``.

    Every process logs every call, with its own pointer for a communicator; the lines of its initialisation
    say which communicator that is, and the process's rank in it. One process speaks for each communicator;
    the k-th calls of communicators of one size run at the same time.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError("job", str(path), f"a file that can be read ({error.strerror})") from None
    member = {(m["process"], m["comm"]): (m["id"], int(m["rank"]), int(m["n"])) for m in _INIT.finditer(text)}
    called = list(_CALLED.finditer(text))
    world = max((int(m["n"]) for m in called), default=0)
    world = max([world, *(n for _, _, n in member.values())])
    ranks_of = _members(member, world)
    speaker: dict[Any, tuple[str, str]] = {}
    turn: dict[Any, int] = {}
    place_of: dict[Any, int] = {}
    calls: list[Call] = []
    skipped: dict[str, int] = {}
    guessed = False
    for m in called:
        n, process, comm = int(m["n"]), m["process"], m["comm"]
        identity, rank, _ = member.get((process, comm), (None, None, n))
        op, code = operation(m["op"]), int(m["type"])
        if op is None or n < 2 or code >= len(_NCCL_BYTES) or int(m["count"]) < 1:
            if not m["op"].startswith("Recv"):
                skipped[m["op"]] = skipped.get(m["op"], 0) + 1
            continue
        size = int(m["count"]) * _NCCL_BYTES[code]
        group = ranks_of.get(identity) or tuple(range(n))
        if op == "sends":
            if rank is None or rank == int(m["root"]):
                skipped[m["op"]] = skipped.get(m["op"], 0) + 1
                continue
            key: Any = ("sends", identity or n, m["number"])
            flow = (group[rank], group[int(m["root"])], size)
            if key in place_of:
                before = calls[place_of[key]]
                calls[place_of[key]] = Call("sends", flows=(*before.flows, flow))
            else:
                place_of[key] = len(calls)
                calls.append(Call("sends", flows=(flow,)))
            continue
        # Without initialisation lines, the first process that uses a communicator of n ranks speaks.
        if speaker.setdefault(identity or n, (process, comm)) != (process, comm):
            continue
        # NCCL counts what a rank sends (all-gather) or receives (reduce-scatter): one part of n.
        size *= n if op in ("all_gather", "reduce_scatter") else 1
        turn[identity or n] = turn.get(identity or n, -1) + 1
        key = (n, turn[identity or n], op, size)
        known = calls[place_of[key]] if key in place_of else None
        if known and known.groups and not set(group) & {r for g in known.groups for r in g}:
            calls[place_of[key]] = Call(op, size, (*known.groups, group))
            continue
        place_of[key] = len(calls)
        if n < world and identity not in ranks_of:
            guessed = True
            calls.append(Call(op, size, mesh_groups(group, world)))
        else:
            calls.append(Call(op, size, None if n == world else (group,)))
    if not calls:
        allowed = "YAML, a profiler trace (.json) or an NCCL log with collectives (NCCL_DEBUG_SUBSYS=INIT,COLL)"
        raise InputError("job", str(path), allowed)
    notes = [f"left out: {count} x {name}" for name, count in sorted(skipped.items())]
    if guessed:
        notes.append("groups smaller than the largest are taken to be neighbouring ranks, all at the same time")
    return Job(_together(calls), world, notes=tuple(notes))


def _members(
    member: Mapping[tuple[str, str], tuple[str | None, int, int]], world: int
) -> dict[str | None, tuple[int, ...]]:
    """The ranks of each communicator that the initialisation lines identify, numbered as in the largest one."""
    of_process = {process: rank for (process, _), (_, rank, n) in member.items() if n == world}
    found: dict[str | None, dict[int, int]] = {}
    size: dict[str | None, int] = {}
    for (process, _), (identity, rank, n) in member.items():
        if identity is not None and process in of_process:
            found.setdefault(identity, {})[rank] = of_process[process]
            size[identity] = n
    complete = {i: ranks for i, ranks in found.items() if len(ranks) == size[i] == len(set(ranks.values()))}
    return {i: tuple(ranks[r] for r in range(size[i])) for i, ranks in complete.items()}


def _together(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Equal calls that follow each other as one call with a count."""
    merged: list[Call] = []
    for call in calls:
        last = merged[-1] if merged else None
        same = last and (last.op, last.bytes, last.groups, last.flows) == (call.op, call.bytes, call.groups, call.flows)
        if last and same and call.op != "sends":
            merged[-1] = Call(call.op, call.bytes, call.groups, last.count + call.count, call.options)
        else:
            merged.append(call)
    return tuple(merged)
