"""The op set of CPUs: the compiled kernels."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import ops
from ops.cpu import adapters, kernels, library
from ops.cpu.library import Library
from ops.cpu.lookup import LookupKernel
from ops.cpu.program import NativeProgram
from ops.cpu.sampling import SamplingKernels
from ops.dispatch import Node, Op, OpSet, Spec

_OPS: tuple[Op[Any, Any], ...] = (
    ops.act_and_mul,
    ops.activation,
    ops.adapted_linear,
    ops.adapted_logits,
    ops.add,
    ops.clip,
    ops.embedding,
    ops.experts,
    ops.gated_delta,
    ops.gather_rows,
    ops.heads_linear,
    ops.latent_attention,
    ops.layer_norm,
    ops.linear,
    ops.logits,
    ops.mamba,
    ops.multiply,
    ops.paged_attention,
    ops.rms_norm,
    ops.rotary_embedding,
    ops.route,
    ops.scale,
    ops.short_conv,
    ops.softcap,
)
"""Ops that map to one kernel each (``instructions.py``)."""


class CpuOps(OpSet):
    """The ops, run by the kernels of one library."""

    multiplies_fp8 = False

    def __init__(self, library: Library) -> None:
        implementations: dict[str, Any] = {op.name: kernels.implementation(op, library) for op in _OPS}
        implementations[ops.pack_adapter.name] = adapters.pack_adapter
        implementations[ops.pack_linear.name] = partial(kernels.pack_linear, library)
        implementations[ops.unpack_linear.name] = partial(kernels.unpack_linear, library)
        implementations[ops.pack_segment.name] = partial(kernels.pack_segment, library)
        implementations[ops.quantize_groups.name] = partial(kernels.quantize_groups, library)
        super().__init__("cpu", implementations)
        self.library = library
        self.capability = library.capability

    def compile(
        self,
        nodes: list[Node],
        specs: list[Spec],
        inputs: dict[str, int],
        outputs: list[int],
        capacity: dict[str, int],
    ) -> NativeProgram:
        return NativeProgram(self.library, nodes, specs, inputs, outputs, capacity)

    @cached_property
    def sampling(self) -> SamplingKernels:
        """The sampling kernels of the library."""
        return SamplingKernels(self.library.dll)

    @cached_property
    def lookup(self) -> LookupKernel:
        """The library's search in earlier text."""
        return LookupKernel(self.library.dll)


def create() -> OpSet:
    """The kernels that suit this machine, or the references if there are none."""
    chosen = library.chosen()
    return OpSet() if chosen is None else CpuOps(chosen)
