"""Control messages to the engine core that wait for an answer, such as status requests."""

from __future__ import annotations

import asyncio
from typing import TypeAlias

from api.errors import CallError, EngineDeadError

Answer: TypeAlias = dict[str, int | float | str | bool]


class Calls:
    """The table of open calls."""

    def __init__(self) -> None:
        self._last_id = 0
        self._open: dict[int, asyncio.Future[Answer]] = {}

    def begin(self) -> tuple[int, asyncio.Future[Answer]]:
        """Opens a call. Returns its id and a future of the answer, which may raise ``EngineDeadError`` or
        ``CallError``."""
        self._last_id += 1
        future = self._open[self._last_id] = asyncio.get_running_loop().create_future()
        return self._last_id, future

    def answer(self, call_id: int, result: Answer, error: str | None = None) -> None:
        """Sets the answer of a call, or its error; ignored if the call is no longer open."""
        future = self._open.pop(call_id, None)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(CallError(error))

    def fail_all(self) -> None:
        """Ends all open calls with ``EngineDeadError``: their engine core is gone."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(EngineDeadError("the engine died before it answered"))
        self._open.clear()
