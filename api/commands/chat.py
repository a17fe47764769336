"""``octavo chat``: a conversation in a terminal."""

from __future__ import annotations

import contextlib
import os

from api.commands import slash
from api.commands.backend import Backend, short_name
from api.commands.client import LostConnectionError, ServerError
from api.commands.conversation import Conversation, InputError, Reply
from api.commands.prompt import PLACEHOLDER, CommandCompleter, Prompt, history_path, open_history, unquote
from api.commands.screen import Screen
from api.version import VERSION


class Chat:
    """Reads texts and commands, shows answers."""

    def __init__(self, backend: Backend, conversation: Conversation, screen: Screen) -> None:
        self.backend = backend
        self.conversation = conversation
        self.screen = screen

    def run(self) -> None:
        """Talks until the person leaves."""
        prompt = Prompt(self._completer(), open_history(history_path(os.environ)), PLACEHOLDER)
        self._banner()
        while True:
            try:
                typed = prompt.read()
            except KeyboardInterrupt:
                self.screen.note("To leave, press Ctrl-D or type /bye.")
                continue
            except EOFError:
                return
            try:
                if not self.handle(typed):
                    return
            except KeyboardInterrupt:
                self.screen.note("Stopped.")
            except (InputError, ServerError) as error:
                self.screen.error(f"{error}")

    def handle(self, typed: str) -> bool:
        """Does what was typed. Returns whether the chat goes on.

        Raises:
            InputError: It was a command that cannot be followed.
            ServerError: The server cannot do what the command needs.
        """
        quoted = unquote(typed)
        text = typed.strip() if quoted is None else quoted
        if not text.strip():
            return True
        if quoted is None and text.startswith("/"):
            if not text.startswith("//"):
                return slash.run(self, text)
            text = text[1:]
        self.conversation.ask(text)
        self.answer()
        return True

    def answer(self) -> None:
        """Asks for the next answer and shows it. Ctrl-C ends the answer only; what came of it is kept."""
        conversation, screen, model = self.conversation, self.screen, self.backend.model
        reply, problem, is_stopped = Reply(), None, False
        try:
            self.backend.ensure()
            with (
                contextlib.closing(
                    self.backend.client.stream("/chat/completions", conversation.request(model.name))
                ) as events,
                screen.answer(think=conversation.shows("think"), markdown=conversation.shows("markdown")) as answer,
            ):
                for event in events:
                    for kind, text in reply.take(event):
                        answer.feed(kind, text)
        except KeyboardInterrupt:
            is_stopped = True
        except ServerError as error:
            problem = error
        conversation.receive(reply.text)
        if problem is not None:
            self._explain(problem)
        elif is_stopped:
            screen.note("Stopped. /regenerate asks again.")
        elif conversation.shows("stats") and (statistics := reply.statistics(model.max_model_len)):
            screen.note(statistics)
        if reply.fills(model.max_model_len):
            screen.note("The context is full. /clear begins a new conversation.")
        elif reply.finish_reason == "length":
            screen.note("The answer was cut at max_tokens. /set max_tokens changes that.")
        screen.console.print()

    def _explain(self, problem: ServerError) -> None:
        """One line that says what went wrong, and one that says how to go on."""
        self.screen.error(str(problem))
        if problem.is_context_full:
            self.screen.note("The context is full. /clear begins a new conversation.")
        elif self.backend.own is not None and self.backend.own.exit_code() is not None:
            self.screen.note("The conversation is kept: /regenerate starts the server again and asks again.")
        elif isinstance(problem, LostConnectionError):
            self.screen.note("The conversation is kept: /regenerate asks again, /save FILE saves it.")

    def _banner(self) -> None:
        model = self.backend.model
        length = f" · context {model.max_model_len:,} tokens" if model.max_model_len else ""
        where = "own server" if self.backend.own is not None else self.backend.client.url
        self.screen.show(f"Octavo {VERSION} · {short_name(model.name)}{length} · {where}")
        self.screen.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        self.screen.console.print()

    def _completer(self) -> CommandCompleter:
        words = {
            "/set": slash.setting_names,
            "/show": lambda: slash.SHOWN,
            "/model": lambda: [model.name for model in self.backend.models],
        }
        meanings = {f"/{command.name}": command.help for command in slash.COMMANDS}
        return CommandCompleter(meanings, words, ["/save", "/load"])
