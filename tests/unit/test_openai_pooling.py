"""POST /v1/embeddings, /score and /rerank."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from api.config import PoolerConfig, ServerConfig
from api.openai.embeddings import to_dtype
from engine_core.messages import PoolingSupport, i32
from tests.fakes import (
    BOS,
    HIDDEN_SIZE,
    MAX_MODEL_LEN,
    MODEL,
    VOCAB_SIZE,
    Connection,
    FakeServer,
    fake_vector,
    token_of,
    tokens_of,
)
from tests.unit.conftest import Api, error_of

EMBEDDINGS = "/v1/embeddings"


def vector_of(prompt: list[int], dimensions: int | None = None) -> npt.NDArray[np.float32]:
    vector = fake_vector(prompt)[:dimensions]
    scaled: npt.NDArray[np.float32] = vector / np.linalg.norm(vector)
    return scaled


def prompts_of(server: FakeServer) -> list[list[int]]:
    return [i32(message.prompt_token_ids).tolist() for message in server.engine.submitted]


async def test_one_text(api: Api) -> None:
    answer = await api.ok(EMBEDDINGS, {"input": "abba", "model": MODEL, "user": "me", "unknown": 1})
    assert answer["id"].startswith("embd-") and answer["object"] == "list" and answer["model"] == MODEL
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    (entry,) = answer["data"]
    assert entry["object"] == "embedding" and entry["index"] == 0
    assert entry["embedding"] == vector_of([BOS, *tokens_of("abba")]).tolist()
    assert "completion_tokens" not in answer["usage"]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("abc", [[BOS, *tokens_of("abc")]]),
        (["abc", "d"], [[BOS, *tokens_of("abc")], [BOS, *tokens_of("d")]]),
        (tokens_of("abc"), [tokens_of("abc")]),
        ([tokens_of("abc"), tokens_of("d")], [tokens_of("abc"), tokens_of("d")]),
    ],
)
async def test_ways_to_give_the_input(api: Api, given: Any, prompts: list[list[int]]) -> None:
    answer = await api.ok(EMBEDDINGS, {"input": given})
    assert prompts_of(api.server) == prompts
    assert [entry["index"] for entry in answer["data"]] == list(range(len(prompts)))
    for entry, prompt in zip(answer["data"], prompts, strict=True):
        np.testing.assert_array_equal(np.array(entry["embedding"], np.float32), vector_of(prompt))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_base64_is_the_same_vector(api: Api) -> None:
    plain = await api.ok(EMBEDDINGS, {"input": "abba"})
    for fields, dtype in (
        ({}, "<f4"),
        ({"endianness": "little"}, "<f4"),
        ({"endianness": "big"}, ">f4"),
        ({"embed_dtype": "float16"}, "<f2"),
    ):
        answer = await api.ok(EMBEDDINGS, {"input": "abba", "encoding_format": "base64", **fields})
        vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype)
        expected = np.array(plain["data"][0]["embedding"], np.float32)
        np.testing.assert_array_equal(vector, expected.astype(dtype))


def test_bfloat16_is_torch_s() -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = numbers.bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(to_dtype(numbers.numpy(), "bfloat16").view(np.int16), expected)


async def test_dimensions(api: Api) -> None:
    answer = await api.ok(EMBEDDINGS, {"input": "abba", "dimensions": 3})
    np.testing.assert_array_equal(
        np.array(answer["data"][0]["embedding"], np.float32), vector_of([BOS, *tokens_of("abba")], 3)
    )
    for bad in (0, -1, HIDDEN_SIZE + 1, 10**9):
        error = await api.error(EMBEDDINGS, {"input": "a", "dimensions": bad})
        assert error["param"] == "dimensions" and str(HIDDEN_SIZE) in error["message"]


async def test_dimensions_of_tokens() -> None:
    api = Api(FakeServer(pooling=PoolingSupport(token_size=4)))
    fields = {"input": "abba", "task": "token_embed"}
    assert len((await api.ok("/pooling", {**fields, "dimensions": 4}))["data"][0]["data"][0]) == 4
    error = await api.error("/pooling", {**fields, "dimensions": 5})
    assert error["param"] == "dimensions" and "between 1 and 4" in error["message"]
    await api.ok(EMBEDDINGS, {"input": "abba", "dimensions": 5})


async def test_length_of_the_vectors(api: Api) -> None:
    for fields in ({"use_activation": False}, {"normalize": False}):
        answer = await api.ok(EMBEDDINGS, {"input": "abba", **fields})
        assert answer["data"][0]["embedding"] == fake_vector([BOS, *tokens_of("abba")]).tolist()
    config = ServerConfig(pooler_config=PoolerConfig(pooling_type="MEAN", use_activation=False))
    raw = Api(FakeServer(config))
    answer = await raw.ok(EMBEDDINGS, {"input": "abba"})
    assert answer["data"][0]["embedding"] == fake_vector([BOS, *tokens_of("abba")]).tolist()
    answer = await raw.ok(EMBEDDINGS, {"input": "abba", "use_activation": True})
    assert np.linalg.norm(answer["data"][0]["embedding"]) == pytest.approx(1)
    params = [message.pooling_params for message in raw.server.engine.submitted]
    assert [p.pooling_type for p in params if p] == ["MEAN", "MEAN"]


async def test_special_tokens_and_truncation(api: Api) -> None:
    text = "abcdef"
    for fields, prompt in (
        ({"add_special_tokens": False}, tokens_of(text)),
        ({"truncate_prompt_tokens": 3}, [BOS, *tokens_of("ef")]),
        ({"truncate_prompt_tokens": 3, "add_special_tokens": False}, tokens_of("def")),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [BOS, *tokens_of("ab")]),
        ({"truncate_prompt_tokens": 100}, [BOS, *tokens_of(text)]),
        ({"truncate_prompt_tokens": -1}, [BOS, *tokens_of(text)]),
    ):
        await api.ok(EMBEDDINGS, {"input": text, **fields})
        assert prompts_of(api.server)[-1] == prompt
    await api.ok(EMBEDDINGS, {"input": "x" * 5000, "truncate_prompt_tokens": -1})
    assert len(prompts_of(api.server)[-1]) == MAX_MODEL_LEN
    for bad in (0, -2, MAX_MODEL_LEN + 1):
        error = await api.error(EMBEDDINGS, {"input": text, "truncate_prompt_tokens": bad})
        assert "truncate_prompt_tokens" in error["param"]


async def test_messages(api: Api) -> None:
    one = [{"role": "user", "content": "abc"}]
    two = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]
    tokenized = [
        (await api.ok("/tokenize", {"messages": m, "add_generation_prompt": False}))["tokens"] for m in (one, two)
    ]
    await api.ok(EMBEDDINGS, {"messages": one})
    assert prompts_of(api.server) == [tokenized[0]]
    answer = await api.ok(EMBEDDINGS, {"messages": [one, two]})
    assert prompts_of(api.server)[1:] == tokenized and len(answer["data"]) == 2
    await api.ok(EMBEDDINGS, {"messages": one, "add_generation_prompt": True})
    assert len(prompts_of(api.server)[-1]) > len(tokenized[0])
    for bad in ([], [one, two[0]], [one, []], [{"content": "no role"}]):
        error = await api.error(EMBEDDINGS, {"messages": bad})
        assert "messages" in error["param"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [VOCAB_SIZE]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [[1], [VOCAB_SIZE]]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": {"text": "a"}}, "body.input"),
        ({"input": "a", "encoding_format": "bytes"}, "body.encoding_format"),
        ({"input": "a", "embed_dtype": "fp8_e4m3"}, "body.embed_dtype"),
        ({"input": "a", "priority": 1}, "priority"),
        ({"input": "a" * (MAX_MODEL_LEN + 1)}, "input_tokens"),
        ({"input": [4] * (MAX_MODEL_LEN + 1)}, "input_tokens"),
    ],
)
async def test_what_is_wrong_is_named(api: Api, body: Any, param: str) -> None:
    error = await api.error(EMBEDDINGS, body)
    assert error["param"] == param
    assert not api.server.engine.submitted


async def test_an_empty_text_without_special_tokens(api: Api) -> None:
    await api.ok(EMBEDDINGS, {"input": ""})  # the start token is there
    error = await api.error(EMBEDDINGS, {"input": "", "add_special_tokens": False})
    assert error["param"] == "input" and "empty" in error["message"]


async def test_a_text_may_fill_the_context(api: Api) -> None:
    await api.ok(EMBEDDINGS, {"input": "a" * (MAX_MODEL_LEN - 1)})
    error = await api.error(EMBEDDINGS, {"input": "a" * MAX_MODEL_LEN})
    assert "maximum context length" in error["message"]


async def test_no_such_model(api: Api) -> None:
    for path, body in ((EMBEDDINGS, {"input": "a"}), ("/score", {"text_1": "a", "text_2": "a"})):
        error = await api.error(path, {"model": "another", **body}, 404)
        assert error["type"] == "NotFoundError"


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


async def test_the_engine_fails_or_is_busy(api: Api) -> None:
    api.server.engine.steps_left = 0
    task = asyncio.create_task(api.post(EMBEDDINGS, {"input": ["a", "b"]}))
    await until(lambda: api.server.engine.num_unfinished == 2)
    api.server.engine.fail_one("not a number")
    error_of(await task, 500)
    assert api.server.engine.num_unfinished == 0 and len(api.server.engine.aborted) == 1
    api.server.engine.steps_left = None
    api.server.engine.max_queued = 1
    error_of(await api.post(EMBEDDINGS, {"input": ["a", "b"]}), 429)
    assert api.server.engine.num_unfinished == 0
    api.server.engine.fail_all("dead")
    error_of(await api.post(EMBEDDINGS, {"input": "a"}), 503)


async def test_a_client_that_leaves(api: Api) -> None:
    api.server.engine.steps_left = 0
    connection = Connection(api.server.app, EMBEDDINGS, {"input": ["a", "b", "c"]})
    await until(lambda: api.server.engine.num_unfinished == 3)
    connection.leave()
    await connection.task
    assert len(api.server.engine.aborted) == 3 and not connection.sent


async def test_metrics(api: Api) -> None:
    await api.ok(EMBEDDINGS, {"input": ["abc", "d"]})
    text = (await api.get("/metrics")).text
    label = f'{{engine="0",model_name="{MODEL}"}}'
    assert f"vllm:prompt_tokens_total{label} 6.0" in text
    assert f'vllm:request_success_total{{engine="0",finished_reason="stop",model_name="{MODEL}"}} 2.0' in text
    assert f"vllm:request_prompt_tokens_count{label} 2.0" in text
    assert f"vllm:request_generation_tokens_count{label} 0.0" in text
    assert f"vllm:time_to_first_token_seconds_count{label} 0.0" in text
    assert f"vllm:request_queue_time_seconds_count{label} 2.0" in text


# -- scores ---------------------------------------------------------------------------------------------------


def similarity(one: str, other: str) -> float:
    return float(vector_of([BOS, *tokens_of(one)]) @ vector_of([BOS, *tokens_of(other)]))


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    "names", [("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")]
)
async def test_scores(api: Api, path: str, names: tuple[str, str]) -> None:
    for queries, documents, pairs in (
        ("ab", "ac", [("ab", "ac")]),
        ("ab", ["ab", "cd", "b"], [("ab", "ab"), ("ab", "cd"), ("ab", "b")]),
        (["ab"], ["ab", "cd"], [("ab", "ab"), ("ab", "cd")]),
        (["ab", "c"], ["ab", "cd"], [("ab", "ab"), ("c", "cd")]),
    ):
        answer = await api.ok(path, {names[0]: queries, names[1]: documents})
        assert answer["id"].startswith("score-") and answer["object"] == "list" and answer["model"] == MODEL
        assert [entry["index"] for entry in answer["data"]] == list(range(len(pairs)))
        assert {entry["object"] for entry in answer["data"]} == {"score"}
        expected = [similarity(*pair) for pair in pairs]
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected, abs=1e-6)


async def test_score_of_a_text_with_itself_is_one(api: Api) -> None:
    answer = await api.ok("/score", {"text_1": "abc", "text_2": "abc"})
    assert answer["data"][0]["score"] == pytest.approx(1, abs=1e-12) and answer["data"][0]["score"] <= 1
    assert answer["usage"] == {"prompt_tokens": 8, "total_tokens": 8}


async def test_tokens_per_query_and_document(api: Api) -> None:
    body = {"queries": "abcdef", "documents": ["fedcba", "x"], "max_tokens_per_query": 2, "max_tokens_per_doc": 3}
    await api.ok("/score", body)
    cut = [[BOS, *tokens_of("ab")], [BOS, *tokens_of("fed")], [BOS, token_of(ord("x"))]]
    assert prompts_of(api.server) == cut
    await api.ok("/rerank", {"query": "abcdef", "documents": ["fedcba", "x"], **{k: body[k] for k in list(body)[2:]}})
    assert prompts_of(api.server)[3:] == cut
    await api.ok("/score", {"text_1": "y" * 5000, "text_2": "a", "max_tokens_per_query": 8})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "queries"),
        ({"queries": "a"}, "documents"),
        ({"text_2": "a"}, "queries"),
        ({"queries": "a", "text_1": "a", "documents": "a"}, "queries"),
        ({"queries": [], "documents": "a"}, "queries"),
        ({"queries": "a", "documents": []}, "documents"),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
        ({"text_1": ["a", "b"], "text_2": ["a"]}, "text_2"),
        ({"text_1": "a", "text_2": "a", "instruction": "judge"}, "instruction"),
        ({"text_1": "a", "text_2": ["a"] * 2049}, "text_2"),
        ({"text_1": "a", "text_2": {"text": "a"}}, "body.text_2"),
        ({"text_1": "a", "text_2": "a" * 600}, "input_tokens"),
    ],
)
async def test_what_is_wrong_with_a_score_is_named(api: Api, body: Any, param: str) -> None:
    error = await api.error("/score", body)
    assert error["param"] == param
    assert not api.server.engine.submitted


# -- rankings -------------------------------------------------------------------------------------------------

DOCUMENTS = ["zzz", "abab", {"text": "ab"}, "cd", "abc"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rerank(api: Api, path: str) -> None:
    answer = await api.ok(path, {"model": MODEL, "query": "ab", "documents": DOCUMENTS})
    assert answer["id"].startswith("rerank-") and answer["model"] == MODEL
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0
    results = answer["results"]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1)
    assert sorted(result["index"] for result in results) == list(range(5))
    assert results[0]["index"] == 2
    for result in results:
        document = DOCUMENTS[result["index"]]
        assert result["document"] == (document if isinstance(document, dict) else {"text": document})


async def test_top_n_and_return_documents(api: Api) -> None:
    body = {"query": "ab", "documents": DOCUMENTS}
    every = (await api.ok("/rerank", body))["results"]
    for top_n, count in ((0, 5), (1, 1), (3, 3), (5, 5), (50, 5), (None, 5)):
        assert (await api.ok("/rerank", {**body, "top_n": top_n}))["results"] == every[:count]
    short = (await api.ok("/rerank", {**body, "return_documents": False}))["results"]
    assert [sorted(result) for result in short] == [["index", "relevance_score"]] * 5


async def test_equal_documents_keep_their_order(api: Api) -> None:
    results = (await api.ok("/rerank", {"query": "a", "documents": ["b", "a", "b", "b"]}))["results"]
    assert [result["index"] for result in results] == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "a"}, "body"),
        ({"documents": ["a"]}, "body"),
        ({"query": "a", "documents": []}, "body.documents"),
        ({"query": "a", "documents": "a"}, "body.documents"),
        ({"query": "a", "documents": [{"title": "a"}]}, "body.documents[0]"),
        ({"query": ["a"], "documents": ["a"]}, "body.query"),
        ({"query": "a", "documents": ["a"], "top_n": -1}, "body.top_n"),
        ({"query": "a", "documents": ["a"], "instruction": "judge"}, "instruction"),
        ({"query": "a" * 600, "documents": ["a"]}, "input_tokens"),
    ],
)
async def test_what_is_wrong_with_a_ranking_is_named(api: Api, body: Any, param: str) -> None:
    error = await api.error("/rerank", body)
    assert error["param"] == param
    assert not api.server.engine.submitted


# -- what a server offers -------------------------------------------------------------------------------------

GENERATION = {"/v1/chat/completions", "/v1/completions"}
POOLING = {EMBEDDINGS, "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"}


@pytest.mark.parametrize(
    ("fields", "offered"),
    [
        ({}, GENERATION | POOLING),
        ({"runner": "generate"}, GENERATION),
        ({"convert": "none"}, GENERATION),
        ({"runner": "pooling"}, POOLING),
        ({"runner": "embed", "convert": "embed"}, POOLING),
    ],
)
async def test_runner(fields: Any, offered: set[str]) -> None:
    api = Api(FakeServer(ServerConfig(**fields)))
    paths = set((await api.get("/openapi.json")).json()["paths"])
    assert paths & (GENERATION | POOLING) == offered
    for path in GENERATION | POOLING:
        status = (await api.post(path, {})).status_code
        assert status == (400 if path in offered else 404)


async def test_many_vectors_are_those_of_each_text_alone(api: Api) -> None:
    texts = [f"text {number}" for number in range(40)]
    answer = await api.ok("/v1/embeddings", {"input": texts})
    assert [entry["index"] for entry in answer["data"]] == list(range(40))
    for entry, text in list(zip(answer["data"], texts, strict=True))[::13]:
        alone = await api.ok("/v1/embeddings", {"input": text})
        assert entry["embedding"] == alone["data"][0]["embedding"]
        assert entry["object"] == "embedding"
