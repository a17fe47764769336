"""The gated delta rule (Yang et al., arXiv:2412.06464), a recurrence in the place of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import Spec, StepInput, Value, op
from ops.metadata import AttentionMetadata, AttentionShape
from ops.reference.recurrence import recurrence

EPS = 1e-6
"""Added to the squares of q and k."""


def _infer(qkv: Value, beta: Value, step: Value, *args: object) -> Spec:
    shape = args[-1]
    assert isinstance(shape, AttentionShape)
    return Spec(qkv.spec.rows, shape.out_width, qkv.spec.dtype)


@op(_infer)
def gated_delta(
    qkv: Tensor,
    beta: Tensor,
    step: Tensor,
    conv_weight: Tensor,
    decay: Tensor,
    step_bias: Tensor,
    cache: Tensor,
    meta: AttentionMetadata | StepInput,
    shape: AttentionShape,
) -> Tensor:
    """A causal convolution, then a state for each value head to which each token adds what it does not predict.

    With S the state [head_dim, v_head_dim], k of length 1, and q of length ``head_dim ** -0.5``:
    ``S *= exp(decay * softplus(step + step_bias))``, ``S += k (sigmoid(beta) (v - k S))``, and the result is ``q S``.
    q, k and v are the results of the convolution, whose activation is SiLU. Always token by token in float32, so a
    request may be divided into steps at will.

    A block of the cache holds the state after the last of its tokens that were computed. So a full block is a snapshot
    from which any request with the same tokens can go on. Requests are computed in order: one may begin with a block
    that an earlier one of the step fills. Drafts are left out, and their inputs kept, until they are accepted and
    replayed (``recurrence.py``).

    Args:
        qkv: [num_tokens, 2 * num_kv_heads * head_dim + num_heads * v_head_dim]: q, k and v before the convolution.
            Value heads share heads of q and k: consecutive ones, unless ``shape.has_tiled_heads``.
        beta: [num_tokens, num_heads].
        step: [num_tokens, num_heads].
        conv_weight: [length, width of ``qkv``]; the last row belongs to the token itself.
        decay: float32 [num_heads], below 0.
        step_bias: float32 [num_heads].
        cache: float32 [num_blocks, state_size(shape)], written in place: the last ``length - 1`` rows of ``qkv``, then
            the states, then ``qkv``, ``beta`` and ``step`` of drafts.
        meta: The step's requests.
        shape: The layer's constants; ``num_kv_heads`` heads of q and k.

    Returns:
        [num_tokens, num_heads * v_head_dim] in the type of ``qkv``.
    """
    assert isinstance(meta, AttentionMetadata)

    def advance(token: int, window: Tensor, numbers: Sequence[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
        own_beta, own_step = numbers
        mixed = F.silu((window * conv_weight.float()).sum(0)).to(qkv.dtype).float()
        factor = torch.exp(decay * F.softplus(own_step + step_bias))
        result, states = _advance(states, mixed, factor, torch.sigmoid(own_beta), shape)
        return result.flatten(), states

    return recurrence(qkv, (beta, step), cache, meta, shape, advance)


def _advance(
    states: Tensor, mixed: Tensor, factor: Tensor, rate: Tensor, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """One token: [num_heads, v_head_dim], and the states after it."""
    keys = shape.num_kv_heads * shape.head_dim
    q, k = (_of_value_heads(part.view(shape.num_kv_heads, -1), shape) for part in mixed[: 2 * keys].split(keys))
    v = mixed[2 * keys :].view(shape.num_heads, -1)
    q, k = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + EPS) for each in (q, k))
    states = states * factor[:, None, None]
    delta = (v - (states * k[..., None]).sum(1)) * rate[:, None]
    states = states + k[..., None] * delta[:, None]
    return (states * (q * shape.head_dim**-0.5)[..., None]).sum(1), states


def _of_value_heads(part: Tensor, shape: AttentionShape) -> Tensor:
    each = shape.num_heads // shape.num_kv_heads
    return part.repeat(each, 1) if shape.has_tiled_heads else part.repeat_interleave(each, 0)
