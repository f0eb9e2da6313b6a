"""Real packets over a leaf-spine fabric of network namespaces: do completion times follow the planned loads?

    sudo python benchmarks/packet_spraying_netns.py [--megabytes 8] [--rounds 3] [--out netns.json]

Two leaves, two spines and four hosts are namespaces joined by veth pairs. Only the leaf-spine links are limited
(tbf, 20 Mbit/s), so that the fabric is the bottleneck. Host i has an address 10.80.q.(i+1) for each spine q, routed
over spine q by both leaves, and its sender binds the same alias, so that data and acknowledgements take the planned
spine. The kernel has no per-packet round robin: spraying is each flow striped over both aliases. Eight flows cross
the leaves; with loads of 8, 6 and 4 flows on the busier spine, times should be in the ratio 2 : 1.5 : 1.

Needs root, iproute2 and tbf. Rounds interleave the arms. It can't show reordering: TCP flows stay on their spine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from steersman.distributed.packet_spraying import Assignment, LeafSpine, SinglePathPlanner, Step, loads

RATE, BURST = "20mbit", "16kb"
FABRIC = LeafSpine(leaves=2, spines=2, hosts=2, uplink=0.02, nic=10.0)
# Every host sends two flows to each host of the other leaf.
PAIRS = [(i, j) for i in range(4) for j in range(4) if i // 2 != j // 2]
NAME = f"sm{os.getpid() % 10000}"


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def build() -> None:
    """Namespaces, links, addresses, routes and limits."""
    names = [*(f"l{a}" for a in range(2)), *(f"s{q}" for q in range(2)), *(f"h{i}" for i in range(4))]
    for name in names:
        sh(f"ip netns add {NAME}{name}")
        sh(f"ip -n {NAME}{name} link set lo up")
        # Every switch forwards; there is no sysctl program to rely on.
        subprocess.run(
            ["ip", "netns", "exec", NAME + name, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True
        )
    for a in range(2):
        for q in range(2):  # leaf a - spine q: 10.81.(2a+q).0/24
            link(f"l{a}", f"s{q}", f"10.81.{2 * a + q}", limited=True)
        for i in (2 * a, 2 * a + 1):  # leaf a - host i: 10.82.i.0/24
            link(f"l{a}", f"h{i}", f"10.82.{i}", limited=False)
    for i in range(4):
        a, other = i // 2, 1 - i // 2
        for q in range(2):
            alias = f"10.80.{q}.{i + 1}/32"
            sh(f"ip -n {NAME}h{i} addr add {alias} dev lo")
            sh(f"ip -n {NAME}l{a} route add {alias} via 10.82.{i}.2")
            sh(f"ip -n {NAME}s{q} route add {alias} via 10.81.{2 * a + q}.1")
            sh(f"ip -n {NAME}l{other} route add {alias} via 10.81.{2 * other + q}.2")
        sh(f"ip -n {NAME}h{i} route add default via 10.82.{i}.1")


def link(first: str, second: str, network: str, *, limited: bool) -> None:
    one, two = f"to{second}", f"to{first}"
    sh(f"ip link add {one} netns {NAME}{first} type veth peer name {two} netns {NAME}{second}")
    for name, device, number in ((first, one, 1), (second, two, 2)):
        sh(f"ip -n {NAME}{name} addr add {network}.{number}/24 dev {device}")
        sh(f"ip -n {NAME}{name} link set {device} up")
        if limited:
            sh(f"tc -n {NAME}{name} qdisc replace dev {device} root tbf rate {RATE} burst {BURST} latency 200ms")


def destroy() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        if line.startswith(NAME):
            subprocess.run(["ip", "netns", "del", line.split()[0]], check=False)


# ------------------------------------------------------------------ one host's process


def serve(host: int, connections: int) -> None:
    """Accept connections, read each to its end, say so."""
    import threading

    # All aliases of this host: in a network namespace of its own, whose only links lead to the other namespaces.
    server = socket.create_server(("0.0.0.0", 7000), backlog=64)
    print("ready", flush=True)
    threads = []

    def drain(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            pass
        connection.sendall(b"x")
        connection.close()

    for _ in range(connections):
        thread = threading.Thread(target=drain, args=(server.accept()[0],))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()


def send(host: int, pieces: list[list[int]]) -> None:
    """Connect all pieces (target, spine, bytes), wait for a line, send all at once, wait for the answers."""
    import threading

    connections = []
    for target, spine, size in pieces:
        connection = socket.create_connection(
            (f"10.80.{spine}.{target + 1}", 7000), timeout=120, source_address=(f"10.80.{spine}.{host + 1}", 0)
        )
        connections.append((connection, size))
    print("ready", flush=True)
    sys.stdin.readline()

    def push(connection: socket.socket, size: int) -> None:
        connection.sendall(bytes(size))
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)

    threads = [threading.Thread(target=push, args=pair) for pair in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("done", flush=True)


# ------------------------------------------------------------------ an arm


def run(step: Step, plan: Assignment) -> float:
    """Seconds until all pieces have arrived and were acknowledged."""
    servers, senders = [], []
    try:
        for host in range(4):
            expected = int((step.dst[plan.flow] == host).sum())
            servers.append(start(host, "serve", str(expected)))
        for process in servers:
            assert process.stdout is not None
            process.stdout.readline()
        for host in range(4):
            mine = np.flatnonzero(step.src[plan.flow] == host)
            pieces = [[int(step.dst[plan.flow[p]]), int(plan.spine[p]), int(plan.bytes[p])] for p in mine]
            senders.append(start(host, "send", json.dumps(pieces)))
        for process in senders:
            assert process.stdout is not None
            process.stdout.readline()
        begin = time.perf_counter()
        for process in senders:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in senders:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "done":
                raise RuntimeError("a sender failed")
        return time.perf_counter() - begin
    finally:
        for process in (*servers, *senders):
            process.kill()
            process.wait()


def start(host: int, role: str, argument: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", f"{NAME}h{host}", sys.executable, __file__, role, str(host), argument]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def arms(step: Step) -> dict[str, Assignment]:
    """Planned, striped, and two collisions that a hash may draw."""
    flows = np.arange(len(step))
    striped = Assignment(np.repeat(flows, 2), np.tile([0, 1], len(step)), np.repeat(step.bytes // 2, 2))
    # In each direction four flows cross: all of them on spine 0, or all but one.
    crowded = np.where(flows % 4 == 3, 1, 0)
    return {
        "planned": SinglePathPlanner().assign(FABRIC, step),
        "striped": striped,
        "three to one": Assignment(flows, crowded, step.bytes),
        "all on one": Assignment(flows, np.zeros(len(step), dtype=np.int64), step.bytes),
    }


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] in ("serve", "send"):
        host = int(sys.argv[2])
        if sys.argv[1] == "serve":
            serve(host, int(sys.argv[3]))
        else:
            send(host, json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of each flow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("tc"):
        raise SystemExit("needs root and iproute2")
    src, dst = np.array(PAIRS).T
    step = Step(src, dst, np.full(len(PAIRS), round(arguments.megabytes * 1e6)))
    plans = arms(step)
    predicted = {name: loads(FABRIC, step, plan).bound(FABRIC) for name, plan in plans.items()}
    measured: dict[str, list[float]] = {name: [] for name in plans}
    try:
        build()
        for _ in range(arguments.rounds):
            for name, plan in plans.items():
                measured[name].append(run(step, plan))
                print(f"{name:13s} {measured[name][-1]:6.2f} s (bound {predicted[name]:.2f} s)", flush=True)
    finally:
        destroy()
    results = []
    for name, times in measured.items():
        ratio = statistics.median(t / p for t, p in zip(times, measured["planned"], strict=True))
        wanted = predicted[name] / predicted["planned"]
        results.append({"arm": name, "seconds": times, "ratio": ratio, "predicted_ratio": wanted})
        print(f"{name:13s} {ratio:.2f} x planned, predicted {wanted:.2f}")
    if arguments.out:
        congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        record = {"kernel": platform.release(), "tcp": congestion, "rate": RATE, "results": results}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
