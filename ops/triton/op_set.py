"""The op set of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ops.dispatch import Node, OpSet, Spec
from ops.triton import (
    adapters,
    attention,
    codes,
    collectives,
    experts,
    fp8,
    fusion,
    gather,
    latent,
    launch,
    library,
    linear,
    logprobs,
    norm,
    pointwise,
    recurrent,
    rope,
    route,
    sample,
    short_conv,
)
from ops.triton.program import TritonProgram

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "act_and_mul": pointwise.act_and_mul,
    "activation": pointwise.activation,
    "adapted_embedding": adapters.adapted_embedding,
    "adapted_linear": adapters.adapted_linear,
    "adapted_logits": adapters.adapted_logits,
    "add": pointwise.add,
    "all_gather": collectives.all_gather,
    "all_reduce": collectives.all_reduce,
    "clip": pointwise.clip,
    "concat": gather.concat,
    "embedding": linear.embedding,
    "experts": experts.experts,
    "gated_delta": recurrent.gated_delta,
    "gather_rows": gather.gather_rows,
    "heads_linear": latent.heads_linear,
    "latent_attention": latent.latent_attention,
    "layer_norm": norm.layer_norm,
    "linear": linear.linear,
    "logits": linear.logits,
    "mamba": recurrent.mamba,
    "multiply": pointwise.multiply,
    "pack_adapter": adapters.pack_adapter,
    "pack_segment": codes.pack_segment,
    "paged_attention": attention.paged_attention,
    "rms_norm": norm.rms_norm,
    "rotary_embedding": rope.rotary_embedding,
    "route": route.route,
    "sample": sample.sample,
    "scale": pointwise.scale,
    "select_columns": gather.select_columns,
    "select_rows": collectives.select_rows,
    "shard_ids": collectives.shard_ids,
    "short_conv": short_conv.short_conv,
    "softcap": pointwise.softcap,
    "weight_sum": logprobs.weight_sum,
}
"""Launchers by op name. Each takes the op's arguments and ``out``."""


class TritonOps(OpSet):
    """The ops, run by Triton's kernels."""

    rounds_activations = False

    def __init__(self, *, uses_library: bool = False) -> None:
        """``uses_library``: the vendor's library computes products (``library.py``)."""
        changes = {"linear": library.linear} if uses_library else {}
        super().__init__("triton", {**IMPLEMENTATIONS, **changes})
        self.multiplies_fp8 = fp8.has_products(launch.target())

    def compile(
        self,
        nodes: list[Node],
        specs: list[Spec],
        inputs: dict[str, int],
        outputs: list[int],
        capacity: dict[str, int],
    ) -> TritonProgram:
        kernels = {**self.implementations, **fusion.FUSED}
        return TritonProgram(kernels, fusion.fused(nodes, outputs), specs, inputs, outputs, capacity)


def create() -> OpSet:
    """The kernels, for the GPU that ``launch.use_target`` selects."""
    return TritonOps()
