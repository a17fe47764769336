"""What a model's own files say about its vectors is done, or told to be ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from api.cli import resolve
from api.config import PoolerConfig
from api.model.files import find_model, with_model
from api.model.gguf_file import GGUFFile
from api.model.pooler import ModelPooler, SentenceConfig, find_pooler, merge_pooler
from tests import tiny

MEAN, CLS, LAST = "pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_lasttoken"


def modules(*kinds: str, package: str = "sentence_transformers.models.") -> list[dict[str, Any]]:
    return [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": package + kind}
        for index, kind in enumerate(kinds)
    ]


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("kinds", "pooling", "config"),
    [
        (("Transformer", "Pooling", "Normalize"), {MEAN: True, CLS: False}, ("MEAN", True)),
        (("Transformer", "Pooling"), {CLS: True, "include_prompt": True}, ("CLS", False)),
        (("Transformer", "Pooling", "Normalize"), {"word_embedding_dimension": 8, LAST: True}, ("LAST", True)),
        (("Transformer", "Pooling"), {"pooling_mode": "mean"}, ("MEAN", False)),
        (("Transformer", "Pooling"), {"pooling_mode": ["mean", "cls"]}, ("MEAN+CLS", False)),
        (("Transformer", "Pooling"), {LAST: True, "pooling_mode_max_tokens": True, MEAN: False}, ("MAX+LAST", False)),
        (("Transformer", "Pooling"), {"pooling_mode_mean_sqrt_len_tokens": True}, ("MEAN_SQRT_LEN", False)),
        (("Transformer", "Pooling"), {"pooling_mode_weightedmean_tokens": True}, ("WEIGHTED_MEAN", False)),
        (("Transformer", "Pooling"), {MEAN: False}, ("MEAN", False)),
        (("Transformer",), {}, (None, None)),
    ],
)
def test_what_is_read(tmp_path: Path, kinds: tuple[str, ...], pooling: Any, config: tuple[Any, Any]) -> None:
    folder = write(tmp_path, {"modules.json": modules(*kinds), "1_Pooling/config.json": pooling})
    found = find_pooler(folder, None)
    assert (found.config.pooling_type, found.config.use_activation) == config
    assert not found.notes


WHOLE = modules("Transformer", "Pooling", "Normalize")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"modules.json": modules("Transformer", "Pooling", "Dense", "Normalize")}, "Dense"),
        ({"modules.json": modules("CLIPModel")}, "CLIPModel"),
        ({"modules.json": WHOLE, "1_Pooling/config.json": {"pooling_mode_min_tokens": True}}, "min_tokens"),
        ({"modules.json": WHOLE, "1_Pooling/config.json": {"pooling_mode": ["mean", {}]}}, "{}"),
        ({"modules.json": WHOLE, "1_Pooling/config.json": {"pooling_mode": 1}}, "asks for 1"),
        ({"modules.json": WHOLE}, "1_Pooling/config.json"),
        ({"modules.json": [{**WHOLE[0]}, {**WHOLE[1], "path": "../1_Pooling"}]}, "modules.json"),
        ({"modules.json": "[{"}, "modules.json"),
        ({"modules.json": {"a": 1}}, "modules.json"),
        ({"1_Pooling/config.json": {MEAN: True}}, "1_Pooling/config.json"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "query"}}, "'query'"),
        ({"config_sentence_transformers.json": {"truncate_dim": 0}}, "truncate_dim"),
        ({"config_sentence_transformers.json": {"truncate_dim": True}}, "truncate_dim"),
        ({"sentence_roberta_config.json": {"max_seq_length": "9"}}, "sentence_roberta_config.json"),
    ],
)
def test_what_is_ignored(tmp_path: Path, files: dict[str, Any], named: str) -> None:
    found = find_pooler(write(tmp_path, files), None)
    assert found.config == PoolerConfig()
    (note,) = found.notes
    assert named in note and str(tmp_path) in note and "\n" not in note


def test_ordinary_models_say_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None}})
    assert find_pooler(folder, None) == find_pooler(tmp_path / "none", None) == ModelPooler()


def test_what_sentence_transformers_files_say(tmp_path: Path) -> None:
    prompts = {"query": "query: ", "document": ""}
    files = {
        "modules.json": modules("Transformer", "Pooling", "Dense", "Dense", "Normalize"),
        "1_Pooling/config.json": {MEAN: True, "include_prompt": False},
        "2_Dense/model.safetensors": "",
        "3_Dense/model.safetensors": "",
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": "query",
            "activation_fn": "torch.nn.modules.linear.Identity",
            "similarity_fn_name": "dot",
            "truncate_dim": 64,
        },
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": True},
    }
    found = find_pooler(write(tmp_path, files), None)
    assert not found.notes and found.config == PoolerConfig(pooling_type="MEAN", use_activation=True)
    assert found.sentences == SentenceConfig(
        dense=("2_Dense", "3_Dense"),
        prompts=prompts,
        default_prompt="query",
        pools_prompts=False,
        max_length=256,
        lowers=True,
        activation="torch.nn.modules.linear.Identity",
        similarity="dot",
        dimensions=64,
    )


def test_layers_after_pooling(tmp_path: Path) -> None:
    files = {
        "modules.json": modules("Transformer", "Pooling", "Dropout", "Dense", "LayerNorm"),
        "1_Pooling/config.json": {MEAN: True},
        "3_Dense/model.safetensors": "",
        "4_LayerNorm/model.safetensors": "",
    }
    found = find_pooler(write(tmp_path, files), None)
    assert not found.notes and found.config == PoolerConfig(pooling_type="MEAN", use_activation=False)
    assert found.sentences.dense == ("3_Dense", "4_LayerNorm")


def test_old_names_of_the_transformers_file(tmp_path: Path) -> None:
    write(tmp_path, {"sentence_xlnet_config.json": {"max_seq_length": 9}})
    assert find_pooler(tmp_path, None).sentences == SentenceConfig(max_length=9)
    write(tmp_path, {"sentence_roberta_config.json": {"max_seq_length": 8, "do_lower_case": True}})
    assert find_pooler(tmp_path, None).sentences == SentenceConfig(max_length=8, lowers=True)


@pytest.mark.parametrize(
    ("length", "found"),
    [(77, 77), (10**30, 10**30), (1e30, None), (None, None), (True, None), (0, None), ("9", None)],
)
def test_the_length_may_be_the_tokenizer_s(tmp_path: Path, length: Any, found: int | None) -> None:
    """As sentence-transformers 6 saves it."""
    write(tmp_path, {"tokenizer_config.json": {"model_max_length": length}})
    assert find_pooler(tmp_path, None) == ModelPooler()
    write(tmp_path, {"modules.json": modules("Transformer"), "sentence_bert_config.json": {"transformer_task": "x"}})
    assert find_pooler(tmp_path, None).sentences == SentenceConfig(max_length=found)
    write(tmp_path, {"sentence_bert_config.json": {"max_seq_length": 8}})
    assert find_pooler(tmp_path, None).sentences == SentenceConfig(max_length=8)
    write(tmp_path, {"sentence_bert_config.json": {}, "tokenizer_config.json": "["})
    assert find_pooler(tmp_path, None) == ModelPooler()


@pytest.mark.parametrize("name", ["maxsim", None, 3, ["dot"]])
def test_other_similarities_are_cosines(tmp_path: Path, name: Any) -> None:
    write(tmp_path, {"config_sentence_transformers.json": {"similarity_fn_name": name}})
    assert find_pooler(tmp_path, None) == ModelPooler()


def test_a_decoder_that_pools_several_vectors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts are as they are if it is served for generation, too."""
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    write(folder, {"sentence_bert_config.json": {"do_lower_case": True}})
    for runner in ("auto", "pooling"):
        settings = resolve({"model": str(folder), "runner": runner, "pooler_config": {"pooling_type": "CLS+MEAN"}}, {})[
            0
        ]
        files = find_model(settings)
        assert files.generates and files.sentences.lowers == (runner == "pooling")
        assert with_model(settings, files).engine.executor.model.num_pooled == 2
    assert caplog.text.count("do_lower_case is for embeddings alone, so it needs --runner pooling") == 1


def test_a_decoder_that_is_an_encoder(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"is_causal": False}))
    settings = resolve({"model": str(folder)}, {})[0]
    files = find_model(settings)
    assert not files.generates
    found = with_model(settings, files)
    assert found.runner == "pooling"
    assert found.engine.executor.model.hf_overrides == {"architectures": ["LlamaModel"]}


@pytest.mark.parametrize(("number", "pooling_type", "is_told"), [(1, "MEAN", False), (0, None, False), (4, None, True)])
def test_gguf(number: int, pooling_type: str | None, is_told: bool) -> None:
    gguf = GGUFFile(path="m.gguf", metadata={"general.architecture": "qwen3", "qwen3.pooling_type": number}, tensors=[])
    found = find_pooler(Path("m.gguf"), gguf)
    assert (found.config.pooling_type, bool(found.notes)) == (pooling_type, is_told)


def test_the_servers_option_wins() -> None:
    own = PoolerConfig(pooling_type="MEAN", use_activation=False)
    assert merge_pooler(PoolerConfig(), own) == own
    assert merge_pooler(PoolerConfig(pooling_type="CLS"), own) == PoolerConfig(pooling_type="CLS", use_activation=False)
    assert merge_pooler(PoolerConfig(use_activation=True), own) == PoolerConfig(
        pooling_type="MEAN", use_activation=True
    )


def test_the_log_names_what_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    write(folder, {"modules.json": modules("Transformer", "Pooling", "Dense")})
    find_model(resolve({"model": str(folder)}, {})[0])
    assert "Dense" in caplog.text and "; ignored" in caplog.text
    caplog.clear()
    find_model(resolve({"model": str(folder), "runner": "generate"}, {})[0])
    assert not caplog.text
    write(folder, {"modules.json": WHOLE, "1_Pooling/config.json": {MEAN: True}})
    assert find_model(resolve({"model": str(folder)}, {})[0]).pooler.pooling_type == "MEAN"
