"""Model files that are broken or made to do harm: one line that names the file, and no time or memory lost."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from executor.base import ModelError
from executor.config import ModelConfig
from executor.layers.rotary import RotaryEmbedding
from executor.loader import load_model
from executor.parallel import ParallelState
from tests import tiny
from tests.models.harness import CPU, load, refusal

NORM = "model.norm.weight"


def configured(tmp_path: Path, **fields: Any) -> Path:
    """A folder with a config.json and nothing else: for dummy weights."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((tiny.checkpoint("llama") / "config.json").read_bytes())
    update(folder, fields)
    return folder


def update(folder: Path, fields: dict[str, Any]) -> None:
    """Changes fields. Python writes ``Infinity`` for what a file can only say as a number that is too large."""
    path = folder / "config.json"
    tiny.edit_json(path, lambda config: config.update(fields))
    path.write_text(path.read_text().replace("Infinity", "1e999"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    """Opening a pipe waits for a writer, reading a device may never end."""
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    if name.endswith("index.json"):
        load(folder)  # no index, but a file that is whole
        (folder / "model.safetensors").unlink()
        assert str(folder) in refusal(folder)
    else:
        assert refusal(folder).startswith(str(folder / name))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"NaN",
        b'{"hidden_size": NaN}',
        b'{"rms_norm_eps": Infinity}',
        b"\xff\xfe\x00",
        b'"text"',
        b"",
        b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    ],
    ids=["deep list", "deep object", "NaN", "NaN inside", "Infinity", "not UTF-8", "a string", "empty", "long number"],
)
def test_json_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    assert refusal(folder).startswith(str(folder / "config.json"))


def test_a_document_without_end(tmp_path: Path) -> None:
    folder = configured(tmp_path)
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    assert refusal(folder) == f"{folder / 'config.json'}: longer than 64 MiB"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        ({"hidden_size": 1 << 40}, "hidden_size must be at most"),
        ({"hidden_size": 1 << 24, "intermediate_size": 1 << 24}, "cannot build a model"),
        ({"vocab_size": 10**30}, "vocab_size must be at most"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings must be at most"),
        ({"rms_norm_eps": 1e999}, "rms_norm_eps must be a number"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e999}}, "factor must be"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e308}}, "factor must be"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 10**400}}, "factor must be"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor must be"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1e4}}, "rope_theta must be above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}}, "partial_"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 2}}, "cannot build a model"),
        ({"rope_parameters": {"rope_type": "x" * 10_000}}, "rope_type must be one of"),
        ({"architectures": ["x" * 10_000]}, "is not supported"),
        ({"architectures": ["Bad\n\x1b[2JName"]}, "is not supported"),
    ],
)
def test_numbers_that_no_model_has(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    message = refusal(configured(tmp_path, **fields), load_format="dummy")
    assert expected in message and len(message) < 1000
    assert message.isprintable()


def test_a_long_context_costs_nothing_before_it_is_served(tmp_path: Path) -> None:
    """10^8 positions made a table of 6.4 GB before it was known that the KV cache has no room for them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = load(configured(tmp_path, max_position_embeddings=10**8), load_format="dummy")
    assert loaded.max_model_len == 10**8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    loaded.model.reserve_positions(300)
    rotary = next(module for module in loaded.model.modules() if isinstance(module, RotaryEmbedding))
    few = load(configured(tmp_path, max_position_embeddings=300), load_format="dummy")
    few.model.reserve_positions(300)
    other = next(module for module in few.model.modules() if isinstance(module, RotaryEmbedding))
    assert rotary.cos_sin.shape[0] == 300 and torch.equal(rotary.cos_sin, other.cos_sin)


def test_weights_that_the_machine_cannot_hold(tmp_path: Path) -> None:
    config = ModelConfig(model=str(configured(tmp_path)), load_format="dummy")
    with pytest.raises(ModelError, match="the weights take .* GiB as torch.bfloat16, and the cpu has 9.313e-05 GiB"):
        load_model(config, ParallelState(), CPU, None, lambda *_: None, 100_000)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.safetensors", "a/b.safetensors", "..", "", "weights.bin"])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    """Refused by the name, before anything is opened: the file that it names is a good one."""
    (tmp_path / "secret.safetensors").write_bytes((tiny.checkpoint("llama") / "model.safetensors").read_bytes())
    folder = tiny.copy_of(tiny.checkpoint("llama", shard_size="100KB"), tmp_path / "model")

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"][NORM] = name

    index = folder / "model.safetensors.index.json"
    tiny.edit_json(index, edit)
    assert refusal(folder) == f"{index}: tensor {NORM!r} is in {name!r}, not a safetensors file beside it"


def test_links_of_the_hubs_cache(tmp_path: Path) -> None:
    """The hub's cache has links to files elsewhere."""
    source, folder = tiny.checkpoint("llama", shard_size="100KB"), tmp_path / "snapshots" / "0"
    (tmp_path / "blobs").mkdir()
    folder.mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        (tmp_path / "blobs" / str(number)).write_bytes(file.read_bytes())
        (folder / file.name).symlink_to(f"../../blobs/{number}")
    assert load(folder).weight_bytes == load(source).weight_bytes


NUMBERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([0, 1, 2, 64, 1 << 24, 1 << 31, 1 << 63, 10**30, -(10**30), 1e308, 1e999, -1e999, 1e-320, 0.5]),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=2),
    st.just({"a": {"b": 1}}),
)
FIELDS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "eos_token_id", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters",
    "quantization_config", "sliding_window", "architectures", "text_config",
]  # fmt: skip
ROPES = ["rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
         "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor", "truncate",
         "factors"]  # fmt: skip


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), NUMBERS, max_size=2),
    kind=st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "frequency_factors"]),
    rope=st.dictionaries(st.sampled_from(ROPES), NUMBERS, max_size=4),
    architecture=st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
)
def test_any_configuration_loads_or_is_refused_in_one_line(
    tmp_path: Path, fields: dict[str, Any], kind: str, rope: dict[str, Any], architecture: str
) -> None:
    given_rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **rope}
    folder = configured(tmp_path, architectures=[architecture], rope_parameters=given_rope)
    update(folder, fields)
    config = ModelConfig(model=str(folder), load_format="dummy")
    try:
        load_model(config, ParallelState(), CPU, None, lambda *_: None, 64 << 20)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
