"""``<|tool_call>call:f{a:<|"|>x<|"|>,b:[1,true]}<tool_call|>``: Gemma 4 and FunctionGemma.

Keys and values have no quotes; a token of its own is before and after each string. Arguments are translated to JSON as
they arrive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Final

import msgspec

from api.parsers.base import MAX_DEPTH, MAX_NAME, Event, MakeId, Tool
from api.parsers.ids import new_id
from api.parsers.json_text import json_string, kind_of
from api.parsers.machine import Markers, Name, Output, Steps, marker_at, skip_space
from api.parsers.tools.values import Parameters

_CALL: Final = "call:"
_NAME: Final = re.compile(r"[\w.:/-]*")
_BARE: Final = re.compile(r"[^,{}\[\]]*")
_KEY: Final = re.compile(r"[^:,{}\[\]]*")
_CLOSERS: Final = {"{": "}", "[": "]"}
_WORDS: Final = {"true": "true", "false": "false", "null": "null", "none": "null", "nil": "null"}
_MAX_BARE: Final = 1 << 16
"""Maximum characters of a value without quotes, whose type is known only at its end."""


class GemmaCalls(msgspec.Struct, frozen=True):
    """The special tokens of a family. Calling it creates a parser; see ``ToolParserClass``."""

    opening: str
    closing: str
    quote: str

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See ``Parser``."""
        return self.opening, self.closing, self.quote

    def __call__(self, tools: Iterable[Tool], make_id: MakeId) -> GemmaParser:
        """Creates a parser for one choice."""
        return GemmaParser(self, tools, make_id)

    def new_id(self) -> str:
        """See ``ToolParserClass``."""
        return new_id()


class _Expects(Enum):
    KEY = auto()
    """A key, or the end of an object that is empty or ends with a comma."""
    COLON = auto()
    """The rest of a key without quotes, and the colon."""
    VALUE = auto()
    """A value, or the end of a list that is empty or ends with a comma."""
    BARE = auto()
    """The rest of a value without quotes."""
    NEXT = auto()
    """A comma, or the end of the container."""


class GemmaArguments:
    """Translates the arguments of a call to JSON.

    Attributes:
        done: The object is complete.
        failed: The text is malformed or nested too deeply.
    """

    def __init__(self, quote: str, types: Callable[[str], set[str]]) -> None:
        """Prepares for the text after the opening brace.

        Args:
            quote: The token around strings.
            types: The types that the schema allows for an argument. A number is a string if nothing else is allowed.
        """
        self.done = False
        self.failed = False
        self._quote = quote
        self._quotes = Markers(quote)
        self._types = types
        self._closers = ["}"]
        self._expects = _Expects.KEY
        self._in_string = False
        self._is_quoted = False
        """Whether the key has quotes."""
        self._is_first = True
        """Whether the next item is the first of its container."""
        self._json = ["{"]
        self._word: list[str] = []
        self._size = 0
        self._argument = ""

    def feed(self, text: str, pos: int) -> int:
        """Reads up to the end of the object, to an error, or to where more text is needed; returns that position."""
        while pos < len(text) and not self.done and not self.failed:
            before = self._expects, self._in_string
            if self._in_string:
                end = self._string(text, pos)
            elif self._expects in (_Expects.COLON, _Expects.BARE):
                end = self._unquoted(text, pos)
            else:
                end = skip_space(text, pos)
                if end < len(text):
                    end = self._punctuation(text, end)
            if end == pos and before == (self._expects, self._in_string):
                break
            pos = end
        return pos

    def take(self) -> str:
        """Takes the JSON since the last call."""
        json = "".join(self._json)
        self._json.clear()
        return json

    def _punctuation(self, text: str, pos: int) -> int:
        char = text[pos]
        if self._expects is _Expects.NEXT:
            if char == ",":
                self._expects = _Expects.KEY if self._closers[-1] == "}" else _Expects.VALUE
            elif char == self._closers[-1]:
                self._close()
            else:
                self.failed = True
            return pos if self.failed else pos + 1
        if char == self._closers[-1] and (char == "]" or self._expects is _Expects.KEY):
            self._close()
            return pos + 1
        quote = marker_at(text, pos, self._quote)
        if quote is None:
            return pos
        if self._expects is _Expects.KEY:
            self._separate()
            self._in_string = self._is_quoted = bool(quote)
            self._expects = _Expects.COLON
        elif char in _CLOSERS:
            self._open(char)
            return pos if self.failed else pos + 1
        else:
            self._separate()
            self._in_string = bool(quote)
            self._expects = _Expects.NEXT if quote else _Expects.BARE
        if quote:
            self._json.append('"')
        return pos + len(quote)

    def _separate(self) -> None:
        """Writes the comma before a key, or before an item of a list."""
        if self._closers[-1] == "}" and self._expects is not _Expects.KEY:
            return
        if not self._is_first:
            self._json.append(", ")
        self._is_first = False

    def _open(self, char: str) -> None:
        self.failed = len(self._closers) == MAX_DEPTH
        self._separate()
        self._json.append(char)
        self._closers.append(_CLOSERS[char])
        self._expects = _Expects.KEY if char == "{" else _Expects.VALUE
        self._is_first = True

    def _close(self) -> None:
        self._json.append(self._closers.pop())
        self._expects = _Expects.NEXT
        self._is_first = False
        self.done = not self._closers

    def _string(self, text: str, pos: int) -> int:
        end, quote = self._quotes.find(text, pos)
        piece = json_string(text[pos:end])[1:-1]
        self._json.append(piece)
        if self._expects is _Expects.COLON:
            self._word.append(text[pos:end])
        if quote:
            self._json.append('"')
            self._in_string = False
        return end + len(quote)

    def _unquoted(self, text: str, pos: int) -> int:
        """Reads a key up to its colon, or a value up to the end of it."""
        is_key = self._expects is _Expects.COLON
        match = (_KEY if is_key else _BARE).match(text, pos)
        assert match is not None
        end = match.end()
        self._word.append(match.group())
        self._size += end - pos
        self.failed = self._size > (MAX_NAME if is_key else _MAX_BARE)
        if end == len(text) or self.failed:
            return end
        word = "".join(self._word).strip()
        self._word.clear()
        self._size = 0
        if not is_key:
            self._json.append(self._value(word))
            self._expects = _Expects.NEXT
            return end
        if text[end] != ":" or not (word or self._is_quoted):
            self.failed = True
            return end
        self._json.append(": " if self._is_quoted else f"{json_string(word)}: ")
        if len(self._closers) == 1:
            self._argument = word
        self._expects = _Expects.VALUE
        return end + 1

    def _value(self, word: str) -> str:
        types = self._types(self._argument) if len(self._closers) == 1 else set()
        if types == {"string"}:
            return json_string(word)
        json = _WORDS.get(word.lower())
        return json or (word if kind_of(word) == "number" else json_string(word))


class GemmaParser:
    """Parses calls with text before, between and after them."""

    def __init__(self, format: GemmaCalls, tools: Iterable[Tool], make_id: MakeId) -> None:
        self.special_tokens = format.special_tokens
        self._format = format
        self._out = Output(make_id)
        self._steps = Steps(self._content)
        self._parameters = Parameters(tools)
        self._opening = Markers(format.opening)
        self._name = Name(self._out)
        self._arguments = GemmaArguments(format.quote, lambda _: set())

    def feed(self, text: str, /) -> list[Event]:
        """Takes the next piece of text; returns its events."""
        self._steps.run(text)
        return self._out.take()

    def finish(self) -> list[Event]:
        """Ends the text; returns the remaining events."""
        rest = self._steps.rest()
        # A partial token after a complete call is not content.
        is_markup = self._steps.state == self._after and self._format.closing.startswith(rest)
        return self._out.finish("" if is_markup else rest)

    def _content(self, text: str, pos: int) -> int:
        end, marker = self._opening.find(text, pos)
        self._out.text(text[pos:end])
        if marker:
            self._out.hold(marker)
            self._steps.state = self._opened
        return end + len(marker)

    def _give_up(self, pos: int) -> int:
        self._out.release()
        self._steps.state = self._content
        return pos

    def _opened(self, text: str, pos: int) -> int:
        end = self._out.hold_space(text, pos)
        if end == len(text):
            return end
        marker = marker_at(text, end, _CALL)
        if marker is None:
            return end
        if not marker:
            return self._give_up(end)
        self._out.hold(marker)
        self._name.clear()
        self._steps.state = self._function
        return end + len(marker)

    def _function(self, text: str, pos: int) -> int:
        match = _NAME.match(text, pos)
        assert match is not None
        end = match.end()
        if not self._name.read(match.group()):
            return self._give_up(end)
        if end == len(text):
            return end
        name = self._name.text()
        if text[end] != "{" or not name:
            return self._give_up(end)
        self._out.hold("{")
        self._out.start(name)
        self._arguments = GemmaArguments(self._format.quote, lambda key: self._parameters.types(name, key))
        self._steps.state = self._object
        return end + 1

    def _object(self, text: str, pos: int) -> int:
        end = self._arguments.feed(text, pos)
        self._out.arguments(self._arguments.take(), text[pos:end])
        if self._arguments.failed:
            return self._give_up(end)
        if self._arguments.done:
            self._out.end()
            self._steps.state = self._after
        return end

    def _after(self, text: str, pos: int) -> int:
        end = skip_space(text, pos)
        self._out.text(text[pos:end])
        if end == len(text):
            return end
        marker = marker_at(text, end, self._format.closing)
        if marker is None:
            return end
        if marker:
            self._out.end_layout()
        self._steps.state = self._content
        return end + len(marker)


GEMMA4: Final = GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA: Final = GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>")
