"""Writing to a terminal: text that cannot harm it, word wrap, light Markdown. Everything is written once and in order.

Nothing that is on the screen is written again, so there is no flicker, and neither a change of the width nor scrolling
back disturbs anything.
"""

from __future__ import annotations

import re
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GREY = "grey50"
ERROR = "bold red"
CODE = "cyan"

_CONTROLS: dict[int, str | None] = {code: chr(0x2400 + code) for code in range(0x20)}
_CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None, 0x7F: "\u2421"}
_CONTROLS |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_CONTROLS |= {0x2028: "\n", 0x2029: "\n", **dict.fromkeys(range(0xD800, 0xE000), "\ufffd")}


def visible(text: str) -> str:
    """Text from outside with every character that a terminal would obey made visible.

    Control characters become their pictures (ESC is shown as a small ``ESC``), carriage returns vanish, and what
    changes the direction of writing becomes a replacement character, as do halves of surrogate pairs.
    """
    return text.translate(_CONTROLS)


class Output(Protocol):
    """Takes an answer in pieces."""

    def feed(self, text: str) -> None: ...

    def finish(self) -> None: ...


class WordWrap:
    """Writes words to a terminal, as many as fit on a line; a word is written once it is complete."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0
        self._space = ""
        self._word: list[tuple[str, str]] = []
        """Text and style of the parts of the word that is not complete."""
        self.indent = 0
        """Spaces before the lines that a wrapped line continues on."""

    def write(self, text: str, style: str = "") -> None:
        """Takes visible text."""
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if part == "\n":
                self.end_line()
            elif part.isspace():
                self.flush()
                self._space += part.expandtabs(4)
            else:
                self._take(part, style)

    def _take(self, part: str, style: str) -> None:
        """Takes a part of a word; words of writing systems without spaces may be broken before each character."""
        begin = 0
        for i, char in enumerate(part):
            if char >= "\u2e80" and cell_len(char) == 2 and char not in "、。，．！？：；）」』】》〉〕ー":
                self._append(part[begin:i], style)
                self.flush()
                begin = i
        self._append(part[begin:], style)

    def _append(self, text: str, style: str) -> None:
        if text:
            self._word.append((text, style))

    def flush(self) -> None:
        """Writes the word that is held back."""
        if not self._word:
            return
        width = max(self._console.width, 10)
        length = sum(cell_len(text) for text, _ in self._word)
        if self._column and self._column + len(self._space) + length > width:
            self._console.file.write("\n" + " " * self.indent)
            self._column = self.indent
        else:
            self._console.file.write(self._space)
            self._column += len(self._space)
        for text, style in self._word:
            self._console.print(Text(text, style), end="", soft_wrap=True)
        self._column += length
        if self._column > width:  # a word longer than a line: the terminal has wrapped it
            self._column = self._column % width or width
        self._space, self._word = "", []

    def end_line(self) -> None:
        """Ends the line, and the paragraph with it."""
        self.flush()
        self._console.file.write("\n")
        self._column, self._space, self.indent = 0, "", 0

    def finish(self) -> None:
        """Ends the line if anything is on it."""
        self.flush()
        if self._column:
            self.end_line()
        self._space = ""


class PlainOutput:
    """Writes an answer as it is, in one style."""

    def __init__(self, console: Console, style: str = "") -> None:
        self._console = console
        self._style = style
        self._wrap = WordWrap(console)

    def feed(self, text: str) -> None:
        self._wrap.write(visible(text), self._style)
        self._console.file.flush()

    def finish(self) -> None:
        self._wrap.finish()
        self._console.file.flush()


_FENCE = re.compile(r" *(`{3,}|~{3,})([^`\n]*)\n")
_HEADING = re.compile(r"#{1,6} +(?=[^\s#])")
_BULLET = re.compile(r"( *)[-*+] +(?=\S)")
_UNDECIDED = re.compile(r" *([-*+] *|`{0,2}|~{0,2}|#{1,6} *|(`{3,}|~{3,})[^`\n]*)")
"""The beginning of a line that may still become one of the above."""
_SPECIAL = re.compile(r"[`*\n]")
_RUN = re.compile(r"`+|\*+")
_SPANS = {"`": re.compile(r"`([^`]+)`"), "**": re.compile(r"\*\*(?!\s)(.*?[^\s*])\*\*")}
"""What two marks may enclose."""
MAX_SPAN = 200
"""Characters of a line that are held back while the end of a bold or code span is looked for."""
MAX_HIGHLIGHT_LINES = 400
"""A line of code is highlighted in the light of those before it, in blocks of up to this length."""


class MarkdownOutput:
    """Writes an answer with its bold text, headings, lists and code shown as such."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._wrap = WordWrap(console)
        self._pending = ""
        """What could not be written yet, since what follows decides how."""
        self._code: _CodeBlock | None = None
        self._at_line_start = True
        self._style = ""
        self._before = ""
        """The character before ``_pending``."""

    def feed(self, text: str) -> None:
        self._pending += visible(text)
        self._advance(is_last=False)
        self._console.file.flush()

    def finish(self) -> None:
        self._advance(is_last=True)
        self._wrap.finish()
        self._console.file.flush()

    def _advance(self, *, is_last: bool) -> None:
        while self._pending:
            if self._code is not None:
                goes_on = self._code_line(self._code, is_last=is_last)
            elif self._at_line_start:
                goes_on = self._line_start(is_last=is_last)
            else:
                goes_on = self._inline(is_last=is_last)
            if not goes_on:
                return

    def _line_start(self, *, is_last: bool) -> bool:
        """Decides what kind of line begins. Returns whether that is possible yet."""
        if fence := _FENCE.match(self._pending):
            self._drop(fence.end())
            self._print_line(fence[0].rstrip("\n"), GREY)
            self._code = _CodeBlock(fence[1], fence[2].strip())
            return True
        if not is_last and _UNDECIDED.fullmatch(self._pending):
            return False
        if heading := _HEADING.match(self._pending):
            self._drop(heading.end())
            self._style = "bold"
        elif bullet := _BULLET.match(self._pending):
            self._drop(bullet.end())
            self._wrap.write(f"{bullet[1]}\u2022 ")
            self._wrap.indent = len(bullet[1]) + 2
        self._at_line_start = False
        return True

    def _inline(self, *, is_last: bool) -> bool:
        """Writes up to the next mark, or a span. Returns whether there may be more to do."""
        found = _SPECIAL.search(self._pending)
        begin = len(self._pending) if found is None else found.start()
        if found is None or begin:
            self._wrap.write(self._pending[:begin], self._style)
            self._drop(begin)
            return True
        if self._pending[0] == "\n":
            self._wrap.end_line()
            self._drop(1)
            self._at_line_start, self._style = True, ""
            return True
        return self._marks(is_last=is_last)

    def _marks(self, *, is_last: bool) -> bool:
        """Writes a span, or marks that begin none. Returns whether it is known yet which."""
        line, newline, _ = self._pending.partition("\n")
        can_wait = not (newline or is_last or len(line) > MAX_SPAN)
        run = _RUN.match(line)
        assert run is not None
        marks = run[0]
        if len(marks) == len(line) and can_wait:
            return False
        if marks in _SPANS and not (
            marks == "**" and self._before.isascii() and self._before.isalnum()
        ):  # 2**3 is a number
            span = _SPANS[marks].match(line)
            if span is not None:
                self._wrap.write(span[1], CODE if marks == "`" else "bold")
                self._drop(span.end())
                return True
            if can_wait and not line[len(marks)].isspace():
                return False
        self._wrap.write(marks, self._style)
        self._drop(len(marks))
        return True

    def _code_line(self, code: _CodeBlock, *, is_last: bool) -> bool:
        line, newline, _ = self._pending.partition("\n")
        if not newline and not is_last:
            return False
        self._drop(len(line) + len(newline))
        if code.is_closed_by(line):
            self._code = None
            self._print_line(line, GREY)
        else:
            self._console.print(code.highlight(line), soft_wrap=True)
        return True

    def _print_line(self, line: str, style: str) -> None:
        self._console.print(Text(line, style), soft_wrap=True)

    def _drop(self, count: int) -> None:
        if count:
            self._before = self._pending[count - 1]
            self._pending = self._pending[count:]


class _CodeBlock:
    """Code between fences, highlighted line by line."""

    def __init__(self, fence: str, language: str) -> None:
        from rich.syntax import Syntax  # loads all of Pygments, and most answers have no code

        self._fence = fence
        self._lines: list[str] = []
        self._syntax = Syntax("", language.split()[0] if language else "text", theme="ansi_dark")

    def is_closed_by(self, line: str) -> bool:
        mark = line.strip()
        return len(mark) >= len(self._fence) and not mark.strip(self._fence[0])

    def highlight(self, line: str) -> Text:
        self._lines.append(line)
        if len(self._lines) > MAX_HIGHLIGHT_LINES:
            self._lines = [line]
        text = self._syntax.highlight("\n".join(self._lines))
        lines = text.split("\n", allow_blank=True)
        return lines[len(self._lines) - 1] if len(lines) >= len(self._lines) else Text(line)
