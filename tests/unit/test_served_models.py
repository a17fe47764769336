"""One server, two models: requests find theirs by name."""

from __future__ import annotations

import pytest

from api.generation.serving import Serving
from api.server.app import create_app
from tests.fakes import MODEL, FakeServer, says
from tests.unit.conftest import Api


def two_models() -> tuple[Api, FakeServer, FakeServer]:
    """A client of both, and the servers whose engines they are."""
    first, second = FakeServer(script=says("first")), FakeServer(script=says("second"), generation_config={"top_k": 7})
    second.model.names = ["other", "alias"]
    second.model.root = "/models/other"
    first.serving = Serving(first.model.host, [first.model, second.model])
    first.app = create_app(first.serving, first.traffic)
    return Api(first), first, second


async def test_requests_find_their_model_by_name() -> None:
    api, first, second = two_models()
    answers = [await api.complete(model=name) for name in (MODEL, "other", "alias")]
    assert [answer["choices"][0]["text"] for answer in answers] == ["first", "second", "second"]
    assert [answer["model"] for answer in answers] == [MODEL, "other", "other"]
    assert (await api.complete())["model"] == MODEL  # nobody is asked for by name
    assert [len(server.engine.submitted) for server in (first, second)] == [2, 2]
    assert {request.sampling_params.top_k for request in second.engine.submitted if request.sampling_params} == {7}
    chat = await api.chat(model="other")
    assert (chat["model"], chat["choices"][0]["message"]["content"]) == ("other", "second")


def test_a_tokenizer_of_another_model_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    FakeServer()
    assert not caplog.text
    FakeServer(vocab_size=100)
    assert "tokens, the model 100: they are of different models" in caplog.text


async def test_models_are_listed_and_others_are_refused() -> None:
    api, *_ = two_models()
    listed = (await api.get("/v1/models")).json()["data"]
    roots = [(MODEL, "/models/fake"), ("other", "/models/other"), ("alias", "/models/other")]
    assert [(card["id"], card["root"]) for card in listed] == roots
    error = await api.error("/v1/completions", {"model": "third", "prompt": "hi"}, 404)
    assert error["param"] == "model"


async def test_a_server_is_as_ready_as_its_models() -> None:
    api, _, second = two_models()
    assert (await api.get("/readyz")).status_code == 200
    second.engine.is_restarting = True
    assert (await api.get("/readyz")).status_code == 503
    assert (await api.get("/livez")).status_code == 200
