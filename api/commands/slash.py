"""The slash commands of a chat."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from api.commands.backend import Backend
from api.commands.conversation import DISPLAY, SETTINGS, UNSET, Conversation, InputError, setting
from api.commands.screen import Screen

SHOWN = ("messages", "log")
"""Arguments of ``/show``, besides none for the overview."""


class Chat(Protocol):
    """The part of a chat that commands need."""

    conversation: Conversation

    @property
    def backend(self) -> Backend: ...
    @property
    def screen(self) -> Screen: ...
    def answer(self) -> None:
        """Requests the next answer and shows it."""


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    arguments: str
    help: str
    run: Callable[[Chat, str], bool | None]
    """Takes the arguments. Returns False to leave."""
    aliases: tuple[str, ...] = ()


def run(chat: Chat, line: str) -> bool:
    """Runs a command line. Returns whether the chat continues.

    Raises:
        InputError: The command is unknown or invalid.
        ServerError: The server cannot do what the command needs.
    """
    name, _, rest = line[1:].partition(" ")
    name = name.split("\n")[0]
    for command in COMMANDS:
        if name in (command.name, *command.aliases):
            return command.run(chat, rest.strip()) is not False
    names = [name for command in COMMANDS for name in (command.name, *command.aliases)]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean /{close[0]}?" if close else "/help lists the commands."
    raise InputError(f"unknown command /{name}; {hint} To send text that starts with a slash, start it with //")


def setting_names() -> Iterable[str]:
    """The names of all settings."""
    return SETTINGS


def _help(chat: Chat, rest: str) -> None:
    lines = [(f"/{command.name} {command.arguments}".strip(), command.help) for command in COMMANDS]
    lines += [
        ('"""', 'starts multi-line input, which ends with """; Alt-Enter or Ctrl-J also add a line'),
        ("//...", "sends text that starts with one slash"),
        ("Ctrl-C", "stops an answer; the conversation continues"),
        ("Ctrl-D", "exits"),
    ]
    chat.screen.table(lines)


def _clear(chat: Chat, rest: str) -> None:
    chat.conversation.clear()
    chat.screen.note("Started a new conversation. System prompt and settings are kept.")


def _system(chat: Chat, rest: str) -> None:
    conversation = chat.conversation
    if rest:
        conversation.system = "" if rest.lower() in UNSET else rest.strip('"')
    system = conversation.system
    chat.screen.note(f"System prompt: {system}" if system else "No system prompt. Set one with /system TEXT.")


def _set(chat: Chat, rest: str) -> None:
    settings = chat.conversation.settings
    name, _, text = rest.partition(" ")
    text = text.strip()
    if not name:
        chat.screen.table((name, _value(chat, name), known.help) for name, known in SETTINGS.items())
        chat.screen.note("/set NAME VALUE sets a parameter, /set NAME default resets it.")
        return
    known = setting(name)
    if not text:
        chat.screen.table([(name, _value(chat, name), known.help)])
    elif text.lower() in UNSET:
        settings.pop(name, None)
        chat.screen.note(f"{name}: {_value(chat, name)}")
    else:
        settings[name] = known.parse(name, text)
        chat.screen.note(f"{name}: {_value(chat, name)}")


def _value(chat: Chat, name: str) -> str:
    value = chat.conversation.settings.get(name, DISPLAY.get(name))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "default" if value is None else json.dumps(value, ensure_ascii=False)


def _show(chat: Chat, rest: str) -> None:
    conversation, backend = chat.conversation, chat.backend
    if rest == "messages":
        for message in conversation.messages:
            chat.screen.note(f"{message['role']}:")
            chat.screen.show(message["content"])
        if not conversation.messages:
            chat.screen.note("No messages yet.")
    elif rest == "log":
        if backend.own is None:
            raise InputError("no log: this chat did not start the server")
        chat.screen.show("\n".join(backend.own.log()[-40:]) or "The log is empty.")
    elif rest:
        raise InputError(f"/show: expected nothing or one of {', '.join(SHOWN)}, got {rest!r}")
    else:
        model = backend.model
        settings = [f"{name} {_value(chat, name)}" for name in conversation.settings]
        lines = {
            "model": model.name,
            "context": f"{model.max_model_len:,} tokens" if model.max_model_len else "unknown",
            "server": backend.client.url if backend.own is None else f"started by this chat, process {backend.own.pid}",
            "system prompt": conversation.system or "none",
            "settings": ", ".join(settings) or "defaults",
            "messages": str(len(conversation.messages)),
        }
        chat.screen.table(lines.items())


def _save(chat: Chat, rest: str) -> None:
    path = _path("save", rest)
    chat.conversation.save(path, chat.backend.model.name)
    chat.screen.note(f"Saved {_messages(chat.conversation)} to {path}.")


def _load(chat: Chat, rest: str) -> None:
    path = _path("load", rest)
    chat.conversation = Conversation.load(path)
    chat.screen.note(f"Loaded {_messages(chat.conversation)} from {path}; /show messages shows them.")


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise InputError(f"/{command} needs a file name")
    return Path(rest).expanduser()


def _messages(conversation: Conversation) -> str:
    count = len(conversation.messages)
    return f"{count} message{'' if count == 1 else 's'}"


def _model(chat: Chat, rest: str) -> None:
    backend = chat.backend
    if rest:
        backend.model = backend.find(rest)
    else:
        backend.models = backend.client.models()
    for model in backend.models:
        chat.screen.show(f"{'*' if model.name == backend.model.name else ' '} {model.name}")


def _regenerate(chat: Chat, rest: str) -> None:
    if not chat.conversation.take_back():
        raise InputError("there is no answer to regenerate")
    chat.answer()


def _bye(chat: Chat, rest: str) -> bool:
    return False


COMMANDS = (
    Command("help", "", "list the commands", _help, ("?",)),
    Command("clear", "", "start a new conversation", _clear),
    Command("system", "TEXT", "set or show the system prompt; /system none clears it", _system),
    Command("set", "NAME VALUE", "set a parameter; /set lists them", _set),
    Command("show", "[messages|log]", "show model, server and settings, the conversation, or the server's log", _show),
    Command("save", "FILE", "save the conversation", _save),
    Command("load", "FILE", "continue a saved conversation", _load),
    Command("model", "[NAME]", "list the server's models, or switch to another", _model),
    Command("regenerate", "", "regenerate the last answer", _regenerate, ("retry",)),
    Command("bye", "", "exit the chat", _bye, ("exit", "quit")),
)
