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
import numpy as np
import pytest

from api import LLM, SamplingParams
from api.errors import RequestError
from api.llm_inputs import LoRARequests
from api.params.lora import LoRARequest
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
    cards = {card["id"]: card["parent"] for card in server.get("/v1/models").json()["data"]}
    assert cards == {"base": None, "a": "base", "b": "base"}
    assert server.metric("octavo:lora_adapters_loaded") == 2


def test_scales_of_requests(server: Server) -> None:
    """Each is what it is alone, whatever runs beside it, and its prompt is in no other's cache; 0 is the base model."""
    wanted: list[tuple[str, float]] = [("a", 0.5), ("a", 1), ("b", 0.5), ("a", 0), ("a", 2), ("b", 2)]
    alone = [answer(server, model, 3, lora_scale=scale) for model, scale in wanted]
    assert len({str(each) for each in alone}) == len(wanted)
    assert alone[1] == answer(server, "a", 3) and alone[3] == answer(server, "base", 3)
    with ThreadPoolExecutor(len(wanted)) as pool:
        asked = [pool.submit(answer, server, model, 3, lora_scale=scale) for model, scale in wanted]
        assert [each.result() for each in asked] == alone
    assert alone[0] == answer(server, "a", 3, lora=[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0}])


def test_offline(folder: Path, tiny_model: Path) -> None:
    """What pools has adapters, too: each prompt one of its own, and the vectors that it has alone."""
    texts, path = ["one text", "another"], str(folder / "b")
    half, whole = (LoRARequest("b", 1, path, scale) for scale in (0.5, 1))
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "64MiB", "max_lora_rank": 8}
    with LLM(str(tiny_model), enable_lora=True, max_loras=2, **options) as llm:

        def vectors(text: str | list[str], adapter: LoRARequests) -> list[list[float]]:
            return [each.outputs.embedding for each in llm.embed(text, use_tqdm=False, lora_request=adapter)]

        alone = [vectors(texts[0], adapter)[0] for adapter in (None, half, whole)]
        assert len({str(each) for each in alone}) == 3
        assert vectors([texts[0]] * 4, [half, None, None, whole]) == [alone[1], alone[0], alone[0], alone[2]]
        (raw,) = llm.encode(texts[0], use_tqdm=False, lora_request=half)
        assert raw.outputs.data.tolist() == alone[1]
        first, second = map(np.array, vectors(texts, whole))
        (score,) = llm.score(*texts, use_tqdm=False, lora_request=whole)
        assert score.outputs.score == pytest.approx(first @ second, abs=1e-6)
        assert llm.rerank(texts[0], texts[1:], lora_request=whole)[0].relevance_score == score.outputs.score
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
        outputs = llm.generate([texts[0]] * 2, params, use_tqdm=False, lora_request=[half, whole])
        assert [
            llm.generate(texts[0], params, use_tqdm=False, lora_request=each)[0].outputs for each in (half, whole)
        ] == [each.outputs for each in outputs]
        with pytest.raises(RequestError, match="one per prompt; got 1 for 2"):
            llm.embed(texts, lora_request=[half])


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
    generated = server.metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(len(wanted)) as pool:
        asked = [pool.submit(answer, server, model, number, max_tokens=150) for number, model in enumerate(wanted)]
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
