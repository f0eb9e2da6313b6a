"""Seconds to plan and evaluate an all-to-all against the number of hosts, and relative to ideal spraying.

    python benchmarks/packet_planning.py [--hosts 128,256,512,1024] [--rounds 5] [--out packet_planning.json]

Leaves of 16 hosts under 16 spines, 64 MB per rank, all flows in one step and as n - 1 permutation steps. Rounds
take all policies in rotating order, so that a machine that slows down slows all of them. Times are medians of
processor seconds (other programs on the machine don't count); a policy's ratio is the median over rounds of its
time, evaluation included, divided by that of ideal spraying in the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from steersman.distributed.packet_spraying import LeafSpine, collective, evaluate, place, policy

POLICIES = ("spray", "ecmp", "ecmp-8", "single", "plan-lazy", "plan-cut:bundle=leaf", "plan-equal:bundle=leaf")


def measure(hosts: int, form: str, rounds: int) -> list[dict[str, Any]]:
    """Each policy's medians at one number of hosts."""
    fabric = LeafSpine(leaves=hosts // 16, spines=16, hosts=16)
    job = collective("all_to_all", place(fabric), "64MB", form=form)
    policies = {name: policy(name) for name in POLICIES}
    whole: dict[str, list[float]] = {name: [] for name in POLICIES}
    planning: dict[str, list[float]] = {name: [] for name in POLICIES}
    results = {}
    for turn in range(rounds):
        shift = turn % len(POLICIES)
        for name in (*POLICIES[shift:], *POLICIES[:shift]):
            start = time.process_time()
            results[name] = evaluate(fabric, job, policies[name])
            whole[name].append(time.process_time() - start)
            planning[name].append(results[name].seconds)
    return [
        {
            "hosts": hosts,
            "form": form,
            "flows": results[name].flows,
            "policy": name,
            "pieces": results[name].pieces,
            "seconds": statistics.median(whole[name]),
            "planning_wall_seconds": statistics.median(planning[name]),
            "times_spray": statistics.median(
                own / spray for own, spray in zip(whole[name], whole["spray"], strict=True)
            ),
            "bound_over_spray": results[name].bound / results["spray"].bound,
        }
        for name in POLICIES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="128,256,512,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    for hosts in map(int, arguments.hosts.split(",")):
        for form in ("step", "permutation"):
            for row in measure(hosts, form, arguments.rounds):
                results.append(row)
                print(
                    f"{hosts:5d} hosts {form:11s} {row['policy']:23s} {row['seconds']:7.3f} s  "
                    f"{row['times_spray']:6.1f} x spray  bound {row['bound_over_spray']:.3f} x"
                )
    if arguments.out:
        record = {"numpy": np.__version__, "python": platform.python_version(), "results": results}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
