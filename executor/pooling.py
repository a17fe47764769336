"""Pools the hidden states of requests that generate no tokens into vectors.

A prompt may arrive in chunks of any size and with any neighbours, and its vector has the same bits either way: each
pooling takes the rows of its request in position order, regardless of chunk boundaries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from executor.deferred import Deferred
from executor.messages import I32, ResolvedPoolingParams, RowError, Tensor, to_tensor

if TYPE_CHECKING:  # the simulated device also pools, without torch
    import torch

    from executor.request_states import RequestStates

F32 = npt.NDArray[np.float32]

BAD_STATES = "the model produced hidden states that are not finite numbers"
SMALLEST_LENGTH = 1e-12
"""Shorter vectors are not scaled to length 1."""


class Pooling(Protocol):
    """Pools the hidden states of one request."""

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        """The slice of the next positions to take.

        Args:
            first: Position of the first one in the prompt.
            count: Number of positions.
            is_last: Whether the prompt ends with them.
        """

    def take(self, rows: F32) -> None:
        """Takes the hidden states of that slice, float32 [any, hidden_size]; copies what it keeps."""

    def result(self) -> F32:
        """float32 [hidden_size], or [positions, hidden_size]; called once, after the last position."""


class LastPooling:
    """The state of the last position, which in a causal model attends to all others."""

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        return slice(count - 1 if is_last else count, count)

    def take(self, rows: F32) -> None:
        for row in rows:
            self._row: F32 = row.copy()

    def result(self) -> F32:
        return self._row


class FirstPooling:
    """The state of the first position."""

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        return slice(0, 1 if first == 0 else 0)

    def take(self, rows: F32) -> None:
        for row in rows:
            self._row: F32 = row.copy()

    def result(self) -> F32:
        return self._row


class MeanPooling:
    """The mean over all positions: a float32 sum from the first position to the last, then one division."""

    def __init__(self, *, root: bool = False, num_before: int | None = None) -> None:
        """Creates the state.

        Args:
            root: Divide by the root of the number of positions.
            num_before: Each position counts as often as its number, of which the first follows this one (SGPT,
                arXiv:2202.08904). None: all count once.
        """
        self._sum: F32 | None = None
        self._root = root
        self._is_weighted = num_before is not None
        self._number = num_before or 0
        self._weights = 0

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        return slice(0, count)

    def take(self, rows: F32) -> None:
        if self._sum is None:
            self._sum = np.zeros(rows.shape[1], np.float32)
        numbers = np.arange(self._number + 1, self._number + len(rows) + 1)
        self._number += len(rows)
        if self._is_weighted:
            rows = rows * numbers.astype(np.float32)[:, np.newaxis]
        self._weights += int(numbers.sum()) if self._is_weighted else len(rows)
        # NumPy adds the rows of a contiguous array to the first one after the other, however many there are: the order
        # does not depend on the chunk size. (It sums numbers that are neighbours in another order.)
        self._sum = np.add.reduce(np.concatenate((self._sum[np.newaxis], rows)), axis=0)

    def result(self) -> F32:
        assert self._sum is not None
        weights = np.float32(self._weights)
        mean: F32 = self._sum / (np.sqrt(weights) if self._root else weights)
        return mean


class MaxPooling:
    """Of each number of the states, the largest."""

    def __init__(self) -> None:
        self._most: F32 | None = None

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        return slice(0, count)

    def take(self, rows: F32) -> None:
        for row in rows:
            self._most = row.copy() if self._most is None else np.maximum(self._most, row)

    def result(self) -> F32:
        assert self._most is not None
        return self._most


class SeveralPoolings:
    """Vectors behind each other."""

    def __init__(self, parts: Sequence[Pooling]) -> None:
        """``parts``: What makes them."""
        self._parts = parts
        self._slices: deque[list[slice]] = deque()
        """Those that each part wants of positions whose states are in transit."""

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        self._slices.append([part.wanted(first, count, is_last=is_last) for part in self._parts])
        return slice(0, count)

    def take(self, rows: F32) -> None:
        for part, own in zip(self._parts, self._slices.popleft(), strict=True):
            part.take(rows[own])

    def result(self) -> F32:
        return np.concatenate([part.result() for part in self._parts])


class LaterPooling:
    """Pools only the positions behind the first ones."""

    def __init__(self, pooling: Pooling, num_skipped: int) -> None:
        """Creates the state.

        Args:
            pooling: Pools these.
            num_skipped: Number of the others.
        """
        self._pooling = pooling
        self._num_skipped = num_skipped

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        skipped = min(max(self._num_skipped - first, 0), count)  # of these
        own = self._pooling.wanted(max(first - self._num_skipped, 0), count - skipped, is_last=is_last)
        return slice(own.start + skipped, own.stop + skipped)

    def take(self, rows: F32) -> None:
        self._pooling.take(rows)

    def result(self) -> F32:
        return self._pooling.result()


class AllPooling:
    """The states of all positions."""

    def __init__(self) -> None:
        self._parts: list[F32] = []

    def wanted(self, first: int, count: int, *, is_last: bool) -> slice:
        return slice(0, count)

    def take(self, rows: F32) -> None:
        self._parts.append(rows.copy())

    def result(self) -> F32:
        return np.concatenate(self._parts)


POOLINGS: dict[str, Callable[[int], Pooling]] = {
    "LAST": lambda skipped: LastPooling(),
    "MEAN": lambda skipped: MeanPooling(),
    "CLS": lambda skipped: FirstPooling(),
    "ALL": lambda skipped: AllPooling(),
    "MAX": lambda skipped: MaxPooling(),
    "MEAN_SQRT_LEN": lambda skipped: MeanPooling(root=True),
    "WEIGHTED_MEAN": lambda skipped: MeanPooling(num_before=skipped),
}
"""By ``ResolvedPoolingParams.pooling_type``; called with the number of skipped positions."""


def create_pooling(params: ResolvedPoolingParams) -> Pooling:
    """What a request asks for. CLS is the first position behind those that are skipped, as in sentence-transformers."""
    parts: list[Pooling] = []
    for name in params.pooling_type.split("+"):
        part = POOLINGS[name](params.num_skipped)
        parts.append(LaterPooling(part, params.num_skipped) if params.num_skipped else part)
    return parts[0] if len(parts) == 1 else SeveralPoolings(parts)


Layer = Callable[[F32], F32]
"""Takes vectors [..., size], returns others."""


class Head(Protocol):
    """A classifier."""

    activate: Layer

    def __call__(self, vectors: F32) -> F32:
        """Vectors [..., hidden_size] -> logits [..., num_labels]."""


def finish(vectors: F32, params: ResolvedPoolingParams, head: Head | None = None, dense: Sequence[Layer] = ()) -> F32:
    """What a client gets of pooled states: scores of labels, or vectors.

    Args:
        vectors: float32 [..., hidden_size].
        params: Which of the two, and in which form.
        head: The model's classifier.
        dense: Layers that make vectors.
    """
    if params.classifies:
        assert head is not None
        logits = head(vectors)
        return head.activate(logits) if params.normalize else logits
    for layer in dense:
        vectors = layer(vectors)
    return scaled(vectors, params)


def scaled(vectors: F32, params: ResolvedPoolingParams) -> F32:
    """Truncates vectors [..., hidden_size] to the requested number of dimensions, then scales each to length 1."""
    if params.dimensions is not None:
        vectors = vectors[..., : params.dimensions]
    if params.normalize:
        squares = np.square(vectors, dtype=np.float64)
        lengths = np.sqrt(squares.sum(axis=-1, keepdims=True))
        vectors = (vectors / np.maximum(lengths, SMALLEST_LENGTH)).astype(np.float32)
    return vectors


@dataclass
class PoolerOutput:
    vectors: Sequence[tuple[int, Tensor]] = ()
    """Row of the step and result, for each request whose prompt is complete."""
    row_errors: Sequence[RowError] = ()


NOTHING_POOLED = Deferred.known(PoolerOutput())


class Pooler:
    """Pools the hidden states of requests that ask for it. State is by slot and is reset by ``add``."""

    def __init__(
        self,
        max_num_seqs: int,
        head: Head | None = None,
        dense: Sequence[Layer] = (),
        token_dense: Sequence[Layer] = (),
    ) -> None:
        """Creates the state.

        Args:
            max_num_seqs: Number of slots.
            head: The model's classifier.
            dense: Layers that follow pooling.
            token_dense: Those that make vectors of tokens.
        """
        self._head, self._dense, self._token_dense = head, dense, token_dense
        self._params: list[ResolvedPoolingParams | None] = [None] * max_num_seqs
        self._poolings: list[Pooling | None] = [None] * max_num_seqs
        self._is_active = np.zeros(max_num_seqs, np.bool_)
        self._num_active = 0

    def add(self, slot: int, params: ResolvedPoolingParams | None) -> None:
        """Registers a request that enters a slot; None: it generates and is not pooled."""
        self._params[slot] = params
        self._poolings[slot] = None if params is None else create_pooling(params)
        self._num_active += int(params is not None) - int(self._is_active[slot])
        self._is_active[slot] = params is not None

    def remove(self, slots: I32) -> None:
        """Drops requests that leave their slots."""
        if self._num_active:
            for slot in slots[self._is_active[slots]].tolist():
                self.add(slot, None)

    def pool(self, hidden: torch.Tensor, slots: I32, counts: I32, states: RequestStates) -> Deferred[PoolerOutput]:
        """Takes the hidden states of a step.

        Args:
            hidden: [num_tokens, hidden_size], concatenated row by row.
            slots: int32 [rows].
            counts: int32 [rows]: tokens per row.
            states: Request states before the step.

        Returns:
            The vectors of the requests whose prompts end in this step.
        """
        if not self._num_active:
            return NOTHING_POOLED
        active = np.flatnonzero(self._is_active[slots]).tolist()
        is_wide = hidden.dtype.itemsize == 4
        ends = np.cumsum(counts)
        taken: list[_Taken] = []
        tensors: list[torch.Tensor] = []
        for row in active:
            slot, count, end = int(slots[row]), int(counts[row]), int(ends[row])
            params, pooling = self._params[slot], self._poolings[slot]
            assert params is not None and pooling is not None
            first = int(states.num_computed[slot])
            is_last = first + count == int(states.num_prompt[slot])
            wanted = pooling.wanted(first, count, is_last=is_last)
            begin, end = end - count + wanted.start, end - count + wanted.stop
            rows = hidden if begin == 0 and end == len(hidden) else hidden[begin:end]
            tensors.append(rows if is_wide else rows.float())
            taken.append(_Taken(row, params, pooling, is_last))
            if is_last:
                self._poolings[slot] = None
        return Deferred(tensors, lambda arrays: self._pooled(taken, arrays))

    def _pooled(self, taken: list[_Taken], arrays: Sequence[F32]) -> PoolerOutput:
        vectors: list[tuple[int, Tensor]] = []
        row_errors: list[RowError] = []
        for entry, rows in zip(taken, arrays, strict=True):
            entry.pooling.take(rows)
            if not entry.is_last:
                continue
            result = entry.pooling.result()
            if np.isfinite(result).all():
                dense = self._token_dense if entry.params.pooling_type == "ALL" else self._dense
                vectors.append((entry.row, to_tensor(finish(result, entry.params, self._head, dense))))
            else:
                row_errors.append(RowError(row=entry.row, message=BAD_STATES))
        return PoolerOutput(vectors, row_errors)


@dataclass
class _Taken:
    """A row of a step whose hidden states are in transit."""

    row: int
    params: ResolvedPoolingParams
    pooling: Pooling
    is_last: bool
