"""The report as text: what it says, and that nothing in it can run or load anything."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from steersman.engine.comparison import Comparison
from steersman.errors import InputError, OutputError
from steersman.report import blocks as b
from steersman.report.html import MOST_COLUMNS, render, write_report
from tests.report.toy import ToyBench, comparison_of, exhibits_of, fabric_of, rows_of

EVIL = "</td><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_well_formed_and_loads_nothing(comparison: Comparison):
    page = Page(render(comparison, exhibits_of(comparison.contenders)))
    assert page.open == []
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name in ("src", "data", "action", "poster", "srcset"):
            if name in attributes:
                assert (attributes[name] or "").startswith("data:image/png;base64,"), (tag, attributes)
        if "href" in attributes and tag != "a":
            assert attributes["href"] == "data:," or attributes["href"].startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert page.all("iframe") == page.all("object") == page.all("base") == []
    style = render(comparison).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_the_policy_allows_only_the_pages_own_script(comparison: Comparison):
    page = Page(render(comparison))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def test_it_says_what_was_found(comparison: Comparison):
    text = Page(render(comparison)).text
    assert "plms is best at every budget" in text
    assert "on digits at calls 5, 10 and 20" in text and "8 seeds each; 87 of 96 rows went well" in text
    assert "2.031 ± 0.071 frechet" in text
    assert "Heun needs an even number of calls" in text and "the network returned NaN at step 7" in text
    assert "steersman compare sampling --methods ddim,plms --calls 5,10,20 --seeds 8" in text
    assert "Linux x86_64; 2 cores" in text and "torch 2.13.0" in text and "2026-11-24 03:25 UTC" in text
    assert "DdimScheduler(order=2)" in text


def test_every_exhibit_is_there(comparison: Comparison):
    page = Page(render(comparison, exhibits_of(comparison.contenders)))
    for title in (
        "Images from the same noise",
        "Continuations",
        "Link loads",
        "Samples",
        "Who works when",
        "Loss",
        "Flows",
    ):
        assert title in page.text
    assert "Mind: The classifier saw the same digits." in page.text
    marked = [a.get("class") for a in page.all("mark")]
    assert marked.count("loop") == 2 and marked.count("steered") == 2  # in the legend and in the text
    images = [a for a in page.all("img") if a.get("class") == "pixels"]
    assert len(images) == 3 * 4 * MOST_COLUMNS
    assert images[0]["alt"] == "ddim, class 0"
    assert f"The first {MOST_COLUMNS} of 20." in page.text
    assert "2600 more characters" in page.text


def test_hostile_text_stays_text(tmp_path: Path):
    label = "ddim"
    rows = rows_of([label, "plms"])
    for row in rows[:3]:
        row.status, row.figures, row.error = "failed", {}, EVIL
    rows[5].setting["calls"] = EVIL
    evil = [label, EVIL]
    for row in rows:
        if row.contender == "plms":
            row.contender = EVIL
    comparison = comparison_of([], [label], tmp_path)
    comparison = Comparison(
        comparison.bench,
        rows,
        {
            **comparison.config,
            "contenders": evil,
            "parts": {label: [{"id": label, "knobs": {"k": EVIL}}], EVIL: [{"id": EVIL, "knobs": {}}]},
            "grid": {"calls": [5, 10, 20, EVIL]},
            "subject": EVIL,
            "command": EVIL,
            "machine": {"system": EVIL, "gpu": EVIL},
            "versions": {EVIL: EVIL},
            "seeds": list(range(8)),
        },
        Path(EVIL.replace("/", "_")),
    )
    exhibits = [
        b.ImageGrid(EVIL, {EVIL: np.zeros((1, 4, 4))}, [EVIL], EVIL, {EVIL: EVIL}),
        b.SideBySide(EVIL, [b.Answers(EVIL, {EVIL: b.Text(EVIL, [b.Span(3, 20, "bad", EVIL)], EVIL)})], EVIL),
        b.LoadMap(EVIL, {EVIL: np.ones((2, 2))}, unit=EVIL, caption=EVIL),
        b.Scatter(EVIL, {EVIL: np.zeros((3, 2))}, caption=EVIL),
        b.Timeline(EVIL, {EVIL: {EVIL: [b.Activity(0, 1, note=EVIL)]}}),
        b.Curves(EVIL, {EVIL: b.Line([1, 2], [1, 2])}, EVIL, EVIL, band=EVIL),
        b.TableBlock(EVIL, [EVIL, "contender"], [[EVIL, EVIL]]),
        b.Note(EVIL, "warning", EVIL),
    ]
    page = Page(render(comparison, exhibits))
    assert page.open == []
    assert len(page.scripts) == 1 and "evil.example" not in page.scripts[0]
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "evil.example" not in (attributes.get("src") or "") + (attributes.get("href") or "")
        assert "evil.example" not in (attributes.get("style") or "")
    assert page.text.count("alert('x')") > 20


def test_a_card_with_a_hostile_address_gets_no_link(comparison: Comparison, monkeypatch):
    from steersman.report import html, summary

    monkeypatch.setattr(html, "recipe", lambda c, n: summary.Recipe((), "", (("Paper", "javascript:alert(1)"),)))
    assert "javascript:" not in render(comparison)


@pytest.mark.parametrize("seeds", [1, 3])
def test_few_seeds_say_so(tmp_path: Path, seeds):
    text = Page(render(comparison_of(rows_of(["ddim", "plms"], seeds=seeds), ["ddim", "plms"], tmp_path))).text
    assert "plms leads at every budget; the seeds are too few to be sure" in text
    assert "too few seeds to tell" in text and "with fewer than five seeds there are no intervals" in text
    assert "±" not in text


@pytest.mark.parametrize("seeds", [3, 8])
def test_a_tie_is_no_lead(tmp_path: Path, seeds):
    from steersman.report import html, summary

    def headline(**ahead: float) -> str:
        rows = rows_of(["a", "b", "c"], [10, 20], seeds)
        for row in rows:
            row.figures["frechet"] = 3.0 - ahead.get(row.contender, 0.0) + 0.1 * row.seed
        comparison = comparison_of(rows, ["a", "b", "c"], tmp_path)
        return html._headline(comparison, summary.picks(comparison))

    assert headline() == "Nothing differs in frechet at every budget"
    unsure = " at every budget; the seeds are too few to be sure"
    assert headline(a=0.5, b=0.5) == "Nothing is better than a" + (unsure if seeds == 3 else " at any budget")
    assert headline(b=0.5) == ("b leads" + unsure if seeds == 3 else "b is best at every budget")


def test_one_contender(tmp_path: Path):
    text = Page(render(comparison_of(rows_of(["ddim"]), ["ddim"], tmp_path))).text
    assert "ddim on digits" in text and "nothing to compare it with here" in text
    assert "★ best:" not in text


def test_nothing_ran_yet(tmp_path: Path):
    page = Page(render(comparison_of([], ["ddim", "plms"], tmp_path, grid={"calls": [5]}, seeds=[0, 1])))
    assert "no row has run yet" in page.text and "4 rows have not run" in page.text
    assert page.open == []


def test_everything_failed(tmp_path: Path):
    rows = rows_of(["ddim", "plms"])
    for row in rows:
        row.status, row.figures, row.error = "failed", {}, "the network returned NaN at step 7"
    page = Page(render(comparison_of(rows, ["ddim", "plms"], tmp_path)))
    assert "0 of 48 rows went well" in page.text and "8 seeds" in page.text
    assert "Which to pick" not in page.text


def test_no_contenders_at_all(tmp_path: Path):
    assert "An empty sampling comparison" in Page(render(comparison_of([], [], tmp_path))).text


def test_figures_that_are_not_numbers(tmp_path: Path):
    rows = rows_of(["ddim", "plms"])
    for row in rows:
        if row.contender == "plms" and row.setting["calls"] == 5:
            row.figures["frechet"] = math.nan
        if row.contender == "plms" and row.setting["calls"] == 10 and row.seed < 2:
            row.figures["frechet"] = math.inf
    page = Page(render(comparison_of(rows, ["ddim", "plms"], tmp_path)))
    assert "not a number" in page.text and "2 of 8 not a number" in page.text
    assert "Not considered, for lack of rows: plms." in page.text


def test_a_cost_that_is_a_figure(tmp_path: Path):
    page = Page(render(fabric_of(tmp_path)))
    assert "Nothing is better than plan at any setting" in page.text
    assert "pieces 240" in page.text and "the same as spray at every seed" in page.text
    assert "compare('load-balancing', 'fabric'," in page.text  # no command line is known


def test_many_settings_become_a_table(tmp_path: Path):
    page = Page(render(comparison_of(rows_of(["ddim", "plms"], calls=list(range(5, 17))), ["ddim", "plms"], tmp_path)))
    assert "How sure" in page.text and "16 calls" in page.text


def test_many_contenders(tmp_path: Path):
    names = [f"method-{i}:a_long_knob_name={i}" for i in range(12)]
    page = Page(render(comparison_of(rows_of(names), names, tmp_path)))
    assert "and 6 more, further behind" in page.text


def downloaded(page: Page, name: str) -> str:
    link = next(a["href"] for a in page.all("a") if a.get("download") == name)
    return base64.b64decode(link.split(",", 1)[1]).decode()


def test_the_rows_come_along(comparison: Comparison):
    page = Page(render(comparison))
    record = json.loads(downloaded(page, "comparison.json"))
    assert len(record["rows"]) == 96 and record["config"]["subject"] == "digits"
    table = list(csv.DictReader(io.StringIO(downloaded(page, "rows.csv"))))
    assert len(table) == 96
    row = comparison.rows[0]
    assert float(table[0]["frechet"]) == row.figures["frechet"] and table[0]["contender"] == row.contender


def test_a_spreadsheet_sees_no_formula(tmp_path: Path):
    rows = rows_of(["ddim"], seeds=1)
    rows[0].status, rows[0].error = "failed", "=cmd|'/c calc'!A1"
    table = downloaded(Page(render(comparison_of(rows, ["ddim"], tmp_path))), "rows.csv")
    assert "'=cmd" in table


def test_large_images_and_large_runs_stay_small(comparison: Comparison):
    rng = np.random.default_rng(0)
    grid = b.ImageGrid("t", {name: rng.random((20, 384, 384, 3), dtype=np.float32) for name in comparison.contenders})
    for row in comparison.rows:
        row.per_item = {"frechet": [0.123456789] * 5000}
    text = render(comparison, [grid])
    assert len(text) < 9_000_000
    assert "the values behind each figure are in the run folder" in text


def test_images_keep_their_pixels(comparison: Comparison):
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8) * 4
    page = Page(render(comparison, [b.ImageGrid("t", {"ddim": image})]))
    (source,) = [a["src"] for a in page.all("img")]
    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(source.split(",")[1])), format="png")
    assert np.array_equal(np.rint(pixels[..., 0] * 255).astype(np.uint8), image[0])


def test_overlapping_spans_lose_no_text(comparison: Comparison):
    text = "abcdefghij"
    spans = [b.Span(2, 6), b.Span(4, 8, "steered"), b.Span(9, 99)]
    block = b.SideBySide("t", [b.Answers("p", {"ddim": b.Text(text, spans)})])
    html = render(comparison, [block])
    body = re.search(r'<p class="text">(.*?)</p>', html, re.S)
    assert body and re.sub("<[^>]+>", "", body[1]) == text
    assert "<mark" in body[1] and ">cdef</mark>" in body[1] and ">gh</mark>" in body[1]


def test_only_blocks_are_exhibits(comparison: Comparison):
    with pytest.raises(InputError, match="exhibits"):
        render(comparison, ["<b>text</b>"])


def test_writing(comparison: Comparison, tmp_path: Path):
    path = write_report(comparison, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_report(comparison, tmp_path / "file" / "report.html")


def test_lone_surrogates_can_be_written(comparison: Comparison, tmp_path: Path):
    write_report(comparison, tmp_path / "r.html", [b.Note("broken \ud800 text")])
    assert "broken ? text" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_bench_needs_only_its_contract(comparison: Comparison):
    class Bare(ToyBench):
        headline = ("frechet", "seconds")
        figures = {k: v for k, v in ToyBench.figures.items() if k in ("frechet", "seconds")}

    for row in comparison.rows:
        row.figures = {k: v for k, v in row.figures.items() if k in Bare.figures}
    comparison.bench = Bare()
    assert "seconds" in Page(render(comparison)).text


@pytest.mark.parametrize(
    ("at_20", "seeds", "headline"),
    [
        (0.0, 8, "b is never clearly beaten"),
        (-1.0, 8, "Which one is best depends on the budget"),
        (-1.0, 3, "The seeds are too few to say which one is best"),
    ],
)
def test_a_change_of_leader_within_noise_is_no_finding(tmp_path, at_20, seeds, headline):
    from steersman.report import html, summary

    rows = rows_of(["a", "b"], [10, 20], seeds)
    for row in rows:
        wobble = 0.2 * np.random.default_rng([row.seed, row.setting["calls"]]).normal()
        lead = {10: 0.6, 20: at_20 - 0.01}[row.setting["calls"]]  # of b over a
        row.figures["frechet"] = 3.0 + (wobble - lead if row.contender == "b" else 0.0)
    comparison = comparison_of(rows, ["a", "b"], tmp_path)
    if at_20 == 0.0:  # a leads at 20 calls by less than the noise
        for row in rows:
            if row.setting["calls"] == 20 and row.contender == "b":
                row.figures["frechet"] = 3.01 + 0.2 * (-1) ** row.seed
    assert html._headline(comparison, summary.picks(comparison)) == headline
