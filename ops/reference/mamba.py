"""The recurrence of Mamba-2 (Dao and Gu, arXiv:2405.21060), in the place of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import Spec, StepInput, Value, op
from ops.metadata import AttentionMetadata, AttentionShape
from ops.reference.recurrence import recurrence


def _infer(x: Value, step: Value, *args: object) -> Spec:
    shape = args[-1]
    assert isinstance(shape, AttentionShape)
    return Spec(x.spec.rows, shape.out_width, x.spec.dtype)


@op(_infer)
def mamba(
    x: Tensor,
    step: Tensor,
    gate: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    decay: Tensor,
    skip: Tensor,
    step_bias: Tensor,
    cache: Tensor,
    meta: AttentionMetadata | StepInput,
    shape: AttentionShape,
) -> Tensor:
    """A causal convolution, then a state for each head that decays and to which each token adds.

    With S the state [head_dim, v_head_dim] and ``t = softplus(step + step_bias)``, limited to ``shape.step_limits``:
    ``S = exp(decay * t) * S + B (t * x)``, and the result is ``(C S + skip * x) * silu(gate)``. x, B and C are the
    results of the convolution, whose activation is SiLU. Always token by token in float32, so a request may be divided
    into steps at will.

    A block of the cache holds the state after the last of its tokens that were computed, as of ``gated_delta``.

    Args:
        x: [num_tokens, num_heads * v_head_dim + 2 * num_kv_heads * head_dim]: x, B and C before the convolution.
            Consecutive heads share B and C.
        step: [num_tokens, num_heads].
        gate: [num_tokens, num_heads * v_head_dim]; None: results are not multiplied.
        conv_weight: float32 [length, width of ``x``]; the last row belongs to the token itself.
        conv_bias: float32 [width of ``x``] or None.
        decay: float32 [num_heads], below 0.
        skip: float32 [num_heads].
        step_bias: float32 [num_heads].
        cache: float32 [num_blocks, state_size(shape)], written in place: the last ``length - 1`` rows of ``x``, then
            the states, then ``x`` and ``step`` of drafts.
        meta: The step's requests.
        shape: The layer's constants; ``num_kv_heads`` groups of heads that share B and C.

    Returns:
        [num_tokens, num_heads * v_head_dim] in the type of ``x``, rounded once.
    """
    assert isinstance(meta, AttentionMetadata)

    def advance(token: int, window: Tensor, numbers: Sequence[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
        mixed = _convolved(window, conv_weight, conv_bias).to(x.dtype).float()
        result, states = _advance(states, mixed, numbers[0] + step_bias, decay, skip, shape)
        return result if gate is None else result * F.silu(gate[token].float()), states

    return recurrence(x, (step,), cache, meta, shape, advance)


def _convolved(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    sums = (window * weight).sum(0)
    return F.silu(sums if bias is None else sums + bias)


def _advance(
    states: Tensor, mixed: Tensor, step: Tensor, decay: Tensor, skip: Tensor, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """One token: [num_heads * v_head_dim], and the states after it."""
    time = F.softplus(step).clamp(*shape.step_limits)
    groups = shape.num_kv_heads * shape.head_dim
    x, *both = mixed.split([shape.out_width, groups, groups])
    each = shape.num_heads // shape.num_kv_heads
    b, c = (part.view(shape.num_kv_heads, -1).repeat_interleave(each, 0) for part in both)
    x = x.view(shape.num_heads, -1)
    states = states * torch.exp(decay * time)[:, None, None] + b[..., None] * (x * time[:, None])[:, None]
    return ((states * c[..., None]).sum(1) + skip[:, None] * x).flatten(), states
