"""Plots: colours, well-formed SVG, and data that is missing or hostile."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from steersman.engine.comparison import Comparison
from steersman.report import plots
from steersman.report.blocks import Activity, Curves, ImageGrid, Line, Timeline
from steersman.report.theme import DARK, LIGHT, MARKERS, SHAPES, marks
from tests.report.toy import comparison_of, fabric_of, rows_of

HOSTILE = '</svg><script>alert(1)</script>$\\frac{$ "&\x00'
SVG = "{http://www.w3.org/2000/svg}"


def linear(colour: str) -> np.ndarray:
    """Linear RGB of "#rrggbb"."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""
    x, y = (float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (max(x, y) + 0.05) / (min(x, y) + 0.05)


def matrix(*numbers: float) -> np.ndarray:
    return np.array(numbers).reshape(3, 3)


TO_LMS = matrix(
    *(0.41222147, 0.53633254, 0.05144599),
    *(0.2119035, 0.68069955, 0.10739696),
    *(0.08830246, 0.28171884, 0.6299787),
)
TO_LAB = matrix(
    *(0.21045426, 0.79361778, -0.00407205),
    *(1.9779985, -2.42859221, 0.45059371),
    *(0.02590404, 0.78277177, -0.80867577),
)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """OKLab (Ottosson, 2020) of linear RGB."""
    lms = np.cbrt(
        np.array(
            [
                [0.41222147, 0.53633254, 0.05144599],
                [0.2119035, 0.68069955, 0.10739696],
                [0.08830246, 0.28171884, 0.6299787],
            ]
        )
        @ rgb
    )
    return (
        np.array(
            [
                [0.21045426, 0.79361778, -0.00407205],
                [1.9779985, -2.42859221, 0.45059371],
                [0.02590404, 0.78277177, -0.80867577],
            ]
        )
        @ lms
    )


# Machado, Oliveira and Fernandes (2009), severity 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": matrix(
        *(0.152286, 1.052583, -0.204868),
        *(0.114503, 0.786281, 0.099216),
        *(-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": matrix(
        *(0.367322, 0.860646, -0.227968),
        *(0.280085, 0.672501, 0.047413),
        *(-0.01182, 0.04294, 0.968881),
    ),
}


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_contenders_stay_apart_for_every_viewer(theme, vision):
    colours = [oklab(np.clip(VISION[vision] @ linear(theme[f"c{i}"]), 0, 1)) for i in range(8)]
    nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(colours, 2))
    assert nearest >= 0.07


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_seen_and_text_is_read(theme):
    for i in range(8):
        assert contrast(theme[f"c{i}"], theme["page"]) >= 3
    for text in ("ink", "muted", "accent", "good", "bad", "warn"):
        assert contrast(theme[text], theme["page"]) >= 4.5
        assert contrast(theme[text], theme["panel"]) >= 4.5


def test_marks_are_distinct_up_to_sixty_four_contenders():
    found = marks(f"contender {i}" for i in range(64))
    assert len({(m.colour, m.marker) for m in found.values()}) == 64
    assert len(MARKERS) == len(SHAPES) == 8


def texts(svg: str) -> str:
    return " ".join(e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text"))


def parsed(text: str) -> ElementTree.Element:
    """An inline plot as a tree (a page's parser knows the namespaces by itself)."""
    names = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return ElementTree.fromstring(text.replace("<svg ", names, 1))


def test_an_inline_plot_has_theme_colours_unique_ids_and_a_label(comparison: Comparison):
    text = plots.inline_svg(plots.quality_plot(comparison, "frechet"), "p7", 'a "b" <c> & \\1')
    tree = parsed(text)
    assert tree.get("role") == "img" and tree.get("aria-label") == 'a "b" <c> & \\1'
    assert all(e.get("id", "p7-").startswith("p7-") for e in tree.iter())
    assert "var(--c0" in text and "var(--ink" in text
    colours = set(re.findall(r"#[0-9a-f]{6}\b", text))
    assert colours <= set(LIGHT.values()), "a colour that no theme can change"
    assert "<style" not in text and "<metadata" not in text


def test_references_inside_a_plot_resolve(comparison: Comparison):
    text = plots.inline_svg(plots.quality_plot(comparison, "frechet"), "p1", "label")
    ids = set(re.findall(r'id="([^"]+)"', text))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used and used <= ids


def test_the_same_plot_twice_is_the_same_text(comparison: Comparison):
    one, two = (plots.inline_svg(plots.quality_plot(comparison, "frechet"), "p", "x") for _ in range(2))
    assert one == two


def test_a_standalone_plot_follows_light_and_dark(comparison: Comparison, tmp_path: Path):
    path = plots.save(lambda theme: plots.quality_plot(comparison, "frechet", theme=theme), tmp_path / "p.svg")
    text = path.read_text()
    ElementTree.fromstring(text)
    assert "prefers-color-scheme:dark" in text and DARK["c0"] in text


def test_a_png(comparison: Comparison, tmp_path: Path):
    path = plots.save(lambda theme: plots.quality_plot(comparison, "frechet", theme=theme), tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_hostile_labels_are_text(tmp_path: Path):
    comparison = comparison_of(rows_of(["ddim", "plms"]), ["ddim", "plms"], tmp_path)
    claims = [{"id": HOSTILE, "verdict": "holds", "effect": 1.0, "interval": [0.5, 1.5], "margin": 0.0}]
    svg = plots.standalone_svg(plots.forest(claims))
    assert "<script" not in svg and "alert(1)" in texts(svg)
    comparison.bench.headline = ("frechet", "seconds")
    block = Curves("t", {HOSTILE: Line([1, 2], [1, 2])}, HOSTILE, HOSTILE)
    svg = plots.standalone_svg(plots.curves_plot(block, marks([HOSTILE])))
    assert "<script" not in svg and "\x00" not in svg
    ElementTree.fromstring(svg)


def test_the_forest_shows_every_kind_of_verdict():
    claims = [
        {"id": "a", "verdict": "holds", "effect": 0.3, "interval": [0.2, 0.4], "margin": 0.1},
        {"id": "b", "verdict": "fails", "effect": -1.0, "interval": [-1.0, -1.0], "margin": 0.0},
        {"id": "c", "verdict": "not shown", "effect": None, "interval": None, "margin": -0.5},
        {"id": "d", "verdict": "not shown", "effect": 0.0, "interval": None, "margin": 0.0},
    ]
    said = texts(plots.standalone_svg(plots.forest(claims)))
    assert "holds (margin 0.1)" in said and "0.3  [0.2, 0.4]" in said and "no effect known" in said
    assert texts(plots.standalone_svg(plots.forest([])))


def test_cost_as_a_figure_and_names_on_the_axis(tmp_path: Path):
    comparison = fabric_of(tmp_path)
    assert "pieces (lower is better)" in texts(plots.standalone_svg(plots.quality_plot(comparison, "congestion")))
    comparison.bench.headline = ("congestion", "collective")
    said = texts(plots.standalone_svg(plots.quality_plot(comparison, "congestion")))
    assert "ring" in said and "all-to-all" in said
    assert "better than ecmp by" in texts(plots.standalone_svg(plots.difference_plot(comparison, "congestion", "ecmp")))


def test_lost_values_leave_gaps(tmp_path: Path):
    rows = rows_of(["ddim", "plms"])
    for row in rows:
        row.figures["frechet"] = float("nan") if row.contender == "plms" else float("inf")
    comparison = comparison_of(rows, ["ddim", "plms"], tmp_path)
    ElementTree.fromstring(plots.standalone_svg(plots.quality_plot(comparison, "frechet")))
    ElementTree.fromstring(plots.standalone_svg(plots.difference_plot(comparison, "frechet", "ddim")))
    block = Curves("t", {"a": Line([1, 2, 3], [1.0, float("nan"), 3.0]), "b": Line([], [])}, "x", "y", log_y=True)
    ElementTree.fromstring(plots.standalone_svg(plots.curves_plot(block, marks(["a", "b"]))))


def test_a_timeline_with_nothing_in_it():
    block = Timeline("t", {"a": {"rank 0": [], "rank 1": [Activity(0.0, 0.0)]}})
    ElementTree.fromstring(plots.standalone_svg(plots.timeline_plot(block, "a", 0.0)))


def test_images_become_rgb_and_lost_pixels_are_marked():
    grey = np.array([[[0.0, 1.0], [np.nan, 0.5]]])
    rgb = plots.as_rgb(grey)
    assert rgb.shape == (1, 2, 2, 3) and rgb.dtype == np.uint8
    assert rgb[0].tolist() == [[[0] * 3, [255] * 3], [[255, 0, 255], [128] * 3]]
    assert plots.as_rgb(np.full((1, 2, 2, 4), 7, np.uint8)).shape == (1, 2, 2, 4)


def test_an_overview_with_and_without_images(comparison: Comparison):
    grid = ImageGrid("t", {"ddim": np.zeros((8, 4, 4)), "plms": np.ones((3, 4, 4))}, setting={"calls": 5})
    assert plots.png(plots.overview(comparison, [grid]), dpi=40).startswith(b"\x89PNG")
    assert plots.png(plots.overview(comparison), dpi=40).startswith(b"\x89PNG")
