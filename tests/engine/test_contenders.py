"""Contenders: text <-> parts <-> JSON."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steersman import catalog
from steersman.engine.contenders import Contender, Part, checked_knobs, code_line, parse, parse_list
from steersman.errors import InputError

# An alias of a method, like "ag", is read as the method.
names = st.from_regex(r"\A[a-z][a-z0-9-]{0,8}\Z").filter(lambda name: catalog.resolve_alias(name) == name)
knobs = st.dictionaries(
    st.from_regex(r"\A[a-z][a-z_]{0,6}\Z"),
    st.one_of(
        st.integers(-1000, 1000),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.none(),
        st.from_regex(r"\A[a-z][a-z0-9]{0,6}\Z").filter(lambda t: t not in ("inf", "null", "true", "false")),
        st.sampled_from(["5", "1.5", "true"]),  # text that looks like JSON stays text
    ),
    max_size=3,
)


@given(st.lists(st.builds(Part, names, knobs), min_size=1, max_size=3))
def test_text_and_json_round_trip(parts):
    contender = Contender(tuple(parts))
    assert parse(contender.label) == contender
    assert Contender.from_json(contender.to_json()) == contender


def test_values_are_json_where_they_are_json():
    (part,) = parse('a:i=3:f=0.5:b=true:n=null:t=word:l=[1,2]:q="3"').parts
    assert part.knobs == {"i": 3, "f": 0.5, "b": True, "n": None, "t": "word", "l": [1, 2], "q": "3"}


def test_commas_in_brackets_do_not_separate():
    assert [c.label for c in parse_list("a:l=[1,2],b")] == ["a:l=[1, 2]", "b"]


@pytest.mark.parametrize("text", ["", "a+", "+a", "a:k", "a:=1", "a:k=1:k=2", "a,a"])
def test_bad_text_is_refused(text):
    with pytest.raises(InputError, match="methods"):
        parse_list(text)


def test_knobs_are_checked_against_the_signature():
    def build(alpha: float = 0.2, top_k: int = 5) -> None: ...

    assert checked_knobs(build, Part("m", {"alpha": 1})) == {"alpha": 1}
    with pytest.raises(InputError, match="top_k"):
        checked_knobs(build, Part("m", {"topk": 1}))


def test_code_line_fills_in_the_knobs():
    assert code_line("F.from_config(c{, knobs})", {"order": 3}) == "F.from_config(c, order=3)"
    assert code_line("F.from_config(c{, knobs})", {}) == "F.from_config(c)"
    assert code_line("g(do_sample=True, top_p={top_p=0.95})", {"top_p": 0.5}) == "g(do_sample=True, top_p=0.5)"
    assert code_line("g(do_sample=True, top_p={top_p=0.95})", {}) == "g(do_sample=True, top_p=0.95)"
    assert code_line("M({knobs})", {"a": 0.2, "t": "x"}) == "M(a=0.2, t='x')"


def test_a_callable_as_value_needs_no_quotes():
    for text in ("fk:n=4:reward=judge.py:score", "fk:reward=judge.py:score:n=4", 'fk:n=4:reward="judge.py:score"'):
        (part,) = parse(text).parts
        assert part.knobs == {"reward": "judge.py:score", "n": 4}
        assert parse(str(part)).parts == (part,)
