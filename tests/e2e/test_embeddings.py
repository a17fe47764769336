"""Embeddings, scores and rankings of a real server: with the openai package, beside completions, through a crash."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from safetensors.torch import load_file, save_file

from api import LLM, PoolingParams
from tests import tiny
from tests.e2e.server import Server

TEXTS = [
    "The capital of France is Paris.",
    "Paris is France's capital.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
]


@pytest.fixture(scope="module", params=["LAST", "MEAN"])
def pooling_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(demo_model: Path, pooling_type: str) -> Iterator[Server]:
    config = f'{{"pooling_type": "{pooling_type}"}}'
    flags = ["--model", str(demo_model), "--served-model-name", "demo", "--pooler-config", config]
    with Server(*flags, "--max-model-len", "512", "--max-num-batched-tokens", "64") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_client_gets_the_same_vectors_in_every_form(client: openai.OpenAI) -> None:
    """By default the package asks for base64 and decodes it."""
    decoded = client.embeddings.create(model="demo", input=TEXTS)
    assert [entry.index for entry in decoded.data] == [0, 1, 2]
    assert decoded.usage.prompt_tokens == decoded.usage.total_tokens > 20
    numbers = client.embeddings.create(model="demo", input=TEXTS, encoding_format="float")
    alone = [client.embeddings.create(model="demo", input=text).data[0].embedding for text in TEXTS]
    for one, other, single in zip(decoded.data, numbers.data, alone, strict=True):
        assert len(one.embedding) == 576
        assert one.embedding == other.embedding == single
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-6)
    raw: Any = client.embeddings.create(model="demo", input=TEXTS[0], encoding_format="base64").data[0].embedding
    assert list(struct.unpack("<576f", base64.b64decode(raw))) == alone[0]


def test_dimensions_and_token_ids(client: openai.OpenAI, server: Server) -> None:
    short = client.embeddings.create(model="demo", input=TEXTS[0], dimensions=64).data[0].embedding
    whole = np.array(client.embeddings.create(model="demo", input=TEXTS[0]).data[0].embedding)
    np.testing.assert_allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-6)
    tokens = server.post("/tokenize", {"prompt": TEXTS[0]}).json()["tokens"]
    by_tokens = client.embeddings.create(model="demo", input=[tokens, tokens]).data
    assert by_tokens[0].embedding == by_tokens[1].embedding == whole.tolist()
    with pytest.raises(openai.BadRequestError, match="between 1 and 576") as caught:
        client.embeddings.create(model="demo", input="x", dimensions=577)
    assert caught.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.embeddings.create(model="demo", input=[1] * 513)
    client.embeddings.create(model="demo", input=[1] * 512)


def test_scores_tell_what_is_alike(server: Server) -> None:
    scores = [entry["score"] for entry in server.post("/score", {"text_1": TEXTS[0], "text_2": TEXTS}).json()["data"]]
    assert scores[0] == pytest.approx(1) and scores[0] > scores[1] > scores[2]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        results = server.post(path, {"query": TEXTS[0], "documents": TEXTS[::-1], "top_n": 2}).json()["results"]
        assert [result["index"] for result in results] == [2, 1]
        assert [result["relevance_score"] for result in results] == scores[:2]
        assert results[1]["document"] == {"text": TEXTS[1]}


def test_the_same_server_generates(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="The capital of France is", temperature=0, max_tokens=4)
    assert "Paris" in answer.choices[0].text


async def test_many_at_once_beside_completions(server: Server) -> None:
    """The bits of a vector do not depend on what else runs."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        inputs = [" ".join(TEXTS * (1 + number % 3)) + str(number) for number in range(24)]
        expected = [(await client.embeddings.create(model="demo", input=text)).data[0].embedding for text in inputs]
        completions = [
            asyncio.create_task(client.completions.create(model="demo", prompt=text, max_tokens=12))
            for text in inputs[:8]
        ]
        together = client.embeddings.create(model="demo", input=inputs)
        single = [client.embeddings.create(model="demo", input=text) for text in inputs]
        answer, *answers = await asyncio.gather(together, *single)
        await asyncio.gather(*completions)
    assert [entry.embedding for entry in answer.data] == expected
    assert [one.data[0].embedding for one in answers] == expected


async def under_way(server: Server, task: asyncio.Task[Any]) -> None:
    """Waits until a server works for a task, or the task is done."""
    for _ in range(20_000):
        if task.done() or server.metric("vllm:num_requests_running"):
            return
        await asyncio.sleep(0.005)


@pytest.mark.timeout(300)
async def test_embeddings_survive_the_death_of_the_engine(tiny_model: Path) -> None:
    flags = ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    with Server(*flags, "--max-num-batched-tokens", "16", "--pooler-config", '{"pooling_type": "MEAN"}') as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            inputs = [[(number * 7 + i * i) % 250 + 3 for i in range(400)] for number in range(64)]
            model = (await client.models.list()).data[0].id
            undisturbed = await client.embeddings.create(model=model, input=inputs)
            for title in ("octavo engine_core", "octavo worker 0"):
                for _ in range(20):  # a process that waits for a CPU may hear of them when they are done
                    task = asyncio.create_task(client.embeddings.create(model=model, input=inputs))
                    await under_way(server, task)
                    if not task.done():
                        break
                assert not task.done(), "the prompts were too short for this test"
                server.kill(title)
                again = await task
                assert [entry.embedding for entry in again.data] == [entry.embedding for entry in undisturbed.data]
        server.restarted(2)
        assert server.metric("octavo:engine_restarts_total") == 2
        server.rests()


def test_offline(tiny_model: Path) -> None:
    with LLM(str(tiny_model), dtype="float32", kv_cache_memory="64MiB") as llm:
        outputs = llm.embed(TEXTS, use_tqdm=False)
        tokens = llm.get_tokenizer().encode(TEXTS[1])
        assert outputs[1].prompt_token_ids == tokens
        (by_tokens,) = llm.embed({"prompt_token_ids": tokens}, use_tqdm=False)
        assert by_tokens.outputs.embedding == outputs[1].outputs.embedding
        (raw,) = llm.encode(TEXTS[1], PoolingParams(use_activation=False, dimensions=8), use_tqdm=False)
        (every,) = llm.encode(TEXTS[1], PoolingParams(use_activation=False), use_tqdm=False, pooling_task="token_embed")
        assert every.outputs.data.shape == (len(tokens), 64)
        np.testing.assert_array_equal(raw.outputs.data, every.outputs.data[-1, :8])
        scores = [entry.outputs.score for entry in llm.score(TEXTS[0], TEXTS, use_tqdm=False)]
        vectors = [np.array(output.outputs.embedding) for output in outputs]
        assert scores == pytest.approx([vectors[0] @ vector for vector in vectors], abs=1e-6)
        assert len(llm.score(TEXTS, TEXTS, use_tqdm=False)) == 3
        short = [vector[:8] / np.linalg.norm(vector[:8]) for vector in vectors]
        dimensions = PoolingParams(dimensions=8)
        ranked = llm.rerank(TEXTS[0], TEXTS, pooling_params=dimensions)
        by_index = [item.relevance_score for item in sorted(ranked, key=lambda item: item.index)]
        assert by_index == pytest.approx([short[0] @ vector for vector in short], abs=1e-6)
        (cut,) = llm.embed(TEXTS[1], pooling_params=PoolingParams(truncate_prompt_tokens=3), use_tqdm=False)
        assert cut.prompt_token_ids == tokens[-3:]
        for bad in (
            lambda: llm.score(TEXTS[:2], TEXTS),
            lambda: llm.score("a", "b", pooling_params=PoolingParams(prompt_name="other")),
            lambda: llm.embed("a", pooling_params=PoolingParams(dimensions=65)),
            lambda: llm.embed([1] * 513),
            lambda: llm.embed([[]]),
            lambda: llm.encode("a", pooling_task="classify"),
        ):
            with pytest.raises(ValueError):
                bad()
        assert llm.generate(TEXTS[0], use_tqdm=False)[0].outputs[0].token_ids


def test_simulated_device(tiny_model: Path) -> None:
    """Without a model there are vectors as well: a function of the tokens."""
    flags = ["--model", str(tiny_model), "--distributed-executor-backend", "simulated"]
    with Server(*flags) as server:
        answers = [server.post("/v1/embeddings", {"input": [TEXTS[0], TEXTS[1]]}).json() for _ in range(2)]
        assert answers[0]["data"] == answers[1]["data"] and len(answers[0]["data"][0]["embedding"]) == 64
        assert answers[0]["data"][0]["embedding"] != answers[0]["data"][1]["embedding"]


def test_a_model_without_an_output_layer(tiny_model: Path, tmp_path: Path) -> None:
    """What only pools needs none."""
    folder = tiny.copy_of(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    assert weights.pop("lm_head.weight") is not None
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "64MiB"}
    with LLM(str(folder), runner="pooling", **options) as llm, LLM(str(tiny_model), **options) as whole:
        ours, theirs = (each.embed(TEXTS[1], use_tqdm=False)[0].outputs.embedding for each in (llm, whole))
        assert ours == theirs
