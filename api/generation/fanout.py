"""Several engine requests behind one completion; the engine core never knows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

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
        ranked = sorted(range(prompt * best_of, (prompt + 1) * best_of), key=lambda choice: -totals[choice])
        for place, choice in enumerate(ranked[:n]):
            for delta in by_choice[choice]:
                delta.choice = prompt * n + place
                kept.append(delta)
    return kept


def cumulative_logprob(deltas: Iterable[Delta]) -> float:
    """Sum of the log probabilities of a completion's tokens."""
    return sum(float(f32(entry.logprobs)[0]) for delta in deltas for entry in delta.logprobs)
