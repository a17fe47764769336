"""The inputs of one step, as models see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from executor.graphs import Program
from executor.messages import I32
from ops import AdapterRows, AttentionMetadata
from ops.dispatch import Spec, StepInput

HIDDEN = "hidden"
"""The input of a program that is hidden states, if it has one."""


@dataclass(frozen=True)
class Spans:
    """Tokens of a step that attend to each other in both directions: those of images, in some models."""

    rows: torch.Tensor
    """int64 [tokens]: where they are in the step."""
    attention: list[AttentionMetadata]
    """One per group of attention layers, with a row for each span."""


@dataclass(frozen=True)
class Deepstack:
    """What is added to tokens of images after the first layers (Meng et al., arXiv:2406.04334)."""

    rows: torch.Tensor
    """int64 [tokens]: where they are in the step, each once."""
    levels: Sequence[torch.Tensor]
    """For each of the first layers, [tokens, hidden_size]."""

    def add(self, hidden: torch.Tensor, index: int) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] after a layer -> the same."""
        return hidden.index_add(0, self.rows, self.levels[index]) if index < len(self.levels) else hidden


@dataclass
class InputBatch:
    """All tokens of a step, concatenated request by request.

    Under capture the tensors are symbolic values and the rest are ``StepInput``s; models need not know.
    """

    input_ids: torch.Tensor
    """int32 [num_tokens]."""
    positions: torch.Tensor
    """int32 [num_tokens], or [axes, num_tokens] where a position has several axes (images)."""
    attention: list[AttentionMetadata]
    """One per group of attention layers."""
    logits_rows: torch.Tensor
    """int64 [num_samples]: tokens whose logits are needed."""
    row_adapters: AdapterRows | None = None
    """Adapters of the tokens; None: no token has one."""
    sample_adapters: AdapterRows | None = None
    """Adapters of the rows in ``logits_rows``."""
    token_types: torch.Tensor | None = None
    """int32 [num_tokens], of models that have them."""
    spans: Spans | None = None
    """Of a step with images, if the model has them."""
    deepstack: Deepstack | None = None
    """Likewise."""
    hidden: torch.Tensor | None = None
    """[num_tokens, hidden_size] of the previous pipeline stage, None on the first; or that from which a draft head goes
    on."""

    def step_inputs(self) -> dict[str, Any]:
        """The arguments of ``Program.replay``."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "positions": self.positions,
            "logits_rows": self.logits_rows,
            "row_adapters": self.row_adapters,
            "sample_adapters": self.sample_adapters,
        }
        if self.token_types is not None:
            inputs["token_types"] = self.token_types
        if self.hidden is not None:
            inputs[HIDDEN] = self.hidden
        for group, metadata in enumerate(self.attention):
            inputs[f"attention.{group}"] = metadata
        return inputs

    @classmethod
    def of_values(cls, positions: Any, attention: Sequence[Any]) -> InputBatch:
        """The batch of a part of a model under capture, which begins with hidden states and ends with them.

        Args:
            positions: Symbolic positions.
            attention: Step inputs, one per group of attention layers.
        """
        return cls(positions, positions, list(attention), positions)

    @classmethod
    def symbolic(
        cls,
        program: Program,
        num_groups: int,
        *,
        position_axes: int = 1,
        has_token_types: bool = False,
        hidden: Spec | None = None,
    ) -> InputBatch:
        """The inputs of a program under capture.

        Args:
            program: Records the operations on them.
            num_groups: Number of groups of attention layers.
            position_axes: Number of axes of a position.
            has_token_types: Whether the model reads ``token_types``.
            hidden: Of the previous pipeline stage's hidden states, or of those from which a draft head goes on; None:
                there are none.
        """
        ids: Any = program.input("input_ids", Spec("tokens", 1, torch.int32))
        spec = Spec("tokens", position_axes, torch.int32, is_transposed=position_axes > 1)
        positions: Any = program.input("positions", spec)
        groups: list[Any] = [StepInput(f"attention.{group}") for group in range(num_groups)]
        rows: Any = StepInput("logits_rows")
        adapters: Any = StepInput("row_adapters")
        sample_adapters: Any = StepInput("sample_adapters")
        types: Any = program.input("token_types", Spec("tokens", 1, torch.int32)) if has_token_types else None
        states: Any = None if hidden is None else program.input(HIDDEN, hidden)
        return cls(ids, positions, groups, rows, adapters, sample_adapters, types, hidden=states)


def adapter_columns(name: str, adapters: I32) -> dict[str, npt.NDArray[Any]]:
    """Columns to upload for ``adapter_rows``; none if no row has an adapter.

    Args:
        name: Name of the map.
        adapters: int32 [rows]: the adapter of each row; 0: none.
    """
    rows = np.flatnonzero(adapters)
    if not len(rows):
        return {}
    rows = rows[np.argsort(adapters[rows], kind="stable")]
    used, starts = np.unique(adapters[rows], return_index=True)
    return {
        f"{name}.rows": rows,
        f"{name}.adapters": used.astype(np.int32),
        f"{name}.starts": np.append(starts, len(rows)).astype(np.int32),
        f"{name}.of_row": adapters,
    }


def put_adapters(name: str, columns: Mapping[str, npt.NDArray[Any]], adapters: I32) -> None:
    """Fills columns of ``adapter_columns`` that have room for more, and are zero; adapters without rows follow."""
    made = adapter_columns(name, adapters)
    for key, values in made.items():
        columns[key][: len(values)] = values
    if made:
        starts = made[f"{name}.starts"]
        columns[f"{name}.starts"][len(starts) :] = starts[-1]


def adapter_rows(name: str, columns: Mapping[str, torch.Tensor]) -> AdapterRows | None:
    """A map of rows from the columns of ``adapter_columns``, now on the device."""
    if f"{name}.rows" not in columns:
        return None
    rows, adapters, starts, of_row = (columns[f"{name}.{part}"] for part in ("rows", "adapters", "starts", "of_row"))
    return AdapterRows(rows, adapters, starts, of_row)


@dataclass
class ModelOutput:
    """What a model's forward pass returns."""

    hidden: torch.Tensor
    """[num_tokens, hidden_size]."""
    aux_hidden_states: tuple[torch.Tensor, ...] = ()
    """[num_tokens, hidden_size] each: what ``Model.set_aux_hidden_state_layers`` asked for."""
