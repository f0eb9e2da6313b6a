"""What the ranks of these tests run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from steersman.cluster.counters import Counters
from steersman.cluster.launch import report
from steersman.errors import Inapplicable


def everyone(value: float) -> dict[str, Any]:
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    for i in range(3):
        report(i + 1, 3, "adding")
        time.sleep(0.06)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
    return {"sum": total.item(), "threads": torch.get_num_threads()} | {name: os.environ[name] for name in names}


def mishap(kind: str, who: int, pids: str) -> None:
    me = dist.get_rank()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pids, str(me)).write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    if me == who:
        if kind == "raise":
            raise ValueError("the loss is NaN\nat step 3")
        if kind == "inapplicable":
            raise Inapplicable("needs three workers")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            print("out of luck", flush=True)
            os._exit(7)
        if kind == "hang":
            time.sleep(600)
    dist.all_reduce(torch.ones(1))


def traffic() -> dict[str, Any]:
    """One of everything, counted, each expected count beside it."""
    n, me, size = dist.get_world_size(), dist.get_rank(), 4000
    x = torch.ones(size // 4)
    expected: dict[str, float] = {}
    found: dict[str, float] = {}

    def count(name: str, sent: float, call: Any) -> None:
        with (counters := Counters()):
            call()
        expected[name], found[name] = sent, counters.usage.payload_bytes

    def send_in_a_ring() -> None:
        works = [dist.isend(x, (me + 1) % n), dist.irecv(torch.empty_like(x), (me - 1) % n)]
        for work in works:
            work.wait()

    def two_at_once() -> None:
        for work in [dist.all_reduce(x, async_op=True), dist.all_reduce(x.clone(), async_op=True)]:
            work.wait()

    pieces = list(torch.ones(n, size // 4).unbind())
    flat = torch.ones(n * size // 4)
    count("all-reduce", 2 * (n - 1) / n * size, lambda: dist.all_reduce(x))
    count("asynchronous", 4 * (n - 1) / n * size, two_at_once)
    count("int8", 2 * (n - 1) / n * 10, lambda: dist.all_reduce(torch.ones(10, dtype=torch.int8)))
    count("all-gather", (n - 1) * size, lambda: dist.all_gather(pieces, x))
    count("all-gather into one", (n - 1) * size, lambda: dist.all_gather_into_tensor(flat, x))
    count("reduce-scatter", (n - 1) / n * n * size, lambda: dist.reduce_scatter_tensor(x.clone(), flat))
    count("broadcast", (n - 1) / n * size, lambda: dist.broadcast(x, 0))
    count("reduce", (n - 1) / n * size, lambda: dist.reduce(x.clone(), 0))
    count("gather", size if me else 0, lambda: dist.gather(x, None if me else pieces))
    count("scatter", 0 if me else (n - 1) * size, lambda: dist.scatter(x.clone(), None if me else pieces))
    count("all-to-all", (n - 1) * size, lambda: dist.all_to_all_single(torch.empty_like(flat), flat))
    count("ring", size, send_in_a_ring)
    count("barrier", 0, dist.barrier)
    count("nothing", 0, lambda: None)

    model = DistributedDataParallel(torch.nn.Linear(50, 20))
    count("ddp", 2 * (n - 1) / n * 4 * 1020, lambda: model(torch.ones(3, 50)).sum().backward())
    group = dist.new_group([0, 1])
    count("two of them", size if me < 2 else 0, lambda: dist.all_reduce(x, group=group) if me < 2 else None)
    return {"expected": expected, "found": found}


def large(count: int) -> dict[str, Any]:
    """All-reduces of 4 MB, in two blocks."""
    x = torch.ones(1_000_000)
    counters = Counters()
    for _ in range(2):
        with counters:
            for _ in range(count):
                dist.all_reduce(x)
        dist.all_reduce(x)  # not counted
        time.sleep(0.6)
    return asdict(counters.usage)
