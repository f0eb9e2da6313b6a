"""Blocks refuse what no renderer could show, in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.errors import InputError
from steersman.report.blocks import (
    Activity,
    Answers,
    Curves,
    ImageGrid,
    Line,
    LoadMap,
    Note,
    Scatter,
    SideBySide,
    Span,
    TableBlock,
    Text,
    Timeline,
    loops,
)

ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ImageGrid("t", {}), "images"),
        (lambda: ImageGrid("t", {"a": np.zeros((8, 8))}), "images['a']"),
        (lambda: ImageGrid("t", {"a": np.zeros((1, 8, 8, 2))}), "images['a']"),
        (lambda: ImageGrid("t", {"a": np.zeros((0, 8, 8))}), "images['a']"),
        (lambda: ImageGrid("t", {"a": np.full((1, 8, 8), -1.0)}), "images['a']"),
        (lambda: ImageGrid("t", {"a": np.zeros((1, 8, 8), dtype=int)}), "images['a']"),
        (lambda: Span(3, 3), "span"),
        (lambda: Span(-1, 3), "span"),
        (lambda: Span(0, 3, "purple"), "kind"),
        (lambda: SideBySide("t", []), "items"),
        (lambda: Answers("p", {}), "texts"),
        (lambda: LoadMap("t", {"a": ONES}, {"b": ONES}), "down"),
        (lambda: LoadMap("t", {"a": ONES, "b": np.ones((3, 2))}), "up['b']"),
        (lambda: LoadMap("t", {"a": -ONES}), "up['a']"),
        (lambda: LoadMap("t", {"a": np.full((2, 2), np.inf)}), "up['a']"),
        (lambda: Scatter("t", {"a": np.zeros((4, 3))}), "points['a']"),
        (lambda: Scatter("t", {"a": np.zeros((4, 2))}, target=np.zeros(4)), "points['target']"),
        (lambda: Activity(2.0, 1.0), "activity"),
        (lambda: Activity(0.0, float("nan")), "activity"),
        (lambda: Activity(0.0, 1.0, "sleep"), "kind"),
        (lambda: Timeline("t", {"a": {}}), "lanes['a']"),
        (lambda: Line([1, 2], [1]), "y"),
        (lambda: Line([1, 2], [1, 2], low=[1, 2]), "low"),
        (lambda: Curves("t", {}, "x", "y"), "lines"),
        (lambda: Note("t", "loud"), "level"),
        (lambda: TableBlock("t", [], []), "columns"),
        (lambda: TableBlock("t", ["a"], [[1, 2]]), "rows"),
    ],
)
def test_bad_blocks_are_refused_by_name(make, names):
    with pytest.raises(InputError) as refusal:
        make()
    assert refusal.value.parameter == names


def test_pixels_that_are_not_numbers_are_allowed():
    images = np.zeros((1, 4, 4))
    images[0, 0, 0] = np.nan
    assert ImageGrid("t", {"a": images}).images["a"].shape == (1, 4, 4)


def test_a_loop_is_one_span():
    text = "the cat sat on the mat. the cat sat on the mat. the cat sat on"
    (span,) = loops(text)
    assert text[: span.start] == "the cat sat on the mat. "
    assert text[span.start : span.end] == "the cat sat on the mat. the cat sat on"


def test_no_loop_in_fresh_text():
    assert loops("each of these words is said once and only here") == []


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab ,.", max_size=80), st.integers(1, 5))
def test_loops_lie_inside_the_text_and_do_not_overlap(text, words):
    at = 0
    for span in loops(text, words):
        assert at <= span.start < span.end <= len(text)
        at = span.end + 1


def test_loops_need_words():
    with pytest.raises(InputError, match="words"):
        loops("text", 0)


def test_a_text_holds_its_spans():
    assert Text("abc", [Span(0, 2)]).spans[0].kind == "loop"
