"""Reports log probabilities.

The device selects the tokens and returns their logits and the normalising sums. The host takes the logarithms in
float64, so that they are the same everywhere (see ``ops.reference.sampling.log_probs``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

import ops
from executor.deferred import Array, Deferred
from executor.device.steps import StepChannel
from executor.messages import TokenLogprobs
from ops.reference.sampling import UNIT_BITS


def report(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    counts: Sequence[int],
    listed: Sequence[tuple[int, ...]],
    places: Sequence[tuple[int, int]],
    channel: StepChannel,
) -> Deferred[list[TokenLogprobs | None]]:
    """Reports the log probabilities of some rows; None for a row without a finite largest logit.

    Args:
        logits: float32 [rows, vocab_size], unprocessed.
        token_ids: int64 [rows], on the same device: the actual tokens.
        counts: For each row, number of most likely tokens to report, ties by lowest id; -1: all.
        listed: For each row, tokens to report instead of the most likely ones.
        places: For each row, its row in the step and ``TokenLogprobs.position``.
        channel: Channel to the device of the logits.
    """
    vocab_size = logits.shape[1]
    sizes = [
        len(ids) or (vocab_size if count < 0 else min(count, vocab_size))
        for count, ids in zip(counts, listed, strict=True)
    ]
    most = max((size for size, ids in zip(sizes, listed, strict=True) if not ids), default=0)
    columns = [token_ids.unsqueeze(1)]
    if most:
        columns.append(torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :most])
    if any(listed):
        longest = max(map(len, listed))
        padded = np.array([[*ids, *[0] * (longest - len(ids))] for ids in listed], np.int64)
        columns.append(channel.upload({"listed": padded})["listed"])
    ids = torch.cat(columns, dim=1)
    chosen = logits.gather(1, ids)
    ranks = (logits > chosen[:, :1]).sum(dim=1) + 1
    tensors = (ids, chosen, ranks, logits.amax(dim=1), ops.weight_sum(logits))

    starts = [1 + most if ids else 1 for ids in listed]
    return Deferred(tensors, lambda arrays: make_entries(arrays, starts, sizes, places))


def make_entries(
    arrays: Sequence[Array], starts: Sequence[int], sizes: Sequence[int], places: Sequence[tuple[int, int]]
) -> list[TokenLogprobs | None]:
    """Takes the logarithms of some rows; None for a row without a finite largest logit.

    Args:
        arrays: Ids and logits [rows, any], the token's in the first column; its rank, the largest logit and
            ``ops.weight_sum`` [rows].
        starts: For each row, the first column to report besides the token's.
        sizes: For each row, number of those columns.
        places: For each row, its row in the step and ``TokenLogprobs.position``.
    """
    all_ids, all_logits, all_ranks, tops, sums = arrays
    entries: list[TokenLogprobs | None] = []
    for index, (row, position) in enumerate(places):
        if not np.isfinite(tops[index]):
            entries.append(None)
            continue
        columns = [0, *range(starts[index], starts[index] + sizes[index])]
        values = all_logits[index, columns].astype(np.float64)
        logprobs = values - float(tops[index]) - math.log(int(sums[index]) / 2.0**UNIT_BITS)
        entries.append(
            TokenLogprobs(
                row=row,
                position=position,
                token_ids=all_ids[index, columns].astype(np.int32).tobytes(),
                logprobs=logprobs.astype(np.float32).tobytes(),
                rank=int(all_ranks[index]),
            )
        )
    return entries
