"""The tokens of a plan as columns: one entry per token, row by row."""

from __future__ import annotations

import numpy as np

from engine_core.in_flight import I64, Bools, InFlight
from engine_core.messages import I32, i32, u8
from executor.messages import ModelRunnerOutput, row_offsets


class StepTokens:
    """Tokens of the rows that sample: of each step, a row's accepted drafts and one more.

    Attributes:
        rows: int64 [samples]: the rows of the step.
        counts: int64 [samples]: tokens that the worker sampled for each row.
        kept: int64 [samples]: how many of these, from the first, belong to the output. 0 if the request has left its
            slot; later checks may lower others.
        has_drafts: Whether any of the steps verified drafts.
    """

    def __init__(self, step: InFlight, result: ModelRunnerOutput, current: Bools) -> None:
        """
        Args:
            step: The plan.
            result: Its result.
            current: bool [rows]: the request still has its slot.
        """
        self._tokens = i32(result.sampled_token_ids)
        self.rows: I64 = step.sampled.nonzero()[0]
        self.counts: I64 = np.full(len(self.rows), step.num_steps)
        self._starts: I64 | None = None
        """Start of each row's tokens; None: one token per row."""
        self.has_drafts = bool(result.num_verified)
        self._verified = _by_step(result.num_verified, step)
        self._accepted = _by_step(result.num_accepted, step)
        has_accepted = bool(result.num_accepted.strip(b"\0"))
        if has_accepted:
            self.counts += self._accepted.sum(axis=0)
        if has_accepted or step.num_steps > 1:
            self._starts = np.cumsum(self.counts) - self.counts
        self.kept: I64 = self.counts * current[self.rows]
        for error in result.row_errors:
            if step.sampled[error.row] and current[error.row]:
                self.kept[self.sample(error.row)] = error.position

    def sample(self, row: int) -> int:
        """Index of a sampling row in the columns."""
        return int(np.searchsorted(self.rows, row))

    def of(self, sample: int) -> list[int]:
        """The kept tokens of a row."""
        start = sample if self._starts is None else int(self._starts[sample])
        tokens: list[int] = self._tokens[start : start + int(self.kept[sample])].tolist()
        return tokens

    def drafts_of(self, rows: I64) -> tuple[I64, I64] | None:
        """Drafts that were verified in each of these rows, which sample and keep all tokens, and how many of them were
        accepted; None: there were no drafts."""
        if not self.has_drafts:
            return None
        samples = np.searchsorted(self.rows, rows)
        return self._verified[:, samples].sum(axis=0), self._accepted[:, samples].sum(axis=0)

    def drafts_within(self, sample: int, num_kept: int) -> tuple[int, int]:
        """Of a row, the drafts verified in the steps that its first tokens come from, at least one, and how many of
        these tokens were drafts. The last token of each step was none, or does not count as one if the output ends
        before."""
        if not self.has_drafts:
            return 0, 0
        ends = np.cumsum(1 + self._accepted[:, sample])
        num_begun = 1 + int(np.count_nonzero(ends[:-1] < num_kept))
        return int(self._verified[:num_begun, sample].sum()), num_kept - num_begun

    def columns(self) -> tuple[I32, I64, I64 | None]:
        """The kept tokens.

        Returns:
            int32 [tokens]: the tokens; int64 [tokens]: their rows; int64 [tokens]: index of each token among its row's
            tokens, None: one token per row.
        """
        if self._starts is None:
            samples = self.kept.nonzero()[0]
            if len(samples) == len(self.rows):
                return self._tokens, self.rows, None
            return self._tokens[samples], self.rows[samples], None
        samples, offsets = row_offsets(self.counts)
        kept = offsets < self.kept[samples]
        return self._tokens[kept], self.rows[samples[kept]], offsets[kept]


def _by_step(counts: bytes, step: InFlight) -> I64:
    """A column of uint8 [steps, samples] as int64; empty if it is."""
    table: I64 = u8(counts).reshape(step.num_steps, -1).astype(np.int64)
    return table
