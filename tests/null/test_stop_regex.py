"""Patterns that end a completion, searched in a stream."""

from __future__ import annotations

import re
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from api.stop_regex import MAX_PATTERN_CHARS, StopAutomaton, StopRegexChecker, StopRegexError
from tests.work import count_calls


def search(text: str, stop: list[str], patterns: list[str], include: bool = False) -> tuple[str, str | None]:
    """The definition: the first end of a match, and of those that end there the earliest beginning."""
    for end in range(1, len(text) + 1):
        for begin in range(end):
            for source in (*map(re.escape, stop), *patterns):
                if re.compile(source).fullmatch(text, begin, end):
                    names = [*stop, *patterns]
                    index = [*map(re.escape, stop), *patterns].index(source)
                    return text[: end if include else begin], names[index]
    return text, None


def stream(pieces: list[str], stop: list[str], patterns: list[str], include: bool = False) -> tuple[str, str | None]:
    checker = StopRegexChecker(stop, patterns, include)
    text = ""
    for piece in pieces:
        part, matched = checker.feed(piece)
        text += part
        if matched is not None:
            return text, matched
    return text + checker.finish(), None


ATOMS = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", r"\d", r"\s", r"\w", "ab", "(?:ba)", "(?i:A)", r"\n"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(
    patterns=st.lists(PATTERNS, min_size=1, max_size=2),
    stop=st.lists(st.text("ab", min_size=1, max_size=3), max_size=1),
    pieces=st.lists(st.text("abB1 \n", max_size=4), max_size=6),
    include=st.booleans(),
)
def test_a_stream_is_searched_like_its_whole_text(
    patterns: list[str], stop: list[str], pieces: list[str], include: bool
) -> None:
    assume(not any(re.fullmatch(pattern, "") for pattern in patterns))
    assert stream(pieces, stop, patterns, include) == search("".join(pieces), stop, patterns, include)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"\d+ apples", "I have 12 apples and", "I have "),
        (r"(?m)^Question:", "Question: x", ""),
        (r"(?m)^Question:", "A Question:\nQuestion: x", "A Question:\n"),
        (r"^b", "ab b", "ab b"),
        (r"\Ab", "bb", ""),
        (r"(?i)stop", "please StOp now", "please "),
        (r"(?s)a.b", "xa\nb", "x"),
        (r"a.b", "xa\nb", "xa\nb"),
        (r"[^\W\d_]{3}!", "12 añb!", "12 "),
        (r"(?a)\w+!", "añb!", "añ"),
        (r"(?a)a(?u:\w)!", "aañ!", "a"),
        (r"(?i:A)b", "aB ab", "aB "),
        (r"(?x) a \ b  # a comment", "ab a b", "ab "),
        (r"a{,2}b", "xaaab", "xa"),
        (r"a{x}", "aa a{x}", "aa "),
        (r"[]^-]-", "a-^-", "a-"),
        (r"\101[\102\0]\u0043\N{LATIN SMALL LETTER D}", "xABCd", "x"),
        (r"<\|(?P<name>\w+)\|>", "a <|b|> <|end|>", "a "),
        ("é", "ros\u00e9", "ros"),
    ],
)
def test_what_patterns_find(pattern: str, text: str, expected: str) -> None:
    assert stream(list(text), [], [pattern])[0] == expected
    assert stream([text], [], [pattern])[0] == expected


SYNTAX = (
    *("^", "|", "(", ")", "[", "]", "[^", "(?:", "(?P<n>", "(?#c)", "(?i)", "(?x)", "(?m)", "(?a)", "(?s)", "(?i:"),
    *("(?-i:", "(?x:", "(?a:", "(?u:", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}", "{,}", "{}", "{", "}", "."),
    *(r"\A", r"\d", r"\W", r"\s", r"\S", r"\n", r"\x61", r"\u0062", r"\141", r"\0", r"\.", r"\]", r"\\"),
    *(r"\N{DIGIT ONE}", "a", "b", "B", "1", " ", "\n", "-", "a-b", ",", "#", "é", "É", r"[\b]"),
    *(r"\1", r"\8", "$", r"\b", "(?=", "(?<!", "++"),
)
PROBES = (
    "",
    "a",
    "B",
    "1",
    "\n",
    " ",
    "é",
    "É",
    "aa",
    "ab",
    "ba",
    "a1",
    "aab",
    "a b",
    "-",
    "]",
    "^",
    "{",
    "{}",
    "a{",
    "\b",
)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(SYNTAX), min_size=1, max_size=8).map("".join))
def test_any_syntax_is_read_as_the_library_reads_it(source: str) -> None:
    try:
        theirs = re.compile(source)
    except re.error:
        with pytest.raises(StopRegexError, match="is not a regular expression|is too large|uses"):
            StopAutomaton((), (source,))
        return
    try:
        StopAutomaton((), (source,))
    except StopRegexError as error:
        assert "uses" in str(error) or ("matches the empty string" in str(error) and theirs.search("\nx")), error
        return
    for text in PROBES:
        assert stream([text], [], [source]) == search(text, [], [source]), text


def test_only_what_may_be_part_of_a_match_is_held_back() -> None:
    checker = StopRegexChecker([], [r"\d+ apples"], False)
    assert checker.feed("text ") == ("text ", None)
    assert checker.feed("12") == ("", None)
    assert checker.feed(" ap") == ("", None)
    assert checker.feed("es 3") == ("12 apes ", None)
    assert checker.feed(" apples") == ("", r"\d+ apples")
    assert checker.matched == r"\d+ apples" and checker.feed("more") == ("", r"\d+ apples")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "not a regular expression"),
        ("a**", "not a regular expression"),
        ("a*", "matches the empty string"),
        ("", "matches the empty string"),
        ("(?m)^", "matches the empty string"),
        ("a$", "an anchor other than ^"),
        (r"\bword\b", "an anchor other than ^"),
        (r"(a)\1", "a back reference"),
        ("a(?=b)", "a look-around assertion"),
        ("(?<!a)b", "a look-around assertion"),
        ("a" * (MAX_PATTERN_CHARS + 1), "is longer than"),
        ("a{1000}", "is too large"),
        ("(a{100}){100}", "is too large"),
        ("((((a?){100}){100}){100}){100}", "is too large"),
        ("(?:){60000}b", "is too large"),
        ("(" * 400 + "a" + ")" * 400, ""),
    ],
)
def test_patterns_that_cannot_be_searched_for(pattern: str, reason: str) -> None:
    if reason:
        with pytest.raises(StopRegexError, match=re.escape(reason)):
            StopAutomaton((), (pattern,))
    else:
        StopAutomaton((), (pattern,))


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*)*(.*)*(.*)*x", "(?:a?){120}a{120}"])
def test_catastrophic_patterns_take_linear_time(pattern: str) -> None:
    """Backtracking would not come back; twice the text costs twice the calls."""

    def search(num_pieces: int) -> None:
        assert stream(["a" * 50] * num_pieces, [], [pattern])[1] in (None, pattern)

    once, twice = (count_calls(partial(search, num_pieces)) for num_pieces in (50, 100))
    assert twice < 2.2 * once
