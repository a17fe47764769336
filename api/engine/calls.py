"""Questions to the engine core, such as for its status, that wait for their answers."""

from __future__ import annotations

import asyncio
from typing import TypeAlias

from api.errors import EngineDeadError

Answer: TypeAlias = dict[str, int | float | str | bool]


class Calls:
    """The table of those that are open."""

    def __init__(self) -> None:
        self._last_id = 0
        self._open: dict[int, asyncio.Future[Answer]] = {}

    def begin(self) -> tuple[int, asyncio.Future[Answer]]:
        """Opens a call. Returns its id, and what becomes the answer or an ``EngineDeadError``."""
        self._last_id += 1
        future = self._open[self._last_id] = asyncio.get_running_loop().create_future()
        return self._last_id, future

    def answer(self, call_id: int, result: Answer) -> None:
        """Ends a call; one that is over already is passed over."""
        future = self._open.pop(call_id, None)
        if future is not None and not future.done():
            future.set_result(result)

    def fail_all(self) -> None:
        """The engine core that was asked is gone."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(EngineDeadError("the engine died before it answered"))
        self._open.clear()
