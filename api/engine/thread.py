"""The thread of an offline engine's client, separate from the object that users hold."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from api.engine.pool import Engines

T = TypeVar("T")


class EngineThread:
    """An event loop in its own thread, with the engine's client.

    The engine core dies with the thread that starts it, so this thread lives as long as the engine. It holds no
    reference to the ``LLM`` object, which may therefore be collected at any time; ``close`` is then called in
    whichever thread collects it.

    Attributes:
        client: Set by the owner once there is one; ``close`` stops its processes.
    """

    def __init__(self) -> None:
        self.client: Engines | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="engine client", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._is_closed = False

    def _work(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the thread and waits for its result.

        Raises:
            RuntimeError: The engine is closed.
        """
        if self._is_closed:
            work.close()
            raise RuntimeError("this LLM is closed; create a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # for example on Ctrl-C: the result is no longer needed
            raise

    def close(self) -> None:
        """Stops the engine's processes, then the thread, and waits for both. May be called more than once."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if threading.current_thread() is not self._thread:  # the garbage collector may run in any thread, even this one
            self._thread.join()

    async def _end(self) -> None:
        try:
            if self.client is not None:
                await self.client.close()
        finally:
            self._loop.stop()
