"""The last work of a dead engine core: the reader's side of ``flight_record.py``, without numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

SIZE = 1 << 17
"""Size of the file in bytes. Entries that do not fit are left out."""
MAX_COMPILING = 1 << 11
"""Maximum requests recorded whose grammars are being compiled; the end of the file is reserved for them."""
HEADER = 3
"""Number of int64 header fields: the request being accepted or 0, the number of rows computed, the number of grammars
being compiled."""
COLUMNS = 3
"""Number of int64 fields per row: the request, and the range of its positions being computed (first, last + 1)."""


@dataclass(frozen=True)
class LastWork:
    """What a core was doing when it died. Requests are identified by index."""

    adding: int = 0
    """The request being accepted; 0: none."""
    computing: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Requests in steps without results, with the range of positions being computed (first, last + 1)."""
    compiling: frozenset[int] = field(default_factory=frozenset)
    """Requests whose grammars were being compiled."""

    @property
    def suspects(self) -> dict[int, tuple[int, int]]:
        """The requests that may have killed the core, with the positions being computed at the time."""
        before = (-1, 0)
        if self.adding:
            return {self.adding: before}
        return dict.fromkeys(self.compiling, before) | self.computing


def read_flight_record(path: str) -> LastWork:
    """Reads a dead core's record; empty if the core never wrote one."""
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
