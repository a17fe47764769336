"""POST /classify, /pooling, and scores of cross-encoders; prompts that a model's files name."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from api.config import PoolerConfig, ServerConfig
from api.model.pair_template import DEFAULT_INSTRUCTION, QWEN3_RERANKER
from api.model.pooler import SentenceConfig
from engine_core.messages import PoolingSupport, i32
from tests.fakes import (
    BOS,
    EOS,
    HIDDEN_SIZE,
    MAX_MODEL_LEN,
    FakeServer,
    fake_vector,
    tiny_tokenizer,
    token_of,
    tokens_of,
)
from tests.unit.conftest import Api


def pairing() -> Any:
    """A tokenizer that joins two texts as BERT's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def server(head: str = "CLS", *labels: str, **fields: Any) -> Api:
    config = ServerConfig(runner="pooling")
    kind = PoolingSupport(generates=False, pooling_type="MEAN", head_pooling=head, labels=labels)
    return Api(FakeServer(config, tokenizer=pairing(), pooling=kind, **fields))


def sent(api: Api) -> list[tuple[list[int], int]]:
    messages = api.server.engine.submitted
    assert all(message.pooling_params is not None for message in messages)
    return [
        (i32(message.prompt_token_ids).tolist(), message.pooling_params.second_segment)  # type: ignore[union-attr]
        for message in messages
    ]


async def test_classes() -> None:
    api = server("CLS", "bad", "good", "fine")
    answer = await api.ok("/classify", {"input": ["ab", "c"], "use_activation": False})
    assert answer["object"] == "list" and answer["usage"]["prompt_tokens"] == 7
    for entry, text in zip(answer["data"], ("ab", "c"), strict=True):
        numbers = fake_vector([BOS, *tokens_of(text), EOS])[:3]
        assert entry["probs"] == numbers.tolist() and entry["num_classes"] == 3
        assert entry["label"] == ("bad", "good", "fine")[int(numbers.argmax())]
    params = [message.pooling_params for message in api.server.engine.submitted]
    assert [(each.pooling_type, each.normalize, each.classifies) for each in params if each] == [
        ("CLS", False, True)
    ] * 2
    error = await api.error("/score", {"text_1": "a", "text_2": "b"})
    assert error["param"] == "task" and "has 3; use /classify" in error["message"]


async def test_pooling_does_what_the_model_can() -> None:
    api = server("CLS", "bad", "good")
    answer = await api.ok("/pooling", {"input": "ab", "use_activation": False})
    prompt = [BOS, *tokens_of("ab"), EOS]
    assert answer["data"] == [{"index": 0, "object": "pooling", "data": fake_vector(prompt)[:2].tolist()}]
    vectors = await api.ok("/pooling", {"input": "ab", "task": "embed", "encoding_format": "base64"})
    numbers = np.frombuffer(base64.b64decode(vectors["data"][0]["data"]), np.float32)
    assert np.linalg.norm(numbers) == pytest.approx(1)
    assert "of whole texts" in (await api.error("/pooling", {"input": "a", "task": "token_classify"}))["message"]
    plain = server("")
    assert "no classifier" in (await plain.error("/classify", {"input": "a"}))["message"]
    await plain.ok("/pooling", {"input": "a"})
    params = plain.server.engine.submitted[0].pooling_params
    assert params is not None and params.pooling_type == "MEAN"


async def test_steps_have_results_at_their_ends() -> None:
    config = ServerConfig(
        runner="pooling", pooler_config=PoolerConfig(pooling_type="STEP", step_tag_id=token_of(ord("c")))
    )
    api = Api(FakeServer(config, tokenizer=pairing(), pooling=PoolingSupport(generates=False)))
    answer = await api.ok("/pooling", {"input": "abcabcd", "use_activation": False})
    assert answer["data"][0]["data"] == [fake_vector(tokens_of("c")).tolist()] * 2
    assert (await api.ok("/pooling", {"input": "ab"}))["data"][0]["data"] == []
    error = await api.error("/v1/embeddings", {"input": "ab"})
    assert error["param"] == "task" and "STEP is for tokens" in error["message"]


async def test_a_cross_encoder_reads_pairs() -> None:
    api = server("CLS", "relevance")
    fields = {"query": "ab", "documents": ["cde", "f"], "use_activation": False}
    answer = await api.ok("/v1/rerank", fields)
    prompts = [
        ([BOS, *tokens_of("ab"), EOS, *tokens_of("cde"), EOS], 4),
        ([BOS, *tokens_of("ab"), EOS, *tokens_of("f"), EOS], 4),
    ]
    assert sent(api) == prompts
    scores = {index: float(fake_vector(prompt)[0] + 4) for index, (prompt, _) in enumerate(prompts)}
    ranked = sorted(scores, key=lambda index: -scores[index])
    assert [(entry["index"], entry["relevance_score"]) for entry in answer["results"]] == [
        (index, pytest.approx(scores[index])) for index in ranked
    ]
    scored = await api.ok("/score", {"text_1": ["ab", "ab"], "text_2": ["cde", "f"], "use_activation": False})
    assert [entry["score"] for entry in scored["data"]] == [pytest.approx(scores[index]) for index in (0, 1)]
    assert (await api.error("/rerank", {**fields, "instruction": "x"}))["param"] == "instruction"


async def test_the_files_may_name_a_text_before_the_query_of_a_pair() -> None:
    prompts = {"query": "q:", "other": "o:"}
    for default, name, prompt in ((None, None, ""), (None, "other", "o:"), ("query", None, "q:"), ("query", "", "")):
        api = server("CLS", "relevance", sentences=SentenceConfig(prompts=prompts, default_prompt=default))
        fields = {} if name is None else {"prompt_name": name}
        await api.ok("/rerank", {"query": "ab", "documents": ["cde"], **fields})
        await api.ok("/score", {"text_1": "ab", "text_2": "cde", **fields})
        own = tokens_of(prompt + "ab")
        assert sent(api) == [([BOS, *own, EOS, *tokens_of("cde"), EOS], len(own) + 2)] * 2
        error = await api.error("/score", {"text_1": "ab", "text_2": "cde", "prompt_name": "none"})
        assert error["param"] == "prompt_name" and "choose from query, other" in error["message"]


async def test_pairs_are_truncated_longest_first() -> None:
    api = server("CLS", "relevance")
    long = "x" * (2 * MAX_MODEL_LEN)
    assert "maximum context" in (await api.error("/score", {"text_1": "ab", "text_2": long}))["message"]
    await api.ok("/score", {"text_1": "ab", "text_2": long, "truncate_prompt_tokens": -1})
    await api.ok("/score", {"text_1": "abcdef", "text_2": long, "truncate_prompt_tokens": 10})
    await api.ok("/score", {"text_1": "ab", "text_2": "cdef", "max_tokens_per_doc": 2})
    (whole, _), (short, second), (few, _) = sent(api)
    assert len(whole) == MAX_MODEL_LEN and whole[:4] == [BOS, *tokens_of("ab"), EOS] and whole[-1] == EOS
    assert short == [BOS, *tokens_of("abc"), EOS, *tokens_of("xxxx"), EOS] and second == 5
    assert few == [BOS, *tokens_of("ab"), EOS, *tokens_of("cd"), EOS]


async def test_queries_of_pairs_are_truncated() -> None:
    api = server("CLS", "relevance")
    await api.ok("/score", {"text_1": "abcd", "text_2": "efgh", "max_tokens_per_query": 2, "max_tokens_per_doc": 3})
    await api.ok("/rerank", {"query": "abcd", "documents": ["ef"], "max_tokens_per_query": 9})
    (few, second), (whole, _) = sent(api)
    assert few == [BOS, *tokens_of("ab"), EOS, *tokens_of("efg"), EOS] and second == 4
    assert whole == [BOS, *tokens_of("abcd"), EOS, *tokens_of("ef"), EOS]


async def test_a_template_is_truncated_before_its_end() -> None:
    api = server("LAST", "yes", pair_template=QWEN3_RERANKER)
    end = api.server.model.tokenizer.encode(QWEN3_RERANKER.suffix, False)
    for number in (1, len(end), len(end) + 2):
        await api.ok("/score", {"text_1": "ab", "text_2": "cd", "truncate_prompt_tokens": number})
        assert sent(api)[-1][0][-len(end) :] == end and len(sent(api)[-1][0]) == max(number, len(end))


async def test_a_reranker_with_a_template() -> None:
    api = server("LAST", "yes", pair_template=QWEN3_RERANKER)
    await api.ok("/score", {"text_1": "ab", "text_2": "cd"})
    await api.ok("/score", {"text_1": "ab", "text_2": "cd", "instruction": "zz", "max_tokens_per_doc": 1})
    (first, _), (second, _) = (sent(api)[index] for index in range(2))
    text = api.server.model.tokenizer.decode(first, skip_special_tokens=False)
    body = f"<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: ab\n<Document>: cd"
    assert text == QWEN3_RERANKER.prefix + body + QWEN3_RERANKER.suffix
    assert second[-1] == first[-1] and token_of(ord("d")) not in second[len(first) - 60 :][:1]
    assert "<Instruct>: zz\n<Query>: ab\n<Document>: c<" in api.server.model.tokenizer.decode(
        second, skip_special_tokens=False
    )
    await api.ok("/score", {"text_1": "ab", "text_2": "cd", "max_tokens_per_query": 1})
    (third, _) = sent(api)[2]
    assert "<Query>: a\n<Document>: cd<" in api.server.model.tokenizer.decode(third, skip_special_tokens=False)


async def test_prompts_of_the_files() -> None:
    files = SentenceConfig(prompts={"query": "q:", "document": ""}, default_prompt="query", pools_prompts=False)
    api = server("", sentences=files)
    for fields, text, skipped in (({}, "q:a", 3), ({"prompt_name": "document"}, "a", 0), ({"prompt_name": ""}, "a", 0)):
        await api.ok("/v1/embeddings", {"input": "a", **fields})
        message = api.server.engine.submitted[-1]
        assert i32(message.prompt_token_ids).tolist() == [BOS, *tokens_of(text), EOS]
        assert message.pooling_params is not None and message.pooling_params.num_skipped == skipped
    error = await api.error("/v1/embeddings", {"input": "a", "prompt_name": "other"})
    assert error["param"] == "prompt_name" and "choose from query, document" in error["message"]
    await api.ok("/v1/embeddings", {"input": tokens_of("a")})
    assert i32(api.server.engine.submitted[-1].prompt_token_ids).tolist() == tokens_of("a")


async def test_vectors_are_truncated_and_compared_as_the_files_say() -> None:
    vectors = [fake_vector([BOS, *tokens_of(text), EOS]).astype(np.float64)[:3] for text in ("ab", "cd")]
    x, y = vectors
    expected = {
        "cosine": x @ y / np.linalg.norm(x) / np.linalg.norm(y),
        "dot": x @ y,
        "euclidean": -np.linalg.norm(x - y),
        "manhattan": -np.abs(x - y).sum(),
    }
    for name, score in expected.items():
        config = ServerConfig(runner="pooling", pooler_config=PoolerConfig(use_activation=False))
        api = Api(
            FakeServer(
                config,
                tokenizer=pairing(),
                pooling=PoolingSupport(generates=False, pooling_type="MEAN"),
                sentences=SentenceConfig(dimensions=3, similarity=name),
            )
        )
        answer = await api.ok("/score", {"text_1": "ab", "text_2": "cd"})
        assert answer["data"][0]["score"] == pytest.approx(score, rel=1e-6)
        assert len((await api.ok("/v1/embeddings", {"input": "ab"}))["data"][0]["embedding"]) == 3
        assert len((await api.ok("/v1/embeddings", {"input": "ab", "dimensions": 5}))["data"][0]["embedding"]) == 5
        assert len((await api.ok("/v2/embed", {"texts": ["ab"]}))["embeddings"]["float"][0]) == 3
    api = server("", sentences=SentenceConfig(dimensions=10**6))
    assert len((await api.ok("/v1/embeddings", {"input": "ab"}))["data"][0]["embedding"]) == HIDDEN_SIZE


async def test_cohere_s_embeddings() -> None:
    api = server("", sentences=SentenceConfig(prompts={"query": "q:", "passage": "p:"}))
    body = {"texts": ["a", "b" * MAX_MODEL_LEN], "embedding_types": ["float", "base64"]}
    answer = await api.ok("/v2/embed", {**body, "input_type": "search_query", "output_dimension": 3})
    prompts = [ids for ids, _ in sent(api)]
    assert prompts[0] == [BOS, *tokens_of("q:a"), EOS]
    assert len(prompts[1]) == MAX_MODEL_LEN and prompts[1][:4] == [BOS, *tokens_of("q:b")]
    assert answer["response_type"] == "embeddings_by_type" and answer["texts"] == body["texts"]
    assert answer["meta"]["billed_units"] == {"input_tokens": sum(map(len, prompts))}
    for numbers, coded, prompt in zip(
        *(answer["embeddings"][kind] for kind in ("float", "base64")), prompts, strict=True
    ):
        vector = fake_vector(prompt)[:3] / np.linalg.norm(fake_vector(prompt)[:3])
        np.testing.assert_allclose(numbers, vector, rtol=1e-6)
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(coded), np.float32), np.array(numbers, np.float32))
    forms = {"embedding_types": ["float", "ubinary", "binary"], "output_dimension": 8}
    answer = (await api.ok("/v2/embed", {"texts": ["a"], **forms}))["embeddings"]
    bits = np.unpackbits(np.array(answer["ubinary"][0], np.uint8))
    np.testing.assert_array_equal(bits, np.array(answer["float"][0]) > 0)
    assert [number + 128 for number in answer["binary"][0]] == answer["ubinary"][0]
    assert (await api.error("/v2/embed", {"texts": ["a"], **forms, "output_dimension": 4}))[
        "param"
    ] == "embedding_types"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await api.ok("/v2/embed", {"inputs": [{"content": parts}]})
    assert sent(api)[-1][0] == [BOS, *tokens_of("ab"), EOS]
    image, nothing = ["data:image/png;base64,AA=="], [{"content": [{"type": "text"}]}]
    wrong: list[tuple[dict[str, Any], str]] = [({}, "texts"), ({"texts": ["a"], "images": image}, "texts")]
    for fields, param in (*wrong, ({"images": image}, "images"), ({"inputs": nothing}, "inputs")):
        assert (await api.error("/v2/embed", fields))["param"] == param
    await api.ok("/v2/embed", {"texts": ["a"], "input_type": "search_document"})
    assert sent(api)[-1][0] == [BOS, *tokens_of("p:a"), EOS]
    assert "maximum context" in (await api.error("/v2/embed", {**body, "truncate": "NONE"}))["message"]
    assert (await api.error("/v2/embed", {**body, "truncate": "NONE", "max_tokens": 3}))["param"] == "max_tokens"
