"""The inputs of one step, as models see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from executor.graphs import Program
from ops import AttentionMetadata
from ops.dispatch import Spec, StepInput


@dataclass
class InputBatch:
    """All tokens of a step, one after another, request by request.

    Under capture the tensors are symbolic values and the rest are ``StepInput``s; models cannot tell.
    """

    input_ids: torch.Tensor
    """int32 [num_tokens]."""
    positions: torch.Tensor
    """int32 [num_tokens]."""
    attention: list[AttentionMetadata]
    """One per KV cache group."""
    logits_rows: torch.Tensor
    """int64 [num_samples]: tokens whose logits are wanted."""

    def step_inputs(self) -> dict[str, Any]:
        """The arguments of ``Program.replay``."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "positions": self.positions,
            "logits_rows": self.logits_rows,
        }
        for group, metadata in enumerate(self.attention):
            inputs[f"attention.{group}"] = metadata
        return inputs

    @classmethod
    def symbolic(cls, program: Program, num_groups: int) -> InputBatch:
        """The inputs of a program under capture."""
        ids: Any = program.input("input_ids", Spec("tokens", 1, torch.int32))
        positions: Any = program.input("positions", Spec("tokens", 1, torch.int32))
        groups: list[Any] = [StepInput(f"attention.{group}") for group in range(num_groups)]
        rows: Any = StepInput("logits_rows")
        return cls(ids, positions, groups, rows)


@dataclass
class ModelOutput:
    """What a model's forward pass returns."""

    hidden: torch.Tensor
    """[num_tokens, hidden_size]."""
    aux_hidden: list[torch.Tensor] = field(default_factory=list)
    """Hidden states of inner layers that a proposer asked for."""
