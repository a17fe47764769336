"""Reasoning in chat completions."""

from __future__ import annotations

from typing import Any

import pytest

from api.config import ServerConfig
from tests.fakes import CHAT_TEMPLATE, FakeServer, says
from tests.unit.conftest import Api
from tests.unit.test_openai_tools import TOOLS, calls_of

PATH = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]
TEXT = "<think>\nHm.\nYes.\n</think>\n\nHello."
TEMPLATE = CHAT_TEMPLATE + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def thinker(text: str = TEXT, parser: str | None = "qwen3", template: str = TEMPLATE, **config: Any) -> Api:
    return Api(FakeServer(ServerConfig(reasoning_parser=parser, **config), script=says(text), chat_template=template))


async def test_reasoning_is_told_from_content() -> None:
    answer = await thinker().ok(PATH, {"messages": HI})
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello.",
        "refusal": None,
        "reasoning": "Hm.\nYes.",
    }
    assert answer["choices"][0]["finish_reason"] == "stop"
    details = answer["usage"]["completion_tokens_details"]
    assert len("Hm.\nYes.") <= details["reasoning_tokens"] < len(TEXT)
    plain = await thinker(parser=None).ok(PATH, {"messages": HI})
    assert plain["choices"][0]["message"]["content"] == TEXT
    assert "completion_tokens_details" not in plain["usage"]


async def test_a_stream() -> None:
    chunks = await thinker().stream(PATH, {"messages": HI, "stream_options": {"include_usage": True}})
    changes = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(change.get("reasoning", "") for change in changes) == "Hm.\nYes."
    assert "".join(change.get("content", "") for change in changes) == "Hello."
    kinds = ["reasoning" if "reasoning" in change else "content" for change in changes[1:]]
    assert kinds == sorted(kinds, reverse=True), "reasoning comes first"
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


async def test_continuous_usage_says_each_token() -> None:
    fields = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "max_tokens": 9}
    chunks = await thinker().stream(PATH, {"messages": HI, **fields})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, *range(1, 10), 9]


async def test_every_token_has_its_logprob() -> None:
    body = {"messages": HI, "logprobs": True, "return_token_ids": True}
    whole = (await thinker().ok(PATH, body))["choices"][0]
    chunks = await thinker().stream(PATH, body)
    pieces = [chunk["choices"][0] for chunk in chunks]
    logprobs = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"]["content"]]
    assert logprobs == whole["logprobs"]["content"]
    assert len(logprobs) == len(TEXT) + 1
    assert [token for piece in pieces for token in piece.get("token_ids", [])] == whole["token_ids"]


async def test_reasoning_that_is_not_wanted() -> None:
    message = (await thinker().ok(PATH, {"messages": HI, "include_reasoning": False}))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hello.", "refusal": None}
    chunks = await thinker().stream(PATH, {"messages": HI, "include_reasoning": False})
    assert all("reasoning" not in chunk["choices"][0]["delta"] for chunk in chunks)


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
async def test_the_prompt_may_have_begun_or_ended_it(parser: str) -> None:
    opened = thinker("So?</think>Yes.", parser, CHAT_TEMPLATE + "<think>\n")
    message = (await opened.ok(PATH, {"messages": HI}))["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("So?", "Yes.")
    off = {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}}
    message = (await thinker("So?", parser).ok(PATH, off))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "So?", "refusal": None}


async def test_an_answer_that_goes_on() -> None:
    begun = [*HI, {"role": "assistant", "content": "<think>Hm"}]
    fields = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    message = (await thinker(" yes</think>Hello.").ok(PATH, fields))["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (" yes", "Hello.")


async def test_reasoning_alone_has_no_content() -> None:
    message = (await thinker("<think>Hm").ok(PATH, {"messages": HI}))["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm", None)


async def test_reasoning_before_calls() -> None:
    text = '<think>\nA clock.\n</think>\n\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    api = thinker(text, enable_auto_tool_choice=True, tool_call_parser="hermes")
    (choice,) = (await api.ok(PATH, {"messages": HI, "tools": TOOLS}))["choices"]
    assert choice["message"]["reasoning"] == "A clock."
    assert choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [("time", {})]
    assert choice["finish_reason"] == "tool_calls"
