"""Turns the events of an answer into items of a response and their stream events."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import msgspec

from api.http.stream import MARK, split_at_mark, typed_event
from api.openai.protocol import ChatLogprob
from api.parsers import Content, Event, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from api.responses.protocol import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    FunctionCallItem,
    ItemStatus,
    OutputItem,
    OutputItemAdded,
    OutputItemDone,
    OutputMessage,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseEvent,
    ResponseObject,
)


class ResponseWriter:
    """Fills the output of a response and numbers its events."""

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self.events: list[bytes] = []
        """Events not taken yet."""
        self._sequence = 0
        self._item: OutputItem | None = None
        """The item being written."""
        self._pieces: list[str] = []
        self._before = b""
        """The JSON before the text of the item's deltas."""
        self._encoder = msgspec.json.Encoder()

    def take(self) -> list[bytes]:
        """Takes the events since the last call."""
        events, self.events = self.events, []
        return events

    def emit(self, make: Callable[[int], ResponseEvent]) -> None:
        """Adds an event, given its number."""
        body = make(self._sequence)
        self._sequence += 1
        tag = type(body).__struct_config__.tag
        assert isinstance(tag, str)
        self.events.append(typed_event(tag, self._encoder.encode(body)))

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def write(self, event: Event, logprobs: Sequence[ChatLogprob] = ()) -> None:
        """Takes the next part of the answer.

        Args:
            event: The parsed part.
            logprobs: Log probabilities of its tokens, if requested.
        """
        match event:
            case Content(text):
                if not isinstance(self._item, OutputMessage):
                    self._open_message()
                self._add_text(text, logprobs)
            case Reasoning(text):
                if not isinstance(self._item, ReasoningItem):
                    self._open_reasoning()
                self._add(text)
            case ToolCallStart(_, id, name):
                self._open_call(id, name)
            case ToolCallArguments(_, text):
                self._add(text)
            case ToolCallEnd(_, complete):
                self.close("completed" if complete else "incomplete")

    def close(self, status: ItemStatus = "completed") -> None:
        """Ends the current item, if any."""
        item, self._item = self._item, None
        if item is None:
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        item.status = status
        if isinstance(item, OutputMessage):
            self._end_message(item, text)
        elif isinstance(item, ReasoningItem):
            self._end_reasoning(item, text)
        else:
            item.arguments = text
            self.emit(
                lambda number: ArgumentsDone(
                    item_id=item.id,
                    output_index=self._index,
                    name=item.name,
                    arguments=text,
                    sequence_number=number,
                )
            )
        self.emit(lambda number: OutputItemDone(output_index=self._index, item=item, sequence_number=number))

    # -- beginnings

    def _open(self, item: OutputItem) -> None:
        self.close()
        self._item = item
        self.response.output.append(item)
        self.emit(lambda number: OutputItemAdded(output_index=self._index, item=item, sequence_number=number))

    def _open_part(self, item: OutputMessage | ReasoningItem, part: OutputText | ReasoningText) -> None:
        self.emit(
            lambda number: ContentPartAdded(
                item_id=item.id, output_index=self._index, part=part, sequence_number=number
            )
        )

    def _open_message(self) -> None:
        item = OutputMessage(id=_new_id("msg"))
        self._open(item)
        part = OutputText()
        self._open_part(item, part)
        item.content.append(part)
        self._mark(OutputTextDelta(item_id=item.id, output_index=self._index, delta=MARK, sequence_number=0))

    def _open_reasoning(self) -> None:
        item = ReasoningItem(id=_new_id("rs"))
        self._open(item)
        part = ReasoningText(text="")
        self._open_part(item, part)
        item.content.append(part)
        self._mark(ReasoningTextDelta(item_id=item.id, output_index=self._index, delta=MARK, sequence_number=0))

    def _open_call(self, call_id: str, name: str) -> None:
        item = FunctionCallItem(id=_new_id("fc"), call_id=call_id, name=name)
        self._open(item)
        self._mark(ArgumentsDelta(item_id=item.id, output_index=self._index, delta=MARK, sequence_number=0))

    def _mark(self, delta: OutputTextDelta | ReasoningTextDelta | ArgumentsDelta) -> None:
        tag = type(delta).__struct_config__.tag
        assert isinstance(tag, str)
        self._before, after = split_at_mark(typed_event(tag, self._encoder.encode(delta)))
        assert after == b',"sequence_number":0}\n\n', "the number comes last"

    # -- pieces

    def _add(self, text: str) -> None:
        self._pieces.append(text)
        data = self._before + self._encoder.encode(text)
        self.events.append(b'%b,"sequence_number":%d}\n\n' % (data, self._sequence))
        self._sequence += 1

    def _add_text(self, text: str, logprobs: Sequence[ChatLogprob]) -> None:
        if not logprobs:
            self._add(text)
            return
        item = self._item
        assert isinstance(item, OutputMessage)
        self._pieces.append(text)
        item.content[0].logprobs += logprobs
        self.emit(
            lambda number: OutputTextDelta(
                item_id=item.id,
                output_index=self._index,
                logprobs=list(logprobs),
                delta=text,
                sequence_number=number,
            )
        )

    # -- ends

    def _end_message(self, item: OutputMessage, text: str) -> None:
        part = item.content[0]
        part.text = text
        self.emit(
            lambda number: OutputTextDone(
                item_id=item.id,
                output_index=self._index,
                logprobs=part.logprobs,
                text=text,
                sequence_number=number,
            )
        )
        self._end_part(item, part)

    def _end_reasoning(self, item: ReasoningItem, text: str) -> None:
        part = item.content[0]
        part.text = text
        self.emit(
            lambda number: ReasoningTextDone(
                item_id=item.id, output_index=self._index, text=text, sequence_number=number
            )
        )
        self._end_part(item, part)

    def _end_part(self, item: OutputMessage | ReasoningItem, part: OutputText | ReasoningText) -> None:
        self.emit(
            lambda number: ContentPartDone(item_id=item.id, output_index=self._index, part=part, sequence_number=number)
        )


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
