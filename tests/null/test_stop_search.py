"""Stops in texts with tokens that are not shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.text.stop_search import StopSearch

Pieces = list[tuple[str, str]]
"""Text that is shown and the hidden token behind it."""


def found(
    pieces: Pieces, stop: list[str], patterns: list[str] | None = None, include: bool = False, least: int = 0
) -> tuple[str, str | None]:
    """The text that goes out and the stop, if the output may end from token ``least`` on."""
    search = StopSearch(stop, patterns or [], include)
    out = ""
    for number, (text, hidden) in enumerate(pieces, 1):
        part, matched = search.feed(text, hidden, number >= least)
        out += part
        if matched is not None:
            return out, matched
    return out + search.finish(), None


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([("ab", ""), ("", "<e>"), ("cd", "")], ["<e>"], ("ab", "<e>")),
        ([("ab", ""), ("", "<e>"), ("cd", "")], ["b<e"], ("a", "b<e")),
        ([("ab", ""), ("", "<e>"), ("cd", "")], ["e>c"], ("ab", "e>c")),
        ([("ab", ""), ("", "<e>"), ("cd", "")], ["bc"], ("a", "bc")),  # what is shown holds no stop string either
        ([("ab", ""), ("", "<e>"), ("", "<f>"), ("cd", "")], ["b<e><f>c"], ("a", "b<e><f>c")),
        ([("ab", ""), ("", "<e>"), ("cd", "")], ["b<e>x", "<f>"], ("abcd", None)),
        ([("", "<e>"), ("ab", ""), ("", "<e>"), ("ab", "")], ["ab<e>ab"], ("", "ab<e>ab")),
        ([("ab", ""), ("", "<e>"), ("bcd", "")], ["abb", "<e>b"], ("", "abb")),
    ],
)
def test_hidden_tokens(pieces: Pieces, stop: list[str], expected: tuple[str, str | None]) -> None:
    assert found(pieces, stop) == expected
    if expected[1] is not None:
        shown = "".join(text for text, _ in pieces)
        assert shown.startswith(found(pieces, stop, include=True)[0])


def test_patterns_see_hidden_tokens() -> None:
    pieces = [("ab1", ""), ("", "<e>"), ("cd", "")]
    assert found(pieces, [], [r"\d<e>"]) == ("ab", r"\d<e>")
    assert found(pieces, [], [r"\dc"]) == ("ab", r"\dc")
    assert found(pieces, ["<e>"], [r"x+"]) == ("ab1", "<e>")


@pytest.mark.parametrize("patterns", [[], ["S[T]OP"]])
def test_a_stop_that_begins_before_the_output_may_end(patterns: list[str]) -> None:
    stop = [] if patterns else ["STOP"]
    pieces = [(char, "") for char in "STOPxy"]
    assert found(pieces, stop, patterns, least=2) == ("", (stop + patterns)[0])
    assert found(pieces, stop, patterns, least=4) == ("", (stop + patterns)[0])
    assert found(pieces, stop, patterns, least=5) == ("STOPxy", None)
    again = [(char, "") for char in "STOPxSTOPy"]
    assert found(again, stop, patterns, least=5) == ("STOPx", (stop + patterns)[0])


_TEXT = st.text("ab<>", max_size=3)


@given(
    st.lists(st.tuples(_TEXT, st.sampled_from(["", "", "<a>", "b>"])), max_size=8),
    st.lists(st.text("ab<>", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 6),
)
def test_any_text_and_any_stops(pieces: Pieces, stop: list[str], least: int) -> None:
    """Against a search of both whole texts after each token."""
    shown = written = ""
    end: int | None = None
    expected_text = "".join(text for text, _ in pieces)
    for number, (text, hidden) in enumerate(pieces, 1):
        before_shown, before_written = len(shown), len(written)
        shown += text
        written += text + hidden
        if number >= least and (_ends(shown, stop, before_shown) or _ends(written, stop, before_written)):
            end = number
            break
    out, matched = found(pieces, stop, least=least)
    assert (matched is None) == (end is None)
    assert expected_text.startswith(out)
    if end is None:
        assert out == expected_text
    else:
        assert matched in stop
        assert len(out) <= len(shown)


def _ends(text: str, stop: list[str], since: int) -> bool:
    """Whether a stop string ends behind character ``since``."""
    return any(text[:i].endswith(each) for each in stop for i in range(since + 1, len(text) + 1))
