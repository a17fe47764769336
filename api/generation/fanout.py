"""``best_of``: several engine requests per returned completion, unknown to the engine core."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from api.engine.channel import Delta
from engine_core.messages import f32


def choose_best(deltas: Iterable[Delta], n: int, best_of: int) -> list[Delta]:
    """Keeps the ``n`` completions of each prompt with the highest cumulative log probability, best first.

    Args:
        deltas: All deltas of all completions, with log probabilities; each prompt has ``best_of`` choices.
        n: Completions to keep per prompt.
        best_of: Completions per prompt.

    Returns:
        The deltas of those completions; choice ``i`` of prompt ``p`` is now ``p * n + i``. Ties keep the earlier one.
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
    """Indices of the ``n`` highest cumulative log probabilities, highest first; ties keep the earlier one."""
    return sorted(range(len(totals)), key=lambda place: -totals[place])[:n]


def cumulative_logprob(deltas: Iterable[Delta]) -> float:
    """Sum of the log probabilities of a completion's tokens."""
    return sum(float(f32(entry.logprobs)[0]) for delta in deltas for entry in delta.logprobs)
