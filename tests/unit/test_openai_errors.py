"""Every way in which a request can be wrong, and the one shape of the answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api.config import ServerConfig
from api.errors import EngineDeadError
from api.openai import completions
from tests.fakes import MAX_MODEL_LEN, VOCAB_SIZE, Connection, FakeServer, tokens_of
from tests.unit.conftest import Api, error_of

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]


# -- bodies that are not what they should be


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b"{'prompt': 'x'}",
        b'{"prompt": "x"} trailing',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "seed": ' + b"9" * 40 + b"}",
        b'{"prompt": "x", "top_k": 99999999999999999999}',
        b'{"prompt": "x", "max_tokens": 1e3}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 x"}',
        b'{"prompt": "\\ud83d\\u0041"}',
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "x", "response_format": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        '{"prompt": "x"}'.encode("utf-16"),
        b"\0" * 64,
    ],
)
async def test_bodies_that_are_no_json_of_the_type(api: Api, body: bytes) -> None:
    error = error_of(await api.raw(COMPLETIONS, body), 400)
    assert error["type"] in ("Bad Request", "BadRequestError")
    assert error["param"].startswith("body") or error["param"] in ("seed",)
    assert not api.server.engine.submitted


@pytest.mark.parametrize("depth", [200_000, 8_000_000])
async def test_what_is_nested_very_deeply_is_not_even_decoded(api: Api, depth: int) -> None:
    for opening in (b"[", b'{"a":'):
        error_of(await api.raw(COMPLETIONS, b'{"unknown": ' + opening * min(depth, 30_000_000 // len(opening))), 413)
    assert not api.server.engine.submitted


@pytest.mark.parametrize("depth", [20, 100, 200, 300, 400, 450, 480, 490, 500, 600])
async def test_a_deep_conversation_is_a_bad_request(depth: int) -> None:
    """Shallow enough for the decoder, too deep for what comes after it: never a 500."""
    api = Api(FakeServer(chat_template="{{ messages | tojson }}{{ documents | tojson }}{{ a | tojson }}"))
    deep = '{"a": [' * depth + "1" + "]}" * depth
    for body in (
        f'{{"messages": [{{"role": "user", "content": "x", "tool_calls": [{deep}]}}], "truncate_prompt_tokens": 9}}',
        f'{{"messages": [{{"role": "user"}}], "documents": [{deep}], "truncate_prompt_tokens": 9}}',
        f'{{"messages": [{{"role": "user"}}], "chat_template_kwargs": {deep}, "truncate_prompt_tokens": 9}}',
        f'{{"messages": [{{"role": "user", "content": [{deep}]}}], "truncate_prompt_tokens": 9}}',
    ):
        response = await api.raw(CHAT, body.encode())
        assert response.status_code in (200, 400), response.text
        if depth >= 600:
            error_of(response, 400)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "body"),
        (COMPLETIONS, {"prompt": None}, "body.prompt"),
        (COMPLETIONS, {"prompt": 5}, "body.prompt"),
        (COMPLETIONS, {"prompt": [1, 2.5]}, "body.prompt[1]"),
        (COMPLETIONS, {"prompt": [[1, "x"]]}, "body.prompt[0][1]"),
        (COMPLETIONS, {"prompt": "x", "n": "many"}, "body.n"),
        (COMPLETIONS, {"prompt": "x", "stream": "yes"}, "body.stream"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": "x"}}, "body.logit_bias[...]"),
        (COMPLETIONS, {"prompt": "x", "stop": [1]}, "body.stop[0]"),
        (COMPLETIONS, {"prompt": "x", "cache_salt": ""}, "body.cache_salt"),
        (COMPLETIONS, {"prompt": "x", "cache_salt": "s" * 1025}, "body.cache_salt"),
        (COMPLETIONS, {"prompt": "x", "request_id": "a b"}, "body.request_id"),
        (COMPLETIONS, {"prompt": "x", "priority": 1 << 40}, "body.priority"),
        (COMPLETIONS, {"prompt": "x", "min_tokens": 1 << 40}, "body.min_tokens"),
        (COMPLETIONS, {"prompt": "x", "truncation_side": "secret-value"}, "body.truncation_side"),
        (CHAT, {}, "body"),
        (CHAT, {"messages": []}, "body.messages"),
        (CHAT, {"messages": "hi"}, "body.messages"),
        (CHAT, {"messages": [{"content": "hi"}]}, "body.messages[0]"),
        (CHAT, {"messages": [{"role": 5}]}, "body.messages[0].role"),
        (CHAT, {"messages": [*HI, {"role": "user", "content": {"a": 1}}]}, "body.messages[1].content"),
        (CHAT, {"messages": HI, "stream_options": []}, "body.stream_options"),
        (CHAT, {"messages": HI, "chat_template_kwargs": 1}, "body.chat_template_kwargs"),
        ("/tokenize", {"prompt": 5}, "body.prompt"),
        ("/detokenize", {"tokens": ["x"]}, "body.tokens[0]"),
    ],
)
async def test_the_place_of_a_wrong_type(api: Api, path: str, body: Any, param: str) -> None:
    error = await api.error(path, body)
    assert error["type"] == "Bad Request"
    assert error["param"] == param
    assert error["message"].startswith("1 validation error:\n")
    assert "secret-value" not in error["message"]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_content_types_that_are_not_json(api: Api, content_type: str | None) -> None:
    error = error_of(await api.raw(COMPLETIONS, b'{"prompt": "x"}', content_type), 400)
    assert error["type"] == "Bad Request"
    assert error["param"] is None
    assert "application/json" in error["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
async def test_content_types_that_are_json(api: Api, content_type: str) -> None:
    assert (await api.raw(COMPLETIONS, b'{"prompt": "x"}', content_type)).status_code == 200


async def test_bodies_that_are_too_large() -> None:
    api = Api(FakeServer(ServerConfig(max_body_size=100)))
    assert (await api.raw(COMPLETIONS, b'{"prompt": "x"}'.ljust(100))).status_code == 200
    error = error_of(await api.raw(COMPLETIONS, b'{"prompt": "x"}'.ljust(101)), 413)
    assert "--max-body-size" in error["message"]
    num_read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_read
        while True:
            num_read += 1
            yield b" " * 10

    transport = httpx.ASGITransport(app=api.server.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        headers = {"content-type": "application/json"}
        error_of(await client.post(COMPLETIONS, content=endless(), headers=headers), 413)
        assert num_read <= 12
        # A length that lies is not believed beyond the limit.
        headers["content-length"] = "9" * 30
        error_of(await client.post(COMPLETIONS, content=b"{}", headers=headers), 413)


# -- values out of range, and bad combinations


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 16385}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"seed": 1 << 70}, "seed"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"-1": 0}}, "logit_bias"),
        ({"logit_bias": {"1": 0, "foo": 0}}, "logit_bias"),
        ({"logit_bias": {str(VOCAB_SIZE): 0}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**30]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"bad_words": ["x" * 1025]}, "bad_words"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": MAX_MODEL_LEN}, "input_tokens"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_values_out_of_range(api: Api, path: str, fields: dict[str, Any], param: str) -> None:
    prompt: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": "x"}
    error = await api.error(path, {**prompt, "max_tokens": 8, **fields})
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert not api.server.engine.num_unfinished


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 0}, "max_tokens"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "logprobs"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": [[], []], "echo": True}, "prompt"),
        (COMPLETIONS, {"prompt": "", "add_special_tokens": False}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "x"]}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", [1]]}, "prompt"),
        (COMPLETIONS, {"prompt": [VOCAB_SIZE]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [10**30], "echo": True}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 1025}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 1024, "n": 17, "seed": 1}, "n"),
    ],
)
async def test_bad_combinations(api: Api, path: str, fields: dict[str, Any], param: str) -> None:
    prompt: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": "x"}
    error = await api.error(path, {**prompt, **fields})
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert not api.server.engine.submitted


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        *(
            (path, {field: value}, field)
            for path in (CHAT, COMPLETIONS)
            for field, value in (("prompt_embeds", "AAAA"),)
        ),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"audio": {"voice": "x"}}, "audio"),
        (CHAT, {"grammar": 'root ::= "x"'}, "grammar"),
        (COMPLETIONS, {"json_schema": {"type": "object"}}, "json_schema"),
        (CHAT, {"format": "json"}, "format"),
        ("/tokenize", {"messages": HI, "tools": [{}]}, "tools"),
    ],
)
async def test_what_is_not_there_yet_is_refused_by_name(
    api: Api, path: str, fields: dict[str, Any], param: str
) -> None:
    prompts: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "x"}, CHAT: {"messages": HI}}
    error = await api.error(path, {**prompts.get(path, {}), **fields})
    assert error["param"] == param
    assert param in error["message"]


async def test_harmless_values_of_refused_fields(api: Api) -> None:
    await api.chat(tools=None, tool_choice="none", response_format={"type": "text"}, modalities=["text"])
    await api.chat(use_beam_search=False, functions=[], function_call="none", structured_outputs=None)
    await api.complete(suffix=None, best_of=1, response_format=None, grammar="", format="")
    await api.complete(suffix="", best_of=2, n=2, seed=1)


async def test_prompts_that_are_too_long(api: Api) -> None:
    for prompt in (tokens_of("x" * MAX_MODEL_LEN), "x" * (MAX_MODEL_LEN + 1), "x" * 1_000_000):
        error = await api.error(COMPLETIONS, {"prompt": prompt})
        assert f"maximum context length is {MAX_MODEL_LEN} tokens" in error["message"]
        assert error["param"] == "input_tokens"
    error = await api.error(CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]})
    assert "maximum context length" in error["message"]
    error = await api.error(COMPLETIONS, {"prompt": "x", "max_tokens": MAX_MODEL_LEN})
    assert "maximum context length" in error["message"]


async def test_long_values_are_not_repeated_in_full(api: Api) -> None:
    error = await api.error(COMPLETIONS, {"prompt": "x", "model": "m" * 100_000}, 404)
    assert len(error["message"]) < 1100
    error = await api.error(COMPLETIONS, {"prompt": "x", "stop": ["", "s" * 100_000]})
    assert len(error["message"]) < 1100


# -- routes


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/models/none", "/tokenize", "/detokenize"])
async def test_unknown_models(api: Api, path: str) -> None:
    if path.startswith("/v1/models"):
        error = error_of(await api.get(path), 404)
    else:
        error = await api.error(path, {"prompt": "x", "messages": HI, "tokens": [1], "model": "none"}, 404)
    assert error["type"] == "NotFoundError"
    assert error["message"] == "The model `none` does not exist."
    assert error["param"] == "model"


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/completions/", "//v1/completions", "/v1/nothing", "/docs/"])
async def test_unknown_routes(api: Api, path: str) -> None:
    for response in (await api.get(path), await api.post(path, {"prompt": "x"})):
        assert error_of(response, 404)["type"] == "Not Found"


async def test_routes_of_other_models_say_why(api: Api) -> None:
    error = error_of(await api.post("/v1/audio/transcriptions", {"model": "whisper"}), 404)
    assert error["type"] == "Not Found"
    assert error["message"] == ("/v1/audio/transcriptions is not supported: models that hear or speak are not served")


async def test_wrong_methods(api: Api) -> None:
    response = await api.get(COMPLETIONS)
    assert error_of(response, 405)["type"] == "Method Not Allowed"
    assert response.headers["allow"] == "POST"
    error_of(await api.post("/v1/models", {}), 405)


# -- the server's own faults


async def test_a_busy_engine(api: Api) -> None:
    api.server.engine.max_queued = 0
    response = await api.post(COMPLETIONS, {"prompt": "x"})
    assert error_of(response, 429)["type"] == "RateLimitError"
    assert response.headers["retry-after"] == "7"


async def test_a_queue_with_room_for_some(api: Api) -> None:
    api.server.engine.max_queued = 3
    error = await api.error(COMPLETIONS, {"prompt": ["a", "b", "c", "d"]}, 429)
    assert error["type"] == "RateLimitError"
    assert not api.server.engine.submitted


async def test_a_dead_engine(api: Api) -> None:
    api.server.engine.dead = EngineDeadError("/home/somebody/secret.py: traceback")
    for stream in (False, True):
        error = await api.error(COMPLETIONS, {"prompt": "x", "stream": stream}, 503)
        assert error["type"] == "ServiceUnavailableError"
        assert "secret" not in error["message"]
    assert (await api.get("/health")).status_code == 503


async def test_an_exception_of_ours_says_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(prompt: object) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(completions, "list_prompts", broken)
    with caplog.at_level(logging.ERROR):
        response = await api.post(COMPLETIONS, {"prompt": "x"}, headers={"X-Request-Id": "id-17"})
    error = error_of(response, 500)
    assert error["type"] == "InternalServerError"
    assert "secret" not in response.text
    assert "id-17" in caplog.text and "KeyError" in caplog.text


async def test_a_request_that_breaks_in_the_middle_of_its_body(api: Api) -> None:
    """Nobody is left to be answered, and nothing is said."""
    connection = Connection(api.server.app, COMPLETIONS, b'{"prom', is_complete=False)
    connection.leave()
    await connection.task
    assert connection.sent == []
    assert 'status="4xx"' in (await api.get("/metrics")).text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_key_that_is_no_token_id_is_named(api: Api, path: str) -> None:
    prompt: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": "x"}
    error = await api.error(path, {**prompt, "logit_bias": {"1": 0, "foo": 0, "2": 0}})
    assert "got 'foo'" in error["message"]
