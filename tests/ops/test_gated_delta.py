"""The gated delta rule: the definition against transformers, the kernels against the definition, and the same bits
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
    "shared keys": AttentionShape(4, 2, 24, 1.0, v_head_dim=40, sliding_window=2, kind="gated_delta", conv_length=4),
    "tiled": AttentionShape(
        4, 2, 24, 1.0, v_head_dim=40, sliding_window=2, kind="gated_delta", conv_length=4, has_tiled_heads=True
    ),
    "own keys": AttentionShape(2, 2, 32, 1.0, v_head_dim=16, sliding_window=2, kind="gated_delta", conv_length=2),
}


class DeltaRequests(Requests):
    def __init__(self, shape: AttentionShape, lengths: list[int], dtype: torch.dtype) -> None:
        super().__init__(shape, lengths, dtype, (conv_width(shape), shape.num_heads, shape.num_heads))
        self.conv = 0.5 * randn(shape.conv_length, conv_width(shape), seed=7).to(dtype)

    def run(self, inputs: list[Tensor], meta: AttentionMetadata) -> Tensor:
        qkv, beta, step = inputs
        return ops.gated_delta(qkv, beta, step, self.conv, self.decay, self.bias, self.cache, meta, self.shape)


@pytest.mark.parametrize("name", SHAPES)
def test_the_definition(name: str) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    shape = SHAPES[name]
    requests = DeltaRequests(shape, [50], torch.float32)
    with using("reference"):
        found = torch.cat([requests.step({0: count})[0] for count in (1, 30, 2, 17)])
    qkv, beta, step = requests.data[0]
    padded = F.pad(qkv.T, (shape.conv_length - 1, 0))
    mixed = F.silu(F.conv1d(padded[None], requests.conv.T[:, None], groups=qkv.shape[1]))[0].T
    keys = shape.num_kv_heads * shape.head_dim
    q, k, v = mixed.split([keys, keys, shape.out_width], dim=1)
    if shape.has_tiled_heads:
        q, k = (each.view(50, shape.num_kv_heads, -1).repeat(1, 2, 1).flatten(1) for each in (q, k))
    expected, _ = torch_recurrent_gated_delta_rule(
        q.view(1, 50, -1, shape.head_dim),
        k.view(1, 50, -1, shape.head_dim),
        v.view(1, 50, shape.num_heads, -1),
        (requests.decay * F.softplus(step + requests.bias))[None],
        beta.sigmoid()[None],
        use_qk_l2norm_in_kernel=True,
    )
    torch.testing.assert_close(found, expected[0].flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("capability", NAMES)
def test_kernels(capability: str, name: str, dtype: torch.dtype) -> None:
    check_kernels(lambda lengths: DeltaRequests(SHAPES[name], lengths, dtype), capability, dtype)


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
def test_a_request_goes_on_from_a_block_that_another_fills_in_the_same_step(op_set: str) -> None:
    check_shared_block(lambda lengths: DeltaRequests(SHAPES["shared keys"], lengths, torch.float32), op_set)


@pytest.mark.parametrize("op_set", ["reference", "cpu"])
def test_rejected_drafts_leave_no_trace(op_set: str) -> None:
    shape = replace(SHAPES["shared keys"], max_drafts=9)
    check_drafts(lambda lengths: DeltaRequests(shape, lengths, torch.bfloat16), op_set)
