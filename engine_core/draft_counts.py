"""Counts of drafts, for metrics."""

from __future__ import annotations

from executor.config import MAX_DRAFT_TOKENS


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
        self._at_least = [0] * MAX_DRAFT_TOKENS
        """Rows with more accepted drafts than the index."""
        self._per_position: tuple[int, ...] = ()

    def add(self, num_verified: bytes, num_accepted: bytes) -> None:
        """Counts a step.

        Args:
            num_verified: uint8 [rows]: drafts of each row.
            num_accepted: uint8 [rows]: accepted drafts of each row.
        """
        self.num_drafts += len(num_verified) - num_verified.count(0)
        self.num_draft_tokens += sum(num_verified)
        total = sum(num_accepted)
        if not total:
            return
        self.num_accepted_tokens += total
        for accepted in num_accepted:
            for position in range(accepted):
                self._at_least[position] += 1
        most = sum(count > 0 for count in self._at_least)
        self._per_position = tuple(self._at_least[:most])

    def accepted_per_position(self) -> tuple[int, ...]:
        """Accepted drafts by their position in a row, without positions that had none."""
        return self._per_position
