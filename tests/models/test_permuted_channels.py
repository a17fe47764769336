"""A model with permuted channels computes what the model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from permute_channels import permute_gguf, permuted
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models.harness import load, logits_of


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_logits_stay(kind: str) -> None:
    folder = tiny.checkpoint(kind)
    tensors = load_file(folder / "model.safetensors")
    changed = permuted(tensors)
    assert not torch.equal(
        tensors["model.layers.0.mlp.down_proj.weight"], changed["model.layers.0.mlp.down_proj.weight"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.load_state_dict(changed, strict=False)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_logits_of_a_gguf_file_stay(tmp_path: Path) -> None:
    file = tiny.gguf_file(tiny.checkpoint("gemma3"), GGMLQuantizationType.BF16)
    permute_gguf(file.path, tmp_path / "permuted.gguf")
    ids = list(range(3, 20))
    before = logits_of(load(file.path, dtype="float32"), ids)
    after = logits_of(load(tmp_path / "permuted.gguf", dtype="float32"), ids)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
