"""Outputs that are caught in a loop."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine_core.messages import RepetitionDetection
from engine_core.repetition import RepetitionDetector


def ends_in_a_loop(output: list[int], wanted: RepetitionDetection) -> bool:
    """The definition."""
    for size in range(wanted.min_pattern_size, wanted.max_pattern_size + 1):
        tail = output[-size * wanted.min_count :]
        if len(tail) == size * wanted.min_count and tail == tail[:size] * wanted.min_count:
            return True
    return False


@given(
    output=st.lists(st.integers(0, 2), max_size=40),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
    min_count=st.integers(2, 4),
    resumed=st.integers(0, 40),
)
def test_a_loop_is_found_with_its_last_token(output: list[int], sizes: list[int], min_count: int, resumed: int) -> None:
    wanted = RepetitionDetection(sizes[1], sizes[0], min_count)
    tokens = np.array(output, np.int32)
    resumed = min(resumed, len(output))
    detector = RepetitionDetector(wanted, tokens[:resumed])
    for length in range(resumed + 1, len(output) + 1):
        assert detector.append(tokens[:length]) == ends_in_a_loop(output[:length], wanted)
