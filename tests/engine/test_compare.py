"""The one loop: pairing, order, failures, resume, kills."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from steersman.engine import rows as rows_module
from steersman.engine.compare import compare, expand
from steersman.engine.comparison import Comparison
from steersman.engine.rows import RunFolder, read_rows
from steersman.errors import InputError, OutputError
from tests.engine.toy import ToyBench


@pytest.fixture
def subject(tmp_path: Path) -> str:
    path = tmp_path / "subject.txt"
    path.write_text("what is worked on")
    return str(path)


def run(subject: str, out: Path, **kwargs):
    bench = kwargs.pop("bench", None) or ToyBench()
    options = {"contenders": "constant:value=1,constant:value=2", "grid": {"calls": [1, 2]}, "seeds": 3} | kwargs
    return compare(bench, subject, out=out, **options)


def signature(rows) -> dict:
    return {r.key: (r.contender, r.setting["calls"], r.seed, r.status, r.figures, r.per_item) for r in rows}


def test_contenders_share_their_noise(subject, tmp_path):
    comparison = run(subject, tmp_path / "a")
    for calls in (1, 2):
        one, two = comparison.paired("noise", "constant:value=1", "constant:value=2", calls=calls)
        assert np.array_equal(one, two)
        assert len(set(one)) == 3  # and seeds differ
    one, two = comparison.paired("error", "constant:value=1", "constant:value=2", calls=1)
    np.testing.assert_allclose(two - one, 1.0, atol=1e-12)


def test_trials_are_interleaved_and_the_first_rotates(subject, tmp_path):
    bench = ToyBench()
    run(subject, tmp_path / "a", bench=bench, grid={"calls": [1]})
    assert [name for name, _, _ in bench.order] == ["1", "2", "2", "1", "1", "2"]
    assert bench.loads == 1


def test_every_row_is_on_disk_when_the_next_trial_starts(subject, tmp_path):
    counts = []

    class Watching(ToyBench):
        def trial(self, h, setting, rng, log):
            counts.append(len(read_rows(tmp_path / "a")))
            return super().trial(h, setting, rng, log)

    run(subject, tmp_path / "a", bench=Watching())
    assert counts == list(range(12))


def test_rows_are_synced(subject, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(rows_module.os, "fsync", lambda number: synced.append(number))
    run(subject, tmp_path / "a")
    assert len(synced) == 12


def test_a_failed_trial_leaves_the_others_and_says_why(subject, tmp_path):
    comparison = run(subject, tmp_path / "a", grid={"calls": [1], "mode": "fail"})
    assert [r.status for r in comparison.rows].count("failed") == 3
    row = comparison.failed[0]
    assert "NaN at step 3" in row.error and row.contender == "constant:value=2" and not row.figures
    assert "Traceback" in (tmp_path / "a" / "errors" / f"{row.key}.txt").read_text()
    assert len(comparison.select("constant:value=1")) == 3


def test_failed_rows_run_again_on_resume(subject, tmp_path):
    run(subject, tmp_path / "a", grid={"calls": [1], "mode": "fail"})

    class Mended(ToyBench):
        def trial(self, h, setting, rng, log):
            return super().trial(h, {**setting, "mode": "plain"}, rng, log)

    comparison = run(subject, tmp_path / "a", bench=Mended(), grid={"calls": [1], "mode": "fail"}, resume=True)
    assert not comparison.failed and len(comparison.rows) == 6
    assert len((tmp_path / "a" / "results.jsonl").read_text().splitlines()) == 9  # appended, nothing rewritten


def test_inapplicable_is_not_failed(subject, tmp_path):
    comparison = run(subject, tmp_path / "a", contenders="constant:value=1:least=2,constant:value=2")
    short = [r for r in comparison.rows if r.status == "inapplicable"]
    assert {r.setting["calls"] for r in short} == {1} and len(short) == 3 and short[0].error == "needs more calls"


def test_interrupt_keeps_rows_and_resume_ends_the_same(subject, tmp_path):
    whole = run(subject, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(subject, tmp_path / "cut", grid={"calls": [1, 2], "mode": "interrupt"})
    assert len(read_rows(tmp_path / "cut")) == 1
    assert not list((tmp_path / "cut" / "items").glob("*.partial"))
    del whole


def _forked(subject: str, out: Path) -> None:
    os.setsid()
    run(subject, out, contenders="constant:value=1:nap=0.004,constant:value=2:nap=0.004", seeds=40, resume=out.exists())


def test_twenty_kills_at_random_moments_lose_nothing(subject, tmp_path):
    stacks = "constant:value=1:nap=0.004,constant:value=2:nap=0.004"
    whole = run(subject, tmp_path / "whole", contenders=stacks, seeds=40)
    random.seed(0)
    context = multiprocessing.get_context("fork")
    out, seen, kills = tmp_path / "killed", {}, 0
    for turn in range(20):
        child = context.Process(target=_forked, args=(subject, out))
        child.start()
        time.sleep(random.uniform(0.0, 0.12))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if not (out / "config.json").exists():
            continue  # killed before the folder was made: nothing to keep
        now = signature(read_rows(out))
        assert seen.items() <= now.items(), f"kill {turn} lost rows"
        seen = now
    assert kills >= 10
    comparison = run(subject, out, contenders=stacks, seeds=40, resume=out.exists())
    assert signature(comparison.rows) == signature(whole.rows)
    for row in comparison.rows:
        assert row.items and (out / row.items / "picture.npz").is_file()


def test_a_torn_last_line_is_dropped(subject, tmp_path):
    whole = run(subject, tmp_path / "a")
    path = tmp_path / "a" / "results.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-25])
    assert len(read_rows(tmp_path / "a")) == 11
    again = run(subject, tmp_path / "a", resume=True)
    assert signature(again.rows) == signature(whole.rows)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_full_disk_is_one_sentence_and_loses_nothing(subject, tmp_path, monkeypatch):
    real, calls = rows_module.os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(rows_module.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run(subject, tmp_path / "a")
    assert len(read_rows(tmp_path / "a")) == 4
    monkeypatch.setattr(rows_module.os, "fsync", real)
    assert len(run(subject, tmp_path / "a", resume=True).rows) == 12


def test_a_used_folder_is_refused_unless_resumed(subject, tmp_path):
    run(subject, tmp_path / "a")
    with pytest.raises(InputError, match="--resume"):
        run(subject, tmp_path / "a")


def test_a_foreign_folder_and_a_file_are_refused(subject, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"config\.json"):
        run(subject, tmp_path / "mine", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder"):
        run(subject, tmp_path / "file")


def test_resume_with_another_subject_is_refused(subject, tmp_path):
    run(subject, tmp_path / "a")
    Path(subject).write_text("changed")
    with pytest.raises(InputError, match="fingerprint"):
        run(subject, tmp_path / "a", resume=True)


def test_two_runs_never_share_a_folder(subject, tmp_path):
    config = {"bench": "toy", "subject": subject, "fingerprint": "x"}
    first = RunFolder(tmp_path / "a", config, resume=False)
    with pytest.raises(InputError, match="no other run"):
        RunFolder(tmp_path / "a", config, resume=True)
    first.close()


def test_resume_adds_seeds_contenders_and_settings(subject, tmp_path):
    run(subject, tmp_path / "a", seeds=2)
    bench = ToyBench()
    comparison = run(
        subject, tmp_path / "a", bench=bench, contenders="constant:value=3", grid={"calls": [2]}, seeds=3, resume=True
    )
    assert len(bench.order) == 3
    assert comparison.contenders == ["constant:value=3", "constant:value=1", "constant:value=2"]
    assert len(comparison.rows) == 8 + 3


def test_unmountable_stacks_are_refused_before_anything_runs(subject, tmp_path):
    bench = ToyBench()
    with pytest.raises(InputError, match="only constant"):
        run(subject, tmp_path / "a", bench=bench, contenders="constant:value=1,constant:value=1+constant:value=2")
    assert not bench.order and not (tmp_path / "a").exists()
    stacked = run(subject, tmp_path / "b", contenders="constant:value=1+offset:value=2")
    assert abs(stacked.rows[0].figures["error"] - 3) < 5


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"contenders": "constnt"}, "constant"),
        ({"contenders": "constant:valeu=1"}, "value"),
        ({"contenders": ""}, "methods"),
        ({"contenders": "constant,constant"}, "twice"),
        ({"grid": {"calls": [0]}}, "calls"),
        ({"grid": {"calls": [-1]}}, "calls"),
        ({"grid": {"calls": ["1.5"]}}, "calls"),
        ({"grid": {"calls": []}}, "calls"),
        ({"grid": {"calls": [1, 1]}}, "calls"),
        ({"grid": {"calls": [99]}}, "calls"),
        ({"grid": {"cals": [1]}}, "calls"),
        ({"grid": {"mode": ["plain", "fail"]}}, "mode"),
        ({"grid": {"mode": "loud"}}, "mode"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [-1]}, "seed"),
        ({"seeds": [1, 1]}, "seeds"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(subject, tmp_path, kwargs, named):
    with pytest.raises(InputError) as caught:
        run(subject, tmp_path / "a", **kwargs)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_expand_spans_the_grid():
    settings, varying = expand(ToyBench.knobs, {"calls": [1, 2, 3]})
    assert [s["calls"] for s in settings] == [1, 2, 3] and varying == {"calls": [1, 2, 3]}
    assert all(s["mode"] == "plain" for s in settings)


def test_a_comparison_can_be_loaded_without_its_run(subject, tmp_path, monkeypatch):
    from steersman import catalog

    whole = run(subject, tmp_path / "a")
    monkeypatch.setattr(catalog, "bench", lambda name: ToyBench())
    loaded = Comparison.load(tmp_path / "a")
    assert signature(loaded.rows) == signature(whole.rows)
    assert list(loaded.to_pandas()["contender"]) == [r.contender for r in whole.rows]
    with pytest.raises(LookupError, match="error"):
        loaded.values("eror", "constant:value=1")


def test_non_finite_figures_survive_the_file(subject, tmp_path):
    class Odd(ToyBench):
        def trial(self, h, setting, rng, log):
            return {"error": float("nan"), "noise": float("inf")}

    comparison = run(subject, tmp_path / "a", bench=Odd())
    rows = read_rows(tmp_path / "a")
    assert np.isnan(rows[0].figures["error"]) and np.isinf(rows[0].figures["noise"])
    for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert len(comparison.rows) == 12


def test_named_files_are_part_of_the_key(subject, tmp_path):
    from steersman.engine.compare import row_key
    from steersman.engine.contenders import parse

    judge = tmp_path / "judge.py"
    judge.write_text("def f(): ...")
    stack = parse("constant")
    before = row_key("toy", "x", stack, {"judge": f"{judge}:f"}, 0)
    judge.write_text("def f(): return 1")
    assert row_key("toy", "x", stack, {"judge": f"{judge}:f"}, 0) != before


def test_pairs_are_refused_where_one_side_failed(subject, tmp_path):
    class Odd(ToyBench):
        def trial(self, h, setting, rng, log):
            if rng.base == 1 and h["parts"][0][1]["value"] == 2:
                raise ValueError("diverged")
            return super().trial(h, setting, rng, log)

    comparison = run(subject, tmp_path / "a", bench=Odd())
    with pytest.raises(LookupError, match="constant:value=2 failed with seed 1"):
        comparison.paired("error", "constant:value=1", "constant:value=2", calls=1)
