"""Ranks on CPUs: the bits of one, whatever their number."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from executor.base import ModelError
from executor.models.catalog import ONE_RANK, STATES
from executor.parallel import ParallelState
from executor.supported import check_supported
from ops import NotConnected
from tests import tiny
from tests.families import FAMILIES
from tests.models.harness import Chunk, Runner, load, random_tokens
from tests.ops.cpu import NEEDS_KERNELS
from tests.shared_ranks import on_shared_ranks, state_of

pytestmark = NEEDS_KERNELS

STEPS = [
    [Chunk(0, random_tokens(40)), Chunk(1, random_tokens(3, 2))],
    [Chunk(1, random_tokens(1, 3)), Chunk(0, random_tokens(1, 4))],
    [Chunk(2, random_tokens(9, 5))],
]
UNEVEN: dict[str, Any] = {
    "hidden_size": 144,
    "intermediate_size": 176,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
"""More ranks than KV heads, blocks that do not divide evenly, and a block that is not whole."""

WIDE: dict[str, Any] = {**UNEVEN, "hidden_size": 192, "intermediate_size": 224, "num_attention_heads": 12}
"""With whole blocks of quantised numbers."""


def run(folder: Path, captured: bool, rank: Any = None, **fields: Any) -> list[torch.Tensor]:
    place = {} if rank is None else {"parallel": state_of(rank), "communicator": rank}
    runner = Runner(load(folder, **place, **fields), captured=captured)
    return [runner.step(step) for step in STEPS]


def check(folder: Path, size: int, captured: bool, **fields: Any) -> None:
    expected = run(folder, captured, **fields)
    for results in on_shared_ranks(size, lambda rank: run(folder, captured, rank, **fields)):
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_of_a_family(name: str) -> None:
    folder, architecture = tiny.checkpoint(name), FAMILIES[name].own_model
    try:
        check_supported(json.loads((folder / "config.json").read_text()), num_ranks=2)
    except ModelError as error:
        assert architecture in ONE_RANK and f"-tensor-parallel-size 2: workers cannot share {STATES}" in str(error)
        with pytest.raises(ModelError, match="--tensor-parallel-size"):
            load(folder, parallel=ParallelState(0, 2), communicator=NotConnected(0, 2, cuts_sums=False))
    else:
        assert architecture not in ONE_RANK or name == "granite4"
        check(folder, 2, captured=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks(size: int, captured: bool, dtype: str) -> None:
    check(tiny.checkpoint("llama", **UNEVEN), size, captured, dtype=dtype)


@pytest.mark.parametrize(
    "fields",
    [{"quantization": "int8"}, {"quantization": "fp8"}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8"}],
    ids=lambda fields: "-".join(f"{name} {value}" for name, value in fields.items()),
)
def test_ranks_of_quantized_weights_and_caches(fields: dict[str, str]) -> None:
    check(tiny.checkpoint("llama", **WIDE), 3, captured=True, dtype="bfloat16", **fields)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0])
def test_ranks_of_gguf_files(kind: GGMLQuantizationType) -> None:
    model = tiny.gguf_file(tiny.checkpoint("llama", **WIDE), kind)
    check(model.path, 3, captured=True, dtype="bfloat16")


def test_a_rank_reads_its_share_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.checkpoint("llama", **UNEVEN)
    read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    sizes = []
    for size in (1, 2):
        for rank in range(size):
            read.clear()
            load(folder, parallel=ParallelState(rank, size), communicator=NotConnected(rank, size, cuts_sums=False))
            sizes.append(sum(read))
    whole, *shares = sizes
    assert all(share < 0.7 * whole for share in shares) and whole <= sum(shares) < 1.02 * whole
