"""Merges found through hashes are those found by looking up every cut."""

from __future__ import annotations

import random

from api.model.sentencepiece_merges import MAX_PIECE_CHARS, implied_merges


def every_cut(pieces: list[str], vocabulary: set[str]) -> list[tuple[str, str]]:
    cuts = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(len(piece) - 1, 0, -1)]
    return [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]


def test_merges_are_those_of_every_cut() -> None:
    draw = random.Random(0)
    pieces = list(
        dict.fromkeys("".join(draw.choices("ab\u2581\0\U0001f600", k=draw.randint(0, 7))) for _ in range(20_000))
    )
    vocabulary = {*pieces, "<control>", "a" * (MAX_PIECE_CHARS + 1)}
    found = implied_merges(pieces, vocabulary)
    assert found == every_cut(pieces, vocabulary) and len(found) > 10_000


def test_no_merges() -> None:
    assert implied_merges([], {}) == [] == implied_merges(["a", ""], {"a", ""})
    long = "a" * (MAX_PIECE_CHARS + 1)
    assert implied_merges([long], {long, "a", long[1:]}) == []
