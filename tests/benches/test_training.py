"""The training bench: its contenders against each other and against loops in this process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steersman.benches import training
from steersman.engine.bench import Bench
from steersman.engine.compare import compare, expand
from steersman.engine.contenders import parse
from steersman.engine.streams import Streams
from steersman.errors import InputError, TrialError
from steersman.report.blocks import Curves, Note, Timeline
from tests.benches import regression

USER = f"{Path(__file__).parent / 'regression.py'}:factory"
STEPS, WORKERS = 20, 2
BYTES = 8 * sum(p.numel() for p in regression.Net().parameters())
LOCAL, EVERY_STEP, WARM = "local-sgd:every=5", "local-sgd:every=1", "local-sgd:every=5:warmup=10"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """All contenders on the same regression, in real processes."""
    contenders = ["single", "ddp", EVERY_STEP, LOCAL, WARM]
    out = tmp_path_factory.mktemp("training") / "run"
    return compare("training", USER, contenders, {"steps": STEPS, "workers": WORKERS}, [3], out)


def curve(comparison: Any, contender: str) -> dict[str, np.ndarray]:
    (row,) = comparison.select(contender)
    with np.load(row.items_dir(comparison.out) / "curve.npz") as found:
        return dict(found)


def figures(comparison: Any, contender: str) -> dict[str, float]:
    (row,) = comparison.select(contender)
    return row.figures


# --- exact ------------------------------------------------------------------------------------------------


def test_ddp_is_a_single_process_on_the_union_of_the_batches(comparison):
    assert [row.status for row in comparison.rows] == ["ok"] * 5, [row.error for row in comparison.rows]
    ddp, single = curve(comparison, "ddp"), curve(comparison, "single")
    np.testing.assert_allclose(ddp["held_out"], single["held_out"], rtol=1e-12)
    assert single["held_out"][-1] < 0.8 * single["held_out"][0]


def test_local_sgd_that_averages_every_step_is_ddp(comparison):
    # Averaging is linear, and so are SGD's steps, with momentum too.
    one, ddp = curve(comparison, EVERY_STEP), curve(comparison, "ddp")
    np.testing.assert_allclose(one["held_out"], ddp["held_out"], rtol=1e-12)


def test_local_sgd_is_a_plain_loop_over_copies(comparison):
    torch.manual_seed(Streams(3).seed("weights"))
    first, *_, held_out = regression.factory()
    workers = [copy.deepcopy(first) for _ in range(WORKERS)]
    optimizers = [torch.optim.SGD(w.parameters(), lr=0.02, momentum=0.9) for w in workers]
    sources = [regression.batches(k, WORKERS, Streams(3).torch("batches")) for k in range(WORKERS)]
    losses = []

    def average() -> list[torch.Tensor]:
        return [torch.stack(ps).mean(0) for ps in zip(*(w.parameters() for w in workers), strict=True)]

    def measure() -> None:
        mean = copy.deepcopy(first)
        for p, value in zip(mean.parameters(), average(), strict=True):
            p.data = value
        losses.append(np.mean([mean(*batch).item() for batch in held_out]))

    measure()
    for step in range(STEPS):
        for worker, optimizer, source in zip(workers, optimizers, sources, strict=True):
            optimizer.zero_grad()
            worker(*next(source)).backward()
            optimizer.step()
        if step % 5 == 0:
            mean = average()
            for worker in workers:
                for p, value in zip(worker.parameters(), mean, strict=True):
                    p.data = value.clone()
        if step % 2 == 1:
            measure()
    local = curve(comparison, LOCAL)
    assert local["step"].tolist() == list(range(0, STEPS + 1, 2))
    np.testing.assert_allclose(local["held_out"], losses, rtol=1e-12)
    assert abs(losses[-1] - curve(comparison, "ddp")["held_out"][-1]) > 1e-6


def test_warm_up_is_ddp_until_it_ends(comparison):
    warm, ddp = curve(comparison, WARM), curve(comparison, "ddp")
    np.testing.assert_allclose(warm["held_out"][:6], ddp["held_out"][:6], rtol=1e-12)
    assert not np.allclose(warm["held_out"][-1], ddp["held_out"][-1], rtol=1e-9)


def test_everyone_starts_alike_and_sees_the_same_examples(comparison):
    starts = [curve(comparison, c)["held_out"][0] for c in comparison.contenders]
    assert starts == [starts[0]] * 5
    first = []
    for contender in comparison.contenders:
        (row,) = comparison.select(contender)
        with np.load(row.items_dir(comparison.out) / "losses.npz") as found:
            assert found["losses"].shape == ((1 if contender == "single" else WORKERS), STEPS)
            first.append(found["losses"][:, 0].mean())
    np.testing.assert_allclose(first, first[0], rtol=1e-12)


def test_bytes_are_those_of_the_collectives(comparison):
    assert figures(comparison, "single")["payload_mb"] == 0
    # Two workers send 2 (2 - 1) / 2 = 1 times the size; averaging after steps 1, 6, 11 and 16.
    assert figures(comparison, LOCAL)["payload_mb"] * 1e6 == 4 * BYTES
    assert figures(comparison, EVERY_STEP)["payload_mb"] * 1e6 == STEPS * BYTES
    # DDP tells its buckets once, in a few integers.
    assert 0 <= figures(comparison, "ddp")["payload_mb"] * 1e6 - STEPS * BYTES < 200
    for contender in comparison.contenders[1:]:
        found = figures(comparison, contender)
        for name in ("socket_mb", "interface_mb"):
            assert name not in found or found[name] >= found["payload_mb"]
        assert 0 < found["communicating"] <= 1
        assert 0 < found["cpu"] < 2


def test_what_a_row_keeps(comparison):
    for row in comparison.rows:
        assert np.mean(row.per_item["held_out_loss"]) == pytest.approx(row.figures["held_out_loss"])
        assert row.figures["seconds"] > 0 and row.figures["step_ms"] > 0
        assert set(row.figures) <= set(comparison.bench.figures)


def test_exhibits_show_loss_bytes_and_time(comparison):
    note, steps, sent, timeline = comparison.bench.exhibits(comparison)
    assert isinstance(note, Note) and "nothing throttles" in note.text
    assert isinstance(steps, Curves) and list(steps.lines) == comparison.contenders
    assert isinstance(sent, Curves) and "single" not in sent.lines  # it sends nothing
    assert isinstance(timeline, Timeline) and list(timeline.lanes["ddp"]) == ["rank 0", "rank 1"]
    kinds = {c: {a.kind for a in timeline.lanes[c]["rank 1"]} for c in ("ddp", LOCAL)}
    assert kinds == {"ddp": {"compute", "communicate"}, LOCAL: {"compute", "communicate"}}
    assert {a.kind for a in timeline.lanes["single"]["rank 0"]} == {"compute"}


# --- reference subjects --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "start"), [("digits", np.log(10)), ("docs/tiny", np.log(4096))])
def test_reference_subjects_start_from_nothing_and_split_a_batch(spec, start):
    bench = training.TrainingBench()
    subject = bench.subject(spec)
    setting = expand(bench.knobs, {"batch": 4})[0][0]
    made = training.build(subject.task, setting, seed=0)
    again = training.build(subject.task, setting, seed=0)
    for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
    sources = [iter(made.batches(k, 2, Streams(0).torch("batches"))) for k in range(2)]
    parts = [next(source) for source in sources]
    whole = training.joined(parts)
    split = [training.loss_of(made.model, part).item() for part in parts]
    assert np.mean(split) == pytest.approx(training.loss_of(made.model, whole).item(), rel=1e-5)
    assert split[0] != split[1]
    assert training.loss_of(made.model, made.held_out[0]).item() == pytest.approx(start, rel=0.1)


def test_shards_share_out_an_epoch_without_overlap():
    take = training.shards(26, 4)
    sources = [take(k, 3, torch.Generator().manual_seed(1)) for k in range(3)]
    epoch = [torch.stack([next(source) for source in sources]).flatten() for _ in range(2)]
    assert len(set(torch.cat(epoch).tolist())) == 24
    second = torch.stack([next(source) for source in sources]).flatten()
    assert sorted(second.tolist()) != sorted(epoch[0].tolist())


def test_digits_learn_with_two_workers(tmp_path):
    found = compare("training", "digits", "ddp", {"steps": 30, "points": 1}, 1, tmp_path / "run")
    (row,) = found.rows
    assert row.status == "ok", row.error
    assert row.figures["held_out_loss"] < 1.0
    parameters = sum(p.numel() for p in training.DigitClassifier().parameters())
    assert row.figures["payload_mb"] == pytest.approx(30 * 4 * parameters / 1e6, abs=1e-3)


# --- mounting --------------------------------------------------------------------------------------------------


def test_a_method_hooks_or_takes_the_place_of_model_and_optimizer(monkeypatch):
    model, optimizer, *_ = regression.factory()
    other, its_optimizer, *_ = regression.factory()
    hook = object()
    returned = {
        "hook": hook,
        "nothing": None,
        "model": other,
        "optimizer": its_optimizer,
        "both": (other, its_optimizer),
    }

    class FakeCard:
        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> Any:
            return lambda model, optimizer, strength: returned[self.name] if strength == 2 else pytest.fail("knob")

    monkeypatch.setattr(training.catalog, "card", FakeCard)
    expected = {
        "hook": (model, optimizer),
        "nothing": (model, optimizer),
        "model": (other, optimizer),
        "optimizer": (model, its_optimizer),
        "both": (other, its_optimizer),
    }
    for name, (new_model, new_optimizer) in expected.items():
        found = training.applied([{"id": name, "knobs": {"strength": 2}}], model, optimizer)
        assert found[0] is new_model and found[1] is new_optimizer
        assert found[2] == [returned[name]]


def test_it_is_a_bench():
    bench = training.TrainingBench()
    assert isinstance(bench, Bench)
    assert bench.headline[0] in bench.figures and bench.headline[1] in bench.figures
    assert all(parse(name).parts[0].id in bench.parts() for name in bench.baselines())


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contenders", "sentence"),
    [
        ("ddp+local-sgd", "the only one of"),
        ("ddp+single", "the only one of"),
        ("local-sgd:every=0", "every=0 is not allowed"),
        ("local-sgd:every=2.5", "every=2.5"),
        ("local-sgd:warmup=-1", "warmup=-1"),
        ("ddp:bucket_mb=0", "bucket_mb=0"),
        ("local-sgd:evry=2", "did you mean 'every'"),
        ("dpp", "did you mean 'ddp'"),
    ],
)
def test_contenders_that_cannot_run_are_refused_at_once(contenders, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        compare("training", USER, contenders, {}, 1, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("subject", "grid", "sentence"),
    [
        (USER, {"workers": 0}, "workers=0"),
        (USER, {"steps": 0}, "steps=0"),
        (USER, {"batch": 4}, "batch=4 is not allowed: it must be left out"),
        (USER, {"optimizer": "lion"}, "optimizer='lion'"),
        (USER.replace("factory", "nobody"), {}, "a name that regression.py defines"),
        ("digits", {"batch": 601}, "at most 600 with 2 workers"),
        ("digits/classifier-a", {}, "digits, docs/tiny"),
        ("gaussians", {}, "digits, docs/tiny"),
    ],
)
def test_settings_that_cannot_run_are_refused_at_once(subject, grid, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        compare("training", subject, "ddp", grid, 1, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "grid", "sentence"),
    [
        ("short", {}, "rank 0 of 1: the batches ended after 3 of 20 steps"),
        ("wrong", {}, "must return (model, optimizer, batches)"),
        ("overflowing", {}, "rank 0 of 1: the training loss became inf at step 2"),
    ],
)
def test_a_trial_that_goes_wrong_says_where(name, grid, sentence, tmp_path):
    spec = USER.replace("factory", name)
    (row,) = compare("training", spec, "single", {"steps": 20, **grid}, 1, tmp_path / "run").rows
    assert row.status == "failed"
    assert sentence in row.error
    traceback = (tmp_path / "run" / "errors" / f"{row.key}.txt").read_text()
    assert "rank 0 wrote" in traceback  # all of it is kept


def test_a_model_must_give_its_loss():
    with pytest.raises(TrialError, match="must return its loss"):
        training.loss_of(torch.nn.Linear(5, 2), [torch.ones(3, 5)])
