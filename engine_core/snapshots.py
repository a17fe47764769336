"""Which states of a recurrent layer outlive the next token, so that others may go on from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from executor.messages import OUTPUT_SNAPSHOT_TOKENS, SNAPSHOT_TOKENS


@dataclass(frozen=True)
class Snapshots:
    """Where in a sequence states are kept for others to go on from.

    States are large, and a sequence needs the last one alone. So its blocks share memory, but none follows another in
    the memory of a block that ends where a snapshot is due. One is due now and then, one shortly before the end of the
    tokens with which a request starts, and behind that more are, of which the last one stays: that of the turn's end.
    All are multiples of ``alignment``.
    """

    alignment: int = 1
    """Tokens in whole blocks of every group: no other prefix can be found."""
    every: int = SNAPSHOT_TOKENS
    every_of_output: int = OUTPUT_SNAPSHOT_TOKENS
    margin: int = 8
    """The last tokens of a prompt open the answer, and a later turn may show it otherwise: without its reasoning."""
    output_tokens: int = 256
    """Most tokens of an output beyond its confirmed ones that may have blocks."""

    def end_of_prompt(self, num_tokens: int) -> int:
        """Where the snapshot before the end of that many tokens is due; 0: nowhere."""
        return max(0, num_tokens - self.margin) // self.alignment * self.alignment

    def is_due(self, num_tokens: int, ends: tuple[int, int]) -> bool:
        """Whether a snapshot is due after that many tokens of a request.

        Args:
            num_tokens: Tokens from its begin.
            ends: ``end_of_prompt`` of its prompt, and of the tokens with which it has started: others may have been
                computed in an earlier life.
        """
        if num_tokens in ends or num_tokens % self._step(self.every) == 0:
            return True
        return num_tokens > ends[1] and num_tokens % self._step(self.every_of_output) == 0

    def is_temporary(self, num_tokens: int, ends: tuple[int, int]) -> bool:
        """Whether the next snapshot makes this one superfluous."""
        return num_tokens > ends[1] and num_tokens % self._step(self.every) > 0

    def kept(self, num_tokens: int, ends: tuple[int, int]) -> list[int]:
        """Where states of a request are kept once that many of its tokens are computed, in ascending order.

        Args:
            num_tokens: Tokens from its begin.
            ends: See ``is_due``.
        """
        due = [end for end in range(self.alignment, num_tokens + 1, self.alignment) if self.is_due(end, ends)]
        return [end for end in due if end == due[-1] or not self.is_temporary(end, ends)]

    def max_states(self, num_tokens: int, span: int) -> int:
        """At least as many states as that many tokens need if at most ``span`` of them are live."""
        of_output = min(num_tokens, self.output_tokens + self.margin + self.alignment)
        return (
            min(num_tokens, span) // self._step(self.every)
            + of_output // self._step(self.every_of_output)
            + 5  # two ends, the last one, and spans that begin and end within
        )

    def _step(self, every: int) -> int:
        return math.lcm(every, self.alignment)
