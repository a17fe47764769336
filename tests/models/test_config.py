"""config.json: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from executor.base import ModelError
from executor.config import ModelConfig
from executor.hf_config import HFConfig
from executor.loader import choose_dtype, load_model
from executor.models.registry import REGISTRY, resolve_model
from executor.parallel import ParallelState
from tests import tiny
from tests.models.harness import CPU, load, logits_of, random_tokens, refusal


def config_of(**fields: Any) -> HFConfig:
    return HFConfig({"max_position_embeddings": 1000, **fields}, "config.json")


def reconfigured(tmp_path: Path, **fields: Any) -> Path:
    """A copy of a checkpoint with other fields in config.json; None removes one."""
    folder = tiny.copy_of(tiny.checkpoint("llama"), tmp_path / "model")

    def edit(config: dict[str, Any]) -> None:
        config.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del config[name]

    tiny.edit_json(folder / "config.json", edit)
    return folder


@pytest.mark.parametrize(
    ("dtype", "saved", "expected"),
    [
        ("auto", "float32", torch.bfloat16),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float16", torch.float16),
        ("auto", None, torch.bfloat16),
        ("auto", "torch.float16", torch.float16),
        ("float", "bfloat16", torch.float32),
        ("float32", "bfloat16", torch.float32),
        ("half", "bfloat16", torch.float16),
        ("float16", "float32", torch.float16),
        ("bfloat16", "float32", torch.bfloat16),
    ],
)
def test_dtype(dtype: Any, saved: str | None, expected: torch.dtype) -> None:
    for spelling in ("dtype", "torch_dtype"):
        assert choose_dtype(ModelConfig(dtype=dtype), config_of(**{spelling: saved})) == expected


# ---------------------------------------------------------------------------------------------------------
# what is refused: configuration


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers must be"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor"),
        ({"hidden_act": "sine"}, "hidden_act must be one of gelu"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": []}, "architectures must be"),
        ({"dtype": "int4"}, "dtype must be one of bfloat16, float, float16, float32, half (--dtype takes precedence)"),
        ({"dtype": {"text": "bfloat16"}}, "dtype must be a string"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be at least 0, not -1e-05"),
        ({"quantization_config": {"bits": 4}}, "quant_method is missing"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be above 0, not 0"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be above 0, not -1.0"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type must be one of default, dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters must be one set"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters: rope_theta must be a number"),
    ],
)
def test_bad_configuration(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    folder = reconfigured(tmp_path, **fields)
    # transformers writes either name of the type
    message = refusal(folder, **({"dtype": "auto"} if "dtype" in fields else {}))
    assert message.startswith(f"{folder / 'config.json'}: ") or "quant_method" in message
    assert expected in message


def test_bad_layer_types(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("qwen2"), tmp_path / "model")
    tiny.edit_json(folder / "config.json", lambda config: config.update(layer_types=["linear_attention"] * 3))
    assert "layer_types must be" in refusal(folder)


def test_unreadable_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert str(path) in refusal(tmp_path)
    for text in ("{", "[]"):
        path.write_text(text)
        assert str(path) in refusal(tmp_path)


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    message = refusal(reconfigured(tmp_path / "a", architectures=["GPT5ForCausalLM"]))
    assert "GPT5ForCausalLM" in message
    assert "(the closest: GPTJForCausalLM, GPT2LMHeadModel; docs/models.md lists all)" in message
    quantized = reconfigured(tmp_path / "b", quantization_config={"quant_method": "hqq"})
    assert "weights quantised with 'hqq' are not supported yet; serve the unquantised model" in refusal(quantized)
    config = ModelConfig(model=str(tiny.checkpoint("llama")))
    with pytest.raises(ModelError, match="'telepathy'; choose from .*reference"):
        load_model(config, ParallelState(), CPU, "telepathy", lambda *_: None)


def test_max_model_len_must_not_exceed_the_model() -> None:
    folder = tiny.checkpoint("llama")
    assert load(folder, max_model_len=100).max_model_len == 100
    assert load(folder, max_model_len=-1).max_model_len == 512
    assert "--max-model-len 513 exceeds the model's maximum of 512 tokens" in refusal(folder, max_model_len=513)


def test_every_registered_model_exists() -> None:
    for name in REGISTRY:
        assert resolve_model(name).__name__ == REGISTRY[name].partition(":")[2]


# ---------------------------------------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1000),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, 1000),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 2500),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 2000),
        ({"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2}}, 2000),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 500}}, 1000),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1000}}, 4000),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 250}}, 1000),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, 4000),
    ],
)
def test_longest_sequence(fields: dict[str, Any], expected: int) -> None:
    config = config_of(**fields)
    assert config.max_position == expected
    is_dynamic = fields.get("rope_scaling", {}).get("rope_type") == "dynamic"
    assert config.default_max_model_len == (1000 if is_dynamic else expected)


def test_types_of_layers_may_have_angles_of_their_own() -> None:
    sets = {"full_attention": {"rope_theta": 7.0, "rope_type": "linear", "factor": 4}, "other": {"rope_theta": 3.0}}
    config = config_of(rope_parameters=sets)
    full, other = config.rope_for("full_attention"), config.rope_for("other")
    assert (full.number("rope_theta"), full.string("rope_type")) == (7.0, "linear")
    assert (other.number("rope_theta"), other.string("rope_type")) == (3.0, "default")
    assert config.default_max_model_len == config.max_position == 1000  # what the other layers were made for
    with pytest.raises(ModelError, match="must be one set"):
        _ = config.rope
    with pytest.raises(ModelError, match="a set of parameters for each layer type, 'sliding_attention' included"):
        config.rope_for("sliding_attention")
    assert config_of(rope_theta=9.0).rope_for("full_attention").number("rope_theta") == 9.0


def test_older_files_have_one_base_for_each_type_of_layer() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = config_of(rope_theta=1e6, rope_local_base_freq=100.0, rope_scaling=scaling)
    full, local = config.rope_for("full_attention"), config.rope_for("sliding_attention")
    assert (full.number("rope_theta"), full.string("rope_type")) == (1e6, "linear")
    assert (local.number("rope_theta"), local.string("rope_type")) == (100.0, "default")
    assert config.max_position == 1000  # layers with the local base are not scaled
    # The base of the older spelling completes the newer one.
    config = config_of(rope_local_base_freq=100.0, rope_parameters={"sliding_attention": {"rope_type": "default"}})
    assert config.rope_for("sliding_attention").number("rope_theta") == 100.0


def test_scaling_may_apply_to_some_types_of_layers() -> None:
    config = config_of(rope_theta=7.0, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert config.rope_for("full_attention").string("rope_type") == "linear"
    local = config.rope_for("sliding_attention", is_scaled=False)
    assert (local.number("rope_theta"), local.string("rope_type")) == (7.0, "default")


def test_a_family_has_names_of_its_own_for_fields() -> None:
    spelling = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "partial_rotary_factor": "rotary_pct",
    }
    defaults = {"hidden_size": 8, "max_position_embeddings": 50, "vocab_size": 9}

    def read(fields: dict[str, Any], **overrides: Any) -> HFConfig:
        return HFConfig.from_fields(fields, overrides, "config.json").for_model(spelling, defaults)

    config = read({"n_embd": 64, "n_positions": 100, "rotary_pct": 0.25})
    assert (config.hidden_size, config.max_position, config.vocab_size) == (64, 100, 9)
    assert config.rope.number("partial_rotary_factor") == 0.25
    assert read({"hidden_size": 64, "max_position_embeddings": 100}).max_position == 100
    assert read({}).hidden_size == 8
    assert read({"n_embd": 64, "n_positions": 100}, max_position_embeddings=20).max_position == 20
    assert read({"n_embd": 64, "n_positions": 100}, n_positions=20).max_position == 20
    with pytest.raises(ModelError, match="config.json: n_embd must be an integer, not 'big'"):
        _ = read({"n_embd": "big"}).hidden_size
    with pytest.raises(ModelError, match=r"n_embd \(64\) and hidden_size \(32\) are the same field; remove one"):
        read({"n_embd": 64, "hidden_size": 32})


def test_an_empty_object_is_absent() -> None:
    config = config_of(
        rope_scaling={}, rope_parameters={"rope_type": "llama3", "rope_theta": 5.0}, quantization_config={}
    )
    assert (config.rope.string("rope_type"), config.rope.number("rope_theta")) == ("llama3", 5.0)
    assert config.quantization is None


def test_overrides() -> None:
    fields = {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "vocab_size": 10}
    config = HFConfig.from_fields(fields, {"vocab_size": 20, "rope_theta": 7.0}, "x")
    assert (config.vocab_size, config.hidden_size, config.rope.number("rope_theta")) == (20, 64, 7.0)
    scaled = HFConfig.from_fields(fields, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "x").rope
    assert (scaled.string("rope_type"), scaled.number("rope_theta")) == ("linear", 5.0)
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = HFConfig.from_fields(old, {"rope_parameters": {"rope_type": "default"}}, "x").rope
    assert (new.string("rope_type"), new.number("rope_theta")) == ("default", 5.0)


def test_overrides_reach_the_model() -> None:
    folder = tiny.checkpoint("llama")
    scaled = tiny.checkpoint("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    loaded = load(folder, hf_overrides={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert torch.equal(logits_of(loaded, random_tokens(30)), logits_of(load(scaled), random_tokens(30)))


def test_the_language_model_of_a_larger_model() -> None:
    outer = {"architectures": ["Outer"], "dtype": "float16", "text_config": {"vocab_size": 7, "architectures": None}}
    config = HFConfig.from_fields(outer, {}, "x")
    assert (config.architecture, config.vocab_size, config.torch_dtype) == ("Outer", 7, torch.float16)


def test_eos_token_ids() -> None:
    assert config_of(eos_token_id=5).eos_token_ids == (5,)
    assert config_of(eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert config_of().eos_token_ids == ()
    with pytest.raises(ModelError, match="eos_token_id"):
        _ = config_of(eos_token_id="x").eos_token_ids


def test_fields_that_config_json_may_leave_out(tmp_path: Path) -> None:
    folder = reconfigured(tmp_path, rms_norm_eps=None, hidden_act=None, attention_bias=None, mlp_bias=None)
    config = load(folder).hf_config
    assert config.rms_norm_eps == 1e-6
    assert config.string("hidden_act") == "silu"
    mistral = resolve_model("MistralForCausalLM").config_defaults
    assert (mistral["sliding_window"], mistral["num_key_value_heads"]) == (4096, 8)
    assert config_of(head_dim=None, hidden_size=64, num_attention_heads=4).head_dim == 16
