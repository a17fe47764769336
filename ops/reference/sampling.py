"""Sampling with counter-based random numbers.

The random number of a token is a function of (seed, index in the output, stream) alone: Philox4x32-10
(Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11). There is no generator state, so the same
request draws the same numbers in any batch, after a preemption and after a restart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ops.dispatch import Spec, op

STREAM_SAMPLE = 0
"""Stream of the number that picks a token; other uses take other streams."""

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(
    seeds: npt.NDArray[np.uint64], counters: npt.NDArray[np.int64], stream: int
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Philox4x32-10.

    Args:
        seeds: uint64 [n], the key.
        counters: int64 [n], >= 0: the low 64 bits of the counter.
        stream: The counter's third word.

    Returns:
        Four uint64 [n] that hold 32 random bits each.
    """
    count = counters.astype(np.uint64)
    c0, c1 = count & _LOW, count >> _SHIFT
    c2 = np.full_like(c0, stream)
    c3 = np.zeros_like(c0)
    k0, k1 = seeds & _LOW, seeds >> _SHIFT
    for round_index in range(10):
        if round_index:
            k0 = (k0 + np.uint64(_W0)) & _LOW
            k1 = (k1 + np.uint64(_W1)) & _LOW
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
    return c0, c1, c2, c3


def uniform(
    seeds: npt.NDArray[np.uint64], counters: npt.NDArray[np.int64], stream: int = STREAM_SAMPLE
) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, float64 [n]."""
    high, low, _, _ = philox(seeds, counters, stream)
    bits = ((high << np.uint64(21)) ^ (low >> np.uint64(11))) & np.uint64((1 << 53) - 1)
    result: npt.NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return result


@op(lambda logits, *_: Spec("samples", 1, torch.int64))
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    numbers: Tensor,
) -> Tensor:
    """Picks a token for each row.

    A row of temperature 0 takes its largest logit, the lowest id among equals. Otherwise ``x = logits /
    temperature``, in this order: min-p keeps the tokens of at least ``min_p`` times the largest probability; top-k
    the k largest, low ids first among equals; top-p the fewest largest that hold ``top_p`` of what is left. Of those,
    in the order of their ids, it takes the first at which the running sum of probabilities exceeds ``number * sum``.

    Args:
        logits: float32 [rows, vocab_size]. Minus infinity: never taken.
        temperature: float32 [rows].
        top_k: int32 [rows], 0: off.
        top_p: float32 [rows], 1: off.
        min_p: float32 [rows], 0: off.
        numbers: float64 [rows] in [0, 1).

    Returns:
        int64 [rows].
    """
    tokens = logits.argmax(dim=-1)
    rows = torch.nonzero(temperature > 0).flatten()
    if not rows.numel():
        return tokens
    x = logits[rows] / temperature[rows].unsqueeze(1)
    probs = torch.exp((x - x.amax(dim=-1, keepdim=True)).double())
    for i, row in enumerate(rows.tolist()):
        keep_tokens(probs[i], int(top_k[row]), float(top_p[row]), float(min_p[row]))
    sums = probs.cumsum(dim=-1)
    threshold = (numbers[rows] * sums[:, -1]).unsqueeze(1)
    picked = torch.searchsorted(sums, threshold, right=True).flatten()
    # A number close to 1 may round to the whole sum: then the last kept token it is.
    last = probs.shape[1] - 1 - (probs.flip(-1) > 0).to(torch.uint8).argmax(dim=-1)
    tokens[rows] = torch.minimum(picked, last)
    return tokens


def keep_tokens(probs: Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Zeroes, in place, the probabilities (float64 [vocab_size], largest 1) that the filters remove."""
    if min_p > 0:
        probs[probs < min_p] = 0
    if not (0 < top_k < probs.shape[0]) and top_p >= 1:
        return
    ordered, ids = torch.sort(probs, descending=True, stable=True)
    kept = ordered.shape[0]
    if 0 < top_k < kept:
        kept = top_k
    if top_p < 1:
        mass = ordered[:kept].cumsum(dim=0)
        kept = min(kept, int(torch.searchsorted(mass, top_p * mass[-1]).item()) + 1)
    probs[ids[kept:]] = 0
