"""Fields that mean the same in every protocol reach the engine from each of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.config import ServerConfig, check_config
from api.engine.channel import Channel
from api.engine.request_state import OutputOptions, RequestState
from api.engine.submission import Submission
from api.flags import ConfigError
from api.openai.protocol import SamplingFields
from api.responses.protocol import ResponsesRequest
from engine_core.messages import EngineCoreRequest, i32
from tests.fakes import FakeServer
from tests.routes import CHATS, request
from tests.unit.conftest import Api

FIELDS: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.25,
    "min_p": 0.25,
    "top_k": 7,
    "seed": 5,
    "min_tokens": 2,
    "ignore_eos": True,
    "stop_token_ids": [17],
    "logit_bias": {"9": 1.5},
    "allowed_token_ids": [17, 9],
    "bad_words": ["b"],
    "num_speculative_tokens": 3,
    "repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 4},
    "stop_regex": "q+",
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "cache_salt": "salt",
    "structured_outputs": {"choice": ["ab", "cd"]},
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}|{{ enable_thinking }}|{{ tone }}"


async def told(route: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[EngineCoreRequest, OutputOptions]:
    """What the engine, and what makes text of its tokens, is told of a request."""
    server = FakeServer(chat_template=TEMPLATE)
    options: list[OutputOptions] = []
    submit = server.engine.submit

    def watch(channel: Channel, choice: int, submission: Submission, **prompt: Any) -> RequestState:
        options.append(submission.options)
        return submit(channel, choice, submission, **prompt)

    monkeypatch.setattr(server.engine, "submit", watch)
    path, body = request(route, "hi", max_tokens=8, **fields)
    response = await Api(server).post(path, body)
    assert response.status_code == 200, response.text
    (submitted,) = server.engine.submitted
    return msgspec.structs.replace(submitted, request_id="", index=0, arrival_time=0.0), options[0]


@pytest.mark.parametrize("name", FIELDS)
async def test_responses_take_what_chat_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"seed": 1, name: FIELDS[name]}
    chat = await told("chat", monkeypatch, **fields)
    assert await told("responses", monkeypatch, **fields) == chat
    assert chat != await told("chat", monkeypatch, seed=1)


def test_no_field_is_forgotten() -> None:
    rest = {"temperature", "top_p", "stop", "thinking_token_budget", "return_tokens_as_token_ids", "priority"}
    rest |= {"stream_interval", "lora_scale", "lora"}
    assert set(SamplingFields.__struct_fields__) == set(FIELDS) | rest
    assert set(SamplingFields.__struct_fields__) <= set(ResponsesRequest.__struct_fields__)


async def test_a_bad_field_of_a_response_is_named(api: Api) -> None:
    for fields, param in (
        ({"min_p": 2}, "min_p"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"chat_template": "x"}, "chat_template"),
        ({"stream_interval": 0}, "stream_interval"),
    ):
        error = await api.error("/v1/responses", {"input": "hi", **fields})
        assert error["param"] == param


@pytest.mark.parametrize("route", CHATS)
async def test_variables_of_the_template(route: str) -> None:
    """The server's, over which go the request's."""
    config = ServerConfig(default_chat_template_kwargs={"enable_thinking": False, "tone": "dry"})
    for given, text in (({}, "hi|False|dry"), ({"tone": "warm"}, "hi|False|warm")):
        server = FakeServer(config, chat_template=TEMPLATE)
        path, body = request(route, "hi", max_tokens=1, chat_template_kwargs=given)
        assert (await Api(server).post(path, body)).status_code == 200
        (submitted,) = server.engine.submitted
        assert server.model.tokenizer.decode(i32(submitted.prompt_token_ids).tolist()) == text


async def test_variables_of_the_template_with_thinking() -> None:
    server = FakeServer(chat_template=TEMPLATE)
    path, body = request("messages", "hi", max_tokens=1, chat_template_kwargs={"tone": "dry"}, cache_salt="mine")
    body["thinking"] = {"type": "disabled"}
    assert (await Api(server).post(path, body)).status_code == 200
    (submitted,) = server.engine.submitted
    assert server.model.tokenizer.decode(i32(submitted.prompt_token_ids).tolist()) == "hi|False|dry"
    assert submitted.cache_salt == "mine"


def test_what_the_servers_variables_may_not_be() -> None:
    with pytest.raises(ConfigError, match="must not contain tools"):
        check_config(ServerConfig(default_chat_template_kwargs={"tools": []}))


@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
@pytest.mark.parametrize(
    ("servers", "requests", "is_id"), [(True, None, True), (True, False, False), (False, True, True)]
)
async def test_tokens_as_ids(route: str, servers: bool, requests: bool | None, is_id: bool) -> None:
    api = Api(FakeServer(ServerConfig(return_tokens_as_token_ids=servers)))
    fields: dict[str, Any] = {} if requests is None else {"return_tokens_as_token_ids": requests}
    fields["logprobs"] = 1 if route == "completions" else True
    if route == "responses":
        fields = {**fields, "include": ["message.output_text.logprobs"]}
        del fields["logprobs"]
    path, body = request(route, "hi", max_tokens=2, **fields)
    answer = (await api.post(path, body)).json()
    if route == "chat":
        token = answer["choices"][0]["logprobs"]["content"][0]["token"]
    elif route == "completions":
        token = answer["choices"][0]["logprobs"]["tokens"][0]
    else:
        token = answer["output"][0]["content"][0]["logprobs"][0]["token"]
    assert token.startswith("token_id:") == is_id
