"""Oracle tests of the single-path planner: what the paper's argument and hand counts say, first."""

from __future__ import annotations

from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.distributed.packet_spraying import (
    LOCAL,
    PLANS,
    Assignment,
    Ecmp,
    LeafSpine,
    SinglePath,
    SinglePathPlanner,
    Spray,
    Step,
    collective,
    completion,
    congestion,
    evaluate,
    fair_rates,
    ideal,
    loads,
    parse_bytes,
    place,
    policy,
    progressive_filling,
)
from steersman.distributed.packet_spraying.policies import edge_colouring
from steersman.distributed.packet_spraying.simulate import classes, incidence
from steersman.errors import InputError

EVERY = ["ecmp", "ecmp-2", "ecmp-8", "single", "spray", "plan-equal", "plan-cut", "plan-whole", "plan-lazy"]
BALANCED = [SinglePathPlanner(policy, bundle) for policy in ("plan-equal", "plan-cut") for bundle in ("host", "leaf")]


def bundle(r: int, s: int, size: int) -> tuple[LeafSpine, Step]:
    """r flows of ``size`` bytes from one host to r hosts of the other leaf, over s spines."""
    fabric = LeafSpine(2, s, [0, *[1] * r])
    return fabric, Step(np.zeros(r), np.arange(1, r + 1), np.full(r, size))


def assert_conserved(step: Step, plan: Assignment) -> None:
    assert (np.bincount(plan.flow, weights=plan.bytes, minlength=len(step)) == step.bytes).all()
    assert (np.diff(plan.flow) >= 0).all() and (plan.bytes > 0).all()


# ------------------------------------------------------------------ 1-3: loads, bytes and pieces of one bundle


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 300), s=st.integers(1, 64), units=st.integers(1, 1000))
@pytest.mark.parametrize("planner", BALANCED, ids=lambda p: p.name)
def test_a_bundle_loads_every_link_exactly_like_spraying(planner, r, s, units):
    # With s units in every flow, both f/s and f g/s are whole, so that equality is exact.
    fabric, step = bundle(r, s, units * s)
    plan = planner.assign(fabric, step)
    got, want = loads(fabric, step, plan), loads(fabric, step, Spray().assign(fabric, step))
    assert (want.up[0] == r * units).all()
    assert (got.up == want.up).all() and (got.down == want.down).all()
    assert_conserved(step, plan)


@pytest.mark.parametrize(
    ("r", "s", "equal", "cut"),
    [(12, 8, 8 + 4 * 2, 16), (15, 16, 240, 30), (16, 16, 16, 16), (24, 16, 32, 32), (1, 16, 16, 16), (7, 1, 7, 7)],
)
def test_pieces_of_a_bundle_by_hand(r, s, equal, cut):
    fabric, step = bundle(r, s, s * 1000)
    assert len(SinglePathPlanner("plan-equal").assign(fabric, step)) == equal
    assert len(SinglePathPlanner("plan-cut").assign(fabric, step)) == cut


def test_twelve_flows_on_eight_spines_are_eight_whole_ones_and_eight_halves():
    fabric, step = bundle(12, 8, 8000)
    plan = SinglePathPlanner("plan-equal").assign(fabric, step)
    assert sorted(plan.bytes.tolist()) == [4000] * 8 + [8000] * 8
    assert sorted(plan.pieces_per_flow(12).tolist()) == [1] * 8 + [2] * 4


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 300), s=st.integers(1, 64))
def test_piece_counts_follow_the_formulas(r, s):
    fabric, step = bundle(r, s, s * 1000)
    q, rem, g = r // s, r % s, gcd(r, s)
    assert g == (gcd(rem, s) if rem else s)
    assert len(SinglePathPlanner("plan-equal").assign(fabric, step)) == q * s + rem * s // g
    assert len(SinglePathPlanner("plan-cut").assign(fabric, step)) == r + s - g


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 100), s=st.integers(1, 40), size=st.integers(64, 10**6), planner=st.sampled_from(BALANCED))
def test_odd_bytes_are_conserved_and_pieces_differ_by_a_byte(r, s, size, planner):
    fabric, step = bundle(r, s, size)
    plan = planner.assign(fabric, step)
    assert_conserved(step, plan)
    if planner.policy == "plan-equal":
        for flow in range(r):
            pieces = plan.bytes[plan.flow == flow]
            assert pieces.max() - pieces.min() <= 1
            assert (np.diff(pieces) <= 0).all(), "the remainder goes to the first pieces"
    got, want = loads(fabric, step, plan).up, loads(fabric, step, Spray().assign(fabric, step)).up
    assert np.abs(got - want).max() <= max(len(plan) / s, 1)


@pytest.mark.parametrize("planner", BALANCED, ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["all_to_all", "halving_doubling", "ring", "double_binary_tree", "recursive_doubling"])
@pytest.mark.parametrize(("leaves", "spines", "hosts"), [(4, 4, 4), (4, 6, 8), (8, 3, 2)])
def test_whole_collectives_load_every_link_exactly_like_spraying(planner, name, leaves, spines, hosts):
    fabric = LeafSpine(leaves, spines, hosts)
    n = fabric.n_hosts
    for how in ("packed", "strided", "random"):
        for step in collective(name, place(fabric, 0, how, np.random.default_rng(3)), spines * n * n * 100):
            plan = planner.assign(fabric, step)
            got, want = loads(fabric, step, plan), loads(fabric, step, Spray().assign(fabric, step))
            assert (got.up == want.up).all() and (got.down == want.down).all()
            assert_conserved(step, plan)


def test_fractional_shares_agree_to_rounding():
    fabric = LeafSpine(4, 7, 5)
    step = collective("all_to_all", place(fabric), 20 * (7 * 10**9 + 7))[0]
    for planner in BALANCED:
        got, want = loads(fabric, step, planner.assign(fabric, step)), loads(fabric, step, Spray().assign(fabric, step))
        np.testing.assert_allclose(got.up, want.up, rtol=1e-12)


def test_halving_doubling_splits_all_flows_by_host_and_none_by_leaf():
    fabric = LeafSpine(16, 16, 16)
    job = collective("halving_doubling", place(fabric), "64MB")
    by_host = evaluate(fabric, job, SinglePathPlanner("plan-equal", "host"))
    by_leaf = evaluate(fabric, job, SinglePathPlanner("plan-equal", "leaf"))
    assert by_host.pieces == 4 * 256 * 16 + 4 * 256  # four of eight distances leave the leaf
    assert by_leaf.split_flows == 0 and by_leaf.bound == by_host.bound


# ------------------------------------------------------------------ 4-5: degenerate cases and bounds


def test_with_one_spine_all_policies_are_the_same():
    fabric = LeafSpine(4, 1, 4)
    step = collective("all_to_all", place(fabric), 16 * 4096)[0]
    want = loads(fabric, step, Spray().assign(fabric, step))
    for name in EVERY:
        got = loads(fabric, step, policy(name).assign(fabric, step))
        assert (got.up == want.up).all() and (got.down == want.down).all(), name


def test_a_single_flow_is_split_s_ways_but_lazily_not_at_all():
    fabric, step = bundle(1, 8, 8000)
    for planner in BALANCED:
        plan = planner.assign(fabric, step)
        assert len(plan) == 8 and sorted(plan.spine.tolist()) == list(range(8))
    assert len(SinglePathPlanner("plan-lazy").assign(fabric, step)) == 1
    thin = LeafSpine(2, 8, [0, 1], uplink=100, nic=400)
    lazy = SinglePathPlanner("plan-lazy").assign(thin, step)
    assert len(lazy) == 8, "where the host link is faster than an uplink, one path isn't enough"


@st.composite
def workloads(draw):
    """A small fabric, perhaps with unequal or failed links, and a step of flows on it."""
    leaves, spines = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hosts = np.concatenate([np.arange(leaves), rng.integers(0, leaves, draw(st.integers(1, 8)))])
    uplink: float | np.ndarray = 100.0
    if draw(st.booleans()):
        uplink = rng.choice([50.0, 100.0, 400.0], size=(leaves, spines))
        uplink[:, 1:][rng.random((leaves, spines - 1)) < 0.2] = 0  # the first spine always works
    fabric = LeafSpine(leaves, spines, hosts, uplink, nic=rng.choice([100.0, 200.0], size=hosts.size))
    count = draw(st.integers(1, 30))
    src = rng.integers(0, hosts.size, count)
    dst = (src + rng.integers(1, hosts.size, count)) % hosts.size
    size = 10_000 if draw(st.booleans()) else rng.integers(1_000, 100_000, count)
    return fabric, Step(src, dst, np.broadcast_to(size, count))


@settings(max_examples=80, deadline=None)
@given(workloads(), st.integers(0, 5))
def test_no_policy_beats_spraying_nor_the_host_links_and_all_conserve_bytes(workload, seed):
    fabric, step = workload
    best = loads(fabric, step, Spray().assign(fabric, step))
    for name in EVERY:
        try:
            plan = policy(name).assign(fabric, step, seed)
        except InputError:
            assert name in ("plan-equal", "plan-whole")
            continue
        load = loads(fabric, step, plan)
        assert_conserved(step, plan)
        assert load.bound(fabric) >= load.host_bound(fabric) == best.host_bound(fabric)
        used = plan.spine >= 0
        a, b = fabric.host_leaf[step.src[plan.flow]], fabric.host_leaf[step.dst[plan.flow]]
        assert (fabric.capacity[a[used], plan.spine[used]] > 0).all()
        assert (fabric.capacity[b[used], plan.spine[used]] > 0).all()
        assert ((a == b) == (plan.spine == LOCAL)).all()
        if fabric.uniform:
            # Spraying loads all links of a leaf alike: nothing can be below it, up to a byte per bundle.
            assert load.bound(fabric) >= best.bound(fabric) * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(workloads())
def test_cuts_match_spraying_with_unequal_flows_links_and_failures(workload):
    fabric, step = workload
    want = loads(fabric, step, Spray().assign(fabric, step))
    for bundle_by in ("host", "leaf"):
        got = loads(fabric, step, SinglePathPlanner("plan-cut", bundle_by).assign(fabric, step))
        assert np.abs(got.up - want.up).max() <= len(step) + 1
        assert np.abs(got.down - want.down).max() <= len(step) + 1


@settings(max_examples=40, deadline=None)
@given(workloads(), st.sampled_from(["ecmp", "ecmp-2", "single", "spray", "plan-cut", "plan-lazy"]))
def test_fair_rates_move_all_bytes_within_every_capacity(workload, name):
    fabric, step = workload
    plan = policy(name).assign(fabric, step)
    matrix, capacity = incidence(fabric, step, plan)
    moved, seconds = np.zeros(len(plan)), 0.0
    for phase, rate in progressive_filling(matrix, capacity, plan.bytes):
        assert (matrix @ rate <= capacity * (1 + 1e-9)).all()
        moved += phase * rate
        seconds += phase
    np.testing.assert_allclose(moved, plan.bytes, rtol=1e-6)
    assert seconds >= loads(fabric, step, plan).bound(fabric) * (1 - 1e-9)
    assert completion(fabric, step, plan) == pytest.approx(seconds, rel=1e-6), "classes change nothing"


# ------------------------------------------------------------------ max-min fairness


def filled(matrix: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Progressive filling as in the textbook: raise all open rates together, to the first full link."""
    n = matrix.shape[1]
    rate, is_open = np.zeros(n), np.ones(n, dtype=bool)
    while is_open.any():
        slack, demand = capacity - matrix @ rate, matrix @ is_open
        rise = min(slack[e] / demand[e] for e in range(len(capacity)) if demand[e] > 0)
        rate[is_open] += rise
        full = (capacity - matrix @ rate) <= 1e-9 * capacity
        is_open &= ~(matrix[full] > 0).any(axis=0)
    return rate


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from(["ecmp", "ecmp-2", "spray", "plan-cut"]))
def test_fair_rates_equal_textbook_filling(workload, name):
    fabric, step = workload
    plan = policy(name).assign(fabric, step)
    matrix, capacity = incidence(fabric, step, plan)
    np.testing.assert_allclose(fair_rates(matrix, capacity), filled(matrix.toarray(), capacity), rtol=1e-6)


def test_fair_rates_of_three_flows_by_hand():
    # Flow 0 crosses both links (10 and 4), flow 1 the first, flow 2 the second: 2, 8, 2.
    from scipy.sparse import csr_array

    rates = fair_rates(csr_array(np.array([[1.0, 1, 0], [1, 0, 1]])), np.array([10.0, 4.0]))
    assert rates.tolist() == [2.0, 8.0, 2.0]


def test_symmetric_traffic_falls_into_a_handful_of_classes():
    fabric = LeafSpine(8, 8, 8)
    step = collective("all_to_all", place(fabric), "8MB")[0]
    plan = SinglePathPlanner("plan-cut").assign(fabric, step)
    matrix, capacity = incidence(fabric, step, plan)
    assert classes(matrix, capacity, plan.bytes).bytes.size <= 4
    assert len(plan) == 64 * 63


@pytest.mark.parametrize("name", ["ring", "all_to_all", "halving_doubling", "recursive_doubling"])
@pytest.mark.parametrize("planner", [SinglePathPlanner("plan-lazy"), SinglePathPlanner("plan-cut", "leaf")])
def test_plans_take_as_long_as_spraying_at_fair_rates(name, planner):
    fabric = LeafSpine(8, 8, 8)
    job = collective(name, place(fabric), "8MB")
    assert evaluate(fabric, job, planner, fair=True).completion == pytest.approx(
        ideal(fabric, job, fair=True).completion, rel=1e-9
    )


def test_delays_are_added_once_per_step():
    fabric = LeafSpine(2, 2, 2, latency=1e-6)
    job = collective("all_to_all", place(fabric), 4 * 10**6)
    inside = [Step(np.array([0]), np.array([1]), np.array([50]), repeat=3)]
    assert evaluate(fabric, job, Spray()).latency == 4e-6
    assert evaluate(fabric, inside, Spray()).bound == pytest.approx(3 * (2e-6 + 1e-9))


# ------------------------------------------------------------------ 6: hashing against balls in bins


@pytest.mark.parametrize(
    ("r", "mean", "high"), [(16, 3.07, 5.0), (64, 1.97, 2.75), (240, 1.48, 1.87), (256, 1.46, 1.88)]
)
def test_ecmp_collides_like_balls_in_bins(r, mean, high):
    s, draws = 16, 20_000
    # r flows that leave one leaf, hashed to s uplinks, for many seeds: one call with many sources.
    fabric = LeafSpine(2, s, [0] * 200 + [1] * r)
    src, dst = np.divmod(np.arange(200 * r), r)
    step = Step(src, 200 + dst, np.full(src.size, s))
    most = []
    for seed in range(draws // 200):
        spine = Ecmp().assign(fabric, step, seed).spine.reshape(200, r)
        counts = np.stack([(spine == k).sum(axis=1) for k in range(s)])
        most.append(counts.max(axis=0))
    ratio = np.concatenate(most) * s / r
    assert ratio.mean() == pytest.approx(mean, rel=0.015)
    assert abs(np.quantile(ratio, 0.99) - high) <= s / r + 0.005


def test_two_flows_collide_once_in_s():
    s, n = 16, 60_000
    fabric = LeafSpine(2, s, [0] * n + [1] * 2)
    src, dst = np.divmod(np.arange(2 * n), 2)
    spine = Ecmp().assign(fabric, Step(src, n + dst, np.full(2 * n, 1)), 7).spine.reshape(n, 2)
    chance = (spine[:, 0] == spine[:, 1]).mean()
    assert abs(chance - 1 / s) < 4 * np.sqrt(1 / s * (1 - 1 / s) / n)


def test_ecmp_is_a_function_of_the_connection_and_the_seed():
    fabric = LeafSpine(4, 8, 4)
    step = collective("all_to_all", place(fabric), 16 * 800)[0]
    first = Ecmp(4).assign(fabric, step, 3)
    backwards = Step(step.src[::-1], step.dst[::-1], step.bytes)
    again = Ecmp(4).assign(fabric, backwards, 3)
    by_flow = first.spine.reshape(-1, 4)
    assert (again.spine.reshape(-1, 4)[::-1] == by_flow).all()
    assert (Ecmp(4).assign(fabric, step, 4).spine != first.spine).any()


# ------------------------------------------------------------------ 7: rings


def test_a_packed_ring_leaves_and_enters_each_leaf_once_and_needs_no_policy():
    fabric = LeafSpine(8, 8, 8)
    step = collective("ring", place(fabric), "64MB")[0]
    outside = fabric.host_leaf[step.src] != fabric.host_leaf[step.dst]
    assert (np.bincount(fabric.host_leaf[step.src[outside]]) == 1).all()
    assert (np.bincount(fabric.host_leaf[step.dst[outside]]) == 1).all()
    assert step.repeat == 2 * 63 and (step.bytes == 10**6).all()
    bounds = {name: loads(fabric, step, policy(name).assign(fabric, step)).bound(fabric) for name in EVERY}
    assert len(set(bounds.values())) == 1
    thin = LeafSpine(8, 8, 8, uplink=100, nic=400)
    one, all_paths = (loads(thin, step, p.assign(thin, step)).fabric_bound(thin) for p in (SinglePath(), Spray()))
    assert one == pytest.approx(8 * all_paths)


# ------------------------------------------------------------------ 8: symmetry and failures


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(["plan-cut", "plan-equal", "plan-whole", "spray", "single"]))
def test_relabelling_leaves_and_spines_changes_no_maximum(seed, name):
    rng = np.random.default_rng(seed)
    capacity = rng.choice([100.0, 400.0], size=(4, 5)) if name in ("plan-cut", "spray") else 100.0
    fabric = LeafSpine(4, 5, np.repeat(np.arange(4), 6), capacity)
    leaf, spine = rng.permutation(4), rng.permutation(5)
    other = LeafSpine(4, 5, leaf[fabric.host_leaf], fabric.capacity[np.argsort(leaf)][:, spine])
    step = collective("all_to_all", np.arange(24), 24 * 2000)[0]
    first = loads(fabric, step, policy(name).assign(fabric, step)).bound(fabric)
    second = loads(other, step, policy(name).assign(other, step)).bound(other)
    # The greedy choice takes leaves in order: what it reaches may depend on the labels a little.
    tolerance = 0.1 if name == "single" else 1e-3
    assert second == pytest.approx(first, rel=tolerance)


def test_a_failed_link_takes_its_spine_from_the_pairs_that_touch_its_leaf_only():
    whole = LeafSpine(4, 8, 8)
    broken = whole.with_failed([(1, 3)])
    step = collective("all_to_all", place(whole), 32 * 7 * 8 * 1000)[0]
    ideal_load = loads(broken, step, Spray().assign(broken, step))
    assert ideal_load.up[1, 3] == ideal_load.down[1, 3] == 0
    for planner in BALANCED:
        plan = planner.assign(broken, step)
        got = loads(broken, step, plan)
        assert (got.up == ideal_load.up).all() and (got.down == ideal_load.down).all()
        before = planner.assign(whole, step)
        touched = (broken.host_leaf[step.src] == 1) | (broken.host_leaf[step.dst] == 1)
        same, old = ~touched[plan.flow], ~touched[before.flow]
        assert (plan.spine[same] == before.spine[old]).all() and (plan.bytes[same] == before.bytes[old]).all()
        assert 3 not in plan.spine[~same & (plan.spine >= 0)]
    # Seven spines carry what eight did, for the pairs that touch leaf 1.
    assert ideal_load.up[1, 0] == pytest.approx(loads(whole, step, Spray().assign(whole, step)).up[1, 0] * 8 / 7)


# ------------------------------------------------------------------ whole flows, tolerances, limits


@settings(max_examples=40, deadline=None)
@given(colours=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_edge_colouring_is_proper(colours, seed):
    rng = np.random.default_rng(seed)
    # The union of `colours` random partial matchings has degrees of at most `colours`.
    u, v = [], []
    for _ in range(colours):
        size = rng.integers(1, 9)
        u.append(rng.permutation(8)[:size])
        v.append(rng.permutation(8)[:size])
    u, v = np.concatenate(u), np.concatenate(v)
    colour = edge_colouring(u, v, colours)
    assert colour.min() >= 0 and colour.max() < colours
    for end in (u, v):
        assert np.unique(np.stack([end, colour]), axis=1).shape[1] == u.size


@settings(max_examples=40, deadline=None)
@given(leaves=st.integers(2, 5), spines=st.integers(1, 6), flows=st.integers(1, 80), seed=st.integers(0, 10**6))
def test_whole_flows_reach_the_least_possible_maximum(leaves, spines, flows, seed):
    rng = np.random.default_rng(seed)
    fabric = LeafSpine(leaves, spines, 8)
    src = rng.integers(0, fabric.n_hosts, flows)
    dst = (src + rng.integers(1, fabric.n_hosts, flows)) % fabric.n_hosts
    step = Step(src, dst, np.full(flows, 1000))
    plan = SinglePathPlanner("plan-whole").assign(fabric, step)
    load = loads(fabric, step, plan)
    assert len(plan) == flows
    for counts in (load.up / 1000, load.down / 1000):
        assert (counts.max(axis=1) == np.ceil(counts.sum(axis=1) / spines)).all()


def test_lazy_plans_split_nothing_in_the_common_collectives():
    fabric = LeafSpine(8, 8, 8)
    for name, options in [
        ("ring", {}),
        ("all_to_all", {}),
        ("all_to_all", {"form": "permutation"}),
        ("halving_doubling", {}),
        ("double_binary_tree", {}),
    ]:
        job = collective(name, place(fabric), "64MB", **options)
        lazy, best = evaluate(fabric, job, SinglePathPlanner()), ideal(fabric, job)
        assert lazy.split_flows == 0 and lazy.bound == pytest.approx(best.bound, rel=1e-9), name


def test_lazy_plans_split_where_whole_flows_are_not_enough():
    # Three flows of 1 Mbit from each leaf over two equally fast uplinks: 2 against 1.5.
    fabric = LeafSpine(2, 2, 3, uplink=100, nic=100)
    step = Step(np.arange(3), np.arange(3, 6), np.full(3, 10**6))
    assert len(SinglePathPlanner("plan-lazy").assign(fabric, step)) == 4
    assert len(SinglePathPlanner("plan-lazy", within=0.34).assign(fabric, step)) == 3


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_tolerance_saves_pieces_and_is_kept(workload, within):
    fabric, step = workload
    want = loads(fabric, step, Spray().assign(fabric, step))
    exact = SinglePathPlanner("plan-cut").assign(fabric, step)
    loose = SinglePathPlanner("plan-cut", within=within).assign(fabric, step)
    got = loads(fabric, step, loose)
    assert len(loose) <= len(exact)
    assert (got.up <= want.up * (1 + within) + len(step) + 1).all()
    assert (got.down <= want.down * (1 + within) + len(step) + 1).all()
    assert_conserved(step, loose)


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 40),
    s=st.integers(2, 40),
    limit=st.integers(2, 8),
    name=st.sampled_from(["plan-equal", "plan-cut"]),
)
def test_no_flow_has_more_pieces_than_allowed(r, s, limit, name):
    fabric, step = bundle(r, s, s * 1000)
    plan = SinglePathPlanner(name, max_pieces=limit).assign(fabric, step)
    assert plan.pieces_per_flow(r).max() <= limit
    assert_conserved(step, plan)
    if r >= s:  # a cut flow then has at most two pieces: nothing is lost
        want = loads(fabric, step, Spray().assign(fabric, step)).up
        assert (loads(fabric, step, plan).up == want).all()


def test_the_trap_of_coprime_numbers_is_avoided_by_falling_back_to_cuts():
    fabric, step = bundle(15, 16, 16 * 15 * 1000)
    assert len(SinglePathPlanner("plan-equal").assign(fabric, step)) == 240
    assert len(SinglePathPlanner("plan-equal", max_pieces=4).assign(fabric, step)) == 30


# ------------------------------------------------------------------ collectives


def test_collectives_move_what_they_should():
    hosts = np.arange(8)
    sent = {}
    for name in ("ring", "halving_doubling", "recursive_doubling", "all_to_all", "all_gather", "reduce_scatter"):
        steps = collective(name, hosts, 8000)
        total = sum(np.bincount(s.src, weights=s.bytes, minlength=8) * s.repeat for s in steps)
        assert (total == total[0]).all()
        sent[name] = total[0]
    assert sent == {
        "ring": 14000,
        "halving_doubling": 14000,
        "recursive_doubling": 24000,
        "all_to_all": 7000,
        "all_gather": 7000,
        "reduce_scatter": 7000,
    }
    assert collective("halving-doubling", hosts, 8000)[0].bytes[0] == 4000


def test_both_forms_of_all_to_all_have_the_same_flows():
    fabric = LeafSpine(4, 4, 4)
    hosts = place(fabric, 0, "strided")
    one = collective("all_to_all", hosts, 16000)
    many = collective("all_to_all", hosts, 16000, form="permutation")
    assert len(one) == 1 and len(many) == 15
    pairs = {(s, d) for step in many for s, d in zip(step.src, step.dst, strict=True)}
    assert pairs == set(zip(one[0].src, one[0].dst, strict=True)) and len(pairs) == 240
    for step in many:
        assert np.unique(step.src).size == np.unique(step.dst).size == 16


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 16])
def test_double_binary_tree_has_two_trees_without_common_inner_nodes(n):
    up, down = collective("double_binary_tree", np.arange(n), 1000)
    assert len(up) == 2 * (n - 1) and (up.bytes == 500).all()
    inner = [set(up.dst[: n - 1]), set(up.dst[n - 1 :])]
    assert n == 2 or not inner[0] & inner[1]
    for children in (up.src[: n - 1], up.src[n - 1 :]):
        assert np.unique(children).size == n - 1, "all but the root have one parent"
    assert np.bincount(up.dst[: n - 1]).max() <= 2
    assert (down.src == up.dst).all() and (down.dst == up.src).all()


def test_hierarchical_pipeline_and_moe():
    hosts = np.arange(8)
    inside, across = collective("hierarchical", hosts, 8000, group=4)
    assert (inside.src // 4 == inside.dst // 4).all() and inside.repeat == 6 and inside.bytes[0] == 2000
    assert ((across.src - across.dst) % 4 == 0).all() and across.repeat == 2 and across.bytes[0] == 1000
    (stage,) = collective("pipeline", hosts, 500, stages=4)
    assert (stage.dst - stage.src == 2).all() and len(stage) == 6
    traffic = np.arange(64).reshape(8, 8)
    dispatch, combine = collective("moe", hosts, 1, traffic=traffic)
    assert dispatch.bytes.sum() == traffic.sum() - np.trace(traffic)
    assert (dispatch.src == combine.dst).all() and (dispatch.bytes == combine.bytes).all()
    skewed = collective("moe", hosts, "1MB", zipf=1.2, rng=np.random.default_rng(0))[0]
    assert skewed.spread > 1 and skewed.bytes.sum() == pytest.approx(7 * 10**6, rel=0.2)


def test_placements():
    fabric = LeafSpine(4, 2, 4)
    assert place(fabric, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert place(fabric, 6, "strided").tolist() == [0, 4, 8, 12, 1, 5]
    drawn = place(fabric, 6, "random", np.random.default_rng(0))
    assert np.unique(drawn).size == 6


def test_queue_pairs_of_eight_way_splitting():
    fabric = LeafSpine(16, 16, 16)
    job = collective("all_to_all", place(fabric), "64MB")
    assert evaluate(fabric, job, Ecmp(8)).queue_pairs == 2 * 8 * 255  # "more than 4000"
    ring_job = collective("ring", place(fabric), "64MB")
    assert evaluate(fabric, ring_job, Ecmp()).queue_pairs == 2, "126 repeats use the same connections"


def test_published_congestion_ratios():
    """Hashing against spraying over 20 seeds on 16 leaves, 16 spines and 256 hosts."""
    fabric = LeafSpine(16, 16, 16)
    hosts = place(fabric)
    for name, k, low, high in [
        ("all_to_all", 1, 1.17, 1.24),
        ("all_to_all", 8, 1.05, 1.09),
        ("halving_doubling", 1, 4.2, 5.0),
        ("halving_doubling", 8, 1.9, 2.3),
    ]:
        job = collective(name, hosts, "64MB")
        best = ideal(fabric, job)
        seeds = range(3) if name == "all_to_all" else range(20)
        ratio = np.mean([congestion(evaluate(fabric, job, Ecmp(k), seed=seed), best) for seed in seeds])
        assert low < ratio < high, (name, k)


# ------------------------------------------------------------------ bad input


def refused(words: str, function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence and sentence.endswith("."), sentence


def test_bad_fabrics_are_refused_in_one_sentence():
    refused("spines=0", LeafSpine, 4, 0, 4)
    refused("leaves=2.5", LeafSpine, 2.5, 4, 4)
    refused("hosts=0", LeafSpine, 4, 4, 0)
    refused("leaf indices from 0 to 1", LeafSpine, 2, 2, [0, 5])
    refused("a positive number of Gb/s", LeafSpine, 4, 4, 4, uplink=0)
    refused("a positive number of Gb/s", LeafSpine, 4, 4, 4, uplink=np.full((4, 4), -1.0))
    refused("a positive number of Gb/s", LeafSpine, 4, 4, 4, nic=-5)
    refused("4 x 4", LeafSpine, 4, 4, 4, uplink=[1.0, 2.0])
    refused("latency", LeafSpine, 4, 4, 4, latency=float("nan"))
    refused("leaf below 4 and spine below 4", LeafSpine, 4, 4, 4, failed=((0, 9),))
    refused("leaf0 and leaf1 share none", LeafSpine, 4, 2, 4, failed=((0, 0), (1, 1)))
    refused("16 names", LeafSpine, 4, 4, 4, host_names=("a", "b"))


def test_bad_jobs_are_refused_in_one_sentence():
    fabric = LeafSpine(2, 2, 4)
    hosts = place(fabric)
    refused("from 2 to the number of hosts (8)", place, fabric, 9)
    refused("from 2 to the number of hosts", place, fabric, 1)
    refused("did you mean 'packed'", place, fabric, 4, "pakced")
    refused("3 to itself", Step, [3], [3], [10])
    refused("at least 1 for each flow", Step, [0], [1], [0])
    refused("whole numbers", Step, [0], [1], [1.5])
    refused("repeat=0", Step, [0], [1], [1], 0)
    refused("from 0 to 7", evaluate, fabric, [Step([0], [99], [1])], Spray())
    refused("at least one step", evaluate, fabric, [], Spray())
    refused("did you mean 'all_to_all'", collective, "all_to_al", hosts, "1MB")
    refused("a power of two", collective, "halving_doubling", hosts[:6], "1MB")
    refused("bytes='-3'", collective, "ring", hosts, "-3")
    refused("bytes='lots'", parse_bytes, "lots")
    refused("did you mean 'step'", collective, "all_to_all", hosts, "1MB", form="steps")
    refused("option of ring='form'", collective, "ring", hosts, "1MB", form="step")
    refused("a divisor of the number of ranks", collective, "hierarchical", hosts, "1MB", group=3)
    refused("a divisor of the number of ranks", collective, "pipeline", hosts, "1MB", stages=3)
    refused("8 x 8", collective, "moe", hosts, "1MB", traffic=np.ones((2, 2)))
    refused("each on its own host", collective, "ring", [1, 1], "1MB")


def test_bad_policies_are_refused_in_one_sentence():
    refused("did you mean 'plan-lazy'", policy, "plan-lasy")
    refused("only plans have options", policy, "ecmp", bundle="leaf")
    refused("from 1 to 256", Ecmp, 0)
    refused("did you mean 'leaf'", SinglePathPlanner, "plan-cut", "leef")
    refused("one of " + ", ".join(sorted(PLANS)), SinglePathPlanner, "ecmp")
    refused("within", SinglePathPlanner, within=-0.1)
    refused("max_pieces", SinglePathPlanner, max_pieces=1)
    fabric = LeafSpine(2, 2, 4)
    unequal = Step([0, 1], [4, 5], [100, 200])
    refused("differ in size", SinglePathPlanner("plan-equal", "leaf").assign, fabric, unequal)
    refused("differ in size", SinglePathPlanner("plan-whole").assign, fabric, unequal)
    lame = LeafSpine(2, 2, 4, uplink=[[100, 400], [400, 400]])
    refused("differ in capacity", SinglePathPlanner("plan-equal").assign, lame, Step([0], [4], [10]))
    refused("links are down", SinglePathPlanner("plan-whole").assign, lame, Step([0], [4], [10]))


def test_too_many_connections_for_fair_rates_are_refused():
    fabric = LeafSpine(16, 16, 16)
    step = collective("all_to_all", place(fabric), "64MB")[0]
    refused("at most 100000", completion, fabric, step, Ecmp(8).assign(fabric, step))


def test_unequal_sizes_and_capacities_are_noted():
    fabric = LeafSpine(2, 2, 4, uplink=[[100, 400], [400, 400]])
    notes = evaluate(fabric, [Step([0, 1], [4, 5], [100, 200])], policy("plan-cut")).notes
    assert any("differ in size" in note for note in notes) and any("differ in capacity" in note for note in notes)
    assert evaluate(LeafSpine(2, 2, 4), [Step([0], [4], [100])], policy("plan-cut")).notes == ()
