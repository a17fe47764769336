"""A server with adapters: any mixture gives each request its own tokens, whatever happens to processes and files."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.e2e.server import Server
from tests.lora import write_adapter

ADMIN = {"Authorization": "Bearer root"}
FLAGS = ("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "8", "--admin-api-key", "root")
NUM_LOADS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of the tiny model."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abcd", 1):
        path = write_adapter(tiny.checkpoint("llama"), seed=seed, scale=0.3, rank=9 if name == "d" else 4)
        shutil.copytree(path, root / name)
    return root


@pytest.fixture(scope="module")
def server(folder: Path, tiny_model: Path) -> Iterator[Server]:
    flags = ("--served-model-name", "base", "--allowed-lora-path", str(folder))
    modules = (f"a={folder / 'a'}", f'{{"name": "b", "path": "{folder / "b"}"}}')
    with Server(str(tiny_model), *FLAGS, *flags, "--lora-modules", *modules) as server:
        yield server


def body(model: str, number: int, **fields: Any) -> dict[str, Any]:
    prompt = [(number * 7 + i * i) % 250 + 3 for i in range(40 + number)]
    return {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2, **fields}


def answer(server: Server, model: str, number: int, **fields: Any) -> Any:
    response = server.post("/v1/completions", body(model, number, ignore_eos=True, return_token_ids=True, **fields))
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    choice = response.json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def change(server: Server, action: str, headers: dict[str, str] = ADMIN, **fields: Any) -> httpx.Response:
    return server.post(f"/v1/{action}_lora_adapter", fields, headers=headers)


def test_any_mixture_gives_each_its_own_tokens(server: Server) -> None:
    wanted = [("base", "a", "b")[number % 3] for number in range(9)]
    alone = [answer(server, model, number) for number, model in enumerate(wanted)]
    assert len({str(answer(server, model, 0)) for model in ("base", "a", "b")}) == 3
    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(lambda pair: answer(server, pair[1], pair[0]), enumerate(wanted)))
    assert together == alone
    cards = {card["id"]: card["parent"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert cards == {"base": None, "a": "base", "b": "base"}
    assert server.metric("octavo:lora_adapters_loaded") == 2


def test_loading_and_unloading(server: Server, folder: Path) -> None:
    path = str(folder / "c")
    assert change(server, "load", {}, lora_name="c", lora_path=path).status_code == 401
    for outside in ("/etc", "../", f"{folder}/../x"):
        response = change(server, "load", lora_name="c", lora_path=outside)
        assert (response.status_code, response.json()["error"]["param"]) == (403, "lora_path")
    response = change(server, "load", lora_name="d", lora_path="d")
    assert response.status_code == 400 and "is 9, and the server was started with --max-lora-rank 8" in response.text
    assert change(server, "load", lora_name="x", lora_path="nothing").status_code == 404
    assert server.post("/v1/completions", body("c", 0)).status_code == 404
    assert change(server, "load", lora_name="a", lora_path=path).status_code == 400
    assert change(server, "unload", lora_name="c").status_code == 404
    before = answer(server, "a", 1)
    assert change(server, "load", lora_name="a", lora_path="c", load_inplace=True).status_code == 200
    assert answer(server, "a", 1) != before
    assert change(server, "load", lora_name="a", lora_path="a", load_inplace=True).status_code == 200
    assert answer(server, "a", 1) == before


def test_loading_under_traffic(server: Server) -> None:
    """More adapters than fit come and go while requests run."""
    expected = {name: answer(server, name, 5) for name in ("base", "a", "b")}

    def ask(number: int) -> None:
        name = ("base", "a", "b")[number % 3]
        assert answer(server, name, 5) == expected[name]

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(3 * NUM_LOADS)]
        for number in range(NUM_LOADS):
            assert change(server, "load", lora_name="c", lora_path="c").status_code == 200
            if number % 5 == 0:
                expected.setdefault("c", answer(server, "c", 5))
                assert answer(server, "c", 5) == expected["c"]
            assert change(server, "unload", lora_name="c").status_code == 200
        for each in asked:
            each.result()


@pytest.mark.parametrize("process", ["octavo worker", "octavo engine_core"])
def test_processes_die(server: Server, process: str) -> None:
    wanted = [("base", "a", "b")[number % 3] for number in range(6)]
    expected = [answer(server, model, number, max_tokens=150) for number, model in enumerate(wanted)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        asked = [pool.submit(answer, server, model, number, max_tokens=150) for number, model in enumerate(wanted)]
        generated = server.metric("vllm:generation_tokens_total")
        while server.metric("vllm:generation_tokens_total") < generated + 10:
            pass
        os.kill(server.child(process).pid, signal.SIGKILL)
        assert [each.result() for each in asked] == expected


def test_a_changed_file_is_no_longer_the_adapter(server: Server, folder: Path) -> None:
    """Its requests end with an error once it must be read again, and those of others go on."""
    expected = answer(server, "b", 2)
    config = folder / "a" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    os.kill(server.child("octavo worker").pid, signal.SIGKILL)
    response = server.post("/v1/completions", body("a", 2))
    while response.status_code == 200:  # it has not died yet
        response = server.post("/v1/completions", body("a", 2))
    assert "files have changed" in response.text
    assert answer(server, "b", 2) == expected
