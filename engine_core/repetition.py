"""Detects requests that repeat themselves."""

from __future__ import annotations

import numpy as np

from engine_core.messages import I32, RepetitionDetection


class RepetitionDetector:
    """Detects when an output ends with one pattern several times in a row.

    For each pattern length it counts how many of the last tokens equal the token that many positions before, so a token
    costs a few array operations, regardless of the output's length.
    """

    __slots__ = ("_needed", "_runs", "_sizes")

    def __init__(self, wanted: RepetitionDetection, output: I32) -> None:
        """Resumes where an earlier life of the request stopped.

        Args:
            wanted: What counts as a repetition.
            output: int32 [num_output_tokens]: the output so far.
        """
        self._sizes = np.arange(wanted.min_pattern_size, wanted.max_pattern_size + 1)
        self._needed = self._sizes * (wanted.min_count - 1)
        self._runs = np.zeros(len(self._sizes), np.int64)
        """By pattern length: how many of the last tokens equal the token that many positions before."""
        if not len(output):
            return
        for i, (size, needed) in enumerate(zip(self._sizes.tolist(), self._needed.tolist(), strict=True)):
            tail = output[-(size + needed) :]
            differs = np.flatnonzero(tail[size:] != tail[:-size])
            self._runs[i] = max(0, len(tail) - size) - (int(differs[-1]) + 1 if len(differs) else 0)

    def append(self, output: I32) -> bool:
        """Records a new token. Returns whether the output now ends with enough repetitions of a pattern.

        Args:
            output: int32 [num_output_tokens]: the whole output, the new token included.
        """
        last = len(output) - 1
        num_sizes = int(np.searchsorted(self._sizes, last, side="right"))
        if not num_sizes:
            return False
        runs = self._runs[:num_sizes]
        runs += 1
        runs[output[last - self._sizes[:num_sizes]] != output[last]] = 0
        return bool((runs >= self._needed[:num_sizes]).any())
