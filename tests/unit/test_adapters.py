"""Adapters by name: loaded and unloaded over HTTP, and chosen as the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api.config import ServerConfig, make_config
from api.errors import EngineDeadError
from api.generation.adapters import Adapters
from api.model import adapter_files
from tests.fakes import MODEL, FakeServer
from tests.unit.conftest import Api, error_of

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


async def test_another_adapter_under_the_same_name(server: FakeServer) -> None:
    api = Api(server)
    assert (await load(api, lora_name="mine", lora_path="one")).status_code == 200
    assert "already been loaded" in error_of(await load(api, lora_name="mine", lora_path="two"), 400)["message"]
    assert (await load(api, lora_name="mine", lora_path="two", load_inplace=True)).status_code == 200
    assert len(server.engine.forgotten) == 1
    assert (await load(api, lora_name="other", lora_path="two")).status_code == 200
    assert (await unload(api, lora_name="mine")).status_code == 200
    assert len(server.engine.forgotten) == 1, "another name stands for the same files"


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

    monkeypatch.setattr(adapter_files, "open_hub", lambda repository, *_: Hub())
    adapters = Adapters(server.model)
    await adapters.load_all([f"a={folder}/one", '{"name": "b", "path": "owner/name", "scale": 2}'])
    assert [view.root for view in adapters.models] == [f"{folder}/one", "owner/name"]
    with pytest.raises(EngineDeadError, match="--lora-modules c=nothing: .*no such folder"):
        await adapters.load_all(["c=nothing"])
