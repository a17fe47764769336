"""Forward passes on a GPU whose launches are made for each step.

For attention of libraries: what the host must tell them of a step is no input of a graph. And for draft models, whose
steps are of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from executor.attention.base import AttentionGroup
from executor.forward import ForwardSetup, UploadedForward
from executor.input_batch import HIDDEN, InputBatch
from ops import AdapterRows, AttentionMetadata
from ops.triton.attention import PlannedAttention
from ops.triton.launch import recorded, scratch
from ops.triton.program import TritonProgram

NOWHERE = torch.device("meta")
LONGEST = 1 << 21
"""Tokens of a context that the memory of attention is planned for; it grows no further."""


def rehearse(setup: ForwardSetup, num_tokens: int, num_rows: int, num_samples: int) -> int:
    """Calls the launchers of a step without data. What they take of ``scratch`` says how much a step will.

    Returns:
        Bytes of its work lists.
    """
    assert setup.program is not None and isinstance(setup.program.runner, TritonProgram)

    def column(length: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(length, dtype=dtype, device=NOWHERE)

    def planned(group: AttentionGroup) -> AttentionMetadata:
        blocks = torch.empty(num_rows, LONGEST // group.block_size, dtype=torch.int32, device=NOWHERE)
        slots = column(num_tokens, torch.int64)
        return group.plan(AttentionMetadata(column(num_rows + 1), column(num_rows), blocks, slots, group.block_size))

    with recorded():
        attention = [planned(group) for group in setup.groups]
    batch = InputBatch(column(num_tokens), column(num_tokens), attention, column(num_samples, torch.int64))
    if HIDDEN in setup.program.inputs:
        spec = setup.program.specs[setup.program.inputs[HIDDEN]]
        batch.hidden = torch.empty(num_tokens, spec.width, dtype=spec.dtype, device=NOWHERE)
    if setup.model.num_token_types:
        batch.token_types = column(num_tokens)
    if setup.hidden is not None:
        batch.hidden = torch.empty_like(setup.hidden[:num_tokens], device=NOWHERE)
    if setup.has_adapters:
        batch.row_adapters, batch.sample_adapters = (
            AdapterRows(*(column(count) for _ in range(4))) for count in (num_tokens, num_samples)
        )
    setup.program.runner.rehearse(batch.step_inputs())
    return sum(each.work.num_bytes for each in attention if isinstance(each, PlannedAttention))


def take_rehearsed() -> int:
    """Bytes of ``scratch`` that rehearsals took; they are free again."""
    num_bytes = scratch.num_bytes(NOWHERE)
    scratch.drop(NOWHERE)
    return num_bytes


class LaunchedForward(UploadedForward):
    """See ``executor.forward.Forward``."""

    @classmethod
    def memory(cls, setup: ForwardSetup) -> tuple[int, int]:
        fixed, per_position = super().memory(setup)
        fixed += cls.step_bytes(setup)
        assert setup.channel.graphs is not None
        return fixed + setup.channel.graphs.reserve_bytes, per_position

    @classmethod
    def step_bytes(cls, setup: ForwardSetup) -> int:
        return rehearse(setup, setup.max_tokens, setup.max_num_seqs, setup.max_samples) + take_rehearsed()
