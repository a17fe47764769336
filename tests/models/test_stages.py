"""Pipeline stages on CPUs: the bits of one worker, whatever the number of stages and of ranks in each."""

from __future__ import annotations

import json
import os
import select
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from executor.base import ModelError
from executor.layers.parameter import named_weights
from executor.models.catalog import ONE_STAGE
from executor.parallel import ParallelState, create_shared_memory
from executor.stages import SharedRing, as_bytes
from executor.supported import check_supported
from tests import tiny, vision_families
from tests.families import FAMILIES
from tests.models.harness import Runner, load
from tests.models.test_ranks import STEPS, UNEVEN, WIDE
from tests.ops.cpu import NEEDS_KERNELS
from tests.shared_ranks import on_shared_ranks

pytestmark = NEEDS_KERNELS


def run(folder: Path, captured: bool, num_stages: int, rank: Any = None, **fields: Any) -> list[torch.Tensor]:
    """The logits of some steps, computed by one stage after the other."""
    runners = []
    for stage in range(num_stages):
        place = ParallelState(pp_rank=stage, pp_size=num_stages)
        if rank is not None:
            place = replace(place, tp_rank=rank.rank, tp_size=rank.size)
        loaded = load(folder, parallel=place, communicator=rank, **fields)
        runners.append(Runner(loaded, captured=captured, goes_on=stage > 0))
    results = []
    for step in STEPS:
        states = None
        for runner in runners:
            states = runner.step(step, states)
        assert states is not None
        results.append(states)
    return results


def check(folder: Path, captured: bool, *num_stages: int, **fields: Any) -> None:
    expected = run(folder, captured, 1, **fields)
    for count in num_stages:
        for ours, theirs in zip(run(folder, captured, count, **fields), expected, strict=True):
            assert torch.equal(ours, theirs)


KINDS = ["llama", "gemma2", "gpt2", "lfm2", "qwen3_5", "nemotron_h", "deepseek_v2"]
"""A family of each kind of layer that attends, recurs or convolves, and of what lies before and after them."""


@pytest.mark.parametrize("name", KINDS)
def test_two_stages_of_a_family(name: str) -> None:
    check(tiny.checkpoint(name), True, 2)


def test_layers_that_need_others_are_refused() -> None:
    for architecture in ONE_STAGE:
        (name,) = (name for name, family in FAMILIES.items() if family.own_model == architecture)
        folder = tiny.checkpoint(name)
        with pytest.raises(ModelError, match="^--pipeline-parallel-size 2: workers cannot share layers that read "):
            check_supported(json.loads((folder / "config.json").read_text()), num_stages=2)
        with pytest.raises(ModelError, match="--pipeline-parallel-size: workers cannot share the layers"):
            load(folder, parallel=ParallelState(pp_size=2))
    with pytest.raises(ModelError, match="^3 layers are too few: use --pipeline-parallel-size 3 or less$"):
        load(tiny.checkpoint("llama", num_hidden_layers=3), parallel=ParallelState(pp_size=4))
    with pytest.raises(ModelError, match="^--pipeline-parallel-size 2: stages take no images yet; add --language-mod"):
        load(vision_families.checkpoint("qwen2_vl"), parallel=ParallelState(pp_size=2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("captured", [False, True])
def test_any_number_of_stages_and_ranks(captured: bool, dtype: str) -> None:
    folder = tiny.checkpoint("llama", **UNEVEN, num_hidden_layers=4)
    check(folder, captured, 2, 3, 4, dtype=dtype)
    expected = run(folder, captured, 1, dtype=dtype)
    for results in on_shared_ranks(2, lambda rank: run(folder, captured, 2, rank, dtype=dtype)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


def test_stages_of_a_gguf_file() -> None:
    model = tiny.gguf_file(tiny.checkpoint("llama", **WIDE), GGMLQuantizationType.Q4_0)
    check(model.path, True, 2, dtype="bfloat16")


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_stage_reads_its_share_of_the_file(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.checkpoint("llama", tie_word_embeddings=is_tied, num_hidden_layers=4)
    read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    sizes, names = [], []
    for size in (1, 2):
        for stage in range(size):
            read.clear()
            loaded = load(folder, parallel=ParallelState(pp_rank=stage, pp_size=size))
            sizes.append(sum(read))
            names.append({name for name, _ in named_weights(loaded.model)})
    whole, *shares = sizes
    table = loaded.hf_config.vocab_size * loaded.hf_config.hidden_size * 4
    assert whole <= sum(shares) < 1.02 * (whole + is_tied * table)
    assert names[1] | names[2] == names[0]
    assert names[1] & names[2] == ({"model.embed_tokens.weight"} if is_tied else set())


def test_messages_between_stages() -> None:
    memory, events = create_shared_memory(), [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    sender = SharedRing(memory, 0, 3, 100, events)
    readers = [SharedRing(memory, 0, 3, 100, [event], reader) for reader, event in enumerate(events)]
    assert [reader.num_arrived() for reader in readers] == [0, 0]
    for step in range(1, 8):  # the ring has fewer slots
        sender.send(step, torch.full((step, 3), step, dtype=torch.int32))
        for reader in readers:
            assert select.select([reader], [], [], 0)[0] and reader.num_arrived() == step
            assert not select.select([reader], [], [], 0)[0]
            assert reader.take(step).view(torch.int32).tolist() == [step] * 3 * step
    assert as_bytes(torch.zeros(1, dtype=torch.int64).expand(1)[::1].as_strided((1,), (0,))).tolist() == [0] * 8
    sender.send(8, torch.zeros(0))
    assert readers[0].num_arrived() == 8 and len(readers[0].take(8)) == 0
    for step in (9, 10):
        sender.send(step, torch.zeros(1))
    with pytest.raises(AssertionError, match="more steps are in flight"):
        sender.send(11, torch.zeros(1))  # the second reader has taken nothing since step 7
    assert readers[1].num_arrived() == 10
    with pytest.raises(AssertionError, match="expected what belongs to step 9, got step 8"):
        readers[1].take(9)
    for descriptor in (memory, *events):
        os.close(descriptor)
