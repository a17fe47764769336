"""The end of a terminal, files that never end, texts on which a tokenizer gives up: a whole server meets them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.e2e.server import PATIENCE, Server, run_cli

SIMULATED = ("--distributed-executor-backend", "simulated")


def stream(server: Server, max_tokens: int) -> httpx.Response:
    body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True}
    return server.post("/v1/completions", body)


def test_the_end_of_a_terminal_drains(tiny_model: Path) -> None:
    """As SIGTERM does: what is open may finish, then the server ends with its folder and its children."""
    device = json.dumps({"step_us": 20000})
    with Server("--model", str(tiny_model), *SIMULATED, "--simulated-device", device) as server:
        body = {"prompt": "a", "max_tokens": 50, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGHUP)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]" and "error" not in "".join(rest)
        assert server.process.wait(timeout=PATIENCE) == 0


def test_nohup_is_respected(tiny_model: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the server inherits it, as from nohup
    try:
        server = Server("--model", str(tiny_model), *SIMULATED)
    finally:
        signal.signal(signal.SIGHUP, before)
    with server:
        server.process.send_signal(signal.SIGHUP)
        assert stream(server, 5).status_code == 200
        assert server.process.poll() is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_ends_the_start_at_once(tmp_path: Path, name: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    result = run_cli("serve", str(folder), "--port", "0")
    assert result.returncode == 78, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("octavo: "))
    assert str(folder / name) in line and line.endswith("Not a regular file")


def test_a_text_on_which_the_tokenizer_gives_up(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")

    def edit(tokenizer: dict[str, Any]) -> None:
        trap = {"type": "Split", "pattern": {"Regex": "(ß+)+$"}, "behavior": "Isolated", "invert": False}
        steps = [trap, tokenizer["pre_tokenizer"]]
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    tiny.edit_json(folder / "tokenizer.json", edit)
    trap = "ß" * 40 + "."
    with Server("--model", str(folder), *SIMULATED, env={"RUST_BACKTRACE": "0"}) as server:
        for text in (trap, trap + " " * 20_000):  # short texts are tokenised at once, long ones in a thread
            for path, body in (
                ("/v1/completions", {"prompt": text}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
                ("/v1/embeddings", {"input": text}),
                ("/tokenize", {"prompt": text}),
            ):
                answer = server.post(path, body)
                assert answer.status_code == 400, (path, answer.text)
                assert "the tokenizer failed" in answer.json()["error"]["message"]
        answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 4, "bad_words": [trap]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "bad_words"
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 4}).status_code == 200
