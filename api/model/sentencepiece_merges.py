"""Finds the merges that the pieces of a SentencePiece vocabulary imply."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_PIECE_CHARS: Final = 512
"""Longer pieces get no merges: no trained vocabulary has any, and finding merges takes quadratic time."""

_BATCH: Final = 1 << 14
"""Pieces at a time, which limits the memory of long ones."""
_HASH_BITS: Final = 24
_BASE: Final = 0x9E3779B97F4A7C15
_INVERSE: Final = pow(_BASE, -1, 1 << 64)

_Indices = npt.NDArray[np.int64]


def implied_merges(pieces: Iterable[str], vocabulary: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of tokens that form a piece: by piece, the longest left half first.

    Most ways to cut a piece give no tokens. A table of hashes finds those that may, so that few are looked up.

    Args:
        pieces: Pieces in the order of their scores.
        vocabulary: All tokens, as a set or dictionary.
    """
    is_token = np.zeros(1 << _HASH_BITS, bool)
    for tokens in _batches(vocabulary):
        texts = _Hashes(tokens)
        is_token[texts.hashes(texts.begins, texts.ends)] = True
    merges = []
    for batch in _batches(pieces):
        for piece, cut in _candidates(batch, is_token):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    short = (text for text in texts if len(text) <= MAX_PIECE_CHARS)
    while batch := list(islice(short, _BATCH)):
        yield batch


def _candidates(pieces: Sequence[str], is_token: npt.NDArray[np.bool_]) -> Iterator[tuple[str, int]]:
    """The cuts of which both halves have a token's hash."""
    texts = _Hashes(pieces)
    num_cuts = np.maximum(texts.ends - texts.begins - 1, 0)
    owners = np.repeat(np.arange(len(pieces)), num_cuts)
    begins, ends = texts.begins[owners], texts.ends[owners]
    places = ends - 1 - (np.arange(len(owners)) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts))
    found = np.flatnonzero(is_token[texts.hashes(begins, places)])
    found = found[is_token[texts.hashes(places[found], ends[found])]]
    cuts = (places - begins)[found]
    return zip(map(pieces.__getitem__, owners[found].tolist()), cuts.tolist(), strict=True)


class _Hashes:
    """Polynomial hashes of all substrings of some texts. A substring is a range of their characters, joined."""

    def __init__(self, texts: Sequence[str]) -> None:
        joined = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64) + 1
        self.ends: _Indices = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        self.begins: _Indices = np.concatenate([[0], self.ends[:-1]])
        powers = np.cumprod(np.full(len(joined), _BASE, np.uint64))
        one, zero = np.ones(1, np.uint64), np.zeros(1, np.uint64)
        self._inverse = np.concatenate([one, np.cumprod(np.full(len(joined), _INVERSE, np.uint64))])
        self._sums = np.concatenate([zero, np.cumsum(joined * powers)])

    def hashes(self, begins: _Indices, ends: _Indices) -> npt.NDArray[np.uint64]:
        """The hashes of the substrings from ``begins`` to ``ends``."""
        values: npt.NDArray[np.uint64] = (self._sums[ends] - self._sums[begins]) * self._inverse[begins]
        values >>= np.uint64(64 - _HASH_BITS)
        return values
