"""Sampling with counter-based random numbers and exact sums.

The random number of a token depends only on (seed, index in the output, stream): Philox4x32-10 (Salmon et al., Parallel
random numbers: as easy as 1, 2, 3, SC11). There is no generator state, so the same request draws the same numbers in
any batch, after a preemption and after a restart.

Probabilities are weights, 1 for the most likely token, and sums of weights count in integer units of 2^-42. Integer
sums do not depend on their order: a kernel may add and search in any order, with vectors of any width and any number of
threads, and still agree with this definition bit for bit. Computing a weight takes only operations that IEEE 754
defines to the last bit: no fused multiply-add, no library exponential. Its relative error is below 2e-7 for likely
tokens and 4e-6 for the least likely that count; anything below a unit, 2e-13, counts as zero.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ops.dispatch import Spec, op

STREAM_SAMPLE = 0
"""Stream of the number that picks a token; other uses take other streams."""

UNIT_BITS = 42
"""A weight of 1 is 2^42 units: with at most 2^20 tokens, sums stay below 2^63."""
MAX_VOCAB_SIZE = 1 << 20
NUMBER_BITS = 53
"""Random bits of a number in [0, 1)."""

_LOG2_E = 1.4426950408889634
_FLOAT32_MAX = torch.finfo(torch.float32).max
EXP2 = [
    float.fromhex(c) for c in ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1")
]
"""2^f on [-0.5, 0.5] is 1 + f * p(f), where p has these float32 coefficients, highest power first."""
_LEAST_EXPONENT = -64.0

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

    A row with temperature 0 takes its largest logit; ties go to the lowest id. Otherwise tokens have weights (see
    ``token_weights``) and are filtered in this order: min-p keeps the tokens whose weight is at least ``min_p``; top-k
    keeps the k largest logits, ties by lowest id; top-p keeps, in the same order, the fewest tokens that hold ``top_p``
    of the remaining units. Of these, in id order, the first at which the running sum of units exceeds ``number * sum``
    is taken.

    Args:
        logits: float32 [rows, vocab_size]; the largest logit of each row is finite. Tokens of minus infinity are never
            taken.
        temperature: float32 [rows].
        top_k: int32 [rows], 0: off.
        top_p: float32 [rows], 1: off.
        min_p: float32 [rows], 0: off.
        numbers: float64 [rows] in [0, 1), of which 53 bits are used.

    Returns:
        int64 [rows].
    """
    assert logits.shape[1] <= MAX_VOCAB_SIZE
    tokens = logits.argmax(dim=-1)
    for row in torch.nonzero(temperature > 0).flatten().tolist():
        weights = token_weights(logits[row], float(temperature[row]))
        kept = kept_tokens(logits[row], weights, int(top_k[row]), float(top_p[row]), float(min_p[row]))
        sums = torch.where(kept, units(weights), 0).cumsum(dim=0)
        target = int(float(numbers[row]) * 2.0**NUMBER_BITS) * int(sums[-1]) >> NUMBER_BITS
        tokens[row] = torch.searchsorted(sums, target, right=True)
    return tokens


def token_weights(logits: Tensor, temperature: float) -> Tensor:
    """``exp((logits - largest) / temperature)`` of a row, float32 [vocab_size]. This is the definition, operation by
    operation.

    Args:
        logits: float32 [vocab_size].
        temperature: Representable as float32.
    """
    scale = torch.tensor(min(_LOG2_E / temperature, _FLOAT32_MAX), dtype=torch.float32)
    z = ((logits - logits.amax()) * scale).clamp(min=_LEAST_EXPONENT)
    whole = torch.round(z)  # half to even
    f = z - whole
    power = torch.full_like(f, EXP2[0])
    for coefficient in (*EXP2[1:], 1.0):
        power = power * f + coefficient  # two roundings
    # torch.ldexp multiplies by a power that it computes with pow, which need not be exact.
    return power * ((whole.int() + 127) << 23).view(torch.float32)


def units(weights: Tensor) -> Tensor:
    """Weights in integer units, int64, rounded half to even."""
    return torch.round(weights.double() * 2.0**UNIT_BITS).long()


def kept_tokens(logits: Tensor, weights: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens of a row pass the filters: bool [vocab_size]. See ``sample``."""
    kept = weights >= min_p
    vocab_size = logits.shape[0]
    if not (0 < top_k < vocab_size) and top_p >= 1:
        return kept
    order = torch.sort(torch.where(kept, logits, -math.inf), descending=True, stable=True).indices
    count = min(int(kept.sum()), top_k or vocab_size)
    if top_p < 1:
        mass = units(weights)[order[:count]].cumsum(dim=0)
        count = int(torch.searchsorted(mass, max(1, math.ceil(top_p * int(mass[-1]))))) + 1
    kept = torch.zeros_like(kept)
    kept[order[:count]] = True
    return kept


@op(lambda logits: Spec("samples", 1, torch.int64))
def weight_sum(logits: Tensor) -> Tensor:
    """Sum of all tokens' units at temperature 1: the normaliser of log probabilities.

    Args:
        logits: float32 [rows, vocab_size].

    Returns:
        int64 [rows].
    """
    sums = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for row in range(len(logits)):
        sums[row] = units(token_weights(logits[row], 1.0)).sum()
    return sums


def log_probs(logits: Tensor) -> Tensor:
    """Log probabilities of a row at temperature 1, float32 [vocab_size]. The normaliser is summed in units too."""
    total = int(weight_sum(logits.unsqueeze(0))[0])
    return (logits.double() - logits.amax().double() - math.log(total / 2.0**UNIT_BITS)).float()
