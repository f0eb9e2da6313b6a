"""The command line: exit codes, sentences, folders, help."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAM_KEYS = {"id", "title", "paper", "family", "room", "host", "summary", "verbs", "benches"}


def sentence(done: subprocess.CompletedProcess) -> str:
    """Standard error must be one sentence and no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_methods_json_is_the_contract(cli):
    listed = json.loads(cli("methods", "--json").stdout)
    assert listed and all(set(entry) >= PROGRAM_KEYS for entry in listed)


def test_info_and_cite(cli):
    assert "PNDM" in cli("info", "plms").stdout
    assert cli("cite", "pndm").stdout.startswith("@")
    record = json.loads(cli("info", "pndm", "--json").stdout)
    assert record["id"] == "pndm" and "## Errata" in record["text"]


@pytest.mark.parametrize("verb", ["methods", "info", "cite", "compare", "evidence", "apply", "probe"])
def test_help_teaches_by_example(cli, verb):
    done = cli(verb, "--help", env={"COLUMNS": "200"})
    assert done.returncode == 0 and f"steersman {verb}" in done.stdout


def test_the_knobs_of_a_bench_are_its_options(cli):
    shown = cli("compare", "sampling", "--help", env={"COLUMNS": "200"}).stdout
    assert "--calls" in shown and "--seeds" in shown and "pndm" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("info", "pdnm"), "did you mean 'pndm'"),
        (("cite", "nothing"), "method="),
        (("methods", "--room", "difusion"), "did you mean 'diffusion'"),
        (("evidence", "pndm", "--scale", "huge"), "quick, full, gpu"),
        (("evidence", "pndm", "--seed", "-1"), "seed=-1"),
        (("apply", "pndm", "--subject", "digits", "--out", "x"), "a method with apply"),
        (("apply", "mmd-ddm", "--subject", "digits", "--out", "x", "--stepz", "3"), "did you mean 'steps'"),
        (("apply", "mmd-ddm", "--subject", "digits", "--out", "x", "--set", "steps"), "setting=value"),
        (("apply", "mmd-ddm", "--subject", "digts", "--out", "x"), "did you mean 'digits'"),
        (("apply", "mmd-ddm", "--subject", "digits", "--input", "nowhere", "--out", "x"), "exists"),
        (("probe", "pndm", "--subject", "digits", "--out", "x"), "a method with probe"),
        (("probe", "subject", "--subject", "digts"), "did you mean 'digits'"),
        (("compare", "sampling", "--methods", "pdnm"), "did you mean"),
        (("compare", "sampling", "--methods", "pndm:varant=plms"), "variant"),
        (("compare", "sampling", "--calls", "0"), "calls=0"),
        (("compare", "sampling", "--calls", "-5"), "calls=-5"),
        (("compare", "sampling", "--calls", "many"), "calls='many'"),
        (("compare", "sampling", "--seeds", "0"), "seeds=0"),
        (("compare", "sampling", "--subject", "digts"), "did you mean 'digits'"),
        (("compare", "sampling", "--methods", "momentum-decoding"), "runs in: decoding"),
    ],
)
def test_bad_input_is_one_sentence(cli, arguments, named):
    assert named in sentence(cli(*arguments))


@pytest.mark.parametrize("arguments", [("compar",), ("compare", "samplin"), ("compare", "sampling", "--call", "3")])
def test_unknown_words_exit_2_with_a_suggestion(cli, arguments):
    done = cli(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Did you mean" in done.stderr or "compare" in done.stderr


def test_a_used_folder_is_refused(cli, plugin, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    assert "--resume" in sentence(cli("compare", "greetings", "--out", "a", env=plugin))
    assert "new or empty" in sentence(cli("apply", "hello", "-s", "digits", "--out", "a", env=plugin))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.txt"]


def test_an_unwritable_folder_is_refused(cli, plugin, tmp_path):
    # A file where a folder would have to be made is refused by the system for every user, also for root.
    (tmp_path / "file").write_text("")
    assert "could not write" in sentence(cli("compare", "greetings", "--out", "file/a", env=plugin))
    assert "could not write" in sentence(cli("apply", "hello", "-s", "digits", "--out", "file/a", env=plugin))


def test_failed_rows_exit_3_and_keep_the_others(cli, plugin, tmp_path):
    done = cli("compare", "greetings", "-m", "hello:strength=13,silence", "--out", "a", env=plugin)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    assert sum(r["status"] == "failed" for r in rows) == 10 and sum(r["status"] == "ok" for r in rows) == 10
    assert "NaN at step 3" in (tmp_path / "a" / "report.html").read_text()


def test_a_warning_is_one_plain_line_and_comes_once(cli, plugin):
    done = cli("compare", "greetings", "-m", "hello:strength=7", "--json", "--out", "a", env=plugin)
    assert done.returncode == 0 and json.loads(done.stdout)
    told = [line for line in done.stderr.splitlines() if "mind" in line or "arning" in line]
    assert told == ["warning: mind the greeting"]


def test_json_goes_to_standard_output_alone(cli, plugin):
    record = json.loads(cli("compare", "greetings", "--json", "--out", "a", env=plugin).stdout)
    assert len(record["rows"]) == 10 and record["report"] == "a/report.html"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_how_to_resume(plugin, tmp_path, number):
    env = {**os.environ, **plugin, "TINY_NAP": "0.05"}
    arguments = [sys.executable, "-m", "steersman", "compare", "greetings", "--seeds", "40", "--out", "a"]
    child = subprocess.Popen(arguments, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    results = tmp_path / "a" / "results.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (results.exists() and results.stat().st_size):
        time.sleep(0.02)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in errors
    assert "--resume" in errors and "are kept" in errors
    done = subprocess.run([*arguments, "--resume"], cwd=tmp_path, env={**env, "TINY_NAP": "0"}, capture_output=True)
    assert done.returncode == 0
    assert len(results.read_text().splitlines()) == 80


def test_apply_writes_a_whole_artefact(cli, plugin, tmp_path):
    chosen = ["--strength", "2", "--set", "count=1"]
    done = cli("apply", "hello", "-s", "digits", *chosen, "-o", "art", "--json", env=plugin)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["settings"] == {"strength": 2.0, "count": 1} and record["metrics"]["strength"] == 2.0
    assert json.loads((tmp_path / "art" / "artefact.json").read_text()) == record
    assert (tmp_path / "art" / "greeting.txt").read_text() == "hello "
    assert "@misc{hello}" in cli("cite", "art", env=plugin).stdout


def test_apply_refuses_and_leaves_nothing(cli, plugin, tmp_path):
    refused = cli("apply", "hello", "-s", "digits", "--strength", "-1", "-o", "art", env=plugin)
    assert "strength=-1" in sentence_after_log(refused)
    assert "of type int" in sentence(cli("apply", "hello", "-s", "digits", "--count", "x", "-o", "art", env=plugin))
    assert not (tmp_path / "art").exists() and not (tmp_path / "art.partial").exists()


def sentence_after_log(done: subprocess.CompletedProcess) -> str:
    """Like ``sentence``, after lines of progress."""
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_probe_contract(cli, plugin, tmp_path):
    done = cli("probe", "hello", "-s", "digits", "--depth", "4", "-o", "p", "--json", env=plugin)
    record = json.loads(done.stdout)
    assert record["verb"] == "probe" and record["metrics"] == {"depth": 4, "politeness": 0.5}
    assert json.loads((tmp_path / "p" / "probe.json").read_text()) == record
    assert "out=None" in sentence(cli("probe", "hello", "-s", "digits", env=plugin))


def test_probe_subject_tells_what_it_is(cli):
    record = json.loads(cli("probe", "subject", "--subject", "digits", "--json").stdout)
    assert record["kind"] == "reference" and record["parameters"] > 10_000


def test_shell_completion_knows_methods_and_verbs(cli):
    env = {"_STEERSMAN_COMPLETE": "complete_bash", "COMP_WORDS": "steersman info pn", "COMP_CWORD": "2"}
    program = os.path.join(os.path.dirname(sys.executable), "steersman")
    done = subprocess.run([program], env={**os.environ, **env}, capture_output=True, text=True)
    assert "pndm" in done.stdout


def test_help_lists_a_methods_settings(cli, plugin):
    done = cli("apply", "hello", "--help", env=plugin)
    assert done.returncode == 0, done.stderr
    assert "Settings of hello" in done.stdout and "--strength" in done.stdout and "--count" in done.stdout
    assert "Settings of" not in cli("apply", "--help", env=plugin).stdout
    assert "a method with probe" in sentence(cli("probe", "pndm", "--help"))
    assert "did you mean" in sentence(cli("apply", "mmd-dm", "--help"))


@pytest.mark.parametrize(
    "before",
    [
        ["--subject", "docs/base"],
        ["--subject=docs/base"],
        ["-s", "docs/base"],
        ["-sdocs/base"],
        ["--json"],
        ["--resume", "--set", "count=1", "--depth", "4"],
    ],
)
def test_the_method_of_a_help_is_the_first_argument(before):
    from steersman.cli.probe import probe
    from steersman.cli.verbs import with_settings

    shown = with_settings(probe, "probe", ["probe", *before, "multi-draft", "--help"])
    assert "n_drafts" in inspect.signature(shown).parameters
    assert with_settings(probe, "probe", ["probe", *before, "--help"]) is probe


def test_every_setting_of_every_method_is_told():
    from steersman import catalog
    from steersman.cli.verbs import arguments_in
    from steersman.engine.artefacts import RESERVED, function_of

    untold = []
    for card in catalog.cards().values():
        for verb in ("apply", "probe"):
            if getattr(card, verb):
                function = function_of(card, verb)
                told = arguments_in(inspect.getdoc(function) or "")
                names = inspect.signature(function).parameters.keys() - {*RESERVED, "self"}
                untold += [f"{verb} {card.id} --{name}" for name in names if not told.get(name)]
    assert not untold
