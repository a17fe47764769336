"""The responses that clients may come back to. They live in memory, within bounds, and end with the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec

from api.errors import KINDS, RequestError
from api.openai.protocol import ChatMessage
from api.responses.protocol import ResponseObject

_CONVERSATION = msgspec.json.Decoder(list[ChatMessage])
_OVERHEAD = 1024
"""Bytes that a response takes beside its texts, about."""


class EventLog:
    """The events of a response that is generated in the background, for any number of readers.

    The sequence number of an event is its place.
    """

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.num_bytes = 0
        self._is_closed = False
        self._news = asyncio.Event()

    def extend(self, events: Sequence[bytes]) -> None:
        """Adds events."""
        self.events += events
        self.num_bytes += sum(map(len, events))
        self._wake()

    def close(self) -> None:
        """No more will come."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self, place: int, max_silence: float) -> AsyncIterator[bytes]:
        """The events from a place on, those that are still to come included.

        Args:
            place: Of the first event.
            max_silence: Seconds after which nothing is yielded, rather than no event; 0: never.
        """
        while True:
            news = self._news
            if place < len(self.events):
                data = b"".join(self.events[place:])
                place = len(self.events)
                yield data
            elif self._is_closed:
                return
            else:
                try:
                    await asyncio.wait_for(news.wait(), max_silence or None)
                except asyncio.TimeoutError:
                    yield b""


class StoredResponse:
    """A response, and the conversation that it ends."""

    def __init__(self, response: ResponseObject, conversation: Sequence[ChatMessage]) -> None:
        self.response = response
        self.log: EventLog | None = None
        """Of a response whose events can be read again."""
        self.task: asyncio.Task[None] | None = None
        """Generates it in the background."""
        self._conversation = b""
        self.size = 0
        """Bytes, as far as the store's bound goes."""
        self.update(conversation)

    @property
    def is_running(self) -> bool:
        return self.response.status in ("queued", "in_progress")

    @property
    def conversation(self) -> list[ChatMessage]:
        """What was said, the response included; instructions are not."""
        return _CONVERSATION.decode(self._conversation)

    def update(self, conversation: Sequence[ChatMessage]) -> None:
        """Takes the conversation as it is now, and measures."""
        self._conversation = msgspec.json.encode(conversation)
        self.size = _OVERHEAD + len(self._conversation) + len(msgspec.json.encode(self.response))
        if self.log is not None:
            self.size += self.log.num_bytes


class ResponseStore:
    """Keeps the latest responses; those that are being generated stay whatever happens."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        """Makes an empty store.

        Args:
            max_count: Most responses; 0: none is kept.
            max_bytes: Most bytes of all of them together, but for those that are being generated.
        """
        self.is_enabled = max_count > 0
        self.num_bytes = 0
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._stored: dict[str, StoredResponse] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def get(self, response_id: str, param: str = "response_id") -> StoredResponse:
        """The response of that id.

        Raises:
            RequestError: 404.
        """
        found = self._stored.get(response_id)
        if found is None:
            raise RequestError(
                f"Response with id {response_id[:80]!r} not found: it was not stored, or is no longer.",
                param,
                status=404,
                kind="not_found_error",
            )
        return found

    def add(self, stored: StoredResponse) -> None:
        """Keeps a response; the oldest ones make room.

        Raises:
            RequestError: 503: all that are kept are still being generated.
        """
        if stored.is_running and sum(other.is_running for other in self._stored.values()) >= self._max_count:
            raise RequestError(
                f"{self._max_count} responses are being generated in the background, which is as many as are kept",
                "background",
                status=503,
                kind=KINDS[503],
            )
        self._stored[stored.response.id] = stored
        self.num_bytes += stored.size
        self._make_room()

    def update(self, stored: StoredResponse, conversation: Sequence[ChatMessage]) -> None:
        """Takes note that a response has changed."""
        before = stored.size
        stored.update(conversation)
        if stored.response.id in self._stored:
            self.num_bytes += stored.size - before
            self._make_room()

    def remove(self, response_id: str) -> StoredResponse:
        """Forgets a response.

        Raises:
            RequestError: 404.
        """
        found = self.get(response_id)
        del self._stored[response_id]
        self.num_bytes -= found.size
        return found

    def _make_room(self) -> None:
        for response_id, stored in list(self._stored.items()):
            if len(self._stored) <= self._max_count and self.num_bytes <= self._max_bytes:
                return
            if not stored.is_running:
                self.remove(response_id)
