"""Late interaction: prompts as PyLate makes them, scores of vectors of tokens, tasks of models that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from api.config import ServerConfig
from api.errors import ModelFileError
from api.model.late_interaction import (
    MAX_LENGTH,
    LateInteraction,
    from_metadata,
    from_multi_vector,
    from_pylate,
    max_sim,
)
from api.model.pooler import SentenceConfig, find_pooler
from api.model.task_adapters import task_adapters
from api.params.pooling import without_special
from engine_core.messages import PoolingSupport
from tests.fakes import BOS, EOS, FakeServer, tiny_tokenizer, tokens_of
from tests.unit.conftest import Api
from tests.unit.test_model_pooler import modules, write
from tests.unit.test_openai_classifiers import pairing, sent

LATE = LateInteraction("[Q] ", "[D] ", query_length=8, document_length=9, skipped_words=("!",))


def tokenizer() -> Any:
    found = tiny_tokenizer("[Q] ", "[D] ", "[MASK]")
    found.backend.post_processor = pairing().backend.post_processor
    found.special_tokens_map["mask_token"] = "[MASK]"
    return found


def server(late: LateInteraction | None = LATE, *, lowers: bool = False) -> Api:
    kind = PoolingSupport(generates=False, pooling_type="MEAN", needs_whole_prompts=True)
    sentences = SentenceConfig(late=late, lowers=lowers)
    config, own = ServerConfig(runner="pooling"), tokenizer()
    return Api(FakeServer(config, tokenizer=own, vocab_size=own.vocab_size, pooling=kind, sentences=sentences))


def test_prompts() -> None:
    own = tokenizer()
    q, d, mask = (own.token_to_id(token) for token in ("[Q] ", "[D] ", "[MASK]"))
    query = LATE.query(own, "ab")
    assert query == ([BOS, q, *tokens_of("ab"), EOS, mask, mask, mask], 5, None)
    assert LATE.query(own, "abcdefgh").token_ids == [BOS, q, *tokens_of("abcde"), EOS]
    assert LATE.query(own, "abcdefgh", side="left").token_ids == [BOS, q, *tokens_of("defgh"), EOS]
    assert LATE.query(own, "abcdefgh", 20).token_ids == [BOS, q, *tokens_of("abcdefgh"), EOS]
    assert LATE.document(own, "a!b") == ([BOS, d, *tokens_of("a!b"), EOS], 0, [0, 1, 2, 4, 5])
    assert LATE.document(own, "abcdefghij").token_ids == [BOS, d, *tokens_of("abcdef"), EOS]
    assert LateInteraction(query_length=8, attends_to_expansion=True).query(own, "ab").num_attended == 0
    assert LateInteraction(expands_queries=False).query(own, "ab").token_ids == [BOS, q, *tokens_of("ab"), EOS]


def test_what_files_say(tmp_path: Path) -> None:
    settings = {"query_prefix": "[Q] ", "query_length": 64, "attend_to_expansion_tokens": True, "skiplist_words": [","]}
    dense = {"1_Dense/model.safetensors": "", "1_Dense/config.json": {}}
    files = {"modules.json": modules("Transformer", "Dense"), "config_sentence_transformers.json": settings, **dense}
    found = find_pooler(write(tmp_path / "pylate", files), None).sentences
    assert found.dense == ("1_Dense",)
    assert found.late == LateInteraction(query_length=64, attends_to_expansion=True, skipped_words=(",",))
    metadata = {"query_token_id": "[unused0]", "doc_maxlen": 220, "attend_to_mask_tokens": False}
    folder = write(tmp_path / "colbert", {"artifact.metadata": metadata})
    found = find_pooler(folder, None, {"architectures": ["HF_ColBERT"]}).sentences
    assert found.dense == (".",)
    assert found.late == LateInteraction("[unused0]", "[unused1]", document_length=220)
    assert from_metadata({"mask_punctuation": False}).skipped_words == ()
    for bad in ({"query_length": 1}, {"query_prefix": 3}, {"skiplist_words": "abc"}, {"skiplist_words": [1]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            from_pylate(bad)


MULTI_VECTOR = ("Transformer", "Dense", "MultiVectorMask", "Normalize")


def multi_vector(
    folder: Path, kinds: tuple[str, ...], transformer: dict[str, Any], mask: dict[str, Any], settings: dict[str, Any]
) -> Path:
    """The folder of a ``MultiVectorEncoder``, as sentence-transformers 6 saves it."""
    files = {
        f"{kinds.index('MultiVectorMask')}_MultiVectorMask/config.json": mask,
        "sentence_bert_config.json": transformer,
    }
    dense = {f"{i}_Dense/model.safetensors": "" for i, kind in enumerate(kinds) if kind == "Dense"}
    return write(
        folder, {"modules.json": modules(*kinds), "config_sentence_transformers.json": settings, **files, **dense}
    )


def test_what_files_of_a_multi_vector_encoder_say(tmp_path: Path) -> None:
    prompts = {"query": "", "document": ""}
    plain = find_pooler(multi_vector(tmp_path / "plain", MULTI_VECTOR, {}, {}, {"prompts": prompts}), None)
    assert plain.sentences.dense == ("1_Dense",) and plain.config.use_activation is True and not plain.notes
    assert plain.sentences.late == LateInteraction(
        "", "", MAX_LENGTH, MAX_LENGTH, expands_queries=False, skipped_words=(), prefixes_are_text=True
    )
    expansion = {"strategy": "fixed", "attend": True, "token": None, "length": 24}
    transformer = {"document_length": 14, "query_expansion": expansion}
    mask = {"skiplist_words": ["!"], "skiplist_tasks": ["query", "document"], "keep_only_token_ids": [7]}
    settings = {"prompts": {"query": "q: ", "passage": "p: "}, "similarity_fn_name": "meanmaxsim"}
    kinds = ("Transformer", "Dense", "Dense", "MultiVectorMask")
    found = find_pooler(multi_vector(tmp_path / "all", kinds, transformer, mask, settings), None)
    assert found.sentences.dense == ("1_Dense", "2_Dense") and found.config.use_activation is False
    assert found.sentences.late == LateInteraction(
        "q: ",
        "p: ",
        24,
        14,
        attends_to_expansion=True,
        skipped_words=("!",),
        prefixes_are_text=True,
        expanded_length=24,
        skips_in_queries=True,
        kept_ids=(7,),
        is_mean=True,
    )
    pooled = ("Transformer", "Dense", "MultiVectorMask", "HierarchicalTokenPooling")
    assert (
        "HierarchicalTokenPooling" in find_pooler(multi_vector(tmp_path / "pooled", pooled, {}, {}, {}), None).notes[0]
    )


@pytest.mark.parametrize(
    ("transformer", "mask"),
    [
        ({"query_length": 1}, {}),
        ({"query_expansion": {"strategy": "other", "length": 8}}, {}),
        ({"query_expansion": {"strategy": "fixed"}}, {}),
        ({"query_expansion": {"strategy": "fixed", "length": 8, "token": 3}}, {}),
        ({}, {"skiplist_tasks": ["other"]}),
        ({}, {"skiplist_words": [1]}),
        ({}, {"keep_only_token_ids": ["a"]}),
    ],
)
def test_damaged_files_of_a_multi_vector_encoder(transformer: dict[str, Any], mask: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(transformer or mask))):
        from_multi_vector(transformer, mask, {})


def test_prompts_of_a_multi_vector_encoder() -> None:
    own = tokenizer()
    mask = own.token_to_id("[MASK]")
    settings = {"prompts": {"query": "qq", "document": "dd"}}
    fixed = from_multi_vector({"query_expansion": {"strategy": "fixed", "length": 8}}, {}, settings)
    assert fixed.query(own, "ab") == ([BOS, *tokens_of("qqab"), EOS, mask, mask], 6, None)
    assert fixed.query(own, "abcdefgh").token_ids == [BOS, *tokens_of("qqabcd"), EOS]
    least = {"strategy": "min", "length": 8, "token": "d", "attend": True}
    longer = from_multi_vector({"query_length": 9, "query_expansion": least}, {}, settings)
    assert longer.query(own, "ab") == ([BOS, *tokens_of("qqab"), EOS, *tokens_of("dd")], 0, None)
    assert longer.query(own, "abcdefgh").token_ids == [BOS, *tokens_of("qqabcde"), EOS]
    short = {"document_length": 6, "query_length": 5}
    skipping = from_multi_vector(short, {"skiplist_words": ["!"], "skiplist_tasks": "query"}, settings)
    assert skipping.query(own, "!b") == ([BOS, *tokens_of("qq!"), EOS], 0, [0, 1, 2, 4])
    assert skipping.document(own, "!bc") == ([BOS, *tokens_of("dd!b"), EOS], 0, [0, 1, 2, 3, 4, 5])
    keeping = from_multi_vector({}, {"skiplist_words": ["!"], "keep_only_token_ids": tokens_of("a!")}, settings)
    assert keeping.document(own, "a!b").kept == [3]


def test_max_sim() -> None:
    query, document = np.eye(3, dtype=np.float32)[:2], np.array([[0.5, 0, 0], [0, 2, 0], [-1, 1, 0]], np.float32)
    assert max_sim(query, document) == 2.5
    assert max_sim(query, document[:0]) == 0
    assert LateInteraction().score(query, document) == 2.5
    assert LateInteraction(is_mean=True).score(query, document) == 1.25


async def test_scores_and_vectors() -> None:
    api = server()
    scored = await api.ok("/score", {"text_1": "ab", "text_2": ["ab!", "pp"]})
    prompts = [ids for ids, _ in sent(api)]
    own = tokenizer()
    assert prompts[0] == LATE.query(own, "ab").token_ids and prompts[1] == LATE.document(own, "ab!").token_ids
    params = [message.pooling_params for message in api.server.engine.submitted]
    assert [(each.pooling_type, each.num_attended) for each in params if each] == [("ALL", 5), ("ALL", 0), ("ALL", 0)]
    assert scored["data"][0]["score"] > scored["data"][1]["score"] > 0
    ranked = await api.ok("/rerank", {"query": "ab", "documents": ["ab!", "pp"], "max_tokens_per_doc": 5})
    assert len(ranked["results"]) == 2 and len(sent(api)[4][0]) == 5
    cut = {"truncate_prompt_tokens": 5, "truncation_side": "left"}
    await api.ok("/score", {"text_1": "abcd", "text_2": "pppqr", **cut})
    assert sent(api)[7][0] == LATE.document(own, "qr").token_ids
    with_special = {"text_1": "a", "text_2": "b", "add_special_tokens": False}
    assert (await api.error("/score", with_special))["param"] == "add_special_tokens"
    vectors = (await api.ok("/pooling", {"input": "a!b", "prompt_name": "document"}))["data"][0]["data"]
    assert len(vectors) == 5
    assert (await api.error("/pooling", {"input": "a", "prompt_name": "other"}))["param"] == "prompt_name"
    assert "a vector of each token" in (await api.error("/v1/embeddings", {"input": "a"}))["message"]
    assert "the model has none" in (await api.error("/v1/embeddings", {"input": "a", "task": "x"}))["message"]


async def test_texts_in_lower_case() -> None:
    api, own = server(lowers=True), tokenizer()
    await api.ok("/score", {"text_1": "AB", "text_2": "Cd"})
    assert [ids for ids, *_ in sent(api)] == [LATE.query(own, "ab").token_ids, LATE.document(own, "cd").token_ids]


def test_rows_of_special_tokens() -> None:
    rows, ids = np.arange(4, dtype=np.float32)[:, None], [BOS, 9, 8, EOS]
    assert without_special(rows, ids, {BOS, EOS}, "token_embed")[:, 0].tolist() == [1, 2, 3]
    assert without_special(rows, ids, {BOS, EOS}, "token_classify")[:, 0].tolist() == [1, 2]
    assert len(without_special(rows[:1], [BOS], {BOS}, "token_classify")) == 0


def test_adapters_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    random = np.random.default_rng(1)
    sizes = {"word_embeddings": ((7, 2), (2, 4)), "token_type_embeddings": ((1, 2), (2, 4)), "Wqkv": ((2, 4), (12, 2))}
    stacks = {
        f"x.{name}.parametrizations.weight.0.lora_{leaf}": random.normal(size=(2, *size)).astype(np.float32)
        for name, pair in sizes.items()
        for leaf, size in zip("AB", pair, strict=True)
    }
    (folder := tmp_path / "model").mkdir()
    save_file({**stacks, "x.Wqkv.bias": np.zeros(3, np.float32)}, folder / "model.safetensors")
    fields = {"position_embedding_type": "rotary", "lora_adaptations": ["a.b", "c"], "lora_rank": 2, "lora_alpha": 1}
    found = task_adapters(folder, fields)
    assert list(found) == ["a.b", "c"] and task_adapters(folder, fields) == found
    assert not task_adapters(folder, {**fields, "lora_adaptations": ["../x"]})
    tensors = load_file(found["c"] / "adapter_model.safetensors")
    prefix = "x.{}.parametrizations.weight.0.lora_{}"
    words, types = (
        stacks[prefix.format(name, "A")][1] @ stacks[prefix.format(name, "B")][1]
        for name in ("word_embeddings", "token_type_embeddings")
    )
    table = (tensors[f"base_model.model.x.word_embeddings.lora_embedding_{leaf}"] for leaf in "BA")
    np.testing.assert_allclose((next(table) @ next(table)).T, words + types, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        tensors["base_model.model.x.Wqkv.lora_A.weight"], stacks[prefix.format("Wqkv", "A")][1]
    )
    config = json.loads((found["c"] / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (
        2,
        {"word_embeddings": 4},
        {"word_embeddings": 2},
    )
    again = task_adapters(folder, {**fields, "lora_alpha": 8})["c"]  # the configuration was edited
    assert json.loads((again / "adapter_config.json").read_text())["lora_alpha"] == 8
    save_file({name: stack for name, stack in stacks.items() if "Wqkv" in name}, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match="adapters of tasks: there is none of the words' embedding"):
        task_adapters(folder, fields)
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ModelFileError, match="not a safetensors file"):
        task_adapters(folder, fields)
