"""Sampling of steps whose rows ask for nothing but filters, with the fewest calls: most steps of most servers.

What the launch reads stays at the same addresses, and goes up in one copy. While the same requests are sampled, the
device counts on by itself, and the host computes and uploads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from executor.deferred import Array
from executor.device.steps import ALIGNMENT, Graphs, as_dtype
from executor.messages import I32
from executor.request_states import RequestStates
from executor.sampling.base import SampleRows
from ops.triton.launch import Launch, recorded, submit
from ops.triton.sample import Filters, Randomness, sample_rows

ROW_BYTES = 32
"""Of a row's inputs: filters, seed, index of the token."""
MOST_LAUNCHES = 64
"""Launches that are kept, one for each place and number of logits."""


class PlainSteps:
    """Samples at most one token for each slot."""

    def __init__(self, graphs: Graphs, filters: Array, seeds: Array, results: Tensor) -> None:
        """
        Args:
            graphs: Makes the memory for the inputs.
            filters: [slots] of 16 bytes: temperature, top_k, top_p and min_p of each slot.
            seeds: uint64 [slots].
            results: int64 [twice the rows or more], on the device: tokens go to its start, their status behind them.
        """
        self._all_filters = filters.view(np.int32).reshape(-1, 4)
        self._all_seeds = seeds.view(np.int64)
        self._results = results
        rows = len(filters)
        self._host = np.zeros(-(-rows * ROW_BYTES // ALIGNMENT) * ALIGNMENT, np.uint8)
        self._block = graphs.block(len(self._host))
        filter_bytes, seed_bytes = self._host[: 16 * rows], self._host[16 * rows : 24 * rows]
        self._filters = filter_bytes.view(np.int32).reshape(-1, 4)
        self._seeds = seed_bytes.view(np.int64)
        self._counters = self._host[24 * rows : 32 * rows].view(np.int64)
        self._slots: I32 | None = None
        """Those whose filters and seeds the device has."""
        self._next = 0
        """Position of the first one's token in a step for which the device has counted on."""
        self._kept: dict[tuple[int, int], tuple[Tensor, Sequence[Launch], tuple[Tensor, Tensor]]] = {}

    def changed(self) -> None:
        """A request has entered a slot."""
        self._slots = None

    def sample(self, logits: Tensor, rows: SampleRows, states: RequestStates) -> tuple[Tensor, Tensor]:
        """Launches a step's sampling; see ``ops.triton.sample.sample_rows``.

        Args:
            logits: float32 [rows, vocab_size], in memory that the model's steps share.
            rows: Its rows, no two of a slot.
            states: Of all requests.
        """
        slots, count = rows.slots, len(rows)
        position = int(rows.positions[0])
        if slots is not self._slots or position != self._next:
            self._filters[:count] = self._all_filters[slots]
            self._seeds[:count] = self._all_seeds[slots]
            np.subtract(rows.positions, states.num_prompt[slots], out=self._counters[:count])
            self._block.write(self._host)
            self._slots = slots
        self._next = position + 1
        found = self._kept.get((id(logits), count))
        if found is None:
            found = self._new(logits, count)
        for each in found[1]:
            submit(each)
        return found[2]

    def _new(self, logits: Tensor, count: int) -> tuple[Tensor, Sequence[Launch], tuple[Tensor, Tensor]]:
        """The launch for these logits. They are kept with it, so that no others have their id."""
        device, rows = self._block.device, len(self._seeds)
        table = device[: 16 * rows].view(as_dtype(self._filters)).view(rows, 4)[:count]
        numbers = table.view(logits.dtype)
        seeds = device[16 * rows : 24 * rows].view(as_dtype(self._seeds))[:count]
        counters = device[24 * rows : 32 * rows].view(as_dtype(self._counters))[:count]
        out = results_of(self._results, count)
        with recorded() as launches:
            sample_rows(
                logits,
                Filters(numbers[:, 0], table[:, 1], numbers[:, 2], numbers[:, 3]),
                Randomness(seeds, counters, counts_on=True),
                out=out,
            )
        if len(self._kept) == MOST_LAUNCHES:
            self._kept.clear()
        found = self._kept[id(logits), count] = (logits, launches, out)
        return found


def results_of(results: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Memory for tokens, int64, and status, int32, of a step, one behind the other: they come back in one copy."""
    status = results.view(as_dtype(np.zeros(0, np.int32)))
    return results[:num_rows], status[2 * num_rows : 3 * num_rows]
