"""Families without an implementation of our own, through transformers' models with our engine around them."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from api import LLM, SamplingParams
from executor.models.fallback.attention import Mask
from executor.models.fallback.layers import StepEmbedding, StepLinear, StepOutput
from executor.models.fallback.support import fallback_problem
from executor.models.registry import REGISTRY, resolve_model
from tests import tiny
from tests.fallback_families import FALLBACKS
from tests.models.harness import (
    Chunk,
    Runner,
    assert_close,
    load,
    logits_of,
    random_tokens,
    reference,
    reference_logits,
    refusal,
)

REFUSED = ("doge", "lfm2 without types", "roberta")
RUNNING = [name for name in FALLBACKS if name not in REFUSED]
families = pytest.mark.parametrize("name", RUNNING)


@functools.cache
def checkpoint(name: str) -> Path:
    """Sinks and routers' biases are parameters and buffers; ``tiny.randomize`` gives them values that matter."""
    return tiny.checkpoint(name)


@families
def test_same_logits_as_transformers(name: str) -> None:
    assert FALLBACKS[name].model not in REGISTRY, "implemented by now: choose another family"
    folder, token_ids = checkpoint(name), random_tokens(70)
    assert_close(logits_of(load(folder), token_ids), reference_logits(folder, token_ids))


@families
def test_chunks_batches_and_greedy_tokens(name: str) -> None:
    folder = checkpoint(name)
    loaded = load(folder)
    first, second = random_tokens(60), random_tokens(33, 2)
    runner = Runner(loaded)
    parts = [runner.step([Chunk(1, second[:1]), Chunk(0, first[:17])])[1:]]
    parts.append(runner.step([Chunk(0, first[17:51]), Chunk(1, second[1:])])[:34])
    parts += [runner.step([Chunk(0, [token])]) for token in first[51:]]
    assert_close(torch.cat(parts), reference_logits(folder, first))
    prompts, tokens = [first, second], [int(parts[-1][-1].argmax()), 0]
    tokens[1] = int(reference_logits(folder, second)[-1].argmax())
    outputs: list[list[int]] = [[], []]
    for _ in range(16):
        for output, token in zip(outputs, tokens, strict=True):
            output.append(token)
        tokens = runner.step([Chunk(row, [token]) for row, token in enumerate(tokens)]).argmax(dim=1).tolist()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == greedy(folder, prompt, 16)


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """transformers' tokens."""
    ids = torch.tensor([prompt])
    model = reference(folder)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    result: list[int] = out[0, len(prompt) :].tolist()
    return result


def test_a_whole_engine() -> None:
    folder = checkpoint("exaone_moe")
    shared = random_tokens(64, 9)  # two blocks: cached after the first request
    prompts = [shared + random_tokens(5 + 7 * index, index) for index in range(6)]
    options: dict[str, Any] = {"max_num_batched_tokens": 40, "max_model_len": 192, "kv_cache_memory": "64MiB"}
    greedily = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    # 16 blocks hold three requests at most, so some are preempted.
    with LLM(str(folder), dtype="float32", num_gpu_blocks_override=16, **options) as llm:
        outputs = llm.generate(requests, greedily, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(folder, prompt, 24)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_built_in_family_gives_the_same_logits_either_way(kind: str) -> None:
    folder, token_ids = tiny.checkpoint(kind, tied=kind == "qwen3"), random_tokens(70)
    loaded = load(folder, model_impl="transformers")
    assert type(loaded.model).__name__ == "TransformersForCausalLM"
    assert_close(logits_of(loaded, token_ids), logits_of(load(folder), token_ids))


def test_products_and_tables_are_ours() -> None:
    model = load(checkpoint("flex_olmo")).model
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), StepLinear)
    assert isinstance(model.get_submodule("model.embed_tokens"), StepEmbedding)
    assert isinstance(model.get_submodule("lm_head"), StepOutput)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert sum(parameter.numel() for name, parameter in model.named_parameters() if "lm_head" in name) == 0  # tied


def test_bfloat16_is_close() -> None:
    folder, token_ids = checkpoint("exaone_moe"), random_tokens(40)
    logits = logits_of(load(folder, dtype="bfloat16"), token_ids)
    expected = reference_logits(folder, token_ids)
    assert (logits - expected).abs().mean() < 0.1 * expected.std()


def test_dynamic_rotation_does_not_depend_on_the_batch() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tiny.checkpoint("llama", rope_parameters=rope, max_position_embeddings=64)
    for length in (64, 128):
        loaded = load(folder, model_impl="transformers", max_model_len=length)
        builtin = load(folder, max_model_len=length)
        token_ids = random_tokens(length)
        assert_close(logits_of(loaded, token_ids), logits_of(builtin, token_ids))
        assert_close(logits_of(loaded, token_ids[:20]), logits_of(loaded, token_ids)[:20])


def test_one_warning_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(checkpoint("helium"))
    (record,) = caplog.records
    assert "HeliumForCausalLM runs through transformers: slower" in record.getMessage()


# ---------------------------------------------------------------------------------------------------------
# refusals


def test_positions_that_do_not_begin_at_0_are_refused() -> None:
    assert "RobertaForCausalLM does not count positions from 0" in refusal(checkpoint("roberta"))


def test_masks_that_paged_attention_does_not_apply_are_refused() -> None:
    assert "does more with masks than the fallback can check" in refusal(checkpoint("doge"))
    assert Mask(causal_mask_function).is_causal(None, 100)
    assert not Mask(causal_mask_function).is_causal(30, 100)
    assert Mask(sliding_window_causal_mask_function(30)).is_causal(30, 100)
    assert not Mask(sliding_window_causal_mask_function(30)).is_causal(None, 100)
    assert Mask(sliding_window_causal_mask_function(30)).is_causal(None, 30), "no sequence exceeds the window"
    assert not Mask(bidirectional_mask_function).is_causal(None, 100)
    chunked = chunked_causal_mask_function(40, torch.zeros(1, dtype=torch.int64))
    assert not Mask(chunked).is_causal(None, 100) and Mask(chunked).is_causal(None, 40)


def test_a_convolution_over_tokens_is_refused(tmp_path: Path) -> None:
    folder = edited("lfm2 without types", tmp_path, layer_types=None, full_attn_idxs=[1])
    assert "is a convolution over tokens" in refusal(folder, model_impl="transformers")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2"}, "keeps a recurrent state"),
        ({"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}, "keeps a recurrent state"),
        (
            {"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "keeps a recurrent state",
        ),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "does not support other attention"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "not a causal language model"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "not a causal language model"),
        ({"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "x.py"}}, "Python code from the model's"),
        ({"architectures": ["OwnForCausalLM"]}, "the installed transformers does not know it"),
        ({"architectures": ["../x"], "model_type": "../x"}, "not the name of a class"),
    ],
)
def test_what_the_fallback_cannot_run_is_known_from_the_configuration(fields: dict[str, Any], reason: str) -> None:
    assert reason in str(fallback_problem(fields["architectures"][0], fields))


def test_the_sources_say_what_the_classes_say() -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for kind in ("mixtral", "exaone_moe", "gpt_oss", "falcon", "zamba2", "opt", "gemma3_text", "gpt-sw3"):
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        found = getattr(transformers, name)
        can_run = found._supports_attention_backend and not found._is_stateful
        assert can_run == (fallback_problem(name, {"model_type": kind}) is None), name


def test_the_check_of_a_configuration_loads_no_torch() -> None:
    code = (
        "import sys; from executor.supported import check_supported; "
        "check_supported({'architectures': ['ExaoneMoeForCausalLM'], 'model_type': 'exaone_moe'}); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_model_impl() -> None:
    folder = checkpoint("helium")
    for name in ("octavo", "vllm"):
        message = refusal(folder, model_impl=name)
        assert "'HeliumForCausalLM' is not built in; use --model-impl auto" in message
    llama = resolve_model("LlamaForCausalLM", {"model_type": "llama"}, "vllm")
    assert llama.__name__ == "LlamaForCausalLM"


def edited(name: str, target: Path, **fields: Any) -> Path:
    """A copy with other fields in config.json."""
    folder = tiny.copy_of(checkpoint(name), target)
    tiny.edit_json(folder / "config.json", lambda config: config.update(fields))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("exaone_moe", {"num_experts": 1 << 40}, "num_experts must be at most 32768"),
        ("exaone_moe", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1024"),
        ("exaone_moe", {"num_attention_heads": "four"}, "transformers rejects this configuration"),
        ("exaone_moe", {"num_key_value_heads": 3}, ""),
        ("exaone_moe", {"hidden_act": "no such function"}, "transformers cannot build this model"),
        ("exaone_moe", {"num_experts": 5}, "has shape"),
        ("flex_olmo", {"num_hidden_layers": 4}, "is missing"),
        ("flex_olmo", {"num_hidden_layers": 2}, "is not part of this model"),
    ],
)
def test_contradictory_configurations_get_one_line(
    name: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = edited(name, tmp_path, **fields)
    message = refusal(folder)
    assert reason in message and str(folder) in message and len(message) < 700


def test_json_fields_are_read_in_either_spelling(tmp_path: Path) -> None:
    folder = tiny.copy_of(checkpoint("flex_olmo"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "torch_dtype": config.pop("dtype")}
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config))
    token_ids = random_tokens(20)
    assert_close(logits_of(load(folder), token_ids), reference_logits(checkpoint("flex_olmo"), token_ids))
