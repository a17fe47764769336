"""The table of errors that clients rely on: status, type and field of every kind of mistake."""

from __future__ import annotations

from typing import Any

import pytest

from api.config import ServerConfig
from api.errors import EngineDeadError
from tests.fakes import MAX_MODEL_LEN, VOCAB_SIZE, FakeServer
from tests.unit.conftest import Api, error_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]
BAD, SCHEMA = "BadRequestError", "Bad Request"
GENERATION: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -0.1}, BAD, "temperature"),
    ({"temperature": 2.01}, BAD, "temperature"),
    ({"top_p": 0}, BAD, "top_p"),
    ({"top_p": 1.01}, BAD, "top_p"),
    ({"top_k": -2}, BAD, "top_k"),
    ({"min_p": -0.1}, BAD, "min_p"),
    ({"min_p": 1.1}, BAD, "min_p"),
    ({"presence_penalty": 2.1}, BAD, "presence_penalty"),
    ({"frequency_penalty": -2.1}, BAD, "frequency_penalty"),
    ({"repetition_penalty": 0}, BAD, "repetition_penalty"),
    ({"n": 0}, BAD, "n"),
    ({"n": 16385}, BAD, "n"),
    ({"n": 2, "temperature": 0}, BAD, "n"),
    ({"n": "two"}, SCHEMA, "body.n"),
    ({"min_tokens": 9}, BAD, "min_tokens"),
    ({"stop": ["a", ""]}, BAD, "stop"),
    ({"stop_regex": "("}, BAD, "stop_regex"),
    ({"prompt_logprobs": 21}, BAD, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, BAD, "prompt_logprobs"),
    ({"stream_options": {"include_usage": True}}, BAD, "stream_options"),
    ({"stream_interval": 0, "stream": True}, BAD, "stream_interval"),
    ({"logit_bias": {"word": 1}}, BAD, "logit_bias"),
    ({"logit_bias": {"1_0": 1}}, BAD, "logit_bias"),
    ({"logit_bias": {"1": 0, "-1": 1}}, BAD, "logit_bias"),
    ({"logit_bias": {"9" * 30: 1}}, BAD, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, BAD, "logit_bias"),
    ({"allowed_token_ids": []}, BAD, "allowed_token_ids"),
    ({"bad_words": ["x"] * 129}, BAD, "bad_words"),
    ({"logprob_token_ids": [-1]}, BAD, "logprob_token_ids"),
    ({"stop_token_ids": [VOCAB_SIZE]}, BAD, "stop_token_ids"),
    ({"truncate_prompt_tokens": -2}, SCHEMA, "body.truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, SCHEMA, "body.truncation_side"),
    ({"cache_salt": ""}, SCHEMA, "body.cache_salt"),
    ({"cache_salt": "x" * 1025}, SCHEMA, "body.cache_salt"),
    ({"priority": 1}, BAD, "priority"),
    ({"repetition_detection": {"max_pattern_size": 2}}, BAD, "repetition_detection"),
    ({"thinking_token_budget": 1}, BAD, "thinking_token_budget"),
    ({"use_beam_search": True, "stream": True}, BAD, "use_beam_search"),
    ({"length_penalty": 1000, "use_beam_search": True}, BAD, "length_penalty"),
    ({"max_tokens": MAX_MODEL_LEN}, BAD, "input_tokens"),
]
ONE: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"suffix": "x"}, BAD, "suffix"),
    (COMPLETIONS, {"best_of": 1, "n": 2}, BAD, "best_of"),
    (COMPLETIONS, {"max_tokens": 0}, BAD, "max_tokens"),
    (COMPLETIONS, {"logprobs": 21}, BAD, "logprobs"),
    (COMPLETIONS, {"prompt": []}, BAD, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 1025}, BAD, "prompt"),
    (COMPLETIONS, {"prompt": [5] * MAX_MODEL_LEN}, BAD, "input_tokens"),
    (COMPLETIONS, {"prompt": None}, SCHEMA, "body.prompt"),
    (CHAT, {"max_tokens": 0}, BAD, "max_tokens"),
    (CHAT, {"top_logprobs": 2}, BAD, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, BAD, "logprobs"),
    (CHAT, {"messages": []}, SCHEMA, "body.messages"),
    (CHAT, {"tools": [{}]}, BAD, "tools"),
    (CHAT, {"tool_choice": "required"}, BAD, "tool_choice"),
    (CHAT, {"response_format": {"type": "json_schema"}}, BAD, "response_format"),
    (CHAT, {"chat_template": "x"}, BAD, "chat_template"),
]
ROWS = [(path, *row) for path in (CHAT, COMPLETIONS) for row in GENERATION] + ONE


@pytest.mark.parametrize(("path", "fields", "kind", "param"), ROWS)
async def test_mistakes_of_a_request(api: Api, path: str, fields: dict[str, Any], kind: str, param: str) -> None:
    good: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": "x"}
    error = await api.error(path, {**good, "max_tokens": 8, **fields})
    assert (error["type"], error["param"]) == (kind, param)
    assert param.removeprefix("body.").split("[")[0] in error["message"] or "maximum context length" in error["message"]
    assert not api.server.engine.num_unfinished
    await api.ok(path, {**good, "max_tokens": 1})  # others are served on


async def test_mistakes_of_a_call() -> None:
    api = Api(FakeServer(ServerConfig(api_key=["key"])))
    key = {"Authorization": "Bearer key"}
    body = {"prompt": "x"}
    for response, status, kind, param in (
        (await api.post(COMPLETIONS, body), 401, "AuthenticationError", None),
        (await api.post(COMPLETIONS, body, headers={"Authorization": "Bearer no"}), 401, "AuthenticationError", None),
        (await api.post(COMPLETIONS, {**body, "model": "none"}, headers=key), 404, "NotFoundError", "model"),
        (await api.post("/v1/nothing", body, headers=key), 404, "Not Found", None),
        (await api.get(COMPLETIONS, headers=key), 405, "Method Not Allowed", None),
    ):
        error = error_of(response, status)
        assert (error["type"], error["param"]) == (kind, param)
    api = Api(FakeServer())
    error = error_of(await api.raw(COMPLETIONS, b"{"), 400)
    assert (error["type"], error["param"]) == (SCHEMA, "body")
    error = error_of(await api.raw(COMPLETIONS, b'{"prompt": "x"}', "text/plain"), 400)
    assert (error["type"], error["param"]) == (SCHEMA, None)


async def test_faults_that_are_not_the_clients(api: Api) -> None:
    api.server.engine.max_queued = 0
    busy = await api.post(COMPLETIONS, {"prompt": "x"})
    assert error_of(busy, 429)["type"] == "RateLimitError" and busy.headers["retry-after"]
    api.server.engine.dead = EngineDeadError("gone")
    assert (await api.error(COMPLETIONS, {"prompt": "x"}, 503))["type"] == "ServiceUnavailableError"
