"""The offline class as an object: who holds it, what it tells of itself, what editors know of it."""

from __future__ import annotations

import gc
import inspect
import io
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llm_options
import psutil
import pytest
from tqdm import tqdm

import api.llm
from api import LLM, SamplingParams
from api.config import ServerConfig
from api.engine.thread import EngineThread
from api.flags import options
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: dict[str, Any] = {"distributed_executor_backend": "simulated"}


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cores() -> list[psutil.Process]:
    """The children of this process that run an engine."""
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def llm() -> LLM:
    return LLM(str(tiny.checkpoint("llama")), **OPTIONS)


def test_what_nobody_holds_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    """A notebook cell that is run again makes another engine and drops the first."""
    model, before = str(tiny.checkpoint("llama")), len(cores())
    capfd.readouterr()
    llm = LLM(model, **OPTIONS)
    llm.generate("a", SamplingParams(max_tokens=3), use_tqdm=False)
    (engine,) = (thread for thread in threading.enumerate() if thread.name == "engine client")
    weak = weakref.ref(llm)
    assert len(cores()) == before + 1
    del llm
    gc.collect()
    assert weak() is None
    assert len(cores()) == before and not engine.is_alive()
    assert capfd.readouterr().err == ""


def test_close_and_repr(llm: LLM) -> None:
    name = str(tiny.checkpoint("llama"))
    assert repr(llm).startswith(f"LLM(model={name!r}, dtype=") and repr(llm).endswith("max_model_len=8192)")
    with llm:
        pass
    llm.close()
    assert repr(llm).endswith(", closed)")
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a")


def test_the_collector_may_run_in_the_engines_own_thread() -> None:
    """There nobody may wait for the thread to end."""
    engine = EngineThread()

    async def close() -> None:
        engine.close()

    engine.run(close())
    wait_for(lambda: not engine._thread.is_alive())


def test_the_bar_shows_tokens_per_second(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(api.llm, "tqdm", lambda **given: tqdm(**{**given, "delay": 0, "file": shown, "mininterval": 0}))
    params = SamplingParams(max_tokens=5, ignore_eos=True, n=2)
    with llm:
        llm.generate(["a", "b c"], params)
        assert "est. speed input: " in shown.getvalue() and "toks/s, output: " in shown.getvalue()
        llm.embed(["a", "b"])


def test_outputs_tell_when_what_happened(llm: LLM) -> None:
    before = time.time(), time.monotonic()
    with llm:
        first, second = llm.generate(
            ["a", "b"],
            [SamplingParams(max_tokens=4, ignore_eos=True, n=2), SamplingParams(max_tokens=1, ignore_eos=True)],
            use_tqdm=False,
        )
    after = time.time(), time.monotonic()
    assert (first.metrics.num_generation_tokens, second.metrics.num_generation_tokens) == (8, 1)
    for stats in (first.metrics, second.metrics):
        assert before[0] - 1 <= stats.arrival_time <= after[0] + 1  # the clocks may drift apart
        moments = [stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, stats.last_token_ts]
        assert moments == sorted(moments) and before[1] <= moments[0] and moments[-1] <= after[1]
        assert stats.first_token_latency == stats.first_token_ts - stats.queued_ts


def test_editors_know_the_options() -> None:
    content = (ROOT / "api" / "llm_options.py").read_text()
    assert content == llm_options.render(), "run scripts/llm_options.py"
    signature = inspect.signature(LLM)
    assert set(signature.parameters) >= {name for option in options(ServerConfig) for name in option.names}
    assert list(signature.parameters)[0] == "model"
    assert str(signature.parameters["max_model_len"].annotation) == "int | str | None"


def test_a_conversation_reaches_the_template_as_online() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls %}{{ '[' + c.function.arguments + ']' }}{% endfor %}{% endfor %}"
    )
    llm = LLM(str(tiny.checkpoint("llama")), chat_template=template, **OPTIONS)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x":1}'}}]},
        {"role": "tool", "content": [{"type": "text", "text": "c"}], "is_error": True},
        {"role": "assistant", "content": "d", "tool_calls": []},
    ]
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1))
    assert output.prompt == '<system>a\n\nb<assistant>[{"x":1}]<tool>Error: c<assistant>d'
