"""The parts of ``octavo chat`` that need neither a terminal nor a server."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

from api.commands.backend import Backend, Wish
from api.commands.chat import Chat
from api.commands.client import Client, ServerError
from api.commands.conversation import SETTINGS, Conversation, InputError, Reply, setting
from api.commands.local_server import read_progress
from api.commands.prompt import MAX_HISTORY_BYTES, history_path, is_complete, open_history, unquote
from api.commands.screen import Screen
from api.commands.talk import parse
from api.commands.terminal import MarkdownOutput, PlainOutput, visible

ROOT = Path(__file__).resolve().parents[2]


def rendered(text: str, *, width: int = 40, size: int = 1, colour: bool = False, plain: bool = False) -> str:
    """What a terminal of some width is sent for an answer that comes in pieces of some size."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="standard" if colour else None)
    output = PlainOutput(console) if plain else MarkdownOutput(console)
    for begin in range(0, len(text), size):
        output.feed(text[begin : begin + size])
    output.finish()
    result = file.getvalue()
    return result if colour else result.replace("\x1b[1m", "").replace("\x1b[0m", "")


@pytest.mark.parametrize("plain", [False, True])
def test_no_control_character_reaches_the_terminal(plain: bool) -> None:
    hostile = "".join(map(chr, [*range(0xA0), *range(0x2020, 0x2070), 0xD800, 0xDFFF, 0xFEFF]))
    text = rendered(f"a{hostile}b `{hostile}`\n```\n{hostile}\n```\n# {hostile}", plain=plain)
    assert not [char for char in text if ord(char) < 32 and char not in "\n\t"]
    assert not set(text) & {chr(code) for code in [*range(0x7F, 0xA0), 0x202E, 0x2066, 0x2028, 0xD800, 0xDFFF]}
    assert visible("\x1b]0;x\x07\r\n") == "\u241b]0;x\u2407\n"
    text.encode()


MARKDOWN = (
    "# A title\n\nSome **bold words**, `code` and 2**3**4, *args, **kwargs and a ` mark.\n\n"
    "* an item that is longer than one line of the terminal\n  - another\n\n---\n\n"
    "```python\ndef f(x):\n    return x ** 2\n```\nand ``double`` ticks; ```not a fence``` either.\n```\nopen"
)
SHOWN = (
    "A title\n\nSome bold words, code and 2**3**4,\n*args, **kwargs and a ` mark.\n\n"
    "\u2022 an item that is longer than one line\n  of the terminal\n  \u2022 another\n\n---\n\n"
    "```python\ndef f(x):\n    return x ** 2\n```\nand ``double`` ticks; ```not a fence```\neither.\n```\nopen\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_markdown_is_shown_the_same_in_any_pieces(size: int) -> None:
    assert rendered(MARKDOWN, size=size) == SHOWN


def test_markdown_has_styles() -> None:
    text = rendered("**bold** `code`\n```python\nreturn 1\n```\n", colour=True)
    assert "\x1b[1mbold\x1b[0m" in text and "\x1b[36mcode\x1b[0m" in text
    assert "\x1b[94mreturn" in text or "\x1b[34mreturn" in text or "mreturn\x1b[0m" in text


def test_an_answer_is_not_written_twice() -> None:
    # No cursor movement: a changed width or a scrolled terminal cannot garble what is there.
    assert "\x1b[" not in rendered(MARKDOWN, size=3)


def test_words_are_wrapped_by_the_cells_they_take() -> None:
    text = "word " * 20 + "\n" + "漢字" * 30 + "。\n" + "x" * 50 + " tail\n"
    lines = rendered(text, width=20, plain=True).split("\n")
    wide = [line for line in lines if "漢" in line or "字" in line]
    assert all(len(line) <= 10 for line in wide) and sum(map(len, wide)) == 61
    assert lines[0] == "word word word word" and not any(line.startswith("。") for line in lines)
    assert "x" * 50 + " tail" in lines


def test_a_span_that_does_not_end_is_shown_in_time() -> None:
    assert rendered("**a" + "b" * 300) == "**a" + "b" * 300 + "\n"


def test_settings_are_validated() -> None:
    assert setting("temperature").parse("temperature", "0.5") == 0.5
    assert setting("seed").parse("seed", "-3") == -3
    assert setting("stop").parse("stop", '["a", "b"]') == ["a", "b"]
    assert setting("stop").parse("stop", "###") == ["###"]
    assert setting("think").parse("think", "off") is False
    for name, text in [
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("temperature", "warm"),
        ("top_p", "0"),
        ("top_p", "1.1"),
        ("max_tokens", "0"),
        ("max_tokens", "1.5"),
        ("presence_penalty", "3"),
        ("seed", "x"),
        ("stop", '["a"'),
        ("stop", "[1]"),
        ("think", "perhaps"),
    ]:
        with pytest.raises(InputError, match=f"{name}: expected .*got"):
            setting(name).parse(name, text)
    with pytest.raises(InputError, match="did you mean temperature"):
        setting("temperatre")


def test_a_request_holds_what_is_for_the_server_only() -> None:
    settings = {"temperature": 0.0, "think": False, "enable_thinking": False}
    conversation = Conversation(system="Be brief.", settings=settings)
    conversation.ask("Hi")
    body = conversation.request("m")
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert body["temperature"] == 0.0 and "think" not in body and "enable_thinking" not in body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_turns_alternate_whatever_happens() -> None:
    conversation = Conversation()
    conversation.ask("one")
    conversation.receive("")
    assert conversation.messages == []
    assert conversation.take_back() and conversation.messages == [{"role": "user", "content": "one"}]
    conversation.receive("half a sentence")
    conversation.ask("two")
    conversation.receive("")
    assert [message["content"] for message in conversation.messages] == ["one", "half a sentence"]
    assert conversation.take_back()
    assert [message["content"] for message in conversation.messages] == ["one", "half a sentence", "two"]
    conversation.clear()
    assert not conversation.take_back()


def test_saving_and_loading(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    conversation = Conversation(system="s", settings={"seed": 1})
    conversation.ask("Grüße \x1b")
    conversation.receive("ok")
    conversation.save(path, "m")
    conversation.save(path, "m")
    assert Conversation.load(path) == conversation
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(InputError, match="not a saved conversation; choose another"):
        conversation.save(other, "m")
    assert other.read_text() == "mine"
    with pytest.raises(InputError, match="No such file"):
        conversation.save(tmp_path / "none" / "x", "m")
    for content in ("", "[]", '{"messages": 1}', '{"messages": [{"role": "tool"}]}', "[" * 100_000):
        other.write_text(content)
        with pytest.raises(InputError, match="not a saved conversation"):
            Conversation.load(other)
    with pytest.raises(InputError, match="No such file"):
        Conversation.load(tmp_path / "none")
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_reply_takes_both_names_of_reasoning_and_bears_nonsense() -> None:
    reply = Reply()
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning": "a"}}]},
        {"choices": [{"delta": {"reasoning_content": "b"}}]},
        {"choices": [{"delta": {"content": "c", "reasoning": None}}]},
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": None, "finish_reason": "length"}]},
        {"choices": "x"},
        {"choices": [], "usage": {"prompt_tokens": 90, "completion_tokens": 10}},
    ]
    pieces = [piece for event in events for piece in reply.take(event)]
    assert pieces == [("reasoning", "a"), ("reasoning", "b"), ("content", "c")]
    assert reply.text == "c" and reply.fills(100) and not reply.fills(101) and not reply.fills(None)
    assert "10 tokens" in reply.statistics(100) and "context 100 of 100" in reply.statistics(100)


def test_text_between_quotes() -> None:
    assert is_complete("hi") and not is_complete('"""hi') and not is_complete('"""') and is_complete('"""a\nb"""')
    assert unquote('"""\n/a\nb\n"""') == "/a\nb"
    assert unquote("hi") is None and unquote('"""hi') is None


def test_history_is_private_and_bounded(tmp_path: Path) -> None:
    path = history_path({"XDG_STATE_HOME": str(tmp_path / "state")})
    open_history(path).append_string("secret\nquestion")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    assert list(open_history(path).load_history_strings()) == ["secret\nquestion"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("\n# time\n+text\n" * (MAX_HISTORY_BYTES // 10))
    assert set(open_history(path).load_history_strings()) == {"text"}
    assert path.stat().st_size <= MAX_HISTORY_BYTES // 2
    open_history(Path("/proc/none/history")).append_string("kept in memory")
    assert history_path({"XDG_STATE_HOME": "relative"}).is_absolute()


class Quiet(Screen):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, width=120, color_system=None)

    def take(self) -> str:
        text = self.file.getvalue()
        self.file.truncate(self.file.seek(0))
        return text


@pytest.fixture
def chat() -> Chat:
    screen = Quiet()
    return Chat(Backend(Wish(), screen.console), Conversation(), screen)


def said(chat: Chat, line: str) -> str:
    assert isinstance(chat.screen, Quiet)
    assert chat.handle(line)
    return chat.screen.take()


def test_commands_that_need_no_server(chat: Chat, tmp_path: Path) -> None:
    for command in ("/clear", "/system", "/set", "/show", "/save", "/load", "/model", "/regenerate", "/bye"):
        assert command in said(chat, "/help") and command in said(chat, "/?")
    assert "Be brief." in said(chat, "/system Be brief.") and chat.conversation.system == "Be brief."
    assert "0.5" in said(chat, "/set temperature 0.5") and chat.conversation.settings == {"temperature": 0.5}
    shown = said(chat, "/show")
    assert "Be brief." in shown and "temperature 0.5" in shown
    assert all(name in said(chat, "/set") for name in SETTINGS)
    assert "default" in said(chat, "/set temperature default") and chat.conversation.settings == {}
    chat.conversation.ask("a")
    chat.conversation.receive("b\x1b")
    assert "b\u241b" in said(chat, "/show messages")
    assert "2 messages" in said(chat, f"/save {tmp_path}/a.json")
    said(chat, "/clear")
    assert chat.conversation.messages == [] and chat.conversation.system == "Be brief."
    assert "2 messages" in said(chat, f"/load {tmp_path}/a.json") and len(chat.conversation.messages) == 2
    assert "No system prompt" in said(chat, "/system none")
    assert said(chat, "   ") == ""
    assert not chat.handle("/bye") and not chat.handle("/exit")
    for line, problem in [
        ("/hlep", r"unknown command /hlep; did you mean /help\?.*start it with //"),
        ("/usr/bin/env\nfoo", "unknown command"),
        ("/set temperatre 1", "did you mean temperature"),
        ("/save", "needs a file name"),
        ("/show x", "expected nothing or one of messages, log"),
        ("/show log", "this chat did not start the server"),
    ]:
        with pytest.raises(InputError, match=problem):
            chat.handle(line)
    chat.conversation.clear()
    with pytest.raises(InputError, match="no answer to regenerate"):
        chat.handle("/retry")


def test_completion(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("")
    completer = chat._completer()

    def offered(text: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(text), CompleteEvent())]

    assert offered("/s") == ["/system", "/set", "/show", "/save"]
    assert offered("/set t") == ["temperature", "top_p", "top_k", "think"]
    assert offered(f"/load {tmp_path}/ta") == ["lk.json"]
    assert offered("hello /s") == [] and offered("/nonesuch x") == []


def test_flags_of_serve_are_told_apart() -> None:
    options, flags = parse(
        "chat", ["m.gguf", "--max-model-len", "4k", "--no-enable-prefix-caching", "--temperature", "0", "Why", "so?"]
    )
    assert options.words == ["m.gguf", "Why", "so?"] and options.temperature == 0.0
    assert flags == ["--max-model-len=4k", "--no-enable-prefix-caching"]
    assert parse("chat", ["--model", "m"])[0].words == ["m"]
    assert parse("chat", []) == (parse("chat", [])[0], [])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--port", "1"], "--port is a flag of octavo serve"),
        (["--temperatur", "1"], "did you mean --temperature"),
        (["--temperature", "hot"], "--temperature: expected a number"),
        (["--max-tokens", "0"], "--max-tokens: expected a whole number of at least 1"),
    ],
)
def test_bad_flags_of_chat(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("chat", arguments)
    assert exit_.value.code == 2 and problem in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:b", "http://x:99999"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ServerError, match="expected a URL such as http://127.0.0.1:8000"):
        Client(url)


def test_progress_is_read_from_the_log() -> None:
    assert read_progress("Loading weights:  45%|####5     | 1.2G/2.7G [00:03<00:04]") == "Loading weights 45 %"
    assert read_progress("Fetching 12 files:   8%|8  | 1/12") == "Fetching 12 files 8 %"
    assert read_progress("WARNING api: 45% of nothing") is None


def test_commands_import_no_engine() -> None:
    code = (
        "import json, sys, api.commands.talk, api.commands.chat, api.commands.local_server\n"
        "ours = [name for name in sys.modules if name.startswith(('api.', 'engine_core.', 'executor.'))]\n"
        "print(json.dumps([ours, [n for n in ('zmq', 'starlette', 'torch', 'numpy') if n in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    ours, heavy = json.loads(result.stdout)
    assert heavy == []
    assert not [name for name in ours if name.rpartition(".")[2] in ("engine_client", "server", "core", "multiproc")]


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["version"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    """As with ``octavo serve --help | head``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "api", *arguments]
    result = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode in (0, 1) and result.stderr == ""
