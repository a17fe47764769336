"""What recurrent layers have in common: a convolution's last inputs and states, kept by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.metadata import AttentionMetadata, AttentionShape

Advance = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes a token of the step, the inputs of the convolution [length, width] up to it in float32, and the states before
it; returns its result [num_heads * v_head_dim] and the states after it."""


def recurrence(x: Tensor, cache: Tensor, meta: AttentionMetadata, shape: AttentionShape, advance: Advance) -> Tensor:
    """Computes requests token by token, from the state of their last token.

    A block of the cache holds the state after the last of its tokens that were computed.

    Args:
        x: [num_tokens, width], the inputs of the convolution.
        cache: float32 [num_blocks, state_size(shape)], written in place.
        meta: The step's requests.
        shape: The layer's constants.
        advance: Computes a token.

    Returns:
        [num_tokens, num_heads * v_head_dim] in the type of ``x``.
    """
    out = x.new_empty(len(x), shape.out_width)
    starts = meta.query_start_loc.tolist()
    for row, seq_len in enumerate(meta.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        first = seq_len - (end - begin)
        blocks = meta.block_table[row].tolist()
        state = cache[blocks[(first - 1) // meta.block_size]] if first else torch.zeros_like(cache[0])
        past, states = _unpack(state, shape)
        for token in range(begin, end):
            position = first + token - begin
            window = torch.cat((past, x[token : token + 1].float()))
            past = window[1:]
            out[token], states = advance(token, window, states)
            if token == end - 1 or (position + 1) % meta.block_size == 0:
                cache[blocks[position // meta.block_size]] = torch.cat((past.flatten(), states.flatten()))
    return out


def conv_width(shape: AttentionShape) -> int:
    """Columns of the convolution's inputs."""
    return 2 * shape.num_kv_heads * shape.head_dim + shape.out_width


def state_size(shape: AttentionShape) -> int:
    """Numbers of a state."""
    return (shape.conv_length - 1) * conv_width(shape) + shape.num_heads * shape.head_dim * shape.v_dim


def _unpack(state: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """The last inputs of the convolution [length - 1, width], and the states [num_heads, head_dim, v_head_dim]."""
    past = (shape.conv_length - 1) * conv_width(shape)
    return state[:past].view(-1, conv_width(shape)), state[past:].view(shape.num_heads, shape.head_dim, -1)
