"""The endpoints beside completions: models, tokenize, monitoring, the OpenAPI document; ids and headers."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest

from api.config import ServerConfig
from api.errors import EngineDeadError
from api.server.app import OPERATIONS
from api.server.startup import StartupApp
from api.version import VERSION
from engine_core.messages import LoadProgress
from tests.fakes import BOS, IM_START, MAX_MODEL_LEN, MODEL, VOCAB_SIZE, FakeServer, config_with_all_routes, tokens_of
from tests.unit.conftest import Api, error_of

HI: list[Any] = [{"role": "user", "content": "hi"}]


async def test_models() -> None:
    api = Api(FakeServer(ServerConfig(served_model_name=["org/model", "alias"])))
    listed = (await api.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["org/model", "alias"]
    card = (await api.get("/v1/models/org/model")).json()
    assert card == listed["data"][0]
    assert (card["object"], card["owned_by"], card["max_model_len"]) == ("model", "octavo", MAX_MODEL_LEN)
    assert card["capabilities"] == {"vision": False}
    assert [card["root"] for card in listed["data"]] == ["/models/fake"] * 2  # what a tokenizer may be loaded from
    error_of(await api.get("/v1/models/org"), 404)


async def test_tokenize(api: Api) -> None:
    answer = await api.ok("/tokenize", {"prompt": "hé", "model": MODEL})
    assert answer == {
        "count": 4,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [BOS, *tokens_of("hé")],
        "token_strs": None,
    }
    answer = await api.ok("/tokenize", {"prompt": "a b", "add_special_tokens": False, "return_token_strs": True})
    assert answer["token_strs"] == ["a", "Ġ", "b"]
    answer = await api.ok("/tokenize", {"messages": HI})
    assert answer["tokens"][0] == IM_START
    without = await api.ok("/tokenize", {"messages": HI, "add_generation_prompt": False})
    assert without["count"] < answer["count"]
    usage = (await api.chat("hi"))["usage"]
    assert usage["prompt_tokens"] == answer["count"]


async def test_tokenize_takes_more_than_fits_the_model(api: Api) -> None:
    assert (await api.ok("/tokenize", {"prompt": "x" * 20_000}))["count"] == 20_001
    assert (await api.ok("/tokenize", {"prompt": ""}))["count"] == 1


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": HI}])
async def test_tokenize_takes_one_of_two(api: Api, body: Any) -> None:
    assert (await api.error("/tokenize", body))["param"] == "prompt"


async def test_detokenize(api: Api) -> None:
    tokens = (await api.ok("/tokenize", {"prompt": "the 🦁"}))["tokens"]
    assert (await api.ok("/detokenize", {"tokens": tokens})) == {"prompt": "<s>the 🦁"}
    assert (await api.ok("/detokenize", {"tokens": []})) == {"prompt": ""}
    for bad in (-1, VOCAB_SIZE, 10**40):
        assert (await api.error("/detokenize", {"tokens": [bad]}))["param"] == "tokens"


async def test_health_and_version(api: Api) -> None:
    for path in ("/health", "/ping"):
        response = await api.get(path)
        assert (response.status_code, response.content) == (200, b"")
    assert (await api.get("/version")).json() == {"version": VERSION}


async def test_probes_tell_the_truth(api: Api) -> None:
    async def probes() -> list[int]:
        return [(await api.get(path)).status_code for path in ("/livez", "/readyz", "/startupz")]

    assert await probes() == [200, 200, 200]
    api.server.engine.is_restarting = True
    assert await probes() == [200, 503, 200]
    assert (await api.get("/readyz")).text == "the engine is restarting"
    assert (await api.get("/health")).status_code == 200  # requests are taken, and wait
    api.server.engine.is_restarting = False
    api.server.traffic.is_draining = True
    assert await probes() == [200, 503, 200]
    api.server.traffic.is_draining = False
    api.server.engine.dead = EngineDeadError("it died too often")
    assert await probes() == [503, 503, 200]
    assert (await api.get("/livez")).text == "the engine is dead"


async def test_what_answers_while_the_model_loads() -> None:
    app = StartupApp("/llm")
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")
    assert (await client.get("/livez")).status_code == 200
    for path in ("/readyz", "/startupz", "/health", "/ping", "/llm/readyz"):
        response = await client.get(path)
        assert (response.status_code, response.text) == (503, "starting")
    app.update(LoadProgress(0, "weights", 45, 99))
    assert (await client.get("/startupz")).text == "loading weights: 45 %"
    response = await client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert "loading weights: 45 %" in response.json()["error"]["message"]
    app.app = FakeServer().app
    assert (await client.get("/readyz")).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})).status_code == 200


async def test_metrics_have_closed_labels(api: Api) -> None:
    await api.complete("ab", max_tokens=3)
    for number in range(50):
        await api.get(f"/v1/unknown-{number}")
        await api.get(f"/v1/models/unknown-{number}")
        await api._client.request(f"METHOD{number}", "/v1/models")
    response = await api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = response.text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in text
    assert 'http_requests_total{handler="none",method="GET",status="4xx"} 50.0' in text
    assert 'http_requests_total{handler="/v1/models/{model:path}",method="GET",status="4xx"} 50.0' in text
    assert 'http_requests_total{handler="/v1/models",method="OTHER",status="4xx"} 50.0' in text
    assert "http_requests_in_progress 1.0" in text
    assert "unknown-" not in text
    assert len(re.findall(r"^http_requests_total", text, re.MULTILINE)) == 4
    assert 'vllm:generation_tokens_total{engine="0",model_name="fake-model"} 3.0' in text


async def test_request_ids(api: Api) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    ids = {(await api.ok("/v1/completions", body))["id"] for _ in range(3)}
    assert len(ids) == 3
    response = await api.post("/v1/completions", body, headers={"X-Request-Id": "mine-1"})
    assert response.json()["id"] == "cmpl-mine-1"
    assert "x-request-id" not in response.headers
    response = await api.post("/v1/completions", {**body, "request_id": "body"}, headers={"X-Request-Id": "mine-1"})
    assert response.json()["id"] == "cmpl-body"
    for bad in ("x" * 129, "a b", "", "\t", "ü"):
        response = await api.post("/v1/completions", body, headers=[(b"X-Request-Id", bad.encode())])
        assert re.fullmatch(r"cmpl-[0-9a-f]{32}", response.json()["id"])


async def test_request_ids_in_headers() -> None:
    api = Api(FakeServer(ServerConfig(enable_request_id_headers=True)))
    for path in ("/health", "/nothing"):
        response = await api.get(path, headers={"X-Request-Id": "mine"})
        assert response.headers["x-request-id"] == "mine"
    response = await api.post("/v1/completions", {"prompt": "x", "stream": True})
    assert f'"cmpl-{response.headers["x-request-id"]}"' in response.text


async def test_a_line_per_request_if_wanted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo")
    await Api(FakeServer()).get("/health")
    assert not [record for record in caplog.records if record.name == "octavo"]
    api = Api(FakeServer(ServerConfig(disable_access_log=False)))
    await api.get("/health", headers={"X-Request-Id": "mine"})
    await asyncio.sleep(0)  # the line is written in the turn after the answer
    lines = [record.getMessage() for record in caplog.records if record.name == "octavo"]
    assert len(lines) == 1
    assert re.fullmatch(r"GET /health 200 \d+\.\d{3}s mine", lines[0])


async def test_the_openapi_document() -> None:
    api = Api(FakeServer(config_with_all_routes()))
    document = (await api.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {operation.path.replace(":path}", "}") for operation in OPERATIONS}
    for operation in OPERATIONS:
        described = document["paths"][operation.path.replace(":path}", "}")][operation.method.lower()]
        assert ("requestBody" in described) == (operation.request is not None)
        statuses = set(described["responses"])
        expected = {"200", "403", "500", "503"}
        if operation.request is not None:
            expected |= {"400", "404", "408", "413", "422"}
        if "{" in operation.path:
            expected |= {"404"}
        if operation.queues:
            expected |= {"429"}
        if operation.is_admin:
            expected |= {"401"}
        if operation.query is not None:
            expected |= {"400"}
        if operation.is_admin and operation.request is None:
            expected |= {"409"}
        assert statuses == expected
        assert ("security" in described) == operation.is_admin
    references = set(re.findall(r'"#/components/schemas/(\w+)"', (await api.get("/openapi.json")).text))
    assert references == set(document["components"]["schemas"])
    fields = {
        f"{kind}.{name}": field
        for kind, schema in document["components"]["schemas"].items()
        for name, field in schema.get("properties", {}).items()
    }
    assert not [name for name, field in fields.items() if not field.get("description", "").endswith(".")]
    refused = [name for name, field in fields.items() if "Request." in name and field.get("type") == "null"]
    assert "ChatCompletionRequest.grammar" in refused
    assert not [name for name in refused if not fields[name]["description"].startswith("Not supported")]
    guarded = Api(FakeServer(ServerConfig(api_key=["k"])))
    document = (await guarded.get("/openapi.json", headers={"Authorization": "Bearer k"})).json()
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"apiKey": []}]
    assert "security" not in document["paths"]["/health"]["get"]
