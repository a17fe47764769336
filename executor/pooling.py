"""From the hidden states of requests that generate nothing to their vectors.

A prompt may come in chunks of any size beside any neighbours, and its vector has the same bits however it came: each
pooling takes the rows of its request in the order of their positions and never looks at how many come together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from executor.messages import I32, PoolingParams, RowError, Tensor, to_tensor

if TYPE_CHECKING:  # the simulated device pools as well, and runs without torch
    import torch

    from executor.request_states import RequestStates

F32 = npt.NDArray[np.float32]

BAD_STATES = "the model produced hidden states that are not finite numbers"
SMALLEST_LENGTH = 1e-12
"""A vector that is shorter is not scaled up to length 1."""


class Pooling(Protocol):
    """What becomes of the hidden states of one request."""

    def take(self, hidden: torch.Tensor, *, is_last: bool) -> None:
        """Takes the next positions, [count, hidden_size]; what is kept of them is copied."""

    def result(self) -> F32:
        """float32 [hidden_size], or [positions, hidden_size]; called once, after the last position."""


def _rows(hidden: torch.Tensor) -> F32:
    rows: F32 = hidden.float().cpu().numpy()
    return rows


class LastPooling:
    """The state of the last position, which in a causal model has seen all others."""

    def take(self, hidden: torch.Tensor, *, is_last: bool) -> None:
        if is_last:
            self._row: F32 = _rows(hidden[-1]).copy()

    def result(self) -> F32:
        return self._row


class FirstPooling:
    """The state of the first position."""

    def __init__(self) -> None:
        self._row: F32 | None = None

    def take(self, hidden: torch.Tensor, *, is_last: bool) -> None:
        if self._row is None:
            self._row = _rows(hidden[0]).copy()

    def result(self) -> F32:
        assert self._row is not None
        return self._row


class MeanPooling:
    """The mean over all positions: a float32 sum from the first position to the last, then one division."""

    def __init__(self) -> None:
        self._sum: F32 | None = None
        self._count = 0

    def take(self, hidden: torch.Tensor, *, is_last: bool) -> None:
        rows = _rows(hidden)
        if self._sum is None:
            self._sum = np.zeros(rows.shape[1], np.float32)
        # Not rows.sum(): its order would depend on the size of the chunk.
        for row in rows:
            self._sum += row
        self._count += len(rows)

    def result(self) -> F32:
        assert self._sum is not None
        mean: F32 = self._sum / np.float32(self._count)
        return mean


class AllPooling:
    """The states of all positions."""

    def __init__(self) -> None:
        self._parts: list[F32] = []

    def take(self, hidden: torch.Tensor, *, is_last: bool) -> None:
        self._parts.append(_rows(hidden).copy())

    def result(self) -> F32:
        return np.concatenate(self._parts)


POOLINGS: dict[str, Callable[[], Pooling]] = {
    "LAST": LastPooling,
    "MEAN": MeanPooling,
    "CLS": FirstPooling,
    "ALL": AllPooling,
}
"""By ``PoolingParams.pooling_type``."""


def finish(vectors: F32, params: PoolingParams) -> F32:
    """Cuts vectors [..., hidden_size] to the wanted number of dimensions, then scales each to length 1."""
    if params.dimensions is not None:
        vectors = vectors[..., : params.dimensions]
    if params.normalize:
        squares = np.square(vectors, dtype=np.float64)
        lengths = np.sqrt(squares.sum(axis=-1, keepdims=True))
        vectors = (vectors / np.maximum(lengths, SMALLEST_LENGTH)).astype(np.float32)
    return vectors


@dataclass
class PoolerOutput:
    vectors: list[tuple[int, Tensor]] = field(default_factory=list)
    """Row of the step and result, for each request whose prompt is complete."""
    row_errors: list[RowError] = field(default_factory=list)


class Pooler:
    """Pools the hidden states of the requests that want it. State is by slot, and begins anew with ``add``."""

    def __init__(self, max_num_seqs: int) -> None:
        self._params: list[PoolingParams | None] = [None] * max_num_seqs
        self._poolings: list[Pooling | None] = [None] * max_num_seqs
        self._is_active = np.zeros(max_num_seqs, np.bool_)

    def add(self, slot: int, params: PoolingParams | None) -> None:
        """A request entered a slot; None: it generates, and its hidden states are let alone."""
        self._params[slot] = params
        self._poolings[slot] = None if params is None else POOLINGS[params.pooling_type]()
        self._is_active[slot] = params is not None

    def remove(self, slots: I32) -> None:
        """Requests left their slots."""
        for slot in slots[self._is_active[slots]].tolist():
            self.add(slot, None)

    def pool(self, hidden: torch.Tensor, slots: I32, counts: I32, states: RequestStates) -> PoolerOutput:
        """Takes the hidden states of a step.

        Args:
            hidden: [num_tokens, hidden_size], row by row.
            slots: int32 [rows].
            counts: int32 [rows]: tokens of each row.
            states: As they were before the step.

        Returns:
            The vectors of the requests whose prompts end in this step.
        """
        output = PoolerOutput()
        rows = np.flatnonzero(self._is_active[slots])
        if not len(rows):
            return output
        ends = np.cumsum(counts)
        for row in rows.tolist():
            slot, count, end = int(slots[row]), int(counts[row]), int(ends[row])
            params, pooling = self._params[slot], self._poolings[slot]
            assert params is not None and pooling is not None
            is_last = int(states.num_computed[slot]) + count == int(states.num_prompt[slot])
            pooling.take(hidden[end - count : end], is_last=is_last)
            if not is_last:
                continue
            result = pooling.result()
            self._poolings[slot] = None
            if np.isfinite(result).all():
                output.vectors.append((row, to_tensor(finish(result, params))))
            else:
                output.row_errors.append(RowError(row=row, message=BAD_STATES))
        return output
