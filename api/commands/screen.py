"""Output of a chat: notes, errors, and answers as they arrive."""

from __future__ import annotations

import contextlib
import sys
import termios
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.commands.terminal import ERROR, GREY, MarkdownOutput, Output, PlainOutput, visible

SPINNER_DELAY = 0.5
"""Seconds without output after which a spinner appears."""


class Screen:
    """Writes to the terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False)

    def note(self, text: str) -> None:
        """Prints a note, in grey."""
        self.console.print(Text(visible(text), GREY))

    def show(self, text: str) -> None:
        """Prints requested output."""
        self.console.print(Text(visible(text)))

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        """Prints a table; the last column wraps."""
        grid = Table.grid(padding=(0, 2), pad_edge=True)
        for row in rows:
            grid.add_row(*(Text(visible(cell)) for cell in row))
        for column in grid.columns[:-1]:
            column.no_wrap = True
        self.console.print(grid)

    def error(self, text: str) -> None:
        self.console.print(Text(visible(text), ERROR))

    def answer(self, *, think: bool, markdown: bool) -> Answer:
        """A context for showing the next answer."""
        return Answer(self.console, think=think, markdown=markdown)


class Answer:
    """Shows an answer as it arrives; a context manager that finishes the output."""

    def __init__(self, console: Console, *, think: bool, markdown: bool) -> None:
        self._console = console
        self._think = think
        self._thoughts: Output | None = None
        self._thinking_since: float | None = None
        self._text: Output = MarkdownOutput(console) if markdown else PlainOutput(console)
        self._spinner = Spinner(console)
        self._is_empty = True

    def __enter__(self) -> Answer:
        self._spinner.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spinner.stop()
        self._end_thinking()
        self._text.finish()

    def feed(self, kind: str, text: str) -> None:
        """Shows a piece: ``reasoning`` or ``content``."""
        self._spinner.stop()
        if kind == "reasoning":
            self._feed_thoughts(text)
            return
        self._end_thinking()
        if self._is_empty:
            text = text.lstrip("\n")  # line breaks between reasoning and answer
            self._is_empty = not text
        self._text.feed(text)

    def _feed_thoughts(self, text: str) -> None:
        if self._thinking_since is None:
            self._thinking_since = time.monotonic()
            self._console.print(Text("Thinking...", GREY), end="\n" if self._think else "")
            self._console.file.flush()
        if self._thoughts is None:
            self._thoughts = PlainOutput(self._console, GREY)
            text = text.lstrip("\n")
        if self._think:
            self._thoughts.feed(text)

    def _end_thinking(self) -> None:
        if self._thinking_since is None or self._thoughts is None:
            return
        seconds = time.monotonic() - self._thinking_since
        self._thoughts.finish()
        self._thoughts = self._thinking_since = None
        self._console.print(Text(f"...thought for {seconds:.1f} s" if self._think else f" {seconds:.1f} s", GREY))
        if self._think:
            self._console.print()


class Spinner:
    """A spinner that appears after a delay. Does nothing if the terminal cannot show it."""

    def __init__(self, console: Console, text: str = "", delay: float = SPINNER_DELAY) -> None:
        self._works = console.is_terminal and not console.is_dumb_terminal
        self._status = console.status(Text(text, GREY), spinner_style=GREY)
        self._timer = threading.Timer(delay, self._begin)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        if self._works:
            self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if not self._stopped:
                self._status.start()

    def update(self, text: str) -> None:
        """Changes the text next to the spinner."""
        self._status.update(Text(visible(text), GREY))

    def stop(self) -> None:
        """Removes the spinner for good."""
        if not self._stopped:
            with self._lock:
                self._stopped = True
                self._timer.cancel()
                self._status.stop()


@contextlib.contextmanager
def quiet_input() -> Iterator[None]:
    """Disables echo between prompts. Keys are kept for the next prompt; Ctrl-C still interrupts."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        yield
        return
    quiet = list(before)
    quiet[0] &= ~termios.ICRNL  # keep Enter distinct from Ctrl-J
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
