"""Topologies, jobs, flow tables and ``apply``: what users bring, and what they take away."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.distributed.packet_spraying import (
    LeafSpine,
    SinglePathPlanner,
    Spray,
    Step,
    collective,
    load_job,
    loads,
    nccl_settings,
    place,
    source_ports,
    spine_of,
    write_table,
)
from steersman.distributed.packet_spraying.apply import apply
from steersman.distributed.packet_spraying.jobs import mesh_groups, operation
from steersman.distributed.packet_spraying.routes import HASHES, addresses, five_tuple
from steersman.errors import InputError

FABRIC = LeafSpine(4, 4, 4)


def refused(words: str, function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence and sentence.endswith("."), sentence


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


# ------------------------------------------------------------------ topologies

NAMED = """\
links:
  - {leaf: L1, spine: S1, gbps: 400}
  - {leaf: L1, spine: S2, gbps: 400}
  - {leaf: L2, spine: S1, gbps: 200}
  - {leaf: L2, spine: S2, gbps: 200}
  - {leaf: L2, spine: S2, gbps: 200}
hosts:
  - {host: a, leaf: L1, gbps: 100, address: 10.1.0.1}
  - {host: b, leaf: L2, gbps: 200, address: 10.1.0.2}
  - {host: c, leaf: L2, gbps: 200, address: 10.1.0.3}
"""
TABLE = """\
host, leaf, spine, gbps, address
, L1, S1, 400,
, L1, S2, 400,
, L2, S1, 200,
, L2, S2, 400,
a, L1, , 100, 10.1.0.1
b, L2, , 200, 10.1.0.2
c, L2, , 200, 10.1.0.3
"""


def same(a: LeafSpine, b: LeafSpine) -> None:
    assert a.host_names == b.host_names and a.addresses == b.addresses
    assert (a.host_leaf == b.host_leaf).all()
    assert (a.capacity == b.capacity).all() and (a.nic_capacity == b.nic_capacity).all()


def test_one_fabric_in_yaml_csv_and_graphml(tmp_path):
    import networkx

    fabric = LeafSpine.load(written(tmp_path, "f.yaml", NAMED))
    assert fabric.capacity.tolist() == [[400, 400], [200, 400]], "parallel links add up"
    assert fabric.nic_capacity.tolist() == [100, 200, 200] and not fabric.uniform
    same(fabric, LeafSpine.load(written(tmp_path, "f.csv", TABLE)))
    graph = fabric.to_networkx()
    for name, address in zip(fabric.host_names, fabric.addresses, strict=True):
        graph.nodes[name]["address"] = address
    networkx.write_graphml(graph, tmp_path / "f.graphml")
    same(fabric, LeafSpine.load(tmp_path / "f.graphml"))


def test_counts_in_a_file_equal_counts_in_a_text(tmp_path):
    text = LeafSpine.load("leaf-spine:leaves=4,spines=3,hosts=8,uplink=200,nic=100,failed=0-1;3-0")
    path = written(
        tmp_path, "f.yml", "leaves: 4\nspines: 3\nhosts: 8\nuplink: 200\nnic: 100\nfailed: [[0, 1], [3, 0]]\n"
    )
    same(text, LeafSpine.load(path))
    same(LeafSpine(), LeafSpine.load("leaf-spine"))
    assert text.oversubscription == pytest.approx(8 * 100 / (2 * 200))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("f.yaml", "leaves: 4\nspines: 0\n", "spines=0"),
        ("f.yaml", "leafs: 4\n", "did you mean 'leaves'"),
        ("f.yaml", "leaves: [", "valid YAML"),
        ("f.yaml", "- 1\n", "YAML with leaves, spines and hosts"),
        ("f.yaml", NAMED.replace("gbps: 100", "gbps: -1"), "a positive number of Gb/s"),
        ("f.yaml", NAMED.replace("gbps: 400", "gbps: 0", 1), "gbps of link L1-S1=0"),
        ("f.yaml", NAMED.replace("host: c", "host: a"), "on one leaf only"),
        ("f.yaml", NAMED.replace("spine: S2", "spine: L2"), "two-tier leaf-spine fabrics"),
        ("f.yaml", NAMED[: NAMED.index("hosts:")], "at least one host"),
        ("f.yaml", NAMED.replace("gbps: 400", "speed: 400", 1), "leaf, spine, gbps"),
        ("f.yaml", "links: []\nhosts: []\n", "at least one spine"),
        ("f.yaml", NAMED + "failed: [[L1, S9]]\n", "names from the links"),
        ("f.yaml", NAMED + "failed: [[L1, S1], [L1, S2]]\n", "L1 and L2 share none"),
        ("f.csv", TABLE.replace("spine, gbps", "spine"), "no gbps"),
        ("f.csv", TABLE.replace("a, L1, , 100", "a, L1, S1, 100"), "line 6 of f.csv"),
        ("f.csv", TABLE.replace("100", "fast"), "a number"),
        ("f.txt", "", "a file that ends in .yaml"),
    ],
)
def test_bad_topologies_are_refused_in_one_sentence(tmp_path, name, content, words):
    refused(words, LeafSpine.load, written(tmp_path, name, content))


def test_missing_and_misspelt_topologies(tmp_path):
    refused("a file that exists", LeafSpine.load, tmp_path / "none.yaml")
    refused("did you mean 'spines'", LeafSpine.load, "leaf-spine:spine=4")
    refused("text like", LeafSpine.load, "leaf-spine:4x4")
    refused("'0-3;1-2'", LeafSpine.load, "leaf-spine:failed=0/3")
    refused("one of .yaml", LeafSpine.load, tmp_path)


def test_three_tiers_are_refused():
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(["s1", "s2"], role="spine")
    graph.add_edge("s1", "s2", gbps=100)
    refused("only two-tier", LeafSpine.from_networkx, graph)
    graph.add_node("core")
    refused("role of node core", LeafSpine.from_networkx, graph)


# ------------------------------------------------------------------ jobs


def test_a_job_in_yaml(tmp_path):
    np.savetxt(tmp_path / "traffic.csv", np.arange(16).reshape(4, 4), delimiter=",")
    path = written(
        tmp_path,
        "job.yaml",
        """
ranks: 4
placement: strided
collectives:
  - {op: all_reduce, bytes: 4kB, count: 3}
  - {op: all-to-all, bytes: 4000, form: permutation}
  - {op: all_gather, bytes: 4kB, group_size: 2}
  - {op: ring, bytes: 3kB, ranks: [0, 2, 3]}
  - {op: moe, traffic: traffic.csv}
""",
    )
    steps = load_job(path).steps(FABRIC)
    assert [(step.name, step.repeat) for step in steps] == [
        ("all_reduce ring", 18),
        ("all_to_all shift 1", 1),
        ("all_to_all shift 2", 1),
        ("all_to_all shift 3", 1),
        ("all_gather ring", 1),
        ("ring ring", 4),
        ("moe dispatch to experts", 1),
        ("moe combine", 1),
    ]
    assert steps[0].src.tolist() == [0, 4, 8, 12]
    pairs = set(zip(steps[4].src.tolist(), steps[4].dst.tolist(), strict=True))
    assert pairs == {(0, 4), (4, 0), (8, 12), (12, 8)}, "both groups at once"
    assert load_job(path).steps(FABRIC, "halving_doubling")[0].bytes[0] == 2000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("collectives: []", "at least one collective"),
        ("ranks: 4", "a list of collectives"),
        ("colectives: []\ncollectives: []", "did you mean 'collectives'"),
        ("collectives: [{op: all_redus, bytes: 1}]", "did you mean 'all_reduce'"),
        ("collectives: [{op: ring}]", "given for ring"),
        ("collectives: [{op: ring, bytes: 0}]", "bytes=0"),
        ("collectives: [{op: ring, bytes: 1, count: 0}]", "count=0"),
        ("collectives: [{op: ring, byts: 1}]", "did you mean 'bytes'"),
        ("collectives: [{bytes: 1}]", "a mapping with op and bytes"),
        ("ranks: 4\ncollectives: [{op: ring, bytes: 1, group_size: 3}]", "a divisor of the job's ranks (4)"),
        ("ranks: 99\ncollectives: [{op: ring, bytes: 1}]", "from 2 to the number of hosts (16)"),
        ("collectives: [{op: ring, bytes: 1, ranks: [0, 77]}]", "rank=77"),
        ("collectives: [{op: moe, traffic: none.csv}]", "a CSV file that exists"),
    ],
)
def test_bad_jobs_are_refused_in_one_sentence(tmp_path, text, words):
    path = written(tmp_path, "job.yaml", text)
    refused(words, lambda: load_job(path).steps(FABRIC))


def test_other_bad_job_files(tmp_path):
    refused("a file that exists", load_job, tmp_path / "none.yaml")
    refused("NCCL log with collectives", load_job, written(tmp_path, "log.txt", "hello\n"))
    refused("with traceEvents", load_job, written(tmp_path, "t.json", "[]"))
    refused("a JSON trace", load_job, written(tmp_path, "t.json", "{"))
    refused("record_shapes=True", load_job, written(tmp_path, "t.json", '{"traceEvents": []}'))


def event(name, sent, received, group, dtype="Float", **more):
    arguments = {"Collective name": name, "In msg nelems": sent, "Out msg nelems": received, "dtype": dtype}
    arguments |= {"Group size": len(group), "Process Group Ranks": str(group)}
    return {"ph": "X", "cat": "kernel", "name": "nccl", "ts": more.pop("ts"), "args": arguments | more}


def test_a_trace_of_a_gpu_run(tmp_path):
    mine, world = [0, 4], list(range(8))
    events = [
        event("allreduce", 1000, 1000, world, ts=3),
        event("allreduce", 1000, 1000, world, ts=4),
        event("_allgather_base", 100, 200, mine, "BFloat16", ts=1),
        event("_reduce_scatter_base", 200, 100, mine, "BFloat16", ts=2),
        event("all_to_all", 800, 800, world, ts=5),
        event("send", 50, 0, [0, 1], ts=6, **{"Src Rank": 0, "Dst Rank": 1}),
        event("barrier", 0, 0, world, ts=7),
        # The call on the CPU says the same as its kernel, and must not count twice.
        event("allreduce", 1000, 1000, world, ts=3) | {"cat": "cpu_op", "name": "record_param_comms"},
    ]
    text = json.dumps({"traceEvents": events, "distributedInfo": {"rank": 0, "world_size": 8}})
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        file.write(text)
    job = load_job(path)
    assert [(c.op, c.bytes, c.count) for c in job.calls] == [
        ("all_gather", 400, 1),
        ("reduce_scatter", 400, 1),
        ("all_reduce", 4000, 2),
        ("all_to_all", 3200, 1),
        ("sends", 0, 1),
    ]
    assert job.calls[0].groups == ((0, 4), (1, 5), (2, 6), (3, 7)), "the other groups of the mesh do the same"
    assert job.calls[4].flows == ((0, 1, 200),)
    assert any("1 x barrier" in note for note in job.notes) and any("at the same time" in note for note in job.notes)
    assert job.ranks == 8 and len(job.steps(FABRIC)) == 5


def test_a_trace_of_gloo_has_shapes_only(tmp_path):
    def op(name, types, dims, ts):
        return {"cat": "cpu_op", "name": f"c10d::{name}", "ts": ts, "args": {"Input type": types, "Input Dims": dims}}

    events = [
        op("allreduce_", ["TensorList", ""], [[[1000], [24]], []], 0),
        op("_allgather_base_", ["double", "double", ""], [[40], [10], []], 1),
        op("alltoall_base_", ["float", "float"], [[8], [8]], 2),
    ]
    path = written(tmp_path, "t.json", json.dumps({"traceEvents": events, "distributedInfo": {"world_size": 4}}))
    job = load_job(path)
    assert [(c.op, c.bytes) for c in job.calls] == [("all_reduce", 4096), ("all_gather", 320), ("all_to_all", 32)]
    assert job.ranks == 4 and any("4 bytes an element" in note for note in job.notes)


def test_mesh_groups():
    assert mesh_groups([0, 1], 6) == ((0, 1), (2, 3), (4, 5))
    assert mesh_groups([1, 3], 4) == ((0, 2), (1, 3))
    assert mesh_groups([0, 3, 4], 8) == ((0, 3, 4),)
    assert mesh_groups([0, 1, 2], 8) == ((0, 1, 2),), "three don't divide eight"
    assert operation("_reduce_scatter_base") == "reduce_scatter" and operation("Reduce") == "reduce"
    assert operation("Recv") is None and operation("ncclAllReduce") == "all_reduce"


def nccl(rank, op, number, count, type_, comm, n, root=0):
    return (
        f"node{rank // 2}:{100 + rank}:900 [{rank % 2}] NCCL INFO {op}: opCount {number:x} sendbuff 0x7f00 recvbuff "
        f"0x7f01 count {count} datatype {type_} op 0 root {root} comm 0x{comm:x} [nranks={n}] stream 0x55\n"
    )


def init(rank, comm, of, n, id_):
    return (
        f"node{rank // 2}:{100 + rank}:900 [{rank % 2}] NCCL INFO ncclCommInitRank comm 0x{comm:x} rank {of} "
        f"nranks {n} cudaDev 0 nvmlDev 0 busId 1000 commId 0x{id_:x} - Init COMPLETE\n"
    )


def test_an_nccl_log_of_all_ranks(tmp_path):
    text = ""
    for rank in range(4):
        text += init(rank, 0xA0 + rank, rank, 4, 0x1) + init(rank, 0xB0 + rank, rank // 2, 2, 0x20 + rank % 2)
    for number in (0, 1):
        for rank in (2, 0, 1, 3):
            text += nccl(rank, "AllReduce", number, 1000, 7, 0xA0 + rank, 4)
    for rank in range(4):
        text += nccl(rank, "AllGather", 0, 50, 9, 0xB0 + rank, 2)
        text += nccl(rank, "Send", 5, 8, 1, 0xA0 + rank, 4, root=(rank + 1) % 4)
        text += nccl(rank, "Recv", 5, 8, 1, 0xA0 + rank, 4, root=(rank - 1) % 4)
    job = load_job(written(tmp_path, "nccl.log", text))
    by_op = {call.op: call for call in job.calls}
    assert len(job.calls) == 3
    assert (by_op["all_reduce"].bytes, by_op["all_reduce"].count, by_op["all_reduce"].groups) == (4000, 2, None)
    assert by_op["all_gather"].bytes == 200 and by_op["all_gather"].groups == ((0, 2), (1, 3))
    assert sorted(by_op["sends"].flows) == [(0, 1, 8), (1, 2, 8), (2, 3, 8), (3, 0, 8)]
    assert job.ranks == 4 and job.notes == ()


def test_an_nccl_log_without_initialisation(tmp_path):
    text = "".join(nccl(rank, "AllReduce", 0x139D, 7382228, 7, 0xA0 + rank, 4) for rank in range(4))
    text += "".join(nccl(rank, "ReduceScatter", 1, 10, 6, 0xB0 + rank, 2) for rank in range(4))
    text += nccl(0, "Send", 5, 8, 1, 0xA0, 4, root=1)
    job = load_job(written(tmp_path, "nccl.log", text))
    assert [(c.op, c.bytes, c.groups) for c in job.calls] == [
        ("all_reduce", 4 * 7382228, None),
        ("reduce_scatter", 40, ((0, 1), (2, 3))),
    ]
    assert any("neighbouring ranks" in note for note in job.notes) and any("1 x Send" in note for note in job.notes)


# ------------------------------------------------------------------ routes


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    hash_=st.sampled_from(sorted(HASHES)),
    spines=st.integers(1, 7),
    failed=st.booleans(),
)
def test_source_ports_reach_their_spines(seed, hash_, spines, failed):
    rng = np.random.default_rng(seed)
    fabric = LeafSpine(3, spines, 4, failed=((1, spines - 1),) if failed and spines > 1 else ())
    src = rng.integers(0, 12, 6)
    step = Step(src, (src + rng.integers(1, 12, 6)) % 12, np.full(6, 6000))
    plan = SinglePathPlanner("plan-cut").assign(fabric, step)
    ports = source_ports(fabric, step, plan, hash_)
    for piece in range(len(plan)):
        flow = plan.flow[piece]
        if plan.spine[piece] < 0:
            assert ports[piece] == 0
            continue
        assert 49152 <= ports[piece] <= 65535
        assert spine_of(fabric, step.src[flow], step.dst[flow], int(ports[piece]), hash_) == plan.spine[piece]


def test_pieces_of_a_flow_on_one_spine_have_different_ports():
    from steersman.distributed.packet_spraying import Assignment

    fabric = LeafSpine(2, 2, 2)
    step = Step([0], [2], [100])
    plan = Assignment(np.zeros(4, dtype=int), np.array([0, 0, 1, 0]), np.full(4, 25))
    ports = source_ports(fabric, step, plan, "crc32")
    assert np.unique(ports).size == 4


def test_hashes_by_hand():
    assert HASHES["crc32"](b"123456789") == 0xCBF43926
    assert HASHES["crc16"](b"123456789") == 0x31C3
    assert HASHES["xor"](bytes([0x12, 0x34, 0xFF, 0x00])) == 0xED34
    assert five_tuple("10.0.0.1", "10.0.1.2", 50000).hex() == "0a0000010a0001020011c35012b7"
    assert addresses(LeafSpine(2, 1, 2)) == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
    refused("did you mean 'crc32'", source_ports, FABRIC, Step([0], [9], [1]), None, "crc33")
    bad = LeafSpine(2, 1, 1, addresses=("fe80::1", "x"))
    refused("an IPv4 address", addresses, bad)


def test_flow_tables_say_the_same_in_csv_and_json(tmp_path):
    step = collective("all_to_all", place(FABRIC, 6), "1MB")[0]
    plan = SinglePathPlanner("plan-cut").assign(FABRIC, step)
    report = write_table(FABRIC, [step], [plan], tmp_path, hash="crc16")
    rows = list(csv.DictReader((tmp_path / "flows.csv").open()))
    columns = json.loads((tmp_path / "flows.json").read_text())["columns"]
    assert report == {"rows": len(plan), "ports_missing": 0} and len(rows) == len(plan)
    assert [int(r["bytes"]) for r in rows] == columns["bytes"] == plan.bytes.tolist()
    assert {r["spine"] for r in rows} == {"", "spine0", "spine1", "spine2", "spine3"}
    assert all((r["spine"] == "") == (r["udp_source_port"] == "") for r in rows)
    total: dict[tuple[str, str], int] = {}
    for r in rows:
        total[r["src"], r["dst"]] = total.get((r["src"], r["dst"]), 0) + int(r["bytes"])
    assert set(total.values()) == {166667} and len(total) == 30


def test_nccl_settings():
    step = Step([0], [4], [4000])
    equal = SinglePathPlanner("plan-equal").assign(FABRIC, step)
    advice = nccl_settings([step], [equal])
    assert advice["environment"] == {"NCCL_IB_QPS_PER_CONNECTION": 4, "NCCL_IB_SPLIT_DATA_ON_QPS": 1}
    assert advice["even"]
    step = Step([0, 0, 0], [4, 5, 6], [4000] * 3)
    cut = SinglePathPlanner("plan-cut").assign(FABRIC, step)
    assert not nccl_settings([step], [cut])["even"]
    assert nccl_settings([step], [Spray().assign(FABRIC, step)])["most_pieces"] == 1


# ------------------------------------------------------------------ apply


def applied(tmp_path, subject="leaf-spine:leaves=4,spines=4,hosts=4", input=None, **options):
    lines: list[str] = []
    metrics = apply(subject, input, tmp_path, log=lines.append, **options)
    return metrics, lines, json.loads((tmp_path / "plan.json").read_text())


def test_apply_says_that_spraying_is_not_needed(tmp_path):
    metrics, lines, plan = applied(tmp_path)
    assert metrics["recommended"] == metrics["planned"] == "plan-lazy"
    assert metrics["split_flows"] == 0 and metrics["over_spraying"]["plan-lazy"] == pytest.approx(1)
    assert metrics["over_spraying"]["ecmp"] > 1.2 and "isn't needed" in metrics["advice"] in " ".join(lines)
    assert set(metrics["queue_pairs"]) >= {"ecmp", "ecmp-8", "single", "spray", "plan-equal", "plan-lazy"}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"flows.csv", "flows.json", "plan.json", "plan.md", "loads.npz", "load_map.png"}
    assert plan["flow_table"]["rows"] == 240 and plan["limits"] in (tmp_path / "plan.md").read_text()
    with np.load(tmp_path / "loads.npz") as saved:
        assert saved["spray.up"].shape == (4, 4) and saved["spray.up"].max() == pytest.approx(1)
        assert saved["ecmp.up"].max() > 1
    table = list(csv.DictReader((tmp_path / "flows.csv").open()))
    assert {row["pieces"] for row in table} == {"1"}


def test_apply_says_that_hashing_is_enough(tmp_path):
    metrics, *_ = applied(tmp_path, "leaf-spine:leaves=4,spines=4,hosts=4,uplink=1600", collective="ring")
    assert metrics["recommended"] == "ecmp" and "enough" in metrics["advice"]


def test_apply_splits_as_little_as_the_tolerance_allows(tmp_path):
    fabric = "leaf-spine:leaves=2,spines=4,hosts=5,nic=400,uplink=400"
    exact, *_ = applied(tmp_path, fabric, collective="pipeline", within=0.0)
    loose, *_ = applied(tmp_path, fabric, collective="pipeline", within=0.7)
    assert exact["planned"] == "plan-lazy" and exact["pieces"] == 5 + 4 - 1 and exact["split_flows"] == 3
    assert loose["pieces"] == 5 and loose["split_flows"] == 0
    for asked, pieces in (("plan-equal", 5 * 4), ("plan-equal:bundle=leaf", 4 + 4)):
        metrics, *_ = applied(tmp_path, fabric, collective="pipeline", policy=asked)
        assert metrics["planned"] == asked and metrics["pieces"] == pieces


def test_apply_takes_files_failed_links_and_fair_rates(tmp_path):
    topology = written(tmp_path, "f.yaml", NAMED)
    job = written(tmp_path, "job.yaml", "collectives: [{op: all_to_all, bytes: 3MB}, {op: ring, bytes: 1MB}]")
    out = tmp_path / "out"
    out.mkdir()
    metrics, lines, plan = applied(out, topology, job, failed="0-0", fair=True, hash="crc32", hash_seeds=2)
    assert plan["fabric"]["links_down"] == 1 and plan["job"]["steps"] == 2
    # With one link of leaf L1 down, there is one path between the leaves: all policies are the same.
    assert set(np.round(list(metrics["over_spraying"].values()), 6)) == {1.0}
    assert metrics["completion_ms"]["plan-lazy"] == pytest.approx(metrics["bound_ms"]["plan-lazy"], rel=0.3)
    assert any("capacity" in line for line in lines)
    rows = list(csv.DictReader((out / "flows.csv").open()))
    assert {row["spine"] for row in rows} == {"", "S2"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"collective": "all_to_al"}, "did you mean 'all_to_all'"),
        ({"policy": "plan-lasy"}, "did you mean 'plan-lazy'"),
        ({"ranks": 99}, "from 2 to the number of hosts (16)"),
        ({"bytes": "0"}, "bytes='0'"),
        ({"within": 2.0}, "within=2.0"),
        ({"failed": "9-9"}, "leaf below 4"),
        ({"failed": "0-0;0-1;0-2;0-3"}, "share none"),
        ({"hash": "md5"}, "one of crc16, crc32, xor"),
        ({"hash_seeds": 0}, "from 1 to 1000"),
        ({"all_reduce": "rings", "collective": "all_reduce"}, "did you mean 'ring'"),
    ],
)
def test_apply_refuses_in_one_sentence(tmp_path, options, words):
    refused(words, applied, tmp_path, **options)


def test_apply_with_unequal_flows_leaves_equal_pieces_out(tmp_path):
    metrics, lines, _ = applied(tmp_path, collective="moe")
    assert "plan-equal" not in metrics["over_spraying"]
    assert any(line.startswith("plan-equal left out") for line in lines)
    refused("one that this job allows", applied, tmp_path, collective="moe", policy="plan-equal")


def test_the_room_exports_the_planner_lazily():
    from steersman import catalog, distributed

    assert distributed.SinglePathPlanner is SinglePathPlanner and distributed.LeafSpine is LeafSpine
    card = catalog.card("packet-spraying")
    assert card.load() is SinglePathPlanner
    assert catalog.card("ethereal") is card


def test_loads_of_a_loaded_job_match_the_collective(tmp_path):
    path = written(tmp_path, "job.yaml", "collectives: [{op: all_to_all, bytes: 1MB}]")
    (step,) = load_job(path).steps(FABRIC)
    (want,) = collective("all_to_all", place(FABRIC), "1MB")
    for one, two in ((step, want),):
        a, b = (loads(FABRIC, s, Spray().assign(FABRIC, s)) for s in (one, two))
        assert (a.up == b.up).all()
