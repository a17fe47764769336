"""What JSON weighs before it is decoded."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from api.admission import MAX_JSON_VALUES, JsonMeter, pieces
from api.errors import RequestError


def weigh(data: bytes, *cuts: int) -> float:
    meter = JsonMeter(float("inf"))
    for begin, end in pairwise((0, *cuts, len(data))):
        meter.feed(data[begin:end])
    return meter.weight


def test_values_weigh_and_text_hardly_does() -> None:
    ids = json.dumps([31234] * 1000, separators=(",", ":")).encode()
    assert 1000 <= weigh(ids) < 1010
    assert weigh(json.dumps({"prompt": "Hello, [there]: {all}, " * 1000}).encode()) < 200
    assert weigh(b"[" * 1000) >= 1000
    assert weigh(json.dumps([{"role": "user", "content": "x"}] * 1000).encode()) > 10_000
    assert weigh(json.dumps({str(number): 1 for number in range(1000)}).encode()) > 3000


@pytest.mark.parametrize(
    "data",
    [
        rb'"\n\n\n\n\n\n\n\n"',
        rb'"\u00e9\u00e9\u00e9\u00e9"',
        b"                                        ",
        b"1111111111111111111111111111111111111111111111111111111111",
        b"1.5e-300",
    ],
)
def test_what_takes_long_to_decode_weighs(data: bytes) -> None:
    assert weigh(data * 100) - weigh(data.replace(b"\\", b"x").strip()[:1] * 100) >= 100


def test_booleans_are_no_exponents() -> None:
    assert weigh(b"[true,false,null]") < 10


TEXT = rb'{"a\\\"b": "x,y\\", "c": ["\"", "[,,,\\\\\"", 1, 2.5, true], "d": {"e": "\\"}}'


def test_strings_are_told_from_the_rest_wherever_the_body_is_cut() -> None:
    json.loads(TEXT)
    whole = weigh(TEXT)
    outside = 6 * 1 + 4 * 2 + 3 * 4  # commas, colons, containers
    assert outside + 9 <= whole < outside + 9 + 4  # nine strings; escapes count little
    for cut in range(1, len(TEXT)):
        assert weigh(TEXT, cut) == pytest.approx(whole, abs=0.1)
    assert weigh(TEXT, *range(1, len(TEXT))) == pytest.approx(whole, abs=0.5)


def test_a_body_is_refused_before_all_of_it_is_there() -> None:
    meter = JsonMeter()
    meter.feed(b"1," * (MAX_JSON_VALUES - 1))
    with pytest.raises(RequestError, match=f"limit of {MAX_JSON_VALUES} values") as caught:
        meter.feed(b"1,1,")
    assert (caught.value.status, caught.value.param) == (413, "body")


def test_text_of_the_largest_body_passes() -> None:
    meter = JsonMeter()
    meter.feed(b'"')
    for _ in range(32):
        meter.feed(b"all human beings " * 61680)
    assert meter.weight < MAX_JSON_VALUES


def test_pieces() -> None:
    assert [list(part) for part in pieces(range(5), 2)] == [[0, 1], [2, 3], [4]]
    assert not list(pieces([]))
