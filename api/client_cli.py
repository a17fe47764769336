"""``octavo chat`` and ``octavo complete``: small clients for a running server."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from api.config import ENVIRONMENT

COMMANDS = ("chat", "complete")


class ServerError(Exception):
    """The server cannot be reached or refused a request; the message is for a person."""


class Client:
    """Speaks with one server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = urlsplit(url if "//" in url else f"http://{url}")
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ServerError(f"--url {url}: expected something like http://127.0.0.1:8000/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def _open(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self._url.path.rstrip("/") + path, data, self._headers)
            response = connection.getresponse()
        except OSError as error:
            raise ServerError(f"no server at {self._url.geturl()}: {error}. Start one with: octavo serve") from error
        if response.status >= 400:
            raise ServerError(_error_message(response))
        return response

    def first_model(self) -> str:
        models = json.load(self._open("GET", "/models", None))
        return str(models["data"][0]["id"])

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed request."""
        for line in self._open("POST", path, {**body, "stream": True}):
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise ServerError(event["error"]["message"])
            yield event


def _error_message(response: http.client.HTTPResponse) -> str:
    content = response.read(4096)
    try:
        return f"{response.status}: {json.loads(content)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status} {response.reason}"


def main(command: str, arguments: Sequence[str]) -> int:
    """Runs ``chat`` or ``complete``. Returns the exit code."""
    options = _parser(command).parse_args(arguments)
    key = options.api_key or next((os.environ[name] for name in ENVIRONMENT["api_key"] if os.environ.get(name)), None)
    try:
        client = Client(options.url, key)
        model = options.model_name or client.first_model()
        settings = {"model": model}
        for name in ("max_tokens", "temperature"):
            if getattr(options, name) is not None:
                settings[name] = getattr(options, name)
        answer = _chat(client, settings, options.system_prompt) if command == "chat" else _complete(client, settings)
        return _converse(answer, options.quick)
    except ServerError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130


def _parser(command: str) -> argparse.ArgumentParser:
    what = "Talk to" if command == "chat" else "Let texts be completed by"
    parser = argparse.ArgumentParser(prog=f"octavo {command}", description=f"{what} a model on a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="Server (default: %(default)s)")
    parser.add_argument("--model-name", help="Model to use. Default: the first that the server has.")
    parser.add_argument("--api-key", help="Key of the server. Default: OCTAVO_API_KEY or VLLM_API_KEY.")
    parser.add_argument("--max-tokens", type=int, help="Longest answer in tokens.")
    parser.add_argument("--temperature", type=float, help="0: the most likely words; higher: more variety.")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="Send this one text, print the answer and end.")
    if command == "chat":
        parser.add_argument("--system-prompt", help="What the model is told before the conversation.")
    else:
        parser.set_defaults(system_prompt=None)
    return parser


Answer = Callable[[str], Iterator[str]]


def _converse(answer: Answer, quick: str | None) -> int:
    """Prints answers to what is typed until the input ends."""
    texts = [quick] if quick is not None else _typed_lines()
    for text in texts:
        for piece in answer(text):
            print(piece, end="", flush=True)
        print()
    return 0


def _typed_lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if line.strip():
            yield line


def _chat(client: Client, settings: dict[str, Any], system_prompt: str | None) -> Answer:
    messages: list[dict[str, str]] = []
    if system_prompt:
        messages.append({"role": "system", "content": system_prompt})

    def answer(text: str) -> Iterator[str]:
        messages.append({"role": "user", "content": text})
        reply = ""
        for event in client.stream("/chat/completions", {**settings, "messages": messages}):
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                reply += piece
                yield piece
        messages.append({"role": "assistant", "content": reply})

    return answer


def _complete(client: Client, settings: dict[str, Any]) -> Answer:
    def answer(text: str) -> Iterator[str]:
        yield text
        for event in client.stream("/completions", {"max_tokens": 128, **settings, "prompt": text}):
            for choice in event["choices"]:
                yield choice["text"]

    return answer
