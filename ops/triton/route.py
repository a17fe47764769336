"""The router of a mixture of experts: a program per token, with its logits in registers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.metadata import Routing
from ops.triton import configs
from ops.triton.catalog import Case, meta
from ops.triton.configs import Config, power_of_two
from ops.triton.launch import launch, result, row_stride

_MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _best(choice, expert, is_left, NONE: tl.constexpr):
    """The expert with the highest number among those that are left, and that number; of equal ones the first."""
    rest = tl.where(is_left, choice, _MINUS_INFINITY)
    highest = tl.max(rest, 0)
    return tl.min(tl.where(is_left & (rest == highest), expert, NONE), 0), highest


@triton.jit
def _in_best_groups(
    choice, expert, known,
    EXPERTS: tl.constexpr, NONE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
):  # fmt: skip
    """Which experts belong to the groups with the largest sums of their two best, or with the best one."""
    SIZE: tl.constexpr = EXPERTS // GROUPS
    group = expert // SIZE
    sums = tl.where(known, 0.0, _MINUS_INFINITY)
    for index in range(GROUPS):
        is_member = known & (group == index)
        first, best = _best(choice, expert, is_member, NONE)
        if GROUP_BEST > 1:
            _, second = _best(choice, expert, is_member & (expert != first), NONE)
            best += second
        sums = tl.where(is_member, best, sums)
    is_left = known
    for _ in range(TOP_GROUPS):
        member, _highest = _best(sums, expert, is_left, NONE)
        is_left = is_left & (group != member // SIZE)
    return known & (is_left == 0)


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, factors_ptr, out_ptr, logits_stride, out_stride, factor, jitter,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SCORES: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr, EXPERTS_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_TILE)
    known = expert < EXPERTS
    logits = tl.load(logits_ptr + token * logits_stride + expert, mask=known, other=_MINUS_INFINITY)
    is_left = known
    if SCORES == "sparsemixer":
        weights = tl.zeros([EXPERTS_TILE], tl.float32)
        for _ in range(TOP_K):
            own, highest = _best(logits, expert, is_left, EXPERTS_TILE)
            is_low = (highest - logits) / tl.maximum(tl.abs(logits), highest) > 2 * jitter
            among = tl.where(is_left & (is_low == 0), tl.exp(logits - highest), 0.0)
            weights = tl.where(expert == own, factor / tl.sum(among, 0), weights)
            is_left = is_left & (expert != own)
    else:
        if SCORES == "softmax":
            scores = tl.exp(logits - tl.max(logits, 0))
            scores = scores / tl.sum(scores, 0)
        else:
            scores = 1.0 / (1.0 + tl.exp(-logits))
        choice = logits
        if bias_ptr is not None:
            choice = scores + tl.load(bias_ptr + expert, mask=known, other=0.0)
        elif GROUPS > 1:
            choice = scores
        if GROUPS > 1:
            is_left = _in_best_groups(choice, expert, known, EXPERTS, EXPERTS_TILE, GROUPS, TOP_GROUPS, GROUP_BEST)
        candidates = is_left
        for _ in range(TOP_K):
            own, _highest = _best(choice, expert, is_left, EXPERTS_TILE)
            is_left = is_left & (expert != own)
        chosen = candidates & (is_left == 0)
        weights = tl.where(chosen, scores, 0.0)
        if NORMALIZE:
            if SCORES == "softmax":
                highest = tl.max(tl.where(chosen, logits, _MINUS_INFINITY), 0)
                weights = tl.where(chosen, tl.exp(logits - highest), 0.0)
                weights = weights / tl.sum(weights, 0)
            else:
                weights = weights / (tl.sum(weights, 0) + 1e-20)
        weights = weights * factor
    if factors_ptr is not None:
        weights = weights * tl.load(factors_ptr + expert, mask=known, other=0.0)
    tl.store(out_ptr + token * out_stride + expert, weights, mask=known)


def route(
    logits: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The op ``route``."""
    out = result(out, tuple(logits.shape), torch.float32, logits)
    tokens, experts = logits.shape
    args = {
        "logits_ptr": logits,
        "bias_ptr": bias,
        "factors_ptr": factors,
        "out_ptr": out,
        "logits_stride": row_stride(logits),
        "out_stride": row_stride(out),
        "factor": float(routing.factor),
        "jitter": float(routing.jitter),
    }
    tile = power_of_two(experts)
    launch(
        route_kernel,
        (tokens,),
        args,
        Config(configs.row(tile, 4), 1, (("EXPERTS_TILE", tile),)),
        EXPERTS=experts,
        TOP_K=routing.top_k,
        SCORES=routing.scores,
        NORMALIZE=routing.normalize,
        GROUPS=routing.num_groups,
        TOP_GROUPS=routing.top_groups,
        GROUP_BEST=min(routing.group_best, experts // routing.num_groups),
    )
    return out


def cases() -> Iterator[Case]:
    """Calls for the catalogue."""
    kinds = {
        "8 of 128": (128, Routing(8, normalize=True)),
        "2 of 16 sparsemixer": (16, Routing(2, "sparsemixer", jitter=0.01)),
        "8 of 256 groups": (256, Routing(8, "sigmoid", True, 2.5, 8, 4)),
    }
    for name, (experts, routing) in kinds.items():
        bias = meta(experts, dtype=torch.float32) if routing.num_groups > 1 else None
        yield Case(name, partial(route, meta(64, experts, dtype=torch.float32), routing, bias))
