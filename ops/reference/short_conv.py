"""A short causal convolution over the tokens of each request (LFM2, Liquid AI, arXiv:2511.23404)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.dispatch import Spec, StepInput, Value, op
from ops.metadata import AttentionMetadata


def _infer(gate_in: Value, gate_out: Value, x: Value, weight: Tensor, *_: Any) -> Spec:
    return x.spec


@op(_infer)
def short_conv(
    gate_in: Tensor,
    gate_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor,
    meta: AttentionMetadata | StepInput,
) -> Tensor:
    """``gate_out * conv(gate_in * x)``: each column is convolved with its own weights over the last ``length`` tokens.

    The cache holds ``gate_in * x`` of earlier tokens. This step's are written before any is read, so a request may read
    blocks that another one fills in the same step.

    Args:
        gate_in: [num_tokens, width].
        gate_out: Likewise.
        x: Likewise.
        weight: [length, width]; the last row belongs to the token itself.
        bias: [width] or None.
        cache: [num_blocks, block_size, width], written in place.
        meta: The step's requests.

    Returns:
        [num_tokens, width] in the type of ``x``. The convolution is summed in float32 and rounded before the gate.
    """
    assert isinstance(meta, AttentionMetadata)
    length, width = weight.shape
    entries = cache.view(-1, width)
    entries[meta.slot_mapping] = gate_in * x
    out = torch.empty_like(gate_out)
    starts = meta.query_start_loc.tolist()
    for row, seq_len in enumerate(meta.seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        first = max(0, seq_len - (end - start) - length + 1)
        positions = torch.arange(first, seq_len, device=x.device)
        blocks = meta.block_table[row][positions // meta.block_size].long()
        inputs = entries[blocks * meta.block_size + positions % meta.block_size].float()
        missing = inputs.new_zeros(length - 1 + end - start - len(inputs), width)
        windows = torch.cat((missing, inputs)).unfold(0, length, 1)  # [tokens, width, length]
        sums = (windows * weight.float().T).sum(dim=-1)
        out[start:end] = sums if bias is None else sums + bias.float()
    return gate_out * out
