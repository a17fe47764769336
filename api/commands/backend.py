"""The server behind a chat: a running one, or its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.text import Text

from api.commands.client import DEFAULT_URL, Client, NoServerError, NotReadyError, ServedModel, ServerError
from api.commands.local_server import LocalServer
from api.commands.screen import Spinner
from api.commands.terminal import GREY, visible

DEMO = "the demo model"
POLL_INTERVAL = 0.1
"""Seconds between polls of a starting server."""


@dataclass
class Wish:
    """The server that the command line asks for."""

    model: str | None = None
    """A hub id, folder or file, as for ``octavo serve``."""
    url: str | None = None
    api_key: str | None = None
    model_name: str | None = None
    """A model name on the server."""
    serve_flags: Sequence[str] = ()
    """Flags for an own server; if there are any, one is started."""


class Backend:
    """A client and its model; as a context manager, stops its own server."""

    def __init__(self, wish: Wish, console: Console) -> None:
        """Args:
        wish: The server that is wanted.
        console: For progress and notes; standard error where standard output is for answers.
        """
        self._wish = wish
        self._console = console
        self.own: LocalServer | None = None
        self.client = Client(wish.url or DEFAULT_URL, wish.api_key)
        self.models: list[ServedModel] = []
        self.model = ServedModel("", "", None)

    def open(self) -> None:
        """Finds a running server with the model, or starts one.

        Raises:
            ServerError: There is none, and none can be started.
        """
        wish = self._wish
        if wish.serve_flags and wish.url is None:
            self._start()
        else:
            try:
                models = self._models()
            except NoServerError:
                if wish.url is not None:
                    raise
                self._start()
            except ServerError as error:
                if wish.model is None:
                    raise
                self._note(f"Cannot list the models of the server at {self.client.url}: {error}")
                self._start()
            else:
                if wish.model is None or any(_is_same(model, wish.model) for model in models):
                    self.models = models
                    if wish.serve_flags:
                        self._note(f"Ignored, since the server is already running: {' '.join(wish.serve_flags)}")
                else:
                    self._note(f"The server at {self.client.url} serves {_names(models)}, not {wish.model}.")
                    self._start()
        self.model = self._choose()

    def _models(self) -> list[ServedModel]:
        """The models of the running server, once loaded."""
        try:
            return self.client.models()
        except NotReadyError:
            return self._wait(f"Waiting for the server at {self.client.url}")

    def ensure(self) -> None:
        """Restarts an own server that has exited.

        Raises:
            ServerError: The restart failed.
        """
        if self.own is not None and self.own.exit_code() is not None:
            self._note(self.own.last_words())
            self.close()
            self._start()

    def find(self, name: str) -> ServedModel:
        """The served model with that name, from a fresh list.

        Raises:
            ServerError: There is none.
        """
        self.models = self.client.models()
        for model in self.models:
            if _is_same(model, name):
                return model
        raise ServerError(f"the server has no model {name}; choose from {_names(self.models)}")

    def close(self) -> None:
        if self.own is not None:
            self.own.stop()
            self.own = None

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _choose(self) -> ServedModel:
        if self._wish.model_name is not None:
            return self.find(self._wish.model_name)
        wanted = self._wish.model
        return next((model for model in self.models if wanted and _is_same(model, wanted)), self.models[0])

    def _start(self) -> None:
        """Starts a server and waits until it is ready."""
        wish = self._wish
        name = short_name(wish.model or DEMO)
        environment = {"OCTAVO_API_KEY": wish.api_key} if wish.api_key else None
        self.own = LocalServer([*([wish.model] if wish.model else []), *wish.serve_flags], environment)
        self.client = Client(self.own.url, wish.api_key)
        try:
            self.models = self._wait(f"Starting a server for {name}")
        except BaseException:
            self.close()
            raise

    def _wait(self, what: str) -> list[ServedModel]:
        """Waits until the server is ready, without a limit, since models may have to be downloaded.

        Args:
            what: Shown while waiting.

        Returns:
            Its models.

        Raises:
            ServerError: The server exited.
        """
        begin = time.monotonic()
        spinner = Spinner(self._console, visible(what), delay=0.0)
        spinner.start()
        try:
            while True:
                try:
                    return self.client.models()
                except NotReadyError:
                    progress = self.client.startup()
                except NoServerError:
                    if self.own is None:
                        raise
                    progress = self.own.progress
                if self.own is not None and self.own.exit_code() is not None:
                    raise ServerError(self.own.last_words())
                parts = [what, progress, f"{time.monotonic() - begin:.0f} s"]
                spinner.update(" · ".join(part for part in parts if part))
                time.sleep(POLL_INTERVAL)
        finally:
            spinner.stop()

    def _note(self, text: str) -> None:
        self._console.print(Text(visible(text), GREY))


def short_name(name: str) -> str:
    """Display name of a model: for a path, its last part."""
    return os.path.basename(name.rstrip("/")) if name.startswith(("/", ".", "~")) else name


def _is_same(model: ServedModel, wanted: str) -> bool:
    if wanted in (model.name, model.root):
        return True
    path = Path(wanted).expanduser()
    return path.exists() and os.path.realpath(path) == os.path.realpath(Path(model.root).expanduser())


def _names(models: Sequence[ServedModel]) -> str:
    return ", ".join(model.name for model in models)
