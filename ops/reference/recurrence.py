"""What recurrent layers have in common: a convolution's last inputs and states, kept by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ops.metadata import AttentionMetadata, AttentionShape

Advance = Callable[[int, Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]
"""Takes a token of the step, the inputs of the convolution [length, width] up to it in float32, its other inputs
[num_heads] each in float32, and the states before it; returns its result [num_heads * v_head_dim] and the states after
it."""


def recurrence(
    x: Tensor,
    numbers: Sequence[Tensor],
    cache: Tensor,
    meta: AttentionMetadata,
    shape: AttentionShape,
    advance: Advance,
) -> Tensor:
    """Computes requests token by token, from the state of their last token.

    A block of the cache holds the state after the last of its tokens that were computed and are no drafts. It keeps the
    inputs of the drafts behind that token, which none but tokens of the same block may be. Those that were accepted are
    replayed when the request goes on, so a state never has to be taken back.

    Args:
        x: [num_tokens, width], the inputs of the convolution.
        numbers: [num_tokens, num_heads] each: other inputs of a state, at most two.
        cache: float32 [num_blocks, state_size(shape)], written in place.
        meta: The step's requests.
        shape: The layer's constants.
        advance: Computes a token.

    Returns:
        [num_tokens, num_heads * v_head_dim] in the type of ``x``.
    """
    out = x.new_empty(len(x), shape.out_width)
    inputs = torch.cat((x.float(), *(each.float() for each in numbers)), 1)
    sizes = [x.shape[1], *(each.shape[1] for each in numbers)]
    starts = meta.query_start_loc.tolist()
    none = [0] * meta.num_reqs
    replays = none if meta.num_replayed is None else meta.num_replayed.tolist()
    drafts = none if meta.num_drafts is None else meta.num_drafts.tolist()
    for row, seq_len in enumerate(meta.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        first = seq_len - (end - begin)
        blocks = meta.block_table[row].tolist()
        state = cache[blocks[(first - 1) // meta.block_size]] if first else torch.zeros_like(cache[0])
        past, states = _unpack(state, shape)
        replayed = _kept(state, shape)[: replays[row], : inputs.shape[1]].clone()
        last_known = end - drafts[row] - 1
        for place, own in enumerate(torch.cat((replayed, inputs[begin:end])), begin - replays[row]):
            token = max(place, begin)  # results of those that are replayed are known
            new, *heads = own.split(sizes)
            window = torch.cat((past, new[None]))
            past = window[1:]
            out[token], states = advance(token, window, heads, states)
            position = first + place - begin
            if begin <= place and (place == last_known or place < last_known and (position + 1) % meta.block_size == 0):
                cache[blocks[position // meta.block_size], : _kept_at(shape)] = torch.cat(
                    (past.flatten(), states.flatten())
                )
        target = cache[blocks[(first + last_known - begin) // meta.block_size]]
        _kept(target, shape)[: drafts[row], : inputs.shape[1]] = inputs[last_known + 1 : end]
    return out


def conv_width(shape: AttentionShape) -> int:
    """Columns of the convolution's inputs."""
    return 2 * shape.num_kv_heads * shape.head_dim + shape.out_width


def state_size(shape: AttentionShape) -> int:
    """Numbers of a state, with the inputs of drafts that it keeps."""
    return _kept_at(shape) + shape.max_drafts * (conv_width(shape) + 2 * shape.num_heads)


def _kept_at(shape: AttentionShape) -> int:
    """Where a state has the inputs that it keeps."""
    return (shape.conv_length - 1) * conv_width(shape) + shape.num_heads * shape.head_dim * shape.v_dim


def _kept(state: Tensor, shape: AttentionShape) -> Tensor:
    """Those inputs, [max_drafts, width + 2 * num_heads]."""
    return state[_kept_at(shape) :].view(shape.max_drafts, conv_width(shape) + 2 * shape.num_heads)


def _unpack(state: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """The last inputs of the convolution [length - 1, width], and the states [num_heads, head_dim, v_head_dim]."""
    past = (shape.conv_length - 1) * conv_width(shape)
    states = state[past : _kept_at(shape)]
    return state[:past].view(-1, conv_width(shape)), states.view(shape.num_heads, shape.head_dim, -1)
