"""Simulated devices, laws that accept independently, and the bench that puts PEARL's schedule on them."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from steersman.benches._latency import Latency, independent_pair
from steersman.benches._schedule import Schedule
from steersman.engine.compare import compare
from steersman.errors import InputError
from steersman.language.pearl import PEARL, expected_tokens


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_the_overlap_of_the_pair_is_the_acceptance(acceptance: float) -> None:
    target, draft = independent_pair(acceptance)
    ids = torch.tensor([[3, 11, 0, 7]])
    with torch.no_grad():
        p, q = (model(ids).logits.softmax(-1) for model in (target, draft))
    assert torch.allclose(torch.minimum(p, q).sum(-1), torch.tensor(acceptance), atol=1e-6)
    assert torch.allclose(p, p[:, :1].expand_as(p)) and torch.allclose(q, q[:, :1].expand_as(q))
    assert int((p[0, 0] == 0).sum()) == 8


def test_tokens_of_the_pair_are_accepted_at_that_rate() -> None:
    target, draft = independent_pair(0.8)
    loop = PEARL(draft, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(1, 1, dtype=torch.long)
    target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=400, do_sample=True, top_k=0, custom_generate=loop
    )
    checked = loop.record.passed + loop.record.rejected
    assert abs(loop.record.acceptance - 0.8) < 4 * np.sqrt(0.8 * 0.2 / checked)


def test_a_forward_takes_the_time_it_is_given_and_no_other_afterwards() -> None:
    model, _ = independent_pair(0.5)
    ids = torch.zeros(1, 1, dtype=torch.long)
    model(ids)
    start = time.perf_counter()
    with Latency(model, 0.03) as device:
        for _ in range(5):
            model(ids)
    assert time.perf_counter() - start >= 0.15 and device.calls == 5
    assert not model._forward_hooks and not model._forward_pre_hooks
    with Latency(model, 0.0) as device:
        model(ids)
    assert device.late == 1


def test_a_trial_of_the_schedule() -> None:
    found = compare(
        Schedule(),
        contenders=["pearl:gamma=2", "pearl", "pearl:gamma=2:variant=sd"],
        grid={"ratio": 2.0, "new_tokens": 12, "t_draft": 2.0},
        seeds=1,
    )
    row, auto, sd = found.rows
    assert row.status == "ok" and row.figures["simulated_ms_per_token"] >= 4 / 2
    by_second = 1e3 / row.figures["simulated_ms_per_token"]
    formula = row.figures["formula"] / (2 * 2e-3)  # a round: two draft steps of 2 ms, or one forward of 4
    assert row.figures["yield_ratio"] == pytest.approx(by_second / formula)
    assert row.figures["formula"] == pytest.approx(expected_tokens(row.figures["accepted"], 2))
    assert 1 <= row.figures["tokens_per_round"] <= 2
    assert {auto.status, sd.status} == {"inapplicable"}


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda: independent_pair(1.5), "acceptance"),
        (lambda: independent_pair(0.5, vocabulary=3), "vocabulary"),
        (lambda: Latency(None, -1), "seconds"),
        (lambda: Latency(None, float("inf")), "seconds"),
        (lambda: compare(Schedule(), contenders=["pearl:gamma=2+pearl:gamma=4"], seeds=1), "methods"),
    ],
)
def test_bad_input(call, parameter: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.parameter == parameter
