"""Every family against transformers, with all its facts set to values that matter (``tests/families.py``).

In float32: prefill, chunked prefill and decode, greedy tokens, both spellings of config.json. In captured programs on
the CPU kernels: the same bits alone and in any batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from executor.models.mpt import mpt_slopes
from executor.models.registry import resolve_model
from tests import tiny
from tests.families import FAMILIES, FULL, LONGROPE, SLIDING
from tests.models.harness import (
    Chunk,
    Runner,
    assert_close,
    assert_independent_of_batch,
    load,
    logits_of,
    random_tokens,
    reference_logits,
    refusal,
    steps_of,
)
from tests.ops.cpu import DTYPES, NEEDS_KERNELS

VARIANTS = [(name, variant) for name, family in FAMILIES.items() for variant in family.variants]

families = pytest.mark.parametrize("name", FAMILIES)

OTHER_FIELDS = {
    "decoder_sparse_step",
    "full_attention_interval",
    "global_head_dim",
    "hidden_act",
    "max_position_embeddings",
    "norm_topk_prob",
    "rope_interleave",
    "rope_local_base_freq",
    "seq_length",
    "sliding_window_pattern",
}
"""Fields that transformers reads, or takes as given, in some families without having them."""


@pytest.mark.parametrize("old_spelling", [False, True], ids=["new", "old"])
@families
def test_same_logits_as_transformers(name: str, old_spelling: bool) -> None:
    token_ids = random_tokens(100)
    expected = reference_logits(tiny.checkpoint(name), token_ids)
    assert_close(logits_of(load(tiny.checkpoint(name, old_rope_spelling=old_spelling)), token_ids), expected)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_variants(name: str, variant: str) -> None:
    folder = tiny.checkpoint(name, **FAMILIES[name].variants[variant])
    token_ids = random_tokens(100)
    assert_close(logits_of(load(folder), token_ids), reference_logits(folder, token_ids))


@families
def test_chunks_and_decode(name: str) -> None:
    folder = tiny.checkpoint(name)
    loaded = load(folder)
    first, second = random_tokens(90), random_tokens(61, 2)
    runner = Runner(loaded, captured=True, block_size=64, seed=3)
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
    for part, token_ids in zip(parts, (first, second), strict=True):
        assert_close(torch.cat(part), reference_logits(folder, token_ids))


@families
def test_greedy_tokens(name: str) -> None:
    """transformers gets what we generated and must choose each of its tokens as well."""
    folder = tiny.checkpoint(name)
    runner = Runner(load(folder), captured=True)
    tokens = random_tokens(40)
    chunk = tokens
    for _ in range(32):
        chunk = [int(runner.step([Chunk(0, chunk)])[-1].argmax())]
        tokens = tokens + chunk
    assert reference_logits(folder, tokens[:-1])[39:].argmax(dim=-1).tolist() == tokens[40:]


ROUGH_IN_BFLOAT16 = {
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "gemma4",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
    "lfm2_moe",
    "llama4",
    "phimoe",
    "qwen3_5_moe",
    "qwen3_next",
}
"""Families whose logits rounding changes so much, in transformers too, that its error is the measure: tokens may get
other experts."""
SEEDS_IN_BFLOAT16 = {"dots1": 6, "ernie4_5_moe": 2, "mixtral": 4}
"""Of tokens that rounding gives no other experts than in transformers, where those of the usual seed get others."""


@families
def test_bfloat16_is_close_to_transformers(name: str) -> None:
    folder = tiny.checkpoint(name, dtype="bfloat16")
    loaded = load(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    token_ids = random_tokens(60, SEEDS_IN_BFLOAT16.get(name, 1))
    theirs = reference_logits(folder, token_ids)
    difference = (logits_of(loaded, token_ids) - theirs).abs()
    if name not in ROUGH_IN_BFLOAT16:
        assert difference.max() < 0.08 * theirs.abs().max()
    else:
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            own = (rounded(torch.tensor([token_ids])).logits[0].float() - theirs).abs()
        assert difference.max() < 1.5 * own.max()
        assert difference.mean() < 1.2 * own.mean()


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_factors_of_embeddings_are_rounded_first(name: str) -> None:
    folder = tiny.checkpoint(name, dtype="bfloat16")
    runner = Runner(load(folder, dtype="auto"))
    batch = runner._batch([Chunk(0, random_tokens(20))])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(runner.model.model.embed(batch), model.model.embed_tokens(batch.input_ids))  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("num_heads", [4, 6])
def test_falcon_rw(num_heads: int) -> None:
    """transformers' own attention adds the biases of the scores twice, torch's once."""
    folder = tiny.checkpoint(
        "falcon",
        alibi=True,
        bias=True,
        multi_query=False,
        new_decoder_architecture=False,
        hidden_size=96,
        num_attention_heads=num_heads,
        num_kv_heads=num_heads,
        parallel_attn=False,
    )
    token_ids = random_tokens(100)
    assert_close(logits_of(load(folder), token_ids), reference_logits(folder, token_ids, "sdpa"))


def test_the_largest_exponent_of_mpt_slopes() -> None:
    """transformers takes 8 for granted."""
    assert mpt_slopes(4, 4) == (0.5, 0.25, 0.125, 0.0625)
    assert mpt_slopes(3, 8) == (0.0625, 0.00390625, 0.25)


def test_layers_of_glm_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    original = tiny.checkpoint("glm4_moe")
    folder = tiny.copy_of(original, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    further = {"model.layers.3.eh_proj.weight": torch.ones(2), "model.layers.3.mlp.gate.weight": torch.ones(3)}
    save_file({**tensors, **further}, folder / "model.safetensors")
    tiny.edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    token_ids = random_tokens(20)
    assert torch.equal(logits_of(load(folder), token_ids), logits_of(load(original), token_ids))
    tiny.edit_json(folder / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    assert "model.layers.3." in refusal(folder)


def test_internlm3_with_biases_of_q_k_and_v_alone_is_qwen2(tmp_path: Path) -> None:
    original = tiny.checkpoint("qwen2")
    folder = tiny.copy_of(original, tmp_path / "model")
    names = {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}
    tiny.edit_json(folder / "config.json", lambda config: config.update(names, head_dim=16, qkv_bias=True, bias=False))
    token_ids = random_tokens(40)
    assert torch.equal(logits_of(load(folder), token_ids), logits_of(load(original), token_ids))


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """They follow the others in checkpoints of DeepSeek-V3."""
    original = tiny.checkpoint("deepseek_v3")
    folder = tiny.copy_of(original, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("eh_proj.weight", "self_attn.kv_b_proj.weight", "shared_head.norm.weight"):
        tensors[f"model.layers.3.{name}"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    token_ids = random_tokens(20)
    assert torch.equal(logits_of(load(folder), token_ids), logits_of(load(original), token_ids))


def test_latents_have_no_cache_in_8_bits_yet() -> None:
    message = refusal(tiny.checkpoint("deepseek_v3"), kv_cache_dtype="fp8")
    assert "--kv-cache-dtype: latents have no cache in float8_e4m3fn yet; use auto" in message


# ---------------------------------------------------------------------------------------------------------
# captured programs on the kernels


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@families
def test_all_ops_run_on_the_kernels_and_give_the_bits_of_eager_mode(name: str, dtype: torch.dtype) -> None:
    loaded = load(tiny.checkpoint(name), dtype=str(dtype).removeprefix("torch."))
    assert "reference" not in {layer.backend.name for layer in loaded.model.attention_layers()}
    # One after the other: they share caches, and states go on from what is there.
    captured = Runner(loaded, captured=True)
    results = [captured.step(step) for step in steps_of(1)]
    eager = Runner(loaded)
    for step, result in zip(steps_of(1), results, strict=True):
        assert torch.equal(eager.step(step), result)
    assert captured.program is not None
    assert captured.program.python_ops == FAMILIES[name].python_ops


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@families
def test_logits_do_not_depend_on_the_batch(name: str, dtype: torch.dtype) -> None:
    assert_independent_of_batch(load(tiny.checkpoint(name), dtype=str(dtype).removeprefix("torch.")))


@NEEDS_KERNELS
@pytest.mark.parametrize("cache", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["bloom", "gemma2", "gemma4", "lfm2"])
def test_caches_in_8_bits(name: str, cache: str) -> None:
    """ALiBi, caps on scores, layers that share K and V, and short convolutions, which cache in the model's dtype."""
    folder, token_ids = tiny.checkpoint(name), random_tokens(100)
    plain, coded = load(folder), load(folder, kv_cache_dtype=cache)
    kinds = {layer.shape.kind: layer.kv_dtype for layer in coded.model.attention_layers()}
    assert kinds.pop("short_conv", torch.float32) == torch.float32
    assert kinds == {"kv": {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[cache]}
    sizes = [
        [group.spec.bytes_per_block for group in Runner(each).groups if group.shape.kind == "kv"]
        for each in (plain, coded)
    ]
    assert all(3 < whole / half <= 4 for whole, half in zip(*sizes, strict=True))
    expected, logits = logits_of(plain, token_ids), logits_of(coded, token_ids)
    assert 0 < (logits - expected).std() < {"int8": 0.05, "fp8": 0.3}[cache] * expected.std()
    assert_independent_of_batch(load(folder, dtype="bfloat16", kv_cache_dtype=cache))


@NEEDS_KERNELS
def test_v_in_4_bits() -> None:
    folder, token_ids = tiny.checkpoint("gemma2", head_dim=128), random_tokens(100)
    plain, coded = load(folder), load(folder, kv_cache_dtype="int4")
    specs = [[group.spec for group in Runner(each).groups] for each in (plain, coded)]
    assert all(spec.dtype == "int4" for spec in specs[1])
    for whole, part in zip(*specs, strict=True):
        assert part.bytes_per_block * 4 * 256 == whole.bytes_per_block * (130 + 80)
    expected, logits = logits_of(plain, token_ids), logits_of(coded, token_ids)
    assert 0 < (logits - expected).std() < 0.2 * expected.std()
    assert_independent_of_batch(load(folder, dtype="bfloat16", kv_cache_dtype="int4"))
    message = refusal(tiny.checkpoint("llama"), kv_cache_dtype="int4")
    assert "--kv-cache-dtype int4: heads of 16 numbers lose too much in 4 bits" in message and "use int8" in message
    message = refusal(tiny.checkpoint("deepseek_v3"), kv_cache_dtype="int4")
    assert "--kv-cache-dtype: latents have no cache in int4 yet; use auto" in message


def test_a_cache_in_another_type_of_16_bits_is_refused() -> None:
    folder = tiny.checkpoint("llama")
    assert load(folder, dtype="bfloat16", kv_cache_dtype="bfloat16").model.attention_layers()[0].kv_dtype == (
        torch.bfloat16
    )
    message = refusal(folder, dtype="bfloat16", kv_cache_dtype="half")
    assert "--kv-cache-dtype half: activations are bfloat16" in message and "--dtype half" in message


# ---------------------------------------------------------------------------------------------------------
# configurations


@families
def test_defaults_are_those_of_transformers(name: str) -> None:
    made = getattr(transformers, FAMILIES[name].config)()
    made.allow_global_per_layer_attribute_access = True  # a default may differ between layers
    rope = made.to_dict().get("rope_parameters") or {}
    theirs = {**vars(type(made)), **rope.get(FULL, rope)}
    ours = resolve_model(FAMILIES[name].own_model)
    for key, value in ours.config_defaults.items():
        own = ours.attribute_map.get(key, made.attribute_map.get(key, key))
        if own in theirs or own not in OTHER_FIELDS:
            assert value in (theirs.get(own), theirs.get(key), getattr(made, own, None)), key


def test_longrope_is_chosen_by_the_longest_sequence() -> None:
    folder = tiny.checkpoint("phi3")  # short factors up to 32 tokens
    token_ids = random_tokens(32)
    short = logits_of(load(folder, max_model_len=32), token_ids)
    assert_close(short, reference_logits(folder, token_ids))
    long = load(folder)
    token_ids = random_tokens(33)  # transformers chooses by the length at hand
    assert_close(logits_of(long, token_ids), reference_logits(folder, token_ids))
    prefix = logits_of(long, token_ids[:32])
    torch.testing.assert_close(prefix, logits_of(long, token_ids)[:32], rtol=0, atol=1e-4)
    assert (prefix - short).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob must be false"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias must be false in a model without q_lora_rank"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group must be at most n_group, 4"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must be 3 times dense or sparse"),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": "LXG"}, "sliding_window_pattern must be"),
        ("exaone4", {"layer_types": [FULL]}, "layer_types must be 3 times"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be above 0, not 0"),
        ("gemma3", {"sliding_window": None}, "sliding_window must be a number of tokens, since layer_types has"),
        ("gpt2", {"layer_norm_epsilon": -1}, "layer_norm_epsilon must be at least 0, not -1"),
        ("gpt2", {"hidden_size": 128}, "n_embd (64) and hidden_size (128) are the same field"),
        ("internlm2", {"bias": None}, "bias is missing"),
        ("lfm2", {"layer_types": ["conv", "mamba", "conv"]}, "layer_types must be 3 times"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "layer_types": [SLIDING] * 3}, "sliding_window"),
        ("qwen2", {"layer_types": [SLIDING] * 3}, "use_sliding_window must be true, since layer_types has"),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a number other than 0"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers must be 5 numbers"),
        ("granite4_h", {"mamba_d_head": 20}, "mamba_d_head must be 16, as 8 heads have 128 columns"),
        ("granite4_h", {"mamba_n_heads": 7}, "mamba_n_heads must be a divisor of 128"),
        ("mamba2", {"n_groups": 3}, "n_groups must be a divisor of num_heads (8)"),
        ("mamba2", {"state_size": 512}, "state_size must be at most 256"),
        ("mamba2", {"time_step_limit": [1.0, 0.5]}, "time_step_limit must be two numbers"),
        ("nemotron_h", {"layers_block_type": ["rnn"]}, "layers_block_type must be a list of linear_attention"),
        ("ministral3", {"rope_parameters": {"rope_type": "yarn"}}, "llama_4_scaling_beta is missing"),
        ("phi3", {"rope_parameters": {**LONGROPE, "long_factor": [1.0]}}, "long_factor must be a list of 6 numbers"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be 3 times 0 or 1"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers must be 3 times 0 or 1"),
    ],
)
def test_contradictory_configurations(tmp_path: Path, name: str, fields: dict[str, Any], expected: str) -> None:
    folder = tiny.copy_of(tiny.checkpoint(name), tmp_path / "model")
    tiny.edit_json(folder / "config.json", lambda config: config.update(fields))
    assert expected in refusal(folder)
