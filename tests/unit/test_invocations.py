"""The one path that SageMaker calls, and endpoints that options turn on and off."""

from __future__ import annotations

from typing import Any

import pytest

from api.config import ServerConfig
from tests.fakes import CHAT_TEMPLATE, FakeServer, tiny_tokenizer
from tests.unit.conftest import Api, error_of, events

HI = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": HI, "max_tokens": 2}, "/v1/chat/completions", "chat.completion"),
    ({"prompt": "hi", "max_tokens": 2}, "/v1/completions", "text_completion"),
    ({"input": "hi"}, "/v1/embeddings", "list"),
    ({"queries": "a", "documents": ["b", "c"]}, "/score", "list"),
    ({"text_1": "a", "text_2": "b"}, "/score", "list"),
]


@pytest.mark.parametrize(("body", "path", "kind"), BODIES)
async def test_a_body_finds_its_endpoint(api: Api, body: dict[str, Any], path: str, kind: str) -> None:
    answer = await api.ok("/invocations", body)
    expected = await api.ok(path, body)
    assert answer["object"] == kind
    for key in ("choices", "data", "usage"):
        assert answer.get(key) == expected.get(key)


async def test_rankings(api: Api) -> None:
    answer = await api.ok("/invocations", {"query": "a", "documents": ["b", "a"]})
    assert {result["index"] for result in answer["results"]} == {0, 1}


async def test_streams(api: Api) -> None:
    response = await api.post("/invocations", {"prompt": "hi", "max_tokens": 3, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response.text))


async def test_mistakes_are_those_of_the_endpoint(api: Api) -> None:
    assert (await api.error("/invocations", {"prompt": "x", "top_p": 0}))["param"] == "top_p"
    assert (await api.error("/invocations", {"messages": []}))["param"] == "body.messages"
    assert "prompt" in (await api.error("/invocations", {"text": "hi"}))["message"]
    error_of(await api.raw("/invocations", b"[1]"), 400)
    error_of(await api.raw("/invocations", b"{"), 400)


async def test_what_is_not_offered_is_not_chosen() -> None:
    pooling = Api(FakeServer(ServerConfig(runner="pooling")))
    assert (await pooling.ok("/invocations", {"messages": HI}))["object"] == "list"
    assert "messages" in (await pooling.error("/invocations", {"prompt": "hi"}))["message"]
    generating = Api(FakeServer(ServerConfig(runner="generate")))
    await generating.error("/invocations", {"input": "hi"})


async def test_unknown_fields_are_those_of_the_endpoint() -> None:
    strict = Api(FakeServer(ServerConfig(strict=True)))
    await strict.ok("/invocations", {"prompt": "x", "max_tokens": 1})
    assert "nonsense" in (await strict.error("/invocations", {"prompt": "x", "nonsense": 1}))["message"]


async def test_the_tokenizers_configuration(api: Api) -> None:
    error_of(await api.get("/tokenizer_info"), 404)
    tokenizer = tiny_tokenizer()
    tokenizer.config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 10**30, "chat_template": "old"}
    config = ServerConfig(enable_tokenizer_info_endpoint=True)
    info = (await Api(FakeServer(config, tokenizer=tokenizer)).get("/tokenizer_info")).json()
    assert info["tokenizer_class"] == "LlamaTokenizer" and info["model_max_length"] == 10**30
    assert info["chat_template"] == CHAT_TEMPLATE
    bare = (await Api(FakeServer(config, chat_template=None)).get("/tokenizer_info")).json()
    assert bare["tokenizer_class"] == "PreTrainedTokenizerFast" and bare["chat_template"] is None


async def test_no_documentation() -> None:
    api = Api(FakeServer(ServerConfig(disable_fastapi_docs=True)))
    for path, status in (("/docs", 404), ("/openapi.json", 404), ("/", 200), ("/v1/models", 200)):
        assert (await api.get(path)).status_code == status
