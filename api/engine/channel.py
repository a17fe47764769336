"""Channels that carry the deltas of completions to their consumer."""

from __future__ import annotations

import asyncio

import msgspec

from engine_core.messages import TokenLogprobs


class Delta(msgspec.Struct, gc=False):
    """New output of one completion."""

    choice: int
    """Number of the completion in its channel."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_param: str | None = None
    """The request field at fault, if the error is the client's fault."""


MAX_TAKEN = 256
"""Maximum deltas that a consumer takes at once; after a pause, such as for a slow reader, any number may be waiting."""


class Channel:
    """A queue of the deltas of one or more completions, with one consumer.

    Attributes:
        quiet: Wake the consumer only when completions end.
    """

    __slots__ = ("_is_behind", "_items", "_loop", "_waiter", "quiet")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.quiet = False
        self._is_behind = False
        self._loop = loop
        self._items: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: Delta) -> None:
        self._items.append(delta)
        if self._waiter is not None and (not self.quiet or delta.finish_reason is not None):
            self.wake()

    def wake(self) -> None:
        """Wakes the consumer if it is waiting, even without deltas."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def take(self) -> list[Delta]:
        """Waits for deltas and returns them in order; empty after ``wake``.

        At most ``MAX_TAKEN`` are returned; the next call then yields to other tasks before it returns more.
        """
        if not self._items:
            self._waiter = self._loop.create_future()
            await self._waiter
        elif self._is_behind:
            await asyncio.sleep(0)
        items, self._items = self._items, []
        self._is_behind = len(items) > MAX_TAKEN
        if self._is_behind:
            self._items = items[MAX_TAKEN:]
            del items[MAX_TAKEN:]
        return items


class PacedChannel(Channel):
    """A channel that joins deltas so that each holds several tokens of a choice, except the first and the last."""

    __slots__ = ("_begun", "_held", "_interval")

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: int) -> None:
        """Opens the channel.

        Args:
            loop: The consumer's event loop.
            interval: Tokens per delta.
        """
        super().__init__(loop)
        self._interval = interval
        self._begun: set[int] = set()
        self._held: dict[int, Delta] = {}

    def push(self, delta: Delta) -> None:
        choice = delta.choice
        held = self._held.pop(choice, None)
        if held is not None:
            delta = _joined(held, delta)
        if choice not in self._begun:
            self._begun.add(choice)
        elif delta.finish_reason is None and len(delta.token_ids) < self._interval:
            self._held[choice] = delta
            return
        super().push(delta)


def _joined(first: Delta, second: Delta) -> Delta:
    """Joins two consecutive deltas of a choice."""
    return Delta(
        first.choice,
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.logprobs + second.logprobs,
        first.prompt_logprobs + second.prompt_logprobs,
        second.finish_reason,
        second.stop_reason,
        second.error,
        second.error_param,
    )
