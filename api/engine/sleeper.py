"""Sleep and new weights, from the api's side: of one engine, and of several."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from api.engine.calls import Answer
from engine_core.messages import SleepRequest, WakeUpRequest


class Sleeper:
    """Whether an engine sleeps."""

    def __init__(
        self,
        call: Callable[[Callable[[int], SleepRequest | WakeUpRequest]], Awaitable[Answer]],
        on_sleep: Callable[[int], None],
    ) -> None:
        """
        Args:
            call: ``EngineClient.call``.
            on_sleep: Called with the level at which the engine sleeps; 0: it is awake.
        """
        self._call = call
        self._on_sleep = on_sleep
        self.is_sleeping = False
        """The engine was told to sleep, and not to wake up yet."""
        self.is_reloading = False
        """It loads its weights again: new requests would wait for that."""

    @property
    def is_awake(self) -> bool:
        """Whether new requests run at once."""
        return not self.is_sleeping and not self.is_reloading

    def awake(self) -> None:
        """Records that the engine is awake."""
        self.is_sleeping = False
        self._on_sleep(0)

    async def sleep(self, level: int = 1, *, keeps_kv: bool = False) -> None:
        """Frees memory until ``wake_up``; requests that run wait. See ``SleepRequest``.

        Raises:
            CallError: Not at this time.
        """
        was_sleeping, self.is_sleeping = self.is_sleeping, True
        try:
            await self._call(lambda call_id: SleepRequest(call_id, level, keeps_kv))
        except BaseException:
            self.is_sleeping = was_sleeping
            raise
        self._on_sleep(level)

    async def wake_up(self) -> None:
        """Ends sleep.

        Raises:
            CallError: The weights cannot be loaded; the engine sleeps on.
        """
        await self._call(WakeUpRequest)
        self.awake()

    async def reload_weights(self) -> None:
        """Loads the weights again, once the requests that run are done; new ones wait.

        Raises:
            CallError: Not at this time, or the weights cannot be loaded: then the engine sleeps.
        """
        self.is_reloading = True
        try:
            await self._call(lambda call_id: SleepRequest(call_id, level=2, finishes=True))
            self.is_sleeping = True
            self._on_sleep(2)
            await self.wake_up()
        finally:
            self.is_reloading = False


class HasSleeper(Protocol):
    sleeper: Sleeper


class Sleepers:
    """Several engines that sleep and wake up together."""

    def __init__(self, clients: Sequence[HasSleeper]) -> None:
        self._clients = clients

    @property
    def is_sleeping(self) -> bool:
        """Whether all of them sleep."""
        return all(client.sleeper.is_sleeping for client in self._clients)

    async def sleep(self, level: int = 1, *, keeps_kv: bool = False) -> None:
        """See ``Sleeper``."""
        await asyncio.gather(*(client.sleeper.sleep(level, keeps_kv=keeps_kv) for client in self._clients))

    async def wake_up(self) -> None:
        """See ``Sleeper``."""
        await asyncio.gather(*(client.sleeper.wake_up() for client in self._clients))

    async def reload_weights(self) -> None:
        """See ``Sleeper``. One engine at a time, while the others serve."""
        for client in self._clients:
            await client.sleeper.reload_weights()
