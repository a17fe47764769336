"""``octavo chat`` as a person uses it: a pseudo-terminal, and a server with a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.pty_process import Terminal

ROOT = Path(__file__).resolve().parents[2]
PROMPT = r">>> "
GREY = "38;5;244m"


class ScriptedServer:
    """Answers chats by what the last message says. Keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.loading = 0
        """Times that the server still says that it is not ready."""
        self.stopped = threading.Event()
        """Set when a client has left in the middle of an answer."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def texts(self) -> list[str]:
        """The messages of the last request."""
        return [message["content"] for message in self.requests[-1]["messages"]]

    def _handler(scripted) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/startupz":
                    scripted.loading -= 1
                    self.send_response(503)
                    self.send_header("Content-Type", "text/plain; charset=utf-8")
                    self.end_headers()
                    self.wfile.write(b"loading weights: 40 %")
                    return None
                if scripted.loading:
                    return self.answer(503, {"error": {"message": "not ready"}})
                models = [{"id": "first", "root": "/models/first", "max_model_len": 100}, {"id": "second"}]
                return self.answer(200, {"data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.requests.append(body)
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.chat(body["messages"][-1]["content"])
                    return
                scripted.stopped.set()

            def answer(self, status: int, body: Any) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def event(self, event: Any) -> None:
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

            def delta(self, **delta: Any) -> None:
                self.event({"choices": [{"delta": delta, "finish_reason": None}]})

            def end(self, reason: str = "stop", prompt_tokens: int = 5) -> None:
                self.event({"choices": [{"delta": {}, "finish_reason": reason}]})
                self.event({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 7}})
                self.wfile.write(b"data: [DONE]\n\n")

            def chat(self, text: str) -> None:
                if text == "too long":
                    message = "This model has room for 100 tokens."
                    return self.answer(400, {"error": {"message": message, "code": "context_length_exceeded"}})
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                if text == "count":
                    for i in range(1_000_000):
                        self.delta(content=f"n{i} ")
                        scripted.stopped.wait(0.01)
                elif text == "think":
                    self.delta(reasoning="deep ")
                    self.delta(reasoning_content="thoughts")
                    self.delta(content="the answer")
                elif text == "escape":
                    self.delta(content="\x1b]0;owned\x07\x1b[2J\x9b31m **bold**")
                elif text == "break":
                    self.delta(content="half ")
                    return None
                elif text == "fail":
                    return self.event({"error": {"message": "the engine\nfailed"}})
                elif text == "pause":
                    self.delta(content="before ")
                    self.wfile.write(b": keep-alive\n\n")
                    scripted.stopped.wait(1.0)
                    self.delta(content="after")
                elif text == "fill":
                    self.delta(content="full")
                    return self.end("length", 93)
                else:
                    self.delta(content=f"echo {text}")
                return self.end()

        return Handler


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


@pytest.fixture
def chat(server: ScriptedServer, tmp_path: Path) -> Iterator[Terminal]:
    with terminal(server.url, tmp_path) as person:
        person.expect(PROMPT)
        yield person


def terminal(url: str, folder: Path, *flags: str, columns: int = 80, **env: str) -> Terminal:
    command = [sys.executable, "-m", "api", "chat", "--url", url, *flags]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": path, "NO_COLOR": "", **env}
    return Terminal(command, cwd=str(folder), env=variables, columns=columns)


def test_a_conversation_and_its_end(chat: Terminal, server: ScriptedServer) -> None:
    assert "first" in chat.output and "100 tokens" in chat.output and "/help" in chat.output
    chat.enter("hello")
    chat.expect("echo hello")
    statistics = chat.expect("context 12 of 100")
    assert f"\x1b[{GREY}" in statistics and "7 tokens" in statistics
    chat.expect(PROMPT)
    chat.enter("//slash")
    chat.expect("echo /slash")
    assert server.texts() == ["hello", "echo hello", "/slash"]
    chat.expect(PROMPT)
    chat.type("\x03")
    chat.expect("Press Ctrl-D or type /bye")
    chat.expect(PROMPT)
    chat.type("half a line\x03")
    chat.type("\x04")
    assert chat.wait() == 0 and len(server.requests) == 2


def test_arrow_keys_and_history_over_two_chats(server: ScriptedServer, tmp_path: Path) -> None:
    with terminal(server.url, tmp_path) as chat:
        chat.expect(PROMPT)
        chat.enter("helo\x1b[Dl")
        chat.expect("echo hello")
        chat.expect(PROMPT)
        chat.enter("/bye")
        assert chat.wait() == 0
    with terminal(server.url, tmp_path) as chat:
        chat.expect(PROMPT)
        chat.enter("\x1b[A\x1b[A!")
        chat.expect("echo hello!")
    assert server.texts() == ["hello!"]
    assert (tmp_path / "state/octavo/chat_history").stat().st_mode & 0o777 == 0o600


def test_several_lines(chat: Terminal, server: ScriptedServer) -> None:
    chat.enter('"""/one')
    chat.enter("two")
    chat.enter('three"""')
    chat.expect("echo /one")
    chat.expect(PROMPT)
    assert server.texts()[-1] == "/one\ntwo\nthree"
    chat.enter("a\nb\x1b\rc")
    chat.expect("echo a")
    chat.expect(PROMPT)
    assert server.texts()[-1] == "a\nb\nc"
    chat.type("\x1b[200~pasted\rlines\x1b[201~")
    chat.enter("!")
    chat.expect("echo pasted")
    assert server.texts()[-1] == "pasted\nlines!"


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(chat: Terminal, server: ScriptedServer) -> None:
    chat.enter("count")
    chat.expect("n5 ")
    chat.type("\x03")
    chat.expect("Stopped")
    assert server.stopped.wait(60)
    chat.expect(PROMPT)
    chat.enter("more")
    chat.expect("echo more")
    texts = server.texts()
    assert texts[0] == "count" and texts[1].startswith("n0 n1 ") and texts[2] == "more"


def test_keys_during_an_answer_are_kept_for_the_next_line(chat: Terminal, server: ScriptedServer) -> None:
    chat.enter("pause")
    chat.expect("before ")
    chat.enter("typed ahead")
    assert "typed" not in chat.expect("after")
    chat.expect("echo typed ahead")


def test_thinking_is_grey_and_can_be_hidden(chat: Terminal) -> None:
    chat.enter("think")
    shown = chat.expect("the answer")
    assert f"\x1b[{GREY}deep" in shown and f"\x1b[{GREY}thoughts" in shown and f"\x1b[{GREY}the" not in shown
    chat.expect(PROMPT)
    chat.enter("/set think off")
    chat.expect("think: off")
    chat.expect(PROMPT)
    chat.enter("think")
    shown = chat.expect("the answer")
    assert "Thinking" in shown and "deep" not in shown


def test_escape_sequences_of_a_model_stay_text(chat: Terminal) -> None:
    chat.enter("escape")
    shown = chat.expect("bold")
    assert "\u241b]0;owned\u2407\u241b[2J" in shown
    assert "\x1b]0;owned" not in chat.output and "\x1b[2J" not in shown and "\x9b" not in shown
    assert "\x1b[1mbold" in shown


def test_commands(chat: Terminal, server: ScriptedServer, tmp_path: Path) -> None:
    def command(line: str, expected: str) -> None:
        chat.enter(line)
        chat.expect(expected)
        chat.expect(PROMPT)

    command("/help", "/regenerate")
    command("/hlep", r"did you mean /help\?")
    command("/system Be brief.", "System prompt: Be brief.")
    command("/set temperature 0.25", "temperature: 0.25")
    command("/set temperature cold", "temperature: expected a number")
    command("one", "echo one")
    assert server.requests[-1]["temperature"] == 0.25 and server.texts() == ["Be brief.", "one"]
    command("/regenerate", "echo one")
    assert server.texts() == ["Be brief.", "one"]
    command("/save talk.json", "Saved 2 messages")
    command("/clear", "new conversation")
    command("/show", "messages +0")
    command("/load talk.json", "Loaded 2 messages")
    command("/show messages", "echo one")
    command("/model", r"\* first")
    command("/model second", r"\* second")
    command("two", "echo two")
    assert server.requests[-1]["model"] == "second" and server.texts() == ["Be brief.", "one", "echo one", "two"]
    command("/model third", "no model third; choose from first, second")
    chat.enter("/bye")
    assert chat.wait() == 0 and json.loads((tmp_path / "talk.json").read_text())["model"] == "first"


def test_completion_shows_commands(chat: Terminal) -> None:
    chat.type("/reg")
    chat.expect("regenerate the last answer")
    chat.type("\t")
    chat.expect("enerate")


def test_what_goes_wrong_is_one_line_and_the_conversation_goes_on(chat: Terminal, server: ScriptedServer) -> None:
    chat.enter("fail")
    chat.expect("the engine failed")
    chat.expect(PROMPT)
    chat.enter("break")
    chat.expect("connection to the server was lost")
    chat.expect("The conversation is kept: /regenerate")
    chat.expect(PROMPT)
    chat.enter("too long")
    chat.expect("has room for 100 tokens")
    chat.expect("/clear starts a new")
    chat.expect(PROMPT)
    chat.enter("fill")
    chat.expect("context is full. /clear")
    assert server.texts() == ["break", "half ", "fill"]
    chat.expect(PROMPT)
    chat.enter("pause")
    chat.expect("before after")
    chat.expect(PROMPT)
    server.close()
    chat.enter("anybody?")
    chat.expect("no server at http://127.0.0.1")
    chat.expect(PROMPT)
    chat.enter("/bye")
    assert chat.wait() == 0


def test_a_signal_ends_the_chat(chat: Terminal) -> None:
    chat.process.send_signal(signal.SIGTERM)
    assert chat.wait() == 128 + signal.SIGTERM


def test_a_narrow_dumb_terminal_without_colours(server: ScriptedServer, tmp_path: Path) -> None:
    with terminal(server.url, tmp_path, columns=20, TERM="dumb", NO_COLOR="1") as chat:
        chat.expect(PROMPT)
        chat.enter("think")
        chat.expect("the answer")
        chat.expect("tokens")
        chat.expect(PROMPT)
        chat.enter("/bye")
        assert chat.wait() == 0
        assert "\x1b[3" not in chat.output and "\x1b[9" not in chat.output


def piped(server: ScriptedServer | None, *arguments: str, text: str = "", command: str = "chat") -> Any:
    url = server.url if server is not None else f"http://127.0.0.1:{free_port()}"
    return subprocess.run(
        [sys.executable, "-m", "api", command, "--url", url, *arguments],
        cwd=ROOT,
        input=text.encode(),
        capture_output=True,
        timeout=240,
        check=False,
    )


def test_in_a_pipe_only_the_answer_is_printed(server: ScriptedServer) -> None:
    result = piped(server, text="a\nb\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"echo a\nb\n", b"")
    assert piped(server, text="think").stdout == b"the answer\n"
    assert piped(server, text="escape").stdout == "\x1b]0;owned\x07\x1b[2J\x9b31m **bold**\n".encode()
    assert piped(server, "-q", "x").stdout == b"echo x\n"
    assert piped(server, "first", "about:", "-", text="this\n").stdout == b"echo about: this\n"
    assert piped(server, "how are you?").stdout == b"echo how are you?\n"
    assert piped(server, "about this:", "-", text="this\n").stdout == b"echo about this: this\n"
    assert piped(server, "-", text="this\n").stdout == b"echo this\n"
    assert piped(server, "--model-name", "second", text="x").returncode == 0
    assert server.requests[-1]["model"] == "second"
    assert piped(server, "--system-prompt", "s", "--temperature", "0", text="x").returncode == 0
    assert server.texts() == ["s", "x"] and server.requests[-1]["temperature"] == 0


def test_a_server_that_is_loading_is_waited_for(server: ScriptedServer, tmp_path: Path) -> None:
    server.loading = 3
    with terminal(server.url, tmp_path) as chat:
        chat.expect("Waiting for the server at .*loading weights: 40 %")
        chat.expect(PROMPT)
    assert server.loading == 0


def test_errors_in_a_pipe(server: ScriptedServer) -> None:
    for result, problem in [
        (piped(server, text="too long"), "has room for 100 tokens. (status 400)"),
        (piped(server, text="fail"), "the engine failed"),
        (piped(server, text=" \n"), "the text is empty"),
        (piped(server, "--model-name", "third", text="x"), "the server has no model third; choose from first, second"),
        (piped(None, text="x"), "no server at http://127.0.0.1"),
    ]:
        assert result.returncode == 1 and result.stdout == b""
        lines = result.stderr.decode().splitlines()
        assert len(lines) == 1 and lines[0].startswith("octavo: ") and problem in lines[0]
    result = piped(server, text="break")
    assert result.returncode == 1 and result.stdout.startswith(b"half ") and b"connection" in result.stderr
