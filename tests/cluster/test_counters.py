"""Bytes counted at the collectives against their formulas, and against what the kernel saw."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from steersman.cluster.counters import Counters, interface_bytes, socket_bytes
from steersman.cluster.launch import launch
from steersman.errors import InputError

RANKS = f"{Path(__file__).parent / 'ranks.py'}"


def test_payload_is_exact_for_every_collective():
    for result in launch(f"{RANKS}:traffic", {}, 3, timeout=100):
        assert result["found"] == pytest.approx(result["expected"], abs=1e-9)
        assert len(result["found"]) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counts are read from Linux's /proc and /sys")
def test_payload_is_what_the_kernel_sent():
    count, size, n = 3, 4_000_000, 2
    results = launch(f"{RANKS}:large", {"count": count}, n, timeout=100)
    payload = 2 * count * 2 * (n - 1) / n * size
    for usage in results:
        assert usage["payload_bytes"] == payload
        assert usage["calls"] == {"allreduce": 2 * count}
        # This process's own connections: gloo's message headers on top, nobody else's traffic.
        assert payload <= usage["socket_bytes"] <= 1.01 * payload + 5000
        # Everyone's traffic on loopback, shared out: at least ours; other programs may add to it.
        assert usage["interface_bytes"] >= payload
        assert len(usage["spans"]) == 2 * count
        # The pause of 0.6 s between the blocks takes no counted time.
        assert all(0 <= start < end <= usage["seconds"] + 0.5 for _, start, end in usage["spans"])
        assert 0 < usage["communicating_s"] <= sum(end - start for _, start, end in usage["spans"]) + 1e-9
        assert 0 < usage["cpu_s"] <= 3 * usage["seconds"]


def test_nothing_is_counted_or_left_outside_the_block():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = torch._C._dispatch_dump("c10d::allreduce_")
        counters = Counters()
        with counters:
            dist.all_reduce(torch.ones(3))
            assert "AutogradCPU" in torch._C._dispatch_dump("c10d::allreduce_")
            with pytest.raises(RuntimeError, match="already"):
                counters.__enter__()
        dist.all_reduce(torch.ones(3))
        assert counters.usage.calls == {"allreduce": 1}
        assert counters.usage.payload_bytes == 0  # a single worker sends nothing
        with pytest.raises(ZeroDivisionError), counters:
            _ = 1 / 0
        assert torch._C._dispatch_dump("c10d::allreduce_") == before
    finally:
        dist.destroy_process_group()


def test_counters_work_without_a_process_group():
    with Counters() as counters:
        sum(range(100_000))
    assert counters.usage.payload_bytes == 0
    assert counters.usage.seconds > 0


def test_unknown_interfaces_have_no_count():
    assert interface_bytes("nothing0") is None
    with pytest.raises(InputError, match="interface"):
        Counters("../lo")
    if sys.platform == "linux":
        assert isinstance(interface_bytes("lo"), int)
        assert isinstance(socket_bytes(), int)
