"""The state of a chat: messages, settings and the answer being received. No terminal, no network."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
UNSET = ("default", "unset", "none")
"""Values of ``/set NAME`` that mean the server's default."""


class InputError(Exception):
    """Invalid input or an unusable file; the message says what is expected."""


@dataclass(frozen=True)
class Setting:
    """A request parameter or a display switch."""

    kind: type
    help: str
    low: float | None = None
    high: float | None = None

    def parse(self, name: str, text: str) -> Any:
        """Parses the typed value.

        Raises:
            InputError: It is invalid.
        """
        if self.kind is bool:
            if text.lower() in ("on", "true", "yes", "1"):
                return True
            if text.lower() in ("off", "false", "no", "0"):
                return False
            raise InputError(f"{name}: expected on or off, got {text!r}")
        if self.kind is list:
            return _parse_texts(name, text)
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        too_low = value is not None and self.low is not None and not value >= self.low
        too_high = value is not None and self.high is not None and not value <= self.high
        if value is None or too_low or too_high:
            raise InputError(f"{name}: expected {self._range()}, got {text!r}")
        return value

    def _range(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        if self.low is not None and self.high is not None:
            return f"{noun} from {self.low:g} to {self.high:g}"
        return noun if self.low is None else f"{noun} of at least {self.low:g}"


SETTINGS = {
    "temperature": Setting(float, "0: always the most likely token; higher: more variety", 0, 100),
    "top_p": Setting(float, "sample from the most likely tokens with this total probability", 0.0001, 1),
    "top_k": Setting(int, "sample from this many most likely tokens; 0: all", -1),
    "min_p": Setting(float, "minimum probability relative to the most likely token", 0, 1),
    "max_tokens": Setting(int, "maximum length of an answer in tokens", 1),
    "seed": Setting(int, "the same seed gives the same answer"),
    "stop": Setting(list, 'stop the answer at this string, or at one of ["several", "strings"]'),
    "presence_penalty": Setting(float, "above 0: discourages tokens already used", -2, 2),
    "frequency_penalty": Setting(float, "above 0: discourages frequently used tokens", -2, 2),
    "repetition_penalty": Setting(float, "above 1: discourages repetition", 0.0001, 100),
    "enable_thinking": Setting(bool, "whether the model reasons first, if its template has a choice"),
    "think": Setting(bool, "show the model's reasoning"),
    "markdown": Setting(bool, "render bold text, code and lists"),
    "stats": Setting(bool, "show token counts and speed after each answer"),
}
DISPLAY = {"think": True, "markdown": True, "stats": True}
"""Display switches, which are not sent to the server, and their defaults."""


def setting(name: str) -> Setting:
    """The setting with that name.

    Raises:
        InputError: There is none.
    """
    if name in SETTINGS:
        return SETTINGS[name]
    close = difflib.get_close_matches(name, SETTINGS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(SETTINGS)}"
    raise InputError(f"unknown setting {name!r}; {hint}")


def _parse_texts(name: str, text: str) -> list[str]:
    if not text.startswith(("[", '"')):
        return [text]
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(part, str) and part for part in texts):
        raise InputError(f'{name}: expected a string, or a JSON list such as ["a", "b"], got {text!r}')
    return texts


@dataclass
class Conversation:
    """The messages, and the settings for requests."""

    messages: list[dict[str, str]] = field(default_factory=list)
    """The messages, without the system prompt."""
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    unanswered: str | None = None
    """A question without any answer because of an error: ``/regenerate`` asks it again."""

    def request(self, model: str) -> dict[str, Any]:
        """The body of the request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        settings = dict(self.settings)
        body: dict[str, Any] = {"model": model, "messages": [*system, *self.messages]}
        if "enable_thinking" in settings:
            body["chat_template_kwargs"] = {"enable_thinking": settings.pop("enable_thinking")}
        sent = {name: value for name, value in settings.items() if name not in DISPLAY}
        return {**body, **sent, "stream_options": {"include_usage": True}}

    def shows(self, name: str) -> bool:
        """Whether a display switch is on."""
        return bool(self.settings.get(name, DISPLAY[name]))

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        self.unanswered = None

    def receive(self, text: str) -> None:
        """Adds an answer, complete or not. If it is empty the question is removed, so that turns alternate."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        elif self.messages and self.messages[-1]["role"] == "user":
            self.unanswered = self.messages.pop()["content"]

    def take_back(self) -> bool:
        """Removes the last answer so that it can be regenerated. Returns whether there is a question."""
        if self.unanswered is not None:
            self.ask(self.unanswered)
            return True
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        return bool(self.messages)

    def clear(self) -> None:
        """Removes all messages; keeps the system prompt and settings."""
        self.messages.clear()
        self.unanswered = None

    def save(self, path: Path, model: str) -> None:
        """Writes the conversation as JSON.

        Raises:
            InputError: The file cannot be written, or exists and is something else.
        """
        if path.exists():
            try:
                Conversation.load(path)
            except InputError:
                raise InputError(f"{path} exists and is not a saved conversation; choose another name") from None
        content = {"model": model, "system": self.system, "settings": self.settings, "messages": self.messages}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except (OSError, UnicodeEncodeError) as error:
            partial.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else "it contains text that is not valid Unicode"
            raise InputError(f"cannot save to {path}: {reason}") from error

    @staticmethod
    def load(path: Path) -> Conversation:
        """Reads what ``save`` wrote.

        Raises:
            InputError: The file cannot be read, or is something else.
        """
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(f"cannot load {path}: {error.strerror}") from error
        except (ValueError, RecursionError):
            content = None
        problem = InputError(f"{path} is not a saved conversation")
        if not isinstance(content, dict):
            raise problem
        messages, system = content.get("messages"), content.get("system", "")
        settings = content.get("settings", {})
        if not isinstance(messages, list) or not isinstance(system, str) or not isinstance(settings, dict):
            raise problem
        read: list[dict[str, str]] = []
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise problem
            if not isinstance(message.get("content"), str):
                raise problem
            read.append({"role": message["role"], "content": message["content"]})
        known = {name: value for name, value in settings.items() if name in SETTINGS}
        return Conversation(read, system, known)


@dataclass
class Reply:
    """An answer as it arrives."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    asked: float = field(default_factory=time.monotonic)
    first: float | None = None
    """Time of the first piece."""
    last: float | None = None

    def take(self, event: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Handles an event; yields its pieces: the kind, ``reasoning`` or ``content``, and the text."""
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"))
            self.completion_tokens = _count(usage.get("completion_tokens"))
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        if isinstance(choice.get("finish_reason"), str):
            self.finish_reason = choice["finish_reason"]
        delta = choice.get("delta")
        for kind, names in (("reasoning", ("reasoning", "reasoning_content")), ("content", ("content",))):
            text = next((delta[name] for name in names if delta.get(name)), "") if isinstance(delta, dict) else ""
            if isinstance(text, str) and text:
                self.last = time.monotonic()
                self.first = self.first or self.last
                if kind == "content":
                    self.text += text
                yield kind, text

    def used(self) -> int | None:
        """Number of context tokens in use."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return None
        return self.prompt_tokens + self.completion_tokens

    def fills(self, max_model_len: int | None) -> bool:
        """Whether the answer ended because the context is full."""
        used = self.used()
        return self.finish_reason == "length" and bool(used and max_model_len and used >= max_model_len)

    def statistics(self, max_model_len: int | None) -> str:
        """Token counts and speed for display; empty if the server reports no usage."""
        if self.completion_tokens is None:
            return ""
        parts = [f"{self.completion_tokens:,} token{'' if self.completion_tokens == 1 else 's'}"]
        if self.first is None or self.last is None:
            parts.append("no text")
        else:
            seconds = self.last - self.first
            if self.completion_tokens > 1 and seconds > 0:
                parts.append(f"{(self.completion_tokens - 1) / seconds:.1f} tokens/s")
            parts.append(f"first token after {self.first - self.asked:.2f} s")
        used = self.used()
        if used is not None and max_model_len:
            parts.append(f"context {used:,} of {max_model_len:,}")
        return " · ".join(parts)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None
