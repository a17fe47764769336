"""/v1/chat/completions."""

from __future__ import annotations

from typing import Any

import pytest

from api.config import ServerConfig
from tests.fakes import IM_END, IM_START, MAX_MODEL_LEN, MODEL, FakeServer, says, token_of, tokens_of
from tests.unit.conftest import Api

PATH = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]


def talker(text: str = "löwe 🦁 bottle robot", config: ServerConfig | None = None) -> Api:
    return Api(FakeServer(config, script=says(text)))


async def prompt_of(api: Api, **fields: Any) -> str:
    """The text that a request was turned into."""
    answer = await api.ok(PATH, {"messages": HI, "max_tokens": 1, "return_token_ids": True, **fields})
    return api.server.model.tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)


async def streamed(api: Api, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together by hand."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in await api.stream(PATH, body):
        for piece in chunk["choices"]:
            if piece["index"] not in choices:
                assert piece["delta"] == {"role": "assistant", "content": ""}
                choices[piece["index"]] = {"content": "", "token_ids": [], "logprobs": None, "finish_reason": None}
                continue
            choice = choices[piece["index"]]
            assert choice["finish_reason"] is None, "nothing comes after the end"
            choice["content"] += piece["delta"]["content"]
            choice["token_ids"] += piece.get("token_ids", [])
            choice["finish_reason"], choice["stop_reason"] = piece["finish_reason"], piece.get("stop_reason")
            if piece["logprobs"] is not None:
                logprobs = choice["logprobs"] or {"content": [], "refusal": None}
                logprobs["content"] += piece["logprobs"]["content"]
                choice["logprobs"] = logprobs
    return choices


async def test_an_answer() -> None:
    api = talker("Hello.")
    answer = await api.chat(max_tokens=20, model=MODEL)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": None,
        }
    ]
    assert answer["prompt_logprobs"] is answer["prompt_token_ids"] is None  # clients read them as attributes
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 7
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True},
        {"return_token_ids": True},
        {"n": 3, "seed": 1},
        {"stop": ["ob"]},
        {"stop": "tle", "include_stop_str_in_output": True, "logprobs": True},
        {"stop_token_ids": [token_of(ord("w"))]},
        {"max_tokens": 3},
    ],
)
async def test_streamed_is_whole(fields: dict[str, Any]) -> None:
    """Both forms say the same, whatever is asked for."""
    api = talker()
    body = {"messages": HI, "max_tokens": 40, **fields}
    whole = await api.ok(PATH, body)
    choices = await streamed(api, body)
    assert sorted(choices) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        piece = choices[choice["index"]]
        assert piece["content"] == choice["message"]["content"]
        for name in ("finish_reason", "stop_reason", "logprobs"):
            assert piece[name] == choice[name], name
        assert piece["token_ids"] == (choice["token_ids"] or [])


async def test_chunks() -> None:
    api = talker("ok!")
    first, *chunks = await api.stream(PATH, {"messages": HI})
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["o", "k", "!", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in [first, *chunks]}) == 1
    *chunks, last = await api.stream(PATH, {"messages": HI, "stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    chunks = await api.stream(
        PATH, {"messages": HI, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 4]


async def test_continuous_usage_needs_include_usage() -> None:
    options = {"continuous_usage_stats": True}
    chunks = await talker("ok").stream(PATH, {"messages": HI, "stream_options": options})
    assert all(chunk.get("usage") is None and chunk["choices"] for chunk in chunks)


async def test_token_ids_in_a_stream() -> None:
    chunks = await talker("ok").stream(PATH, {"messages": HI, "return_token_ids": True})
    assert chunks[0]["prompt_token_ids"][0] == IM_START
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    assert [chunk["choices"][0].get("token_ids") for chunk in chunks[1:3]] == [[token] for token in tokens_of("ok")]


async def test_logprobs() -> None:
    api = talker("é!")
    body = {"messages": HI, "max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    content = (await api.ok(PATH, body))["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "\\xc3",
        "logprob": -1.0,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "\\xc4", "logprob": -2.0, "bytes": [0xC4]}],
    }
    assert content[2]["token"] == "!"
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "é!"
    content = (await api.ok(PATH, {**body, "return_tokens_as_token_ids": True}))["choices"][0]["logprobs"]["content"]
    assert content[2]["token"] == f"token_id:{token_of(ord('!'))}"
    x = token_of(ord("x"))
    content = (await api.chat(logprob_token_ids=[x]))["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content[0]["top_logprobs"]] == [content[0]["token"], "x"]


async def test_prompt_logprobs(api: Api) -> None:
    answer = await api.chat("a", prompt_logprobs=0, return_token_ids=True)
    ids = answer["prompt_token_ids"]
    assert answer["prompt_logprobs"][0] is None
    assert [list(entry) for entry in answer["prompt_logprobs"][1:]] == [[str(token_id)] for token_id in ids[1:]]


async def test_max_completion_tokens_wins(api: Api) -> None:
    assert (await api.chat(max_tokens=5, max_completion_tokens=3))["usage"]["completion_tokens"] == 3
    assert (await api.chat(max_tokens=5, max_completion_tokens=None))["usage"]["completion_tokens"] == 5
    usage = (await api.chat(max_tokens=None))["usage"]
    assert usage["total_tokens"] == MAX_MODEL_LEN


async def test_the_template(api: Api) -> None:
    header = "<|im_start|>assistant\n"
    hi = "<|im_start|>user\nhi<|im_end|>\n"
    assert await prompt_of(api) == hi + header
    assert await prompt_of(api, add_generation_prompt=False) == hi
    assert await prompt_of(api, add_special_tokens=True) == "<s>" + hi + header
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert await prompt_of(api, messages=parts) == "<|im_start|>user\nh\ni<|im_end|>\n" + header
    begun = [*HI, {"role": "assistant", "content": "I am"}]
    assert await prompt_of(api, messages=begun, continue_final_message=True) == hi + header + "I am"


async def test_variables_of_the_template() -> None:
    source = "{{ messages[0]['content'] }}|{{ style }}|{{ documents[0]['title'] }}|{{ reasoning_effort }}"
    api = Api(FakeServer(chat_template=source))
    fields = {
        "documents": [{"title": "T"}],
        "chat_template_kwargs": {"style": "x"},
        "reasoning_effort": "low",
    }
    assert await prompt_of(api, **fields) == "hi|x|T|low"
    error = await api.error(PATH, {"messages": HI, "chat_template_kwargs": {"tools": []}})
    assert error["param"] == "chat_template_kwargs"


async def test_templates_of_requests(api: Api) -> None:
    error = await api.error(PATH, {"messages": HI, "chat_template": "x"})
    assert error["param"] == "chat_template"
    trusting = Api(FakeServer(ServerConfig(trust_request_chat_template=True)))
    assert await prompt_of(trusting, chat_template="{{ messages[0]['content'] }}!") == "hi!"
    error = await trusting.error(PATH, {"messages": HI, "chat_template": "{% if %}"})
    assert error["param"] == "chat_template"
    for source in ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ range(10 ** 9) }}"):
        error = await trusting.error(PATH, {"messages": HI, "chat_template": source})
        assert error["param"] == "chat_template", error
    error = await trusting.error(PATH, {"messages": HI, "chat_template": "{{ raise_exception('no') }}"})
    assert error["param"] == "messages" and "no" in error["message"]


async def test_a_long_conversation_is_rendered(api: Api) -> None:
    answer = await api.chat("x" * 5000, truncate_prompt_tokens=20, max_tokens=2)
    assert answer["usage"]["prompt_tokens"] == 20


async def test_no_template() -> None:
    api = Api(FakeServer(chat_template=None))
    error = await api.error(PATH, {"messages": HI})
    assert "--chat-template" in error["message"]


async def test_echo_and_roles() -> None:
    api = talker(" sure")
    begun = [*HI, {"role": "assistant", "content": "I am"}]
    fields = {"messages": begun, "add_generation_prompt": False, "continue_final_message": True, "echo": True}
    answer = await api.ok(PATH, {**fields, "max_tokens": 20})
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "I am sure", "refusal": None}
    assert (await streamed(api, fields))[0]["content"] == "I am sure"
    assert (await api.chat(echo=True, max_tokens=20))["choices"][0]["message"]["content"] == " sure"
    assert (await api.chat(add_generation_prompt=False))["choices"][0]["message"]["role"] == "user"
    named = talker("x", ServerConfig(response_role="bot"))
    assert (await named.chat())["choices"][0]["message"]["role"] == "bot"


async def test_the_model_s_end_of_turn(api: Api) -> None:
    await api.chat()
    params = api.server.engine.submitted[0].sampling_params
    assert params is not None and IM_END in params.eos_token_ids
    assert params.logprobs is None and params.prompt_logprobs is None


async def test_several_names_of_the_model() -> None:
    api = Api(FakeServer(ServerConfig(served_model_name=["first", "second"])))
    assert (await api.chat(model="second"))["model"] == "first"
    assert (await api.chat())["model"] == "first"
    error = await api.error(PATH, {"messages": HI, "model": MODEL}, 404)
    assert error == {
        "message": f"The model `{MODEL}` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
