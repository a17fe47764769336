"""Several engine requests behind one completion; the engine core never knows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from api.engine.channel import Delta
from engine_core.messages import f32


def choose_best(deltas: Iterable[Delta], n: int, best_of: int) -> list[Delta]:
    """Of each ``best_of`` completions the ``n`` with the highest cumulative log probability, the best first.

    Args:
        deltas: All deltas of all completions, with log probabilities; ``best_of`` choices belong to a prompt.
        n: How many to keep of each prompt.
        best_of: How many there are of each prompt.

    Returns:
        Their deltas; choice ``i`` of prompt ``p`` is now choice ``p * n + i``. Of equals the earlier stays.
    """
    if n == best_of:
        return list(deltas)
    by_choice: dict[int, list[Delta]] = defaultdict(list)
    for delta in deltas:
        by_choice[delta.choice].append(delta)
    totals = {choice: cumulative_logprob(parts) for choice, parts in by_choice.items()}
    kept: list[Delta] = []
    for prompt in range(max(by_choice, default=-1) // best_of + 1):
        first = prompt * best_of
        ranked = best_places([totals[first + place] for place in range(best_of)], n)
        for place, best in enumerate(ranked):
            for delta in by_choice[first + best]:
                delta.choice = prompt * n + place
                kept.append(delta)
    return kept


def best_places(totals: Sequence[float], n: int) -> list[int]:
    """Places of the ``n`` highest cumulative log probabilities, the highest first; of equals the earlier."""
    return sorted(range(len(totals)), key=lambda place: -totals[place])[:n]


def cumulative_logprob(deltas: Iterable[Delta]) -> float:
    """Sum of the log probabilities of a completion's tokens."""
    return sum(float(f32(entry.logprobs)[0]) for delta in deltas for entry in delta.logprobs)
