"""What a dead engine core was working on: the reader's side of ``flight_record.py``, which needs no arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

SIZE = 1 << 17
"""Bytes. What finds no room is left out."""
MAX_COMPILING = 1 << 11
"""Requests whose grammars are being compiled: they have the end of the file for themselves."""
HEADER = 3
"""int64: the request that is being taken in or 0, the number of rows computed, of requests compiled."""
COLUMNS = 3
"""int64 of a row: the request, and the positions of it that are computed: the first, and one more than the last."""


@dataclass(frozen=True)
class LastWork:
    """What a core was doing when it ended. Requests are known by their indices."""

    adding: int = 0
    """Was just being taken in; 0: none."""
    computing: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Were in steps whose results were not there, and which positions of each: first, and one more than the last."""
    compiling: frozenset[int] = field(default_factory=frozenset)
    """Their grammars were being compiled."""

    @property
    def suspects(self) -> dict[int, tuple[int, int]]:
        """Any of them may have ended the core, while these positions of it were computed."""
        before = (-1, 0)
        if self.adding:
            return {self.adding: before}
        return dict.fromkeys(self.compiling, before) | self.computing


def read_flight_record(path: str) -> LastWork:
    """What a dead core left; nothing if it did not get as far as that."""
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE)
    except OSError:
        return LastWork()
    words = memoryview(data[: len(data) // 8 * 8]).cast("q").tolist()
    if len(words) < HEADER:
        return LastWork()
    adding, num_rows, num_compiling = words[:HEADER]
    computing: dict[int, tuple[int, int]] = {}
    rows = words[HEADER : HEADER + num_rows * COLUMNS]
    for index, first, last in zip(rows[::COLUMNS], rows[1::COLUMNS], rows[2::COLUMNS], strict=False):
        computing[index] = computing.get(index, (first, last))[0], last
    return LastWork(
        adding=adding,
        computing=computing,
        compiling=frozenset(words[len(words) - num_compiling :]),
    )
