"""Classifiers and rerankers against transformers, from token ids to scores, through the scheduler and the runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from msgspec.structs import replace
from safetensors.torch import save_file

from api.config import PoolerConfig
from api.model.pooler import step_overrides
from engine_core.messages import ResolvedPoolingParams
from executor import forward
from executor.config import StepSize
from executor.device.cpu import CpuDevice
from executor.layers.attention import form_groups
from executor.loader import LoadedModel
from executor.messages import InitKVCache, NewRequest, SchedulerOutput, to_array
from executor.model_runner import ModelRunner
from tests import tiny
from tests.models.harness import load, refusal
from tests.models.test_encoders import tokens

F32 = npt.NDArray[np.float32]


def runner_of(loaded: LoadedModel) -> ModelRunner:
    groups = form_groups(loaded.model.attention_layers(), 32)
    runner = ModelRunner(
        loaded,
        CpuDevice(),
        groups,
        step_size=StepSize(max_num_seqs=4, max_num_batched_tokens=512),
        enforce_eager=False,
    )
    runner.initialize(InitKVCache((16,) * len(runner.block_sizes), 256))
    return runner


def pooled(runner: ModelRunner, prompts: list[list[int]], params: list[ResolvedPoolingParams]) -> list[F32]:
    """The results of prompts that share a step."""
    counts = np.array([len(prompt) for prompt in prompts], np.int32)
    requests = tuple(
        NewRequest(
            slot=slot,
            token_ids=np.array(prompt, np.int32).tobytes(),
            num_prompt_tokens=len(prompt),
            num_computed_tokens=0,
            block_ids=tuple(np.arange(4 * slot, 4 * slot + 4, dtype=np.int32).tobytes() for _ in runner.block_sizes),
            pooling_params=own,
        )
        for slot, (prompt, own) in enumerate(zip(prompts, params, strict=True))
    )
    plan = SchedulerOutput(
        step_id=1,
        slots=np.arange(len(prompts), dtype=np.int32).tobytes(),
        num_scheduled_tokens=counts.tobytes(),
        num_sampled=bytes(len(prompts)),
        new_reqs=requests,
    )
    with torch.inference_mode():
        output = runner.execute(plan)
    assert not output.row_errors
    return [to_array(tensor) for _, tensor in sorted(output.pooler_output)]


SEQUENCE = {
    "bert": "BertForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "gte": "GteForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "mpnet": "MPNetForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "roberta_encoder": "RobertaForSequenceClassification",
    "xlm_roberta": "XLMRobertaForSequenceClassification",
}
OF_TOKENS = ("bert", "modernbert", "roberta_encoder", "qwen3")
TOKENS = {name: SEQUENCE[name].replace("Sequence", "Token") for name in OF_TOKENS}
CLASSIFY = ResolvedPoolingParams(classifies=True)


def theirs(model: str, folder: Any, prompt: list[int], **inputs: Any) -> F32:
    reference = getattr(transformers, model).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: F32 = reference(torch.tensor([prompt]), **inputs).logits[0].numpy()
    return logits


@pytest.mark.parametrize(("name", "model"), [*SEQUENCE.items(), *TOKENS.items()])
def test_same_logits_as_transformers(name: str, model: str) -> None:
    folder = tiny.checkpoint(name, model=model, num_labels=3)
    loaded = load(folder)
    kind = loaded.pooling
    assert kind.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and not kind.generates
    assert (kind.head_pooling == "ALL") == ("Token" in model)
    prompt, other = tokens(70), tokens(31, 2)
    raw = replace(CLASSIFY, pooling_type=kind.head_pooling, normalize=False)
    runner = runner_of(loaded)
    ours, beside = pooled(runner, [prompt, other], [raw, replace(raw, normalize=True)])
    np.testing.assert_allclose(ours, theirs(model, folder, prompt), rtol=0, atol=2e-4)
    assert np.abs(ours).max() > 0.1
    logits = torch.from_numpy(theirs(model, folder, other))
    np.testing.assert_allclose(beside, torch.softmax(logits, -1).numpy(), rtol=0, atol=1e-4)
    (alone,) = pooled(runner_of(loaded), [prompt], [raw])
    np.testing.assert_array_equal(alone, ours)


def test_a_cross_encoder_reads_types_of_tokens() -> None:
    model = SEQUENCE["bert"]
    folder = tiny.checkpoint("bert", model=model, num_labels=1, id2label={"0": "relevance"})
    loaded = load(folder)
    assert loaded.pooling.labels == ("relevance",)
    prompt = tokens(50)
    params = replace(CLASSIFY, pooling_type="CLS", second_segment=20)
    scores = pooled(runner_of(loaded), [prompt, prompt], [params, replace(params, second_segment=0)])
    types = torch.tensor([[0] * 20 + [1] * 30])
    expected = torch.sigmoid(torch.from_numpy(theirs(model, folder, prompt, token_type_ids=types)))
    np.testing.assert_allclose(scores[0], expected.numpy(), rtol=0, atol=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"num_labels": 1}, torch.sigmoid),
        ({"num_labels": 2}, lambda x: torch.softmax(x, -1)),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda x: x),
        (
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            lambda x: x,
        ),
        ({"num_labels": 1, "sbert_ce_default_activation_function": "torch.nn.Tanh"}, torch.tanh),
    ],
)
def test_activations_of_scores(fields: dict[str, Any], activation: Any) -> None:
    folder = tiny.checkpoint("bert", model=SEQUENCE["bert"], **{"num_labels": 3, **fields})
    prompt = tokens(20)
    logits = torch.from_numpy(theirs(SEQUENCE["bert"], folder, prompt))
    (ours,) = pooled(runner_of(load(folder)), [prompt], [replace(CLASSIFY, pooling_type="CLS")])
    np.testing.assert_allclose(ours, activation(logits).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reranker_made_of_an_output_layer(tied: bool) -> None:
    folder = tiny.checkpoint("qwen3", tied=tied)
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_token_ids": [17, 42],
        "id2label": {"0": "yes"},
    }
    loaded = load(folder, hf_overrides=overrides)
    prompt = tokens(40)
    logits = torch.from_numpy(theirs("Qwen3ForCausalLM", folder, prompt))[-1]
    (score,) = pooled(runner_of(loaded), [prompt], [CLASSIFY])
    expected = torch.softmax(logits[[17, 42]], -1)[1]
    np.testing.assert_allclose(score, [expected.item()], rtol=0, atol=1e-4)


def test_a_judge_of_steps_made_of_an_output_layer() -> None:
    folder = tiny.checkpoint("mistral")
    ids = [42, 17, 5]
    pooler = PoolerConfig(pooling_type="STEP", returned_token_ids=tuple(ids))
    overrides = step_overrides(pooler, json.loads((folder / "config.json").read_text()))
    assert overrides["architectures"] == ["MistralForTokenClassification"]
    loaded = load(folder, hf_overrides=overrides)
    assert (loaded.pooling.head_pooling, loaded.pooling.labels) == ("ALL", ("42", "17", "5"))
    prompt = tokens(40)
    params = ResolvedPoolingParams(pooling_type="ALL", classifies=True)
    (ours,) = pooled(runner_of(loaded), [prompt], [params])
    expected = torch.softmax(torch.from_numpy(theirs("MistralForCausalLM", folder, prompt))[:, ids], -1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="needs a folder with a model ...ForCausalLM, not BertModel"):
        step_overrides(pooler, {"architectures": ["BertModel"]})
    with pytest.raises(ValueError, match='need "pooling_type": "STEP"'):
        step_overrides(PoolerConfig(step_tag_id=3), {})


def test_dense_layers(tmp_path: Path) -> None:
    """As EmbeddingGemma has two: wider, then back."""
    folder = tiny.copy_of(tiny.checkpoint("bert"), tmp_path / "model")
    weights = []
    for name, sizes, bias in (("2_Dense", (96, 64), True), ("3_Dense", (24, 96), False)):
        (folder / name).mkdir()
        layer = torch.nn.Linear(sizes[1], sizes[0], bias=bias)
        weights.append(layer)
        tensors = {f"linear.{key}": value for key, value in layer.state_dict().items()}
        save_file(tensors, folder / name / "model.safetensors")
        kind = "torch.nn.modules.activation.Tanh" if bias else "torch.nn.modules.linear.Identity"
        fields = {"in_features": sizes[1], "out_features": sizes[0], "bias": bias, "activation_function": kind}
        (folder / name / "config.json").write_text(json.dumps(fields))
    prompt = tokens(30)
    raw = ResolvedPoolingParams(pooling_type="MEAN", normalize=False)
    (plain,) = pooled(runner_of(load(folder)), [prompt], [raw])
    loaded = load(folder, dense=("2_Dense", "3_Dense"))
    assert loaded.vector_size == loaded.pooling.token_size == 24
    ours, scaled = pooled(runner_of(loaded), [prompt, prompt], [raw, replace(raw, normalize=True, dimensions=8)])
    with torch.inference_mode():
        expected = weights[1](torch.tanh(weights[0](torch.from_numpy(plain.copy())))).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(scaled, expected[:8] / np.linalg.norm(expected[:8]), rtol=0, atol=1e-5)
    assert "3_Dense: takes vectors of 96 numbers, not of 64" in refusal(folder, dense=("3_Dense",))


def test_layer_norm_behind_a_dense_layer(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.checkpoint("bert"), tmp_path / "model")
    dense, norm = torch.nn.Linear(64, 24), torch.nn.LayerNorm(24)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    fields = {"in_features": 64, "out_features": 24, "activation_function": "torch.nn.modules.linear.Identity"}
    for name, prefix, layer, config in (("2_Dense", "linear", dense, fields), ("3_N", "norm", norm, {"dimension": 24})):
        (folder / name).mkdir()
        tensors = {f"{prefix}.{key}": value for key, value in layer.state_dict().items()}
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    prompt, raw = tokens(30), ResolvedPoolingParams(pooling_type="MEAN", normalize=False)
    (plain,) = pooled(runner_of(load(folder)), [prompt], [raw])
    (ours,) = pooled(runner_of(load(folder, dense=("2_Dense", "3_N"))), [prompt], [raw])
    with torch.inference_mode():
        expected = norm(dense(torch.from_numpy(plain.copy()))).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert "3_N: takes vectors of 24 numbers, not of 64" in refusal(folder, dense=("3_N",))
    (folder / "3_N" / "config.json").write_text(json.dumps({"dimension": 25}))
    assert "norm.weight is missing, or not of the shape [25]" in refusal(folder, dense=("2_Dense", "3_N"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_16_bits(dtype: str) -> None:
    folder, prompts = tiny.checkpoint("bert"), [tokens(6), tokens(90), [5]]
    params = [ResolvedPoolingParams(pooling_type="MEAN")] * 3
    exact, rounded = (pooled(runner_of(load(folder, dtype=name)), prompts, params) for name in ("float32", dtype))
    assert all(one @ other > 0.99 for one, other in zip(exact, rounded, strict=True))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_encoders(quantization: str) -> None:
    folder, prompt = tiny.checkpoint("bert"), tokens(60)
    params = [ResolvedPoolingParams(pooling_type="MEAN")]
    (exact,) = pooled(runner_of(load(folder)), [prompt], params)
    loaded = load(folder, quantization=quantization, calibration=tuple(tokens(40, 3)))
    (rounded,) = pooled(runner_of(loaded), [prompt], params)
    assert 0.9 < exact @ rounded < 0.999999


def test_prompts_that_are_alone_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their inputs are kept by size, which must not show, whatever comes between."""
    monkeypatch.setattr(forward, "MAX_LONE", 2)
    loaded = load(tiny.checkpoint("bert"))
    plain = ResolvedPoolingParams(pooling_type="MEAN", normalize=False)
    pair, query = replace(plain, second_segment=7), replace(plain, num_attended=9)
    kinds = [(20, plain), (20, plain), (20, pair), (20, plain), (20, query), (33, plain), (5, plain), (20, plain)]
    prompts = [(tokens(count, seed), params) for seed, (count, params) in enumerate(kinds)]
    runner, beside = runner_of(loaded), runner_of(loaded)
    for place, (prompt, params) in enumerate(prompts):
        expected, _ = pooled(beside, [prompt, tokens(3)], [params, plain])
        (alone,) = pooled(runner, [prompt], [params])
        np.testing.assert_array_equal(alone, expected)
        if place == 6:
            pooled(runner, [tokens(20), tokens(41)], [plain, plain])


def test_positions_that_are_not_pooled() -> None:
    loaded = load(tiny.checkpoint("bert"))
    prompt = tokens(30)
    every = ResolvedPoolingParams(pooling_type="ALL", normalize=False)
    mean = replace(every, pooling_type="MEAN", num_skipped=11)
    states, ours, first = pooled(runner_of(loaded), [prompt] * 3, [every, mean, replace(mean, pooling_type="CLS")])
    np.testing.assert_allclose(ours, states[11:].mean(0), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(first, states[11])


@pytest.mark.parametrize(
    ("name", "model"), [("qwen3", "Qwen3Model"), ("mistral", "MistralModel"), ("llama", "LlamaModel")]
)
def test_decoders_without_an_output_layer(name: str, model: str) -> None:
    """As Qwen3-Embedding and E5-Mistral are stored."""
    folder = tiny.checkpoint(name, model=model)
    loaded = load(folder)
    assert not loaded.pooling.generates and not loaded.pooling.needs_whole_prompts
    prompt = tokens(60)
    reference = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        state = reference(torch.tensor([prompt])).last_hidden_state[0, -1]
    (ours,) = pooled(runner_of(loaded), [prompt], [ResolvedPoolingParams(normalize=False)])
    np.testing.assert_allclose(ours, state.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_decoders_whose_tokens_attend_to_all(name: str) -> None:
    """As GTE-Qwen2's do."""
    folder = tiny.checkpoint(name, model=f"{name.capitalize()}Model")
    loaded = load(folder, hf_overrides={"is_causal": False})
    assert not loaded.pooling.generates and loaded.pooling.needs_whole_prompts
    prompt = tokens(60)
    reference = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        mask = torch.zeros(1, 1, len(prompt), len(prompt))
        states = reference(torch.tensor([prompt]), attention_mask=mask).last_hidden_state[0]
    params = [ResolvedPoolingParams(pooling_type=way, normalize=False) for way in ("CLS", "LAST")]
    first, last = pooled(runner_of(loaded), [prompt] * 2, params)
    np.testing.assert_allclose([first, last], states[[0, -1]].numpy(), rtol=0, atol=1e-4)


def test_families_that_cannot_attend_to_all_say_so() -> None:
    folder = tiny.checkpoint("lfm2", model="Lfm2Model")
    message = "is_causal must be true for Lfm2Model, whose tokens attend to earlier ones only, not False"
    assert message in refusal(folder, hf_overrides={"is_causal": False})
