"""The input line of a chat: history, multi-line input, completion."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

QUOTES = '"""'
MAX_HISTORY_BYTES = 1 << 20
"""A history file longer than this is cut to its newer half when a chat starts."""
PLACEHOLDER = "Send a message (/help for commands)"


def history_path(environment: Mapping[str, str]) -> Path:
    """Path of the history file, in the XDG state folder."""
    base = environment.get("XDG_STATE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path("~/.local/state").expanduser()
    return folder / "octavo" / "chat_history"


def open_history(path: Path) -> History:
    """The history, in a file that only its owner can read; in memory if that fails."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            os.fchmod(file.fileno(), 0o600)
            _shorten(path, os.fstat(file.fileno()).st_size)
    except OSError:
        return InMemoryHistory()
    return _FileHistory(str(path))


def _shorten(path: Path, size: int) -> None:
    if size <= MAX_HISTORY_BYTES:
        return
    content = path.read_bytes()[-MAX_HISTORY_BYTES // 2 :]
    path.write_bytes(content[max(content.find(b"\n# "), 0) :])


class _FileHistory(FileHistory):
    """Ignores write errors: a full disk must not end the chat."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeEncodeError):
            super().store_string(string)


class CommandCompleter(Completer):
    """Completes commands and their arguments."""

    def __init__(
        self, commands: Mapping[str, str], words: Mapping[str, Callable[[], Iterable[str]]], files: Sequence[str]
    ) -> None:
        """Args:
        commands: Descriptions of commands by name, including the slash.
        words: Possible arguments by command.
        files: Commands that take a file name.
        """
        self._commands = commands
        self._words = words
        self._files = files
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, rest = text.partition(" ")
        if not space:
            for name, meaning in self._commands.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display_meta=meaning)
        elif command in self._files:
            yield from self._paths.get_completions(Document(rest), complete_event)
        elif command in self._words:
            for word in self._words[command]():
                if word.startswith(rest):
                    yield Completion(word, -len(rest))


class Prompt:
    """Reads the user's input."""

    def __init__(self, completer: Completer | None = None, history: History | None = None, hint: str = "") -> None:
        self._session: PromptSession[str] = PromptSession(
            history=history or InMemoryHistory(),
            completer=completer,
            complete_while_typing=True,
            complete_style=CompleteStyle.COLUMN,
            reserve_space_for_menu=6,
            multiline=True,
            prompt_continuation=lambda width, line_number, wrap_count: "." * (width - 1) + " ",
            placeholder=FormattedText([("#808080", hint)]),
            key_bindings=_key_bindings(),
            mouse_support=False,
            enable_suspend=True,
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """The next input, including any triple quotes.

        Raises:
            EOFError: Ctrl-D in an empty line, or the end of the input.
            KeyboardInterrupt: Ctrl-C in an empty line.
        """
        return self._session.prompt(">>> ")


def is_complete(text: str) -> bool:
    """Whether Enter sends the text; inside triple quotes it starts a new line."""
    body = text.strip()
    return not body.startswith(QUOTES) or (len(body) >= 2 * len(QUOTES) and body.endswith(QUOTES))


def unquote(text: str) -> str | None:
    """The text inside triple quotes, or None if there are none."""
    body = text.strip()
    if body.startswith(QUOTES) and is_complete(body):
        return body[len(QUOTES) : -len(QUOTES)].strip("\n")
    return None


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        if is_complete(event.current_buffer.text):
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def discard(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
