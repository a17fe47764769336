"""Calls written as JSON: ``{"name": "f", "arguments": {...}}``, alone or in a list.

Arguments are streamed as they arrive. A call begins when its name is known and its arguments have begun as an object.
Text that is malformed before that is content; malformed text after it ends the call.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from api.parsers.base import MAX_NAME
from api.parsers.json_text import JsonScanner, decode_string, kind_of
from api.parsers.machine import Output, skip_space

ARGUMENTS_KEYS: Final = ("arguments", "parameters")
PLAIN_KEYS: Final = frozenset(("name", "type", "id", *ARGUMENTS_KEYS))
"""The keys of calls. An object with others, such as the description in the definition of a tool, is no call."""


class ArgumentsObject:
    """The arguments of one call, as a JSON object.

    Attributes:
        done: The object is complete.
        failed: The object is malformed. If the call had begun, it has ended.
        started: The call has begun.
    """

    __slots__ = ("_id", "_name", "_out", "_pending", "_pieces", "_scanner", "_size", "done", "failed", "started")

    def __init__(self, out: Output, name: str | None, *, id: str | None = None) -> None:
        """Prepares for the opening brace.

        Args:
            out: Collects the call's events.
            name: Name of the function; None if not known yet.
            id: The call's id, if the model wrote one.
        """
        self.done = False
        self.failed = False
        self.started = False
        self._out = out
        self._name = name
        self._id = id
        self._scanner = JsonScanner()
        self._pending: list[str] = []
        self._pieces: list[str] = []
        self._size = 0
        """Number of characters other than white space, counted up to two: the brace and the character after it."""

    def feed(self, text: str, pos: int) -> int:
        """Reads up to the end of the object, the end of the text or an error; returns that position."""
        end = self._scanner.feed(text, pos)
        piece = self._scanner.take()
        self._pieces.append(piece)
        if self.started:
            self._out.arguments(piece, text[pos:end])
        else:
            self._out.hold(text[pos:end])
            self._pending.append(piece)
            self._size = min(2, self._size + len(piece.strip()))
            self._start()
        self.done, self.failed = self._scanner.done, self._scanner.failed
        if self.started and (self.done or self.failed):
            self._end()
        return end

    def _end(self) -> None:
        """Ends the call. It is complete if its arguments are valid JSON; the scanner only checked their structure."""
        self._out.end(complete=self.done and kind_of("".join(self._pieces)) == "object")

    def finish(self) -> None:
        """Ends the text. If it ends with the opening brace, the call begins now."""
        if self._size == 1 and not self.failed:
            self._size = 2
            self._start()

    def named(self, name: str) -> None:
        """Sets the name of the function, if it comes after the arguments."""
        self._name = name
        self._start()
        if self.started and self.done:
            self._end()

    def _start(self) -> None:
        if self._name is not None and self._size == 2:
            self.started = True
            self._out.start(self._name, self._id)
            self._out.arguments("".join(self._pending))
            self._pending.clear()


class _Expects(Enum):
    OPEN = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    NEXT = auto()


class JsonCall:
    """One call as a JSON object.

    Attributes:
        done: The object, and so the call, is complete.
        failed: The object is malformed. If the call had not begun, all of its text is still held back.
        started: The call has begun.
    """

    __slots__ = (
        "_arguments",
        "_expects",
        "_in_arguments",
        "_key",
        "_keys",
        "_name",
        "_name_key",
        "_needs_arguments",
        "_out",
        "_scanner",
        "_size",
        "_value",
        "_whole_arguments",
        "done",
        "failed",
        "started",
    )

    def __init__(
        self,
        out: Output,
        *,
        name_key: str = "name",
        keys: frozenset[str] | None = None,
        needs_arguments: bool = False,
    ) -> None:
        """Prepares for the opening brace.

        Args:
            out: Collects the call's events.
            name_key: The key of the function's name.
            keys: The keys that the object may have; None: any.
            needs_arguments: An object without arguments is not a call, instead of a call with empty arguments.
        """
        self.done = False
        self.failed = False
        self.started = False
        self._out = out
        self._name_key = name_key
        self._keys = keys
        self._needs_arguments = needs_arguments
        self._expects = _Expects.OPEN
        self._key: str | None = None
        """The key of the value being read; None while a key is being read."""
        self._scanner: JsonScanner | None = None
        self._value: list[str] = []
        self._size = 0
        self._name: str | None = None
        self._arguments: ArgumentsObject | None = None
        self._in_arguments = False
        self._whole_arguments: str | None = None
        """Arguments that are not streamed: a string with JSON in it, or none."""

    def feed(self, text: str, pos: int) -> int:
        """Reads up to the end of the object, the end of the text or an error; returns that position."""
        while pos < len(text) and not self.done and not self.failed:
            if self._in_arguments:
                pos = self._feed_arguments(text, pos)
            elif self._scanner is not None:
                pos = self._scan(self._scanner, text, pos)
            else:
                end = skip_space(text, pos)
                self._out.hold(text[pos:end])
                pos = end
                if pos < len(text):
                    pos = self._punctuation(text[pos], pos)
        return pos

    def finish(self) -> None:
        """Ends the text; see ``ArgumentsObject.finish``."""
        if self._in_arguments and self._arguments is not None:
            self._arguments.finish()

    def _punctuation(self, char: str, pos: int) -> int:
        expects = self._expects
        if expects is _Expects.VALUE:
            self._begin_value(char)
            return pos
        if expects is _Expects.KEY and char == '"':
            self._key = None
            self._scanner = JsonScanner()
            return pos
        if expects is _Expects.OPEN and char == "{":
            self._expects = _Expects.KEY
        elif expects is _Expects.COLON and char == ":":
            self._expects = _Expects.VALUE
        elif expects is _Expects.NEXT and char == ",":
            self._expects = _Expects.KEY
        elif expects in (_Expects.NEXT, _Expects.KEY) and char == "}" and self._complete():
            self.done = True
            self._out.drop()
            return pos + 1
        else:
            self.failed = True
            return pos
        self._out.hold(char)
        return pos + 1

    def _begin_value(self, char: str) -> None:
        if self._is_arguments():
            if char == "{":
                self._arguments = ArgumentsObject(self._out, self._name)
                self._in_arguments = True
                return
            # Some models write the arguments as a string, or as null if there are none.
            self.failed = char not in '"n'
        elif self._key == self._name_key:
            self.failed = char != '"' or self._name is not None
        self._scanner = JsonScanner()

    def _is_arguments(self) -> bool:
        return self._key in ARGUMENTS_KEYS and self._arguments is None and self._whole_arguments is None

    def _feed_arguments(self, text: str, pos: int) -> int:
        arguments = self._arguments
        assert arguments is not None
        end = arguments.feed(text, pos)
        self.started, self.failed = arguments.started, arguments.failed
        if arguments.done:
            self._in_arguments = False
            self._expects = _Expects.NEXT
        return end

    def _scan(self, scanner: JsonScanner, text: str, pos: int) -> int:
        end = scanner.feed(text, pos)
        self._out.hold(text[pos:end])
        piece = scanner.take()
        is_short = self._key is None or self._key == self._name_key
        if is_short or self._is_arguments():
            self._value.append(piece)
            self._size += len(piece)
        self.failed = scanner.failed or (is_short and self._size > MAX_NAME)
        if scanner.done and not self.failed:
            value = "".join(self._value)
            self._value.clear()
            self._size = 0
            self._scanner = None
            self.failed = not self._take_value(value)
        return end

    def _take_value(self, value: str) -> bool:
        """Takes a key, or a value that was not streamed. Returns whether it is valid."""
        if self._key is None:
            self._key = decode_string(value)
            self._expects = _Expects.COLON
            return self._key is not None and (self._keys is None or self._key in self._keys)
        self._expects = _Expects.NEXT
        if self._key == self._name_key:
            self._name = decode_string(value)
            if not self._name:
                return False
            if self._arguments is not None:
                self._arguments.named(self._name)
                self.started = self._arguments.started
        elif self._is_arguments():
            self._whole_arguments = "{}" if value == "null" else decode_string(value)
            if self._whole_arguments is None or kind_of(self._whole_arguments) != "object":
                return False
        self._start_whole()
        return True

    def _start_whole(self) -> None:
        if self._name is not None and self._whole_arguments is not None and not self.started:
            self.started = True
            self._out.start(self._name)
            self._out.arguments(self._whole_arguments)
            self._out.end()

    def _complete(self) -> bool:
        """Whether the finished object is a call; starts one without arguments."""
        if not self.started and self._name is not None and not self._needs_arguments:
            self._whole_arguments = "{}"
            self._start_whole()
        return self.started


class JsonCalls:
    """A list of calls, or a single call without a list.

    Attributes:
        done: The list or single call is complete.
        failed: The text is malformed. The part that does not belong to a call is still held back.
        started: A call has begun.
    """

    __slots__ = (
        "_call",
        "_is_list",
        "_keys",
        "_name_key",
        "_needs_arguments",
        "_needs_comma",
        "_out",
        "done",
        "failed",
        "started",
    )

    def __init__(
        self,
        out: Output,
        *,
        name_key: str = "name",
        keys: frozenset[str] | None = None,
        needs_arguments: bool = False,
    ) -> None:
        """Prepares for the first bracket or brace; see ``JsonCall``."""
        self.done = False
        self.failed = False
        self.started = False
        self._out = out
        self._name_key = name_key
        self._keys = keys
        self._needs_arguments = needs_arguments
        self._is_list = False
        self._needs_comma = False
        self._call: JsonCall | None = None

    def feed(self, text: str, pos: int) -> int:
        """Reads up to the end of the list, the end of the text or an error; returns that position."""
        while pos < len(text) and not self.done and not self.failed:
            if self._call is not None:
                pos = self._feed_call(self._call, text, pos)
                continue
            end = skip_space(text, pos)
            self._out.hold(text[pos:end])
            pos = end
            if pos < len(text):
                pos = self._punctuation(text[pos], pos)
        return pos

    def finish(self) -> None:
        """Ends the text; see ``ArgumentsObject.finish``."""
        if self._call is not None:
            self._call.finish()

    def _feed_call(self, call: JsonCall, text: str, pos: int) -> int:
        end = call.feed(text, pos)
        self.failed = call.failed
        self.started = self.started or call.started
        if call.done:
            self._call = None
            self._needs_comma = True
            self.done = not self._is_list
        return end

    def _punctuation(self, char: str, pos: int) -> int:
        if char == "{" and not self._needs_comma:
            self._call = JsonCall(
                self._out, name_key=self._name_key, keys=self._keys, needs_arguments=self._needs_arguments
            )
            return pos
        if char == "[" and not self._is_list:
            self._is_list = True
        elif char == "," and self._needs_comma:
            self._needs_comma = False
        elif char == "]" and self._needs_comma:
            self.done = True
            self._out.drop()
            return pos + 1
        else:
            self.failed = True
            return pos
        self._out.hold(char)
        return pos + 1
