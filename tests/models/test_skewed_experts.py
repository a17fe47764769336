"""Every family with experts against transformers, where routers are anything but even.

All tokens get the same experts, and the last of them only because it has the lowest id of several with equal scores. As
transformers leaves open which of these it takes, they have equal weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from executor.layers.moe import Router
from tests import tiny
from tests.families import FAMILIES
from tests.hybrids import HYBRIDS
from tests.mixtures import MIXTURES
from tests.models.harness import assert_close, load, logits_of, random_tokens, reference_logits

KINDS = [*MIXTURES, *(name for name in HYBRIDS if name in ("granite4_h", "nemotron_h", "qwen3_5_moe", "qwen3_next"))]
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_k")
EQUAL = 2
"""The first of the experts with equal scores and weights; those before it have their own."""

RESIDUAL = re.compile(r"(o_proj|out_proj|down_proj|\.w2|output_linear)(\.weight|\.bias|_bias)?$")
"""Tensors that make what is added to the hidden states."""
ROUTER = re.compile(r"\.(gate|router|router\.layer|router\.proj)\.(weight|bias)$")
STACK = re.compile(r"\.experts\.(gate_up|down)_proj(_bias)?$|\.block_sparse_moe\.(in|out)put_linear\.weight$")
EXPERT = re.compile(r"(\.experts\.)(\d+)\.")


def skewed(folder: Path, target: Path) -> Path:
    """A copy whose routers see nothing but a number that all tokens have alike."""
    folder = tiny.copy_of(folder, target)
    config = json.loads((folder / "config.json").read_text())
    hidden, count = config["hidden_size"], next(config[name] for name in COUNTS if config.get(name))
    first = next(config[name] for name in CHOSEN if config.get(name))
    # The first is best, and the second where a token gets three.
    weights = [0.1 if first > EQUAL else -0.2, 0.3, *[0.05] * (count - EQUAL)]
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        _change(name, tensor, hidden, torch.tensor(weights))
    for name, tensor in tensors.items():
        found = EXPERT.search(name)
        if found is not None and int(found[2]) > EQUAL:
            tensor.copy_(tensors[EXPERT.sub(rf"\g<1>{EQUAL}.", name)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _change(name: str, tensor: Tensor, hidden: int, weights: Tensor) -> None:
    if re.search(r"(embed_tokens|embeddings)\.weight$", name):
        tensor[:, 0] = 1.5
    elif ROUTER.search(name):
        tensor.zero_()
        if tensor.dim() == 2:
            tensor[:, 0] = weights
    elif name.endswith(("e_score_correction_bias", "expert_bias")):
        tensor.fill_(0.4)
    elif name.endswith("router.scale"):
        tensor[0] = 1.0
    elif name.endswith("per_expert_scale"):
        tensor[EQUAL:] = tensor[EQUAL]
    elif RESIDUAL.search(name):  # keeps the first of the hidden states as it is
        for dim in range(tensor.dim()):
            if tensor.shape[dim] == hidden:
                tensor.select(dim, 0).zero_()
    if STACK.search(name):
        tensor[EQUAL:] = tensor[EQUAL].clone()


@pytest.mark.parametrize("kind", [*KINDS, "gemma4"])
def test_all_tokens_have_the_same_experts(tmp_path: Path, kind: str) -> None:
    fields: dict[str, Any] = FAMILIES[kind].variants["experts"] if kind == "gemma4" else {}
    folder = skewed(tiny.checkpoint(kind, **fields), tmp_path / "model")
    token_ids, chosen = random_tokens(60), []

    def remember(router: nn.Module, inputs: Any, routed: Tensor) -> None:
        chosen.append(routed)

    loaded = load(folder)
    for layer in loaded.model.modules():
        if isinstance(layer, Router):
            layer.register_forward_hook(remember)
    assert_close(logits_of(loaded, token_ids), reference_logits(folder, token_ids))
    for routed in chosen:
        assert len(routed) == len(token_ids)
        (top_k,) = set((routed != 0).sum(1).tolist())
        best = {1: [1], 2: [1, 2], 3: [0, 1, 2]}[top_k]
        assert (routed != 0).nonzero()[:, 1].view(-1, top_k).unique(dim=0).tolist() == [best]
    assert chosen
