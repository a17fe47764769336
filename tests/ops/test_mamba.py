"""The recurrence of Mamba-2: the definition against transformers, the kernels against the definition, and the same bits
however requests are divided into steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from ops import AttentionMetadata, AttentionShape
from ops.reference.recurrence import conv_width
from tests.ops.cpu import DTYPES, NAMES, randn, using
from tests.ops.recurrent import Requests, check_drafts, check_kernels, check_shared_block

SHAPES = {
    "groups": AttentionShape(4, 2, 24, 1.0, v_head_dim=40, sliding_window=2, kind="mamba", conv_length=4),
    "one group": AttentionShape(3, 1, 32, 1.0, v_head_dim=16, sliding_window=2, kind="mamba", conv_length=2),
}


class MambaRequests(Requests):
    def __init__(
        self, shape: AttentionShape, lengths: list[int], dtype: torch.dtype, *, gate: bool = True, bias: bool = True
    ) -> None:
        width = conv_width(shape)
        super().__init__(shape, lengths, dtype, (width, shape.num_heads, shape.out_width))
        self.gate = gate
        self.conv, self.conv_bias = (
            0.5 * randn(shape.conv_length, width, seed=7),
            randn(width, seed=6) if bias else None,
        )
        self.skip = randn(shape.num_heads, seed=5)

    def run(self, inputs: list[Tensor], meta: AttentionMetadata) -> Tensor:
        x, step, gate = inputs
        weights = (self.conv, self.conv_bias, self.decay, self.skip, self.bias)
        return ops.mamba(x, step, gate if self.gate else None, *weights, self.cache, meta, self.shape)


@pytest.mark.parametrize("name", SHAPES)
def test_the_definition(name: str) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    shape = replace(SHAPES[name], step_limits=(0.3, 1.5))
    requests = MambaRequests(shape, [50], torch.float32)
    with using("reference"):
        found = torch.cat([requests.step({0: count})[0] for count in (1, 30, 2, 17)])
    x, step, gate = requests.data[0]
    padded = F.pad(x.T, (shape.conv_length - 1, 0))
    mixed = F.silu(F.conv1d(padded[None], requests.conv.T[:, None], requests.conv_bias, groups=x.shape[1]))[0].T
    groups = shape.num_kv_heads * shape.head_dim
    own, b, c = mixed.split([shape.out_width, groups, groups], dim=1)
    expected = mamba2_chunk_scan(
        own.view(1, 50, shape.num_heads, -1),
        step[None],
        requests.decay,
        b.view(1, 50, shape.num_kv_heads, -1),
        c.view(1, 50, shape.num_kv_heads, -1),
        chunk_size=16,
        D=requests.skip,
        dt_bias=requests.bias,
        dt_softplus=True,
        dt_limit=shape.step_limits,
    )
    torch.testing.assert_close(found, expected[0].flatten(1) * F.silu(gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("capability", NAMES)
def test_kernels(capability: str, name: str, dtype: torch.dtype) -> None:
    options = {"gate": name == "groups", "bias": name == "groups"}
    check_kernels(lambda lengths: MambaRequests(SHAPES[name], lengths, dtype, **options), capability, dtype)


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
def test_a_request_goes_on_from_a_block_that_another_fills_in_the_same_step(op_set: str) -> None:
    check_shared_block(lambda lengths: MambaRequests(SHAPES["groups"], lengths, torch.float32), op_set)


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
def test_rejected_drafts_leave_no_trace(op_set: str) -> None:
    shape = replace(SHAPES["groups"], max_drafts=9)
    check_drafts(lambda lengths: MambaRequests(shape, lengths, torch.bfloat16), op_set)
