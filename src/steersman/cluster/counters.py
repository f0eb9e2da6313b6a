r"""Bytes, seconds and processor time that a worker spends.

Three counts of the same traffic stand side by side, because none alone tells the whole story.

*Payload* is counted exactly, at the collectives: the bytes that this worker must send when the collective
runs by its bandwidth-optimal algorithm (Chan et al., 2007). For N workers,

================================  =============================================
all-reduce of S bytes             :math:`2 (N - 1) S / N`
all-gather of s bytes from each   :math:`(N - 1) s`
reduce-scatter of S bytes         :math:`(N - 1) S / N`
broadcast, reduce of S bytes      :math:`(N - 1) S / N` (the mean over workers)
all-to-all                        what goes to the others
gather, scatter, send             what leaves this worker
barrier, receive                  0
================================  =============================================

*Socket* bytes are what the kernel sent on this process's TCP connections (``tcpi_bytes_sent``: headers and
acknowledgements left out, retransmissions in). *Interface* bytes are what left a network interface, with
headers, whoever sent it: on the loopback interface that is everything on the machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from steersman.errors import InputError

BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info


def interface_bytes(interface: str = "lo") -> int | None:
    """Bytes that ``interface`` has sent since it came up; None where the system doesn't tell."""
    try:
        return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
    except (OSError, ValueError):
        return None


def socket_bytes() -> int | None:
    """Bytes sent so far on the TCP connections that this process holds; None where the system doesn't tell."""
    try:
        handles = os.listdir("/proc/self/fd")
    except OSError:
        return None
    total = 0
    for handle in handles:
        try:
            if not os.readlink(f"/proc/self/fd/{handle}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(handle))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue  # closed meanwhile
        if len(information) < BYTES_SENT + 8:
            return None
        total += struct.unpack_from("Q", information, BYTES_SENT)[0]
    return total


@dataclass
class Usage:
    """What one worker has spent while it was counted.

    Args:
        seconds: wall-clock time.
        cpu_s: processor time of this process, all threads.
        payload_bytes: sent by the bandwidth-optimal algorithms, exactly.
        socket_bytes: sent on this process's TCP connections; None where unknown.
        interface_bytes: sent by the interface, this worker's even share; None where unknown.
        calls: number of collectives by name.
        communicating_s: time during which at least one collective was on its way.
        spans: (name, start, end) of each collective, in counted seconds: pauses between blocks don't count.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    payload_bytes: float = 0.0
    socket_bytes: int | None = 0
    interface_bytes: float | None = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    communicating_s: float = 0.0
    spans: list[tuple[str, float, float]] = field(default_factory=list)


class Counters:
    """Counts what this worker spends inside ``with`` blocks, which add up.

    Every rank of the default process group enters and leaves together (barriers keep other ranks' traffic out
    of the interface's count). Collectives are seen wherever they are called from, also in the C++ of
    DistributedDataParallel: inside the block a kernel of the same name stands before torch's own in the
    dispatcher, counts, and passes the call on. Outside the block nothing is touched.

    Args:
        interface: the network interface that carries the traffic.

    Attributes:
        usage: what has been counted; up to date after each block.
        origin: zero of the counted seconds on :func:`time.perf_counter`'s clock, inside a block.

    Raises:
        InputError: ``interface`` can't be a name of one.

    Example:
        >>> counters = Counters()
        >>> with counters:
        ...     train()
        >>> counters.usage.payload_bytes
    """

    def __init__(self, interface: str = "lo") -> None:
        if not interface or "/" in interface:
            raise InputError("interface", interface, "the name of a network interface")
        self.interface = interface
        self.usage = Usage()
        self._library: torch.library.Library | None = None
        self.origin: float | None = None

    def __enter__(self) -> Self:
        if self._library is not None:
            raise RuntimeError("these counters are counting already")
        _barrier()
        self._before = (socket_bytes(), interface_bytes(self.interface))
        _barrier()
        library = torch.library.Library("c10d", "IMPL")
        for name, sent in SENT.items():
            kernel = _observed(name, sent, self._record)
            for key in ("AutogradCPU", "AutogradCUDA"):
                library.impl(name, kernel, key, with_keyset=True)
        self._library = library
        self._start = (time.perf_counter(), time.process_time())
        self.origin = self._start[0] - self.usage.seconds
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        usage = self.usage
        usage.seconds += time.perf_counter() - self._start[0]
        usage.cpu_s += time.process_time() - self._start[1]
        assert self._library is not None
        self._library._destroy()
        self._library = None
        if kind is None:  # after an error the other ranks may never come
            _barrier()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        sockets, interface = socket_bytes(), interface_bytes(self.interface)
        usage.socket_bytes = _grown(usage.socket_bytes, self._before[0], sockets, 1)
        usage.interface_bytes = _grown(usage.interface_bytes, self._before[1], interface, ranks)
        usage.communicating_s = _covered(usage.spans)

    def _record(self, name: str, sent: float, work: Any) -> None:
        usage, origin = self.usage, self.origin
        assert origin is not None
        usage.payload_bytes += sent
        usage.calls[name] = usage.calls.get(name, 0) + 1
        index, start = len(usage.spans), time.perf_counter() - origin
        usage.spans.append((name, start, start))

        def done(_: Any) -> None:
            usage.spans[index] = (name, start, time.perf_counter() - origin)

        with contextlib.suppress(RuntimeError):  # a send or receive doesn't tell when it is done
            work.get_future().add_done_callback(done)


def _size(tensors: Any) -> int:
    """Bytes of a tensor or of nested lists of tensors."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_size, tensors))


def _to_others(pieces: Sequence[torch.Tensor], me: int) -> int:
    return sum(_size(piece) for i, piece in enumerate(pieces) if i != me)


def _split(a: Mapping[str, Any], n: int, me: int) -> float:
    """What an all-to-all of one tensor, cut along its first axis, sends to the others."""
    sizes = a["input_split_sizes"]
    if not sizes:
        return _size(a["input"]) * (n - 1) / n
    rows = sum(sizes)
    return _size(a["input"]) * (rows - sizes[me]) / rows if rows else 0.0


# Bytes sent by this rank of n, from the arguments of the operator: the table above.
SENT: dict[str, Callable[[Mapping[str, Any], int, int], float]] = {
    "allreduce_": lambda a, n, me: 2 * (n - 1) * _size(a["tensors"]) / n,
    "allreduce_coalesced_": lambda a, n, me: 2 * (n - 1) * _size(a["tensors"]) / n,
    "allgather_": lambda a, n, me: (n - 1) * _size(a["input_tensors"]),
    "_allgather_base_": lambda a, n, me: (n - 1) * _size(a["input_tensor"]),
    "allgather_coalesced_": lambda a, n, me: (n - 1) * _size(a["input_list"]),
    "allgather_into_tensor_coalesced_": lambda a, n, me: (n - 1) * _size(a["inputs"]),
    "reduce_scatter_": lambda a, n, me: (n - 1) * _size(a["input_tensors"]) / n,
    "_reduce_scatter_base_": lambda a, n, me: (n - 1) * _size(a["input_tensor"]) / n,
    "reduce_scatter_tensor_coalesced_": lambda a, n, me: (n - 1) * _size(a["inputs"]) / n,
    "broadcast_": lambda a, n, me: (n - 1) * _size(a["tensors"]) / n,
    "reduce_": lambda a, n, me: (n - 1) * _size(a["tensors"]) / n,
    "gather_": lambda a, n, me: 0 if me == a["root_rank"] else _size(a["input_tensors"]),
    "scatter_": lambda a, n, me: _to_others(a["input_tensors"][0], me) if me == a["root_rank"] else 0,
    "alltoall_": lambda a, n, me: _to_others(a["input_tensors"], me),
    "alltoall_base_": _split,
    "send": lambda a, n, me: _size(a["tensors"]),
}


def _observed(
    name: str, sent: Callable[[Mapping[str, Any], int, int], float], record: Callable[[str, float, Any], None]
) -> Callable[..., Any]:
    """A kernel for ``c10d::name`` that records and passes the call on to torch's own."""
    operator = getattr(torch.ops.c10d, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        result = operator.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        group = dist.ProcessGroup.unbox(given["process_group"])
        work = dist.Work.unbox(result[-1] if isinstance(result, (tuple, list)) else result)
        record(name.strip("_"), sent(given, group.size(), group.rank()), work)
        return result

    return kernel


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _grown(total: Any, before: int | None, after: int | None, ranks: int) -> Any:
    if total is None or before is None or after is None:
        return None
    return total + max(after - before, 0) / ranks if ranks > 1 else total + max(after - before, 0)


def _covered(spans: Sequence[tuple[str, float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for _, start, stop in sorted(spans, key=lambda span: span[1]):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total
