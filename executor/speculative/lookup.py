"""Finds the last tokens of a text again, in the text itself or in others, and reads what followed there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from executor.messages import I32, I64

Kinds = npt.NDArray[np.int8]

MAX_PLACES = 64
"""Places that are compared in full, the latest first."""
MAX_VOTES = 16
"""Places whose continuations are compared, the latest first."""
NO_TOKEN = -1
"""Separates texts."""

_LEVELS = np.searchsorted([2, 3, 4, 5, 7, 10, 16], np.arange(128), side="right").astype(np.int8)
"""Length of a match -> level, 0 to 7."""
NUM_KINDS = 3 * 8
"""Kinds of drafts: by level, and whether the token followed at a single place, at all of several or at some."""


@dataclass(frozen=True)
class Found:
    """Where the last tokens of a text occur."""

    length: int
    """Tokens that are the same; 0: none."""
    places: I64
    """int64 [n], ascending: indices of the tokens that follow there."""


NOTHING = Found(0, np.empty(0, np.int64))


def find(text: I32, query: I32, least: int) -> Found:
    """Finds the longest end of ``query`` in a text, with at least one token behind it.

    Args:
        text: int32 [length].
        query: int32 [n], at least one: the last tokens, the latest first.
        least: The shortest match that counts.
    """
    places = np.flatnonzero(text[:-1] == query[0]) + 1
    length = 1
    while len(places) > MAX_PLACES and length < len(query):
        longer = places[places > length]
        longer = longer[text[longer - 1 - length] == query[length]]
        if not len(longer):
            break
        places, length = longer, length + 1
    if not len(places):
        return NOTHING
    places = places[-MAX_PLACES:]
    same = text[np.maximum(places[:, None] - _OFFSETS[: len(query)], 0)] == query
    lengths = np.minimum(np.where(same.all(1), len(query), same.argmin(1)), places)
    best = int(lengths.max())
    return Found(best, places[lengths == best]) if best >= least else NOTHING


_OFFSETS = np.arange(1, 129)


def continuation(text: I32, found: Found, count: int) -> tuple[list[int], list[int]]:
    """The tokens that most often follow, one after the other.

    Args:
        text: int32 [length]. What would follow its end repeats what follows the place.
        found: Where to read.
        count: Maximum number of tokens.

    Returns:
        The tokens, and the kind of each, 0 <= kind < ``NUM_KINDS``.
    """
    places = found.places[-MAX_VOTES:]
    levels = _LEVELS[np.minimum(found.length + np.arange(count), len(_LEVELS) - 1)].tolist()
    rows = text[places[:, None] + np.arange(count) % (len(text) - places)[:, None]].tolist()
    rows.reverse()  # the latest first: it wins a tie
    tokens: list[int] = []
    kinds: list[int] = []
    was_several = len(rows) > 1
    for index, level in enumerate(levels):
        column = [row[index] for row in rows]
        token = column[0]
        is_split = any(each != token for each in column)
        if is_split:
            token = max(column, key=column.count)
            rows = [row for row in rows if row[index] == token]
        if token == NO_TOKEN:
            break
        tokens.append(token)
        kinds.append(3 * level + (2 if is_split else int(was_several)))
        was_several = len(rows) > 1
    return tokens, kinds
