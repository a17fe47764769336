"""Stored responses. They are kept in memory, within limits, for the lifetime of the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import msgspec

from api.errors import KINDS, RequestError
from api.openai.protocol import ChatMessage
from api.responses.protocol import ResponseObject

_CONVERSATION = msgspec.json.Decoder(list[ChatMessage])
_OVERHEAD = 1024
"""Approximate size of a response in bytes, excluding its texts."""


class EventLog:
    """The events of a background response, for any number of readers.

    The sequence number of an event is its index.
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
        """Marks the end of the events."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def follow(self, place: int, max_silence: float) -> AsyncIterator[bytes]:
        """The events from an index on, including future ones.

        Args:
            place: Index of the first event.
            max_silence: Seconds without an event after which an empty list is yielded; 0: never.
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
    """A response with its conversation."""

    def __init__(self, response: ResponseObject, conversation: Sequence[ChatMessage]) -> None:
        self.response = response
        self.log: EventLog | None = None
        """The events, if they can be streamed again."""
        self.task: asyncio.Task[None] | None = None
        """The background task."""
        self._conversation = b""
        self.size = 0
        """Size in bytes, for the store's limit."""
        self.update(conversation)

    @property
    def is_running(self) -> bool:
        return self.response.status in ("queued", "in_progress")

    @property
    def conversation(self) -> list[ChatMessage]:
        """The conversation, including the response, without instructions."""
        return _CONVERSATION.decode(self._conversation)

    def update(self, conversation: Sequence[ChatMessage]) -> None:
        """Sets the conversation and measures its size."""
        self._conversation = msgspec.json.encode(conversation)
        self.size = _OVERHEAD + len(self._conversation) + len(msgspec.json.encode(self.response))
        if self.log is not None:
            self.size += self.log.num_bytes


class ResponseStore:
    """Keeps the latest responses, and all that are in progress."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        """Makes an empty store.

        Args:
            max_count: Maximum number of responses; 0: none.
            max_bytes: Maximum total size in bytes, excluding responses in progress.
        """
        self.is_enabled = max_count > 0
        self.num_bytes = 0
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._stored: dict[str, StoredResponse] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def get(self, response_id: str, param: str = "response_id") -> StoredResponse:
        """The response with that id.

        Raises:
            RequestError: 404.
        """
        found = self._stored.get(response_id)
        if found is None:
            raise RequestError(
                f"Response with id {response_id[:80]!r} not found; it was not stored, or has been evicted.",
                param,
                status=404,
                kind="not_found_error",
            )
        return found

    def add(self, stored: StoredResponse) -> None:
        """Stores a response; evicts the oldest ones.

        Raises:
            RequestError: 503: all stored responses are still in progress.
        """
        if stored.is_running and sum(other.is_running for other in self._stored.values()) >= self._max_count:
            raise RequestError(
                f"all {self._max_count} stored responses are still in progress; try again later",
                "background",
                status=503,
                kind=KINDS[503],
            )
        self._stored[stored.response.id] = stored
        self.num_bytes += stored.size
        self._make_room()

    def update(self, stored: StoredResponse, conversation: Sequence[ChatMessage]) -> None:
        """Updates the size of a changed response."""
        before = stored.size
        stored.update(conversation)
        if stored.response.id in self._stored:
            self.num_bytes += stored.size - before
            self._make_room()

    def remove(self, response_id: str) -> StoredResponse:
        """Deletes a response.

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
