"""A model that two ranks share: each has a part of every weight, and they meet where results must be whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from executor.parallel import ParallelState
from tests import tiny
from tests.models.harness import Chunk, Runner, assert_close, load, random_tokens
from tests.thread_ranks import ThreadRank, on_ranks

STEPS = [
    [Chunk(0, random_tokens(40)), Chunk(1, random_tokens(3, 2))],
    [Chunk(1, random_tokens(1, 3)), Chunk(0, random_tokens(1, 4))],
]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param("llama", {}, id="plain"),
        pytest.param("llama", {"tied": True}, id="tied"),
        pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param("deepseek_v2", {}, id="latents"),
        pytest.param("deepseek_v3", {}, id="latents of queries, too"),
        pytest.param("gpt_oss", {}, id="experts with biases"),
        pytest.param("phi3", {}, id="fused in the checkpoint"),
        pytest.param("olmo2", {}, id="norm over all heads"),
        pytest.param("olmo2", {"num_key_value_heads": 1}, id="norm over a head that both have"),
    ],
)
def test_two_ranks_have_the_logits_of_one(kind: str, fields: dict[str, Any], captured: bool) -> None:
    folder = tiny.checkpoint(kind, **fields)

    def run(rank: ThreadRank) -> list[torch.Tensor]:
        loaded = load(folder, parallel=ParallelState(rank.rank, rank.size), communicator=rank)
        runner = Runner(loaded, captured=captured)
        return [runner.step(step) for step in STEPS]

    whole = Runner(load(folder), captured=captured)
    first, second = on_ranks(2, run)
    for step, ours, theirs in zip(STEPS, first, second, strict=True):
        assert torch.equal(ours, theirs)
        assert_close(ours, whole.step(step))
