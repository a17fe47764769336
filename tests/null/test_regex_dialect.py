"""Character classes mean what they mean to Python and ECMAScript."""

from __future__ import annotations

import functools
import re
import string
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.params.regex_dialect import translate

llguidance = pytest.importorskip("llguidance")
CHARS = string.printable + "é\x08"


TOKENIZER = llguidance.LLTokenizer("byte")


@functools.lru_cache
def matcher_of(pattern: str) -> Any:
    grammar = f"start: /{llguidance.regex_to_lark(translate(pattern), '')}/"
    matcher = llguidance.LLMatcher(TOKENIZER, grammar)
    assert not matcher.is_error(), (pattern, translate(pattern), matcher.get_error())
    return matcher


def accepts(pattern: str, text: str) -> bool:
    matcher = matcher_of(pattern).deep_copy()
    data = list(text.encode())
    return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())


def expected(pattern: str, text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # sets in sets may mean something one day
        return re.fullmatch(pattern, text) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-z&&[^b-z]]",
        "[[:digit:]]",
        "[^[]",
        "[!-/:-@[-`{-~]",
        "[+--]",
        "[--/]",
        "[a-]",
        "[-a]",
        "[]a]",
        "[^]a]",
        "[a~~b]",
        r"[\]\[]",
        r"[\w-]",
        r"[\b]",
        r"[\x41-\x43]",
        r"\[a\]",
        "x[0-9]",
    ],
)
def test_classes(pattern: str) -> None:
    for char in CHARS:
        for text in (char, f"x{char}", f"{char}]", f"[{char}]"):
            assert accepts(pattern, text) == expected(pattern, text), (pattern, text)


@pytest.mark.parametrize("pattern", ["abc", r"\d+", "(a|b)*", r"a\[b", "[a-c]+x[d-f]"])
def test_what_is_the_same_in_both_stays(pattern: str) -> None:
    assert translate(pattern) == pattern


@given(st.text("cd&~-[]\\:", max_size=8), st.sampled_from("cd&~-[]:x"))
def test_any_class(inner: str, char: str) -> None:
    pattern = f"[{inner}]"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except re.error:
        return
    assert accepts(pattern, char) == expected(pattern, char), (pattern, translate(pattern))


@given(st.text("ab&~-[]^\\", max_size=12))
def test_nothing_breaks_the_translation(pattern: str) -> None:
    assert len(translate(pattern)) >= len(pattern) or r"\x08" in translate(pattern)
