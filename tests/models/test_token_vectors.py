"""Vectors of tokens (ColBERT, BGE-M3) and rewards, against the same layers in torch on transformers' states."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from api.model.task_adapters import task_adapters
from engine_core.messages import ResolvedPoolingParams
from executor.adapter_files import adapter_hash
from executor.adapters import LoadedAdapters
from executor.config import LoRAConfig
from executor.messages import LoRARequest
from tests import tiny
from tests.models.harness import Chunk, Runner, load
from tests.models.test_encoders import tokens
from tests.models.test_heads import pooled, runner_of, theirs

EVERY = ResolvedPoolingParams(pooling_type="ALL", normalize=False)


def with_tensors(folder: Path, target: Path, added: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """A copy of a checkpoint with more tensors and other fields."""
    copy = tiny.copy_of(folder, target)
    save_file({**load_file(folder / "model.safetensors"), **added}, copy / "model.safetensors")
    tiny.edit_json(copy / "config.json", lambda config: config.update(fields))
    return copy


def states(folder: Path, token_ids: list[int], attended: int, attention: str = "eager") -> torch.Tensor:
    """transformers' hidden states, where tokens attend to the first ones only."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
    mask = torch.tensor([[1] * attended + [0] * (len(token_ids) - attended)])
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor([token_ids]), attention_mask=mask).last_hidden_state[0]
    return result


@pytest.mark.parametrize("name", ["bert", "modernbert", "mpnet"])
def test_tokens_to_which_others_do_not_attend(name: str) -> None:
    """Windows and distances count from the tokens' own positions."""
    folder = tiny.checkpoint(name)
    prompt = tokens(50)
    runner = runner_of(load(folder))
    some, every = pooled(runner, [prompt, prompt], [replace(EVERY, num_attended=41), EVERY])
    np.testing.assert_allclose(some, states(folder, prompt, 41).numpy(), rtol=0, atol=2e-4)
    np.testing.assert_allclose(every, states(folder, prompt, 50).numpy(), rtol=0, atol=2e-4)
    assert np.abs(some - every).max() > 1e-3


def test_tokens_that_see_nothing_in_their_windows() -> None:
    """Short queries, filled up: attention gives nothing there, as transformers' usual implementation has it."""
    folder, prompt = tiny.checkpoint("modernbert"), tokens(50)
    (ours,) = pooled(runner_of(load(folder)), [prompt], [replace(EVERY, num_attended=4)])
    np.testing.assert_allclose(ours, states(folder, prompt, 4, "sdpa").numpy(), rtol=0, atol=2e-4)


def test_colbert(tmp_path: Path) -> None:
    """Its layer is in the model's own files."""
    folder, weight = tiny.checkpoint("bert"), torch.randn(24, 64)
    own = with_tensors(folder, tmp_path / "model", {"linear.weight": weight}, architectures=["HF_ColBERT"])
    loaded = load(own, dense=(".",))
    assert loaded.vector_size == 24 and not loaded.pooling.generates
    prompt = tokens(40)
    params = replace(EVERY, normalize=True, num_attended=30)
    (ours,) = pooled(runner_of(loaded), [prompt], [params])
    expected = torch.nn.functional.normalize(states(folder, prompt, 30) @ weight.T, dim=-1)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-4)


def test_layers_for_tokens_alone(tmp_path: Path) -> None:
    """BGE-M3: a dense vector of the text, vectors of tokens, and weights of tokens."""
    folder, layers = tiny.checkpoint("xlm_roberta"), {}
    for name, size in (("vectors", 32), ("weights", 1)):
        (tmp_path / name).mkdir()
        layers[name] = torch.nn.Linear(64, size)
        save_file(layers[name].state_dict(), tmp_path / name / "model.safetensors")
    loaded = load(folder, token_dense=str(tmp_path / "vectors"), token_weights=str(tmp_path / "weights"))
    assert (loaded.vector_size, loaded.pooling.head_pooling, loaded.pooling.labels) == (64, "ALL", ("weight",))
    prompt = tokens(30)
    kinds = [
        ResolvedPoolingParams(pooling_type="CLS"),
        EVERY,
        ResolvedPoolingParams(pooling_type="ALL", classifies=True),
    ]
    dense, vectors, weights = pooled(runner_of(loaded), [prompt] * 3, kinds)
    with torch.inference_mode():
        expected = states(folder, prompt, 30)
        np.testing.assert_allclose(dense, torch.nn.functional.normalize(expected[0], dim=0), rtol=0, atol=1e-4)
        np.testing.assert_allclose(vectors, layers["vectors"](expected), rtol=0, atol=2e-4)
        np.testing.assert_allclose(weights, torch.relu(layers["weights"](expected)), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("Qwen2ForRewardModel", (64, 1)), ("Qwen2ForProcessRewardModel", (64, 2)), ("InternLM2ForRewardModel", (1,))],
)
def test_rewards(tmp_path: Path, architecture: str, sizes: tuple[int, ...]) -> None:
    is_of_internlm = architecture.startswith("Intern")
    kind = "internlm2" if is_of_internlm else "qwen2"
    source = tiny.checkpoint(kind)
    torch.manual_seed(1)
    layers = [torch.nn.Linear(64, size, bias=not is_of_internlm) for size in sizes]
    names = ["v_head"] if is_of_internlm else ["score.0", "score.2"]
    added = {
        f"{name}.{part}": value
        for name, layer in zip(names, layers, strict=True)
        for part, value in layer.state_dict().items()
    }
    stored = {name: value for name, value in load_file(source / "model.safetensors").items() if "lm_head" not in name}
    copy = tiny.copy_of(source, tmp_path / "model")
    save_file(
        {**{name: value for name, value in stored.items() if name != "output.weight"}, **added},
        copy / "model.safetensors",
    )
    tiny.edit_json(copy / "config.json", lambda config: config.update(architectures=[architecture]))
    loaded = load(copy)
    is_process = "Process" in architecture
    assert loaded.pooling.head_pooling == ("ALL" if is_process else "LAST")
    assert loaded.pooling.labels == (("bad", "good") if is_process else ("reward",))
    prompt = tokens(40)
    params = ResolvedPoolingParams(pooling_type="ALL", classifies=True)
    every, last = pooled(runner_of(loaded), [prompt] * 2, [params, replace(params, pooling_type="LAST")])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.saved_by_transformers(source), attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        expected = model.model(torch.tensor([prompt])).last_hidden_state[0]
        for index, layer in enumerate(layers):
            expected = layer(torch.relu(expected) if index else expected)
        expected = torch.softmax(expected, -1) if is_process else expected
    np.testing.assert_allclose(every, expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(last, expected[-1], rtol=0, atol=2e-4)
    assert json.loads((copy / "config.json").read_text())["architectures"] == [architecture]


def test_adapters_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jina Embeddings 3 is stored: a task's products are those of the merged weights."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "cache"))
    source, folder = tiny.checkpoint("jina", old_rope_spelling=True), tmp_path / "model"
    tensors, stored, merged = load_file(source / "model.safetensors"), {}, {}
    torch.manual_seed(2)
    for name, weight in tensors.items():
        parts = name.removesuffix(".weight")
        is_table = parts.endswith("_embeddings")
        if not is_table and (weight.dim() != 2 or "pooler" in name or not name.endswith(".weight")):
            stored[name] = merged[name] = weight
            continue
        rows, columns = weight.shape
        shapes = ((rows, 2), (2, columns)) if is_table else ((2, columns), (rows, 2))
        a, b = (torch.randn(3, *shape) * 0.2 for shape in shapes)
        stored[f"{parts}.parametrizations.weight.original"] = weight
        stored[f"{parts}.parametrizations.weight.0.lora_A"] = a
        stored[f"{parts}.parametrizations.weight.0.lora_B"] = b
        merged[name] = weight + (a[1] @ b[1] if is_table else b[1] @ a[1]) * 0.5
    tiny.copy_of(source, folder)
    fields = {"lora_adaptations": ["x", "separation", "y"], "lora_rank": 2, "lora_alpha": 1}
    tiny.edit_json(folder / "config.json", lambda config: config.update(fields))
    save_file(stored, folder / "model.safetensors")
    tiny.copy_of(tiny.checkpoint("jina"), tmp_path / "merged")
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})

    path = task_adapters(folder, json.loads((folder / "config.json").read_text()))["separation"]
    config = LoRAConfig(enable_lora=True, max_loras=2)
    loaded = load(folder, max_adapters=config.max_loaded)
    LoadedAdapters(loaded, config).load(1, LoRARequest("separation", 1, str(path), adapter_hash(path)))
    prompt = tokens(50)
    ours = Runner(loaded, captured=True).step([Chunk(0, prompt, 1), Chunk(1, prompt)])
    np.testing.assert_allclose(ours[:50], states(tmp_path / "merged", prompt, 50), rtol=0, atol=5e-4)
    np.testing.assert_allclose(ours[50:], states(tiny.checkpoint("jina"), prompt, 50), rtol=0, atol=5e-4)
    assert (ours[:50] - ours[50:]).abs().max() > 0.01


def test_positions_of_jina_reranker(tmp_path: Path) -> None:
    """XLM-R under the names of Jina's own code."""
    kind = "XLMRobertaForSequenceClassification"
    source, folder = tiny.checkpoint("xlm_roberta", model=kind, num_labels=1), tmp_path / "model"
    tiny.copy_of(source, folder)
    names = {
        r"\.embeddings\.LayerNorm\.": ".emb_ln.",
        r"\.layer\.": ".layers.",
        r"\.attention\.output\.dense\.": ".mixer.out_proj.",
        r"\.attention\.output\.LayerNorm\.": ".norm1.",
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"\.output\.dense\.": ".mlp.fc2.",
        r"\.output\.LayerNorm\.": ".norm2.",
    }
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        stored[name] = tensor
    for name in [name for name in stored if ".self.query." in name]:
        parts = [stored.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        stored[name.replace("attention.self.query", "mixer.Wqkv")] = torch.cat(parts)
    save_file(stored, folder / "model.safetensors")
    fields = {"use_flash_attn": True, "position_embedding_type": "absolute"}
    tiny.edit_json(folder / "config.json", lambda config: config.update(fields))
    prompt = tokens(50)
    params = ResolvedPoolingParams(pooling_type="CLS", classifies=True, normalize=False)
    (ours,) = pooled(runner_of(load(folder)), [prompt], [params])
    np.testing.assert_allclose(ours, theirs(kind, source, prompt), rtol=0, atol=2e-4)
