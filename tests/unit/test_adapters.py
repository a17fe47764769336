"""Adapters by name: loaded and unloaded over HTTP, and chosen as the model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from api.config import ServerConfig, make_config
from api.errors import EngineDeadError
from api.generation.adapters import IDLE, MAX_SCALES, Adapters
from api.generation.served_model import ServedModel
from api.model import adapter_files
from api.params.lora import LoRARequest
from tests.fakes import MODEL, FakeServer
from tests.unit.conftest import Api, LoopClock, error_of

ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "adapter_config.json").write_text("{}")
        (tmp_path / "root" / name / "adapter_model.safetensors").write_text(name)
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    return tmp_path / "root"


@pytest.fixture
def server(folder: Path) -> FakeServer:
    options = {"enable_lora": True, "allowed_lora_path": str(folder), "admin_api_key": ["root"], "api_key": ["user"]}
    return FakeServer(make_config(options)[0])


async def load(api: Api, headers: dict[str, str] = ADMIN, **fields: Any) -> Any:
    return await api.post("/v1/load_lora_adapter", fields, headers=headers)


async def unload(api: Api, **fields: Any) -> Any:
    return await api.post("/v1/unload_lora_adapter", fields, headers=ADMIN)


async def test_a_name_is_a_model(server: FakeServer) -> None:
    api, user = Api(server), {"Authorization": "Bearer user"}
    assert (await load(api, lora_name="mine", lora_path="one")).text == (
        "Success: LoRA adapter 'mine' added successfully."
    )
    answer = await api.post("/v1/completions", {"model": "mine", "prompt": "x"}, headers=user)
    assert answer.json()["model"] == "mine"
    message = server.engine.submitted[-1]
    assert message.lora_request is not None and message.lora_request.name == "mine"
    await api.post("/v1/completions", {"prompt": "x"}, headers=user)
    assert server.engine.submitted[-1].lora_request is None
    cards = (await api.get("/v1/models", headers=user)).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [(MODEL, None), ("mine", MODEL)]
    assert (await api.get("/v1/models/mine", headers=user)).json()["root"].endswith("/one")
    assert (await unload(api, lora_name="mine", lora_int_id=1)).status_code == 200
    assert server.engine.forgotten == [message.lora_request.content_hash]
    error_of(await api.post("/v1/completions", {"model": "mine", "prompt": "x"}, headers=user), 404)


async def test_one_adapter_with_two_scales(server: FakeServer) -> None:
    api = Api(server)
    for name, scale in (("whole", 1), ("half", 0.5)):
        assert (await load(api, lora_name=name, lora_path="one", lora_scale=scale)).status_code == 200
        answer = await api.post("/v1/completions", {"model": name, "prompt": "x"}, headers={"x-api-key": "user"})
        assert answer.status_code == 200
    whole, half = (message.lora_request for message in server.engine.submitted[-2:])
    assert whole is not None and half is not None
    assert (whole.scale, half.scale) == (1.0, 0.5) and whole.content_hash != half.content_hash


MESSAGES = [{"role": "user", "content": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/embeddings": {"input": "x"},
    "/pooling": {"input": "x"},
    "/score": {"queries": "x", "documents": "y"},
    "/rerank": {"query": "x", "documents": ["y"]},
    "/v2/embed": {"texts": ["x"]},
}
USER = {"Authorization": "Bearer user"}


async def scaled(api: Api, path: str = "/v1/completions", model: str = "mine", **fields: Any) -> Any:
    return await api.post(path, {**BODIES[path], "model": model, **fields}, headers=USER)


def last_scale(server: FakeServer) -> float | None:
    adapter = server.engine.submitted[-1].lora_request
    return None if adapter is None else adapter.scale


@pytest.mark.parametrize("path", BODIES)
async def test_a_scale_of_a_request(server: FakeServer, path: str) -> None:
    api = Api(server)
    assert (await load(api, lora_name="mine", lora_path="one", lora_scale=2)).status_code == 200
    identities = set()
    for fields, scale in (
        ({}, 2.0),
        ({"lora_scale": 2}, 2.0),
        ({"lora_scale": 0.5}, 0.5),
        ({"lora_scale": 1}, 1.0),
        ({"lora": [{"id": 0, "scale": 0.5}]}, 0.5),
        ({"lora_scale": 0}, None),
        ({"lora": []}, None),
    ):
        assert (await scaled(api, path, **fields)).status_code == 200
        assert last_scale(server) == scale
        identities.add(adapter.content_hash if (adapter := server.engine.submitted[-1].lora_request) else "")
    assert len(identities) == 4
    assert (await scaled(api, path, MODEL, lora=[{"id": 0, "scale": 3}])).status_code == 200
    assert last_scale(server) == 3.0
    response = await scaled(api, path, MODEL, lora_scale=1)
    assert response.status_code == 400 and "lora_scale needs an adapter as model" in response.text
    assert (await unload(api, lora_name="mine")).status_code == 200
    assert len(server.engine.forgotten) == len(set(server.engine.forgotten)) == 4


async def test_scales_that_make_no_sense(server: FakeServer) -> None:
    api = Api(server)
    for name in ("mine", "gone", "other"):
        assert (await load(api, lora_name=name, lora_path="one")).status_code == 200
    assert (await unload(api, lora_name="gone")).status_code == 200
    cards = (await api.get("/v1/models", headers=USER)).json()["data"]
    assert [card.get("lora_id") for card in cards] == [None, 0, 2]
    assert (await load(api, lora_name="mine", lora_path="two", load_inplace=True)).status_code == 200
    for fields, param in (
        ({"lora_scale": 1e9}, "lora_scale"),
        ({"lora_scale": "much"}, "body.lora_scale"),
        ({"lora_scale": 1, "lora": []}, "lora_scale"),
        ({"lora": [{"id": 0, "scale": -1e9}]}, "lora"),
        ({"lora": [{"id": 1, "scale": 0}]}, "lora"),
        ({"lora": [{"id": 2, "scale": 1}]}, "lora"),
        ({"lora": [{"id": 0, "scale": 1}, {"id": 0, "scale": 2}]}, "lora"),
    ):
        assert error_of(await scaled(api, **fields), 400)["param"] == param
    both: list[dict[str, Any]] = [{"id": 0, "scale": 0}, {"id": 2, "scale": 0.25}]
    assert (await scaled(api, model=MODEL, lora=both)).json()["model"] == "other"
    assert last_scale(server) == 0.25
    assert (
        error_of(await scaled(api, model=MODEL, lora=[{**each, "scale": 1} for each in both]), 400)["param"] == "lora"
    )
    plain = Api(FakeServer(ServerConfig()))
    assert (await plain.post("/v1/completions", {"prompt": "x", "lora": []})).status_code == 200
    error = error_of(await plain.post("/v1/completions", {"prompt": "x", "lora": [{"id": 0, "scale": 1}]}), 400)
    assert error["param"] == "lora"


async def test_an_adapter_has_few_scales(server: FakeServer, clock: LoopClock) -> None:
    """A client that asks for ever new ones cannot have the files read in every step."""
    api = Api(server)
    assert (await load(api, lora_name="mine", lora_path="one")).status_code == 200
    for number in range(MAX_SCALES):
        assert (await scaled(api, lora_scale=number + 2)).status_code == 200
    clock.advance(IDLE - 30)
    assert (await scaled(api, lora_scale=2)).status_code == 200
    response = await scaled(api, lora_scale=0.5)
    error = error_of(response, 429)
    assert error["param"] == "lora_scale" and "8 other scales already (2.0, 3.0, " in error["message"]
    assert response.headers["retry-after"] == "60"
    assert (await scaled(api, lora_scale=0)).status_code == 200
    clock.advance(31)
    assert (await scaled(api, lora_scale=0.5)).status_code == 200
    (forgotten,) = server.engine.forgotten
    assert forgotten.endswith(" * 3.0"), "the one unused for longest"
    view = server.serving.find_model("mine")
    assert server.serving.adapters is not None
    for number in range(2 * MAX_SCALES):  # who runs the engine may have any
        await server.serving.adapters.scaled(view, number + 0.125, is_bounded=False)


async def test_an_adapter_that_cannot_have_a_scale(server: FakeServer, clock: LoopClock) -> None:
    api = Api(server)
    tried: list[float] = []

    async def call(make: Any) -> Any:
        tried.append(make(1).adapter.scale)
        return {"error": "" if tried[-1] == 1 else "the adapter has a magnitude; use a scale of 1"}

    server.engine.call = call  # type: ignore[method-assign]
    assert (await load(api, lora_name="mine", lora_path="one")).status_code == 200
    for wait, count in ((0, 2), (0, 2), (IDLE + 1, 3)):
        clock.advance(wait)
        error = error_of(await scaled(api, lora_scale=2), 400)
        assert error["message"] == "lora_scale: the adapter has a magnitude; use a scale of 1"
        assert len(tried) == count
    server.engine.sleeper.is_sleeping = True
    error_of(await scaled(api, lora_scale=3), 503)


async def test_scales_offline(server: FakeServer, folder: Path) -> None:
    """They do not read the folder again."""
    adapters = Adapters(server.model)
    wanted = [LoRARequest("x", 1, str(folder / "one"), scale) for scale in (1, 0.5, 1, 2, 0.5)]
    views = [await adapters.view(each) for each in wanted]
    assert views[0] is views[2] and views[1] is views[4]
    assert [view.adapter.scale for view in views if view.adapter is not None] == [1.0, 0.5, 1.0, 2.0, 0.5]
    assert await adapters.view(LoRARequest("x", 2, str(folder / "two"))) is not views[0]
    assert len(server.engine.forgotten) == 3


async def test_another_adapter_under_the_same_name(server: FakeServer) -> None:
    api = Api(server)
    assert (await load(api, lora_name="mine", lora_path="one")).status_code == 200
    assert "already been loaded" in error_of(await load(api, lora_name="mine", lora_path="two"), 400)["message"]
    assert (await load(api, lora_name="mine", lora_path="two", load_inplace=True)).status_code == 200
    assert len(server.engine.forgotten) == 1
    assert (await load(api, lora_name="other", lora_path="two")).status_code == 200
    assert (await unload(api, lora_name="mine")).status_code == 200
    assert len(server.engine.forgotten) == 1, "another name stands for the same files"


async def test_nothing_is_left_of_adapters_that_went(server: FakeServer) -> None:
    api = Api(server)

    async def count_after(rounds: int) -> int:
        for number in range(rounds):
            for path in ("one", "two"):
                assert (await load(api, lora_name="mine", lora_path=path, load_inplace=True)).status_code == 200
                assert (await scaled(api, lora_scale=0.5 + number % 3)).status_code == 200
            assert (await unload(api, lora_name="mine")).status_code == 200
        server.engine.submitted.clear()
        server.engine.forgotten.clear()
        gc.collect()
        return sum(type(each) is ServedModel for each in gc.get_objects())

    await count_after(5)
    before = await count_after(5)
    assert await count_after(20) <= before


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"lora_name": "x", "lora_path": "../"}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": "link/root/one/../.."}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": "."}, 403, "lora_path"),
        ({"lora_name": "x", "lora_path": ""}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "a" * 5000}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "\0"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "none"}, 404, "lora_path"),
        ({"lora_name": "", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": MODEL, "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "unfit", "lora_path": "one"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "one", "lora_scale": -1e9}, 400, "lora_scale"),
        ({"lora_name": 1, "lora_path": "one"}, 400, "body.lora_name"),
    ],
)
async def test_bad_requests(server: FakeServer, fields: Any, status: int, param: str) -> None:
    api = Api(server)
    assert error_of(await load(api, **fields), status)["param"] == param
    assert (await load(api, lora_name="x", lora_path="link/root/one")).status_code == 200


async def test_a_server_that_sleeps_loads_none(server: FakeServer) -> None:
    api = Api(server)
    server.engine.sleeper.is_sleeping = True
    error_of(await load(api, lora_name="mine", lora_path="one"), 503)
    server.engine.sleeper.is_sleeping = False
    assert (await load(api, lora_name="mine", lora_path="one")).status_code == 200


async def test_only_the_admin_may(server: FakeServer) -> None:
    api = Api(server)
    for headers in ({}, {"Authorization": "Bearer user"}):
        error_of(await load(api, headers, lora_name="x", lora_path="one"), 401)
    error_of(await unload(api, lora_name="x"), 404)
    plain = Api(FakeServer(ServerConfig()))
    error_of(await load(plain, lora_name="x", lora_path="one"), 404)


async def test_adapters_at_start(server: FakeServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def download(self, patterns: object) -> Path:
            return folder / "two"

        def fetch(self, file: str) -> Path | None:
            return folder / file if file == "three.gguf" else None

    monkeypatch.setattr(adapter_files, "open_hub", lambda repository, *_: Hub())
    adapters = Adapters(server.model)
    await adapters.load_all([f"a={folder}/one", '{"name": "b", "path": "owner/name", "scale": 2}'])
    (folder / "three.gguf").write_bytes(b"GGUF")
    await adapters.load_all(["c=owner/name/three.gguf"])
    assert [view.root for view in adapters.models] == [f"{folder}/one", "owner/name", "owner/name/three.gguf"]
    with pytest.raises(EngineDeadError, match="--lora-modules d=nothing: .*no such folder"):
        await adapters.load_all(["d=nothing"])
    with pytest.raises(EngineDeadError, match="owner/name/four.gguf: .*the repository has no four.gguf"):
        await adapters.load_all(["d=owner/name/four.gguf"])
