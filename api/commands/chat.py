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
    """Reads input and commands, and shows answers."""

    def __init__(self, backend: Backend, conversation: Conversation, screen: Screen) -> None:
        self.backend = backend
        self.conversation = conversation
        self.screen = screen

    def run(self) -> None:
        """Runs the chat until the user leaves."""
        prompt = Prompt(self._completer(), open_history(history_path(os.environ)), PLACEHOLDER)
        self._banner()
        while True:
            try:
                typed = prompt.read()
            except KeyboardInterrupt:
                self.screen.note("Press Ctrl-D or type /bye to leave.")
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
        """Handles an input. Returns whether the chat continues.

        Raises:
            InputError: The command is invalid.
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
        """Requests the next answer and shows it. Ctrl-C stops only the answer; the part so far is kept."""
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
            screen.note("Stopped. /regenerate tries again.")
        elif conversation.shows("stats") and (statistics := reply.statistics(model.max_model_len)):
            screen.note(statistics)
        if reply.fills(model.max_model_len):
            screen.note("The context is full. /clear starts a new conversation.")
        elif reply.finish_reason == "length":
            screen.note("The answer reached max_tokens. Change the limit with /set max_tokens.")
        screen.console.print()

    def _explain(self, problem: ServerError) -> None:
        """Shows one line about the error and one about how to continue."""
        self.screen.error(str(problem))
        if problem.is_context_full:
            self.screen.note("The context is full. /clear starts a new conversation.")
        elif self.backend.own is not None and self.backend.own.exit_code() is not None:
            self.screen.note("The conversation is kept: /regenerate restarts the server and tries again.")
        elif isinstance(problem, LostConnectionError):
            self.screen.note("The conversation is kept: /regenerate tries again, /save FILE saves it.")

    def _banner(self) -> None:
        model = self.backend.model
        length = f" · context {model.max_model_len:,} tokens" if model.max_model_len else ""
        where = "own server" if self.backend.own is not None else self.backend.client.url
        self.screen.show(f"Octavo {VERSION} · {short_name(model.name)}{length} · {where}")
        self.screen.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D exits")
        self.screen.console.print()

    def _completer(self) -> CommandCompleter:
        words = {
            "/set": slash.setting_names,
            "/show": lambda: slash.SHOWN,
            "/model": lambda: [model.name for model in self.backend.models],
        }
        meanings = {f"/{command.name}": command.help for command in slash.COMMANDS}
        return CommandCompleter(meanings, words, ["/save", "/load"])
