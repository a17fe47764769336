"""Recurrences in Triton, interpreted: against the definitions, and the same bits however requests are divided into
steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import test_gated_delta, test_mamba
from tests.ops.cpu import using
from tests.ops.recurrent import BLOCK, Requests, check_shared_block
from tests.ops.test_gated_delta import DeltaRequests
from tests.ops.test_mamba import MambaRequests
from tests.triton_interpreter import grid_order

op_set: Any = pytest.importorskip("ops.triton.op_set")

BFLOAT16 = torch.bfloat16
Make = Callable[[list[int]], Requests]
DELTA, MAMBA = test_gated_delta.SHAPES, test_mamba.SHAPES
LAYERS: dict[str, Make] = {
    "shared keys": partial(DeltaRequests, DELTA["shared keys"], dtype=BFLOAT16),
    "tiled": partial(DeltaRequests, replace(DELTA["tiled"], v_head_dim=16), dtype=torch.float32),
    "own keys": partial(DeltaRequests, DELTA["own keys"], dtype=torch.float16),
    "mamba": partial(MambaRequests, replace(MAMBA["groups"], v_head_dim=16), dtype=BFLOAT16),
}
LIMITED = replace(MAMBA["one group"], step_limits=(0.3, 1.5))
LAYERS["mamba without a gate"] = partial(MambaRequests, LIMITED, dtype=torch.float32, gate=False, bias=False)


@pytest.mark.parametrize("name", LAYERS)
def test_definition_and_bits(name: str) -> None:
    lengths = [BLOCK + 3, 4]
    with using("reference"):
        plain = LAYERS[name](lengths)
        definition = [plain.step({row: length})[row] for row, length in enumerate(lengths)]
    with using(op_set.create()):
        alone = LAYERS[name](lengths)
        expected = [alone.step({row: length})[row] for row, length in enumerate(lengths)]
        batched = LAYERS[name](lengths)
        parts: list[list[Tensor]] = [[], []]
        with grid_order("shuffled", seed=2):
            for counts in ({0: BLOCK - 1, 1: 1}, {0: 2}, {1: 2, 0: 1}, {0: 1, 1: 1}):
                for row, result in batched.step(counts).items():
                    parts[row].append(result)
    for part, whole, exact in zip(parts, expected, definition, strict=True):
        assert torch.equal(torch.cat(part), whole)
        tolerance = {BFLOAT16: 0.02, torch.float16: 2e-3, torch.float32: 1e-5}[whole.dtype]
        torch.testing.assert_close(whole, exact, rtol=tolerance, atol=tolerance)
    used = [int(batched.table[row, (length - 1) // BLOCK]) for row, length in enumerate(lengths)]
    torch.testing.assert_close(batched.cache[used], plain.cache[used], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["own keys", "mamba without a gate"])
def test_a_request_goes_on_from_a_block_that_another_fills_in_the_same_step(name: str) -> None:
    check_shared_block(LAYERS[name], op_set.create())
