"""Counts of drafts, for metrics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor.config import MAX_DRAFT_TOKENS

U8 = npt.NDArray[np.uint8]


class DraftCounts:
    """Drafts that steps have verified since the start.

    Attributes:
        num_drafts: Rows with drafts.
        num_draft_tokens: Their drafts.
        num_accepted_tokens: Drafts that were accepted.
    """

    def __init__(self) -> None:
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._accepted = np.zeros(MAX_DRAFT_TOKENS + 1, np.int64)
        """Rows by the number of their accepted drafts."""

    def add(self, num_verified: U8, num_accepted: U8) -> None:
        """Counts a step.

        Args:
            num_verified: uint8 [rows]: drafts of each row.
            num_accepted: uint8 [rows]: accepted drafts of each row.
        """
        with_drafts = num_verified > 0
        self.num_drafts += int(np.count_nonzero(with_drafts))
        self.num_draft_tokens += int(num_verified.sum(dtype=np.int64))
        self.num_accepted_tokens += int(num_accepted.sum(dtype=np.int64))
        self._accepted += np.bincount(num_accepted[with_drafts], minlength=len(self._accepted))

    def accepted_per_position(self) -> tuple[int, ...]:
        """Accepted drafts by their position in a row, without positions that had none."""
        if not self.num_accepted_tokens:  # each step asks
            return ()
        at_least = np.cumsum(self._accepted[::-1])[::-1][1:]
        return tuple(np.trim_zeros(at_least, "b").tolist())
