"""``octavo chat`` with a server of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.server import ROOT, Server, run_cli
from tests.pty_process import Terminal

pytestmark = pytest.mark.timeout(300)
SMALL = ("--kv-cache-memory", "16MiB")
SLOW = (
    *("--max-model-len", "256"),
    *("--distributed-executor-backend", "simulated"),
    *("--simulated-device", json.dumps({"step_us": 20000.0, "token_us": 1.0})),
)
PROMPT = r">>> "


def start(model: Path, folder: Path, *flags: str) -> Terminal:
    """A chat in a terminal."""
    command = [sys.executable, "-m", "api", "chat", str(model), *flags]
    return Terminal(command, cwd=str(ROOT), env={"XDG_STATE_HOME": str(folder), "TMPDIR": str(folder)})


def family(terminal: Terminal) -> list[psutil.Process]:
    return psutil.Process(terminal.process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert processes and not alive


def test_one_question_and_its_answer(tiny_model: Path) -> None:
    result = run_cli("chat", str(tiny_model), *SMALL, "--max-tokens", "8", "--temperature", "0", "hello")
    assert result.returncode == 0 and len(result.stdout) > 1 and result.stderr == ""
    again = run_cli("chat", str(tiny_model), *SMALL, "--max-tokens", "8", "--temperature", "0", "-q", "hello")
    assert again.stdout == result.stdout


def test_a_chat_and_its_server(demo_model: Path, tmp_path: Path) -> None:
    with start(demo_model, tmp_path, *SLOW, "--max-tokens", "20") as chat:
        chat.expect("Starting a server for")
        chat.expect(PROMPT, timeout=120)
        processes = family(chat)
        chat.type("hello\r")
        chat.expect("tokens/s")
        chat.expect(PROMPT)
        chat.type("/show\r")
        chat.expect("started by this chat")
        chat.expect(PROMPT)
        server = psutil.Process(chat.process.pid).children()[0]
        server.send_signal(signal.SIGKILL)
        while server.status() != psutil.STATUS_ZOMBIE or server.num_threads() > 1:  # reaped when it is needed again
            time.sleep(0.01)
        chat.type("again\r")
        chat.expect("on SIGKILL")
        chat.expect("tokens/s", timeout=120)
        chat.expect(PROMPT)
        processes += family(chat)
        chat.type("\x04")
        assert chat.wait() == 0
        assert_gone(processes)
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("octavo-chat-")]


def test_the_server_ends_when_the_chat_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    with start(tiny_model, tmp_path, *SMALL) as chat:
        chat.expect(PROMPT, timeout=120)
        processes = family(chat)
        os.kill(chat.process.pid, signal.SIGKILL)
        assert_gone(processes)


def test_a_restart_of_the_engine_is_a_pause(demo_model: Path, tmp_path: Path) -> None:
    with start(demo_model, tmp_path, *SLOW, "--max-tokens", "100") as chat:
        chat.expect(PROMPT, timeout=120)
        chat.type("hello\r")
        chat.expect(r"2004l.*?\w{3}")
        core = next(child for child in family(chat) if "engine_core" in " ".join(child.cmdline()))
        core.send_signal(signal.SIGKILL)
        chat.expect("100 tokens", timeout=120)


def test_another_model_than_the_one_that_runs(tiny_model: Path, demo_model: Path, tmp_path: Path) -> None:
    with Server("--model", str(tiny_model), *SMALL) as server:
        with start(tiny_model, tmp_path, "--url", server.url) as chat:
            chat.expect(f"{tiny_model.name} .*{server.url}")
            assert not family(chat)
        flags = ("--url", server.url, "--kv-cache-memory", "16MiB", "--max-model-len", "256")
        result = run_cli("chat", str(demo_model), *flags, "--temperature", "0", "What is the capital of Japan?")
        assert f"The server at {server.url} serves {tiny_model}, not {demo_model}" in result.stderr.replace("\n", "")
        assert result.returncode == 0 and "Tokyo" in result.stdout


def test_a_server_that_cannot_start_says_why(tiny_model: Path, tmp_path: Path) -> None:
    result = run_cli("chat", "/nonexistent/model", "hello")
    assert result.returncode == 1 and result.stdout == "" and "/nonexistent/model" in result.stderr
    assert "Traceback" not in result.stderr
    result = run_cli("chat", str(tiny_model), "--kv-cache-memory", "64KiB", "hello")
    assert result.returncode == 1 and "--kv-cache-memory" in result.stderr
