"""``octavo chat`` and ``octavo complete``, in a terminal or a pipe."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from api.commands.backend import Backend, Wish
from api.commands.client import DEFAULT_URL, ServerError
from api.commands.conversation import Conversation, InputError, Reply, setting
from api.commands.terminal import MarkdownOutput, Output, PlainOutput, visible
from api.config import ServerConfig, variables_of
from api.flags import Parser, add_arguments
from api.flags import options as flag_options
from api.vllm_options import add_foreign_arguments

COMMANDS = ("chat", "complete")
ADDRESS_FLAGS = ("host", "port", "uds")
COMPLETION_TOKENS = 128
LEAVE_TIMEOUT = 15.0
"""Maximum seconds from a signal to exit."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Runs ``chat`` or ``complete``. Returns the exit code."""
    options, serve_flags = parse(command, arguments)
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with _signals_as_exceptions():
            return _run(command, options, serve_flags)
    except (ServerError, InputError) as error:
        print(f"octavo: {visible(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def parse(command: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and the flags for its own server. Exits on invalid flags."""
    brief = _parser(command, is_full=False)
    if any(argument in ("-h", "--help") for argument in arguments):
        brief.print_help()
        raise SystemExit(0)
    full = _parser(command, is_full=True)
    given = full.parse(arguments, intermixed=True)
    options = argparse.Namespace(**{name: given.pop(name) for name in vars(brief.parse_args([]))})
    if "model" in given:
        options.words.insert(0, given.pop("model"))
    for name in ADDRESS_FLAGS:
        if name in given:
            full.error(f"--{name} is a flag of octavo serve; use --url to select a running server")
    for name in ("temperature", "max_tokens"):
        if getattr(options, name) is not None:
            try:
                setattr(options, name, setting(name).parse(f"--{name.replace('_', '-')}", getattr(options, name)))
            except InputError as error:
                full.error(str(error))
    return options, _as_flags(given)


def short_parser(command: str) -> Parser:
    """The flags of ``octavo chat`` or ``octavo complete``, without those of ``octavo serve``."""
    return _parser(command, is_full=False)


def _parser(command: str, *, is_full: bool) -> Parser:
    """The flags of a command; if full, also those of ``octavo serve`` that do not clash with them."""
    is_chat = command == "chat"
    parser = Parser(
        f"octavo {command}",
        "Chat with a model." if is_chat else "Complete text with a model.",
        usage="[MODEL] [TEXT] [flags]",
    )
    parser.epilog = (
        "If no server is running, the command starts its own, which takes the flags of octavo serve and stops with the "
        "command. Piped text is one question, and only the answer is printed."
    )
    if is_full:
        parser.conflict_handler = "resolve"
        parser.add_argument("--config", default=argparse.SUPPRESS)
        add_arguments(parser, ServerConfig)
        add_foreign_arguments(parser, [name for option in flag_options(ServerConfig) for name in option.names])
    parser.add_argument(
        "words",
        nargs="*",
        metavar="MODEL TEXT",
        help="Hub id, folder or GGUF file, as for octavo serve; default: the server's model, or the demo model. With "
        "TEXT, print the answer and exit; - stands for piped input. A first argument with white space is TEXT.",
    )
    own = parser.add_argument_group("flags")
    own.add_argument("--url", help=f"URL of the server, or unix:PATH for a Unix socket (default: {DEFAULT_URL}).")
    own.add_argument("--model-name", help="Name of the model on the server. Default: the first.")
    own.add_argument("--api-key", help="API key of the server. Default: OCTAVO_API_KEY or VLLM_API_KEY.")
    own.add_argument("--max-tokens", help="Maximum length of an answer in tokens.")
    own.add_argument("--temperature", help="0: always the most likely token; higher: more variety.")
    own.add_argument("-q", "--quick", metavar="TEXT", help="Send this text, print the answer and exit.")
    if is_chat:
        own.add_argument("--system-prompt", help="System prompt for the conversation.")
    return parser


def _as_flags(given: Mapping[str, Any]) -> list[str]:
    """Parsed flags of ``octavo serve``, as command-line arguments."""
    flags: list[str] = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            flags += [flag, *value]
        else:
            flags.append(f"{flag}={value}")
    return flags


def _run(command: str, options: argparse.Namespace, serve_flags: list[str]) -> int:
    key = options.api_key or next((os.environ[name] for name in variables_of("api_key") if os.environ.get(name)), None)
    model, words = _model_and_texts(options.words)
    wish = Wish(model, options.url, key, options.model_name, serve_flags)
    texts = [*([options.quick] if options.quick is not None else []), *words]
    is_interactive = not texts and sys.stdin.isatty() and sys.stdout.isatty()
    text = None if is_interactive else _question(texts)
    if text is not None and not text.strip():
        raise InputError("the text is empty")
    settings = {name: value for name in ("temperature", "max_tokens") if (value := getattr(options, name)) is not None}
    console = Console(stderr=not is_interactive, highlight=False, markup=False, emoji=False)
    with Backend(wish, console) as backend:
        if command == "complete":
            backend.open()
            _complete(backend, settings, text)
            return 0
        conversation = Conversation(system=options.system_prompt or "", settings=settings)
        if text is None:
            _chat(backend, conversation)
        else:
            backend.open()
            conversation.ask(text)
            _answer(backend, conversation)
    return 0


def _model_and_texts(words: list[str]) -> tuple[str | None, list[str]]:
    """The model, if the first word can be one: no model but a local file has white space in its name."""
    if words and words[0] != "-" and (len(words[0].split()) == 1 or Path(words[0]).exists()):
        return words[0], words[1:]
    return None, words


def _chat(backend: Backend, conversation: Conversation) -> None:
    """A conversation in a terminal."""
    from api.commands.chat import Chat  # a pipe needs no line editor
    from api.commands.screen import Screen, quiet_input

    with quiet_input():
        backend.open()
        Chat(backend, conversation, Screen()).run()


def _question(texts: Sequence[str]) -> str:
    """The text to send; piped input replaces a dash."""
    if not texts:
        return sys.stdin.read().rstrip("\n")
    return " ".join(sys.stdin.read().rstrip("\n") if text == "-" else text for text in texts)


def _answer(backend: Backend, conversation: Conversation) -> None:
    """Prints one answer and nothing else."""
    output = _output(has_markdown=True)
    reply = Reply()
    events = backend.client.stream("/chat/completions", conversation.request(backend.model.name))
    with contextlib.closing(events):
        for event in events:
            for kind, text in reply.take(event):
                if kind == "content":
                    output.feed(text)
    output.finish()


def _complete(backend: Backend, settings: Mapping[str, Any], text: str | None) -> None:
    """Prints texts with the model's completions."""
    if text is not None:
        _complete_one(backend, settings, text)
        return
    from api.commands.prompt import Prompt

    prompt = Prompt(hint="Start a text (Ctrl-D exits)")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            typed = prompt.read()
            if typed.strip():
                try:
                    _complete_one(backend, settings, typed)
                except ServerError as error:
                    print(f"octavo: {visible(str(error))}", file=sys.stderr)


def _complete_one(backend: Backend, settings: Mapping[str, Any], text: str) -> None:
    output = _output(has_markdown=False)
    output.feed(text)
    body = {"model": backend.model.name, "max_tokens": COMPLETION_TOKENS, **settings, "prompt": text}
    with contextlib.closing(backend.client.stream("/completions", body)) as events:
        for event in events:
            for choice in event.get("choices") or ():
                output.feed(choice.get("text") or "")
    output.finish()


class _RawOutput:
    """For pipes and files: the bytes of the answer."""

    def feed(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def finish(self) -> None:
        self.feed("\n")


def _output(*, has_markdown: bool) -> Output:
    console = Console(highlight=False, markup=False, emoji=False)
    if not sys.stdout.isatty():
        return _RawOutput()
    return MarkdownOutput(console) if has_markdown else PlainOutput(console)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the stack, so that an own server is stopped.

    Running code may swallow the exception, so there is also a deadline, after which the process exits; the kernel then
    stops the server.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        deadline = threading.Timer(LEAVE_TIMEOUT, os._exit, [128 + number])
        deadline.daemon = True
        deadline.start()
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
