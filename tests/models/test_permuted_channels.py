"""A model with permuted channels computes what the model computes."""

from __future__ import annotations

import pytest
import torch
from permute_channels import permuted
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny


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
