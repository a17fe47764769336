"""A model that two ranks share: each has a part of every weight, and they meet where results must be whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from executor.base import ModelError
from executor.layers.moe import MoE
from executor.parallel import ParallelState
from ops import NotConnected
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


@pytest.mark.parametrize(
    ("kind", "size"), [("mixtral", 3), ("qwen2_moe", 2), ("deepseek_v3", 2), ("gpt_oss", 2), ("llama4", 2)]
)
def test_ranks_with_whole_experts_have_the_logits_of_one(kind: str, size: int) -> None:
    folder = tiny.checkpoint(kind)

    def run(rank: ThreadRank) -> tuple[list[torch.Tensor], list[int]]:
        place = ParallelState(rank.rank, rank.size, expert_parallel=True)
        loaded = load(folder, parallel=place, communicator=rank)
        runner = Runner(loaded, captured=True)
        counts = [len(module.experts) for module in loaded.model.modules() if isinstance(module, MoE)]
        return [runner.step(step) for step in STEPS], counts

    alone = load(folder)
    whole = Runner(alone, captured=True)
    results = on_ranks(size, run)
    counts = [module.num_experts for module in alone.model.modules() if isinstance(module, MoE)]
    assert [sum(each) for each in zip(*(own for _, own in results), strict=True)] == counts
    for index, step in enumerate(STEPS):
        expected = whole.step(step)
        for logits, _ in results:
            assert torch.equal(logits[index], results[0][0][index])
            assert_close(logits[index], expected)


@pytest.mark.parametrize(
    ("size", "cuts_sums", "reason"),
    [(2, False, "workers on CPUs divide every expert"), (3, True, "2 experts are too few for 3 workers; use ")],
)
def test_whole_experts_are_refused_where_ranks_cannot_have_them(size: int, cuts_sums: bool, reason: str) -> None:
    place = ParallelState(0, size, expert_parallel=True)
    with pytest.raises(ModelError, match=f"^--enable-expert-parallel: {reason}"):
        load(
            tiny.checkpoint("mixtral", num_local_experts=2),
            parallel=place,
            communicator=NotConnected(0, size, cuts_sums=cuts_sums),
        )
