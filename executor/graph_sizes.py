"""The sizes of steps that have graphs: other steps are padded to them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

TOKENS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Tokens of padded steps. Larger steps work so long that launching them costs nothing."""
SAMPLES = (8, 64)
"""Samples of padded steps, besides as many as tokens."""
WARM = 64
"""Steps of up to this many tokens have their graphs before the first request; others when they first occur."""
UPDATES = 64
"""Block updates that a step has room for, besides one per row. More need a copy of their own."""


@dataclass(frozen=True)
class Size:
    """What a step has room for."""

    tokens: int
    rows: int
    samples: int
    is_padded: bool = True
    """Whether other steps have it, too: its launches are kept."""
    has_adapters: bool = False
    """Whether its rows may have adapters."""

    @property
    def updates(self) -> int:
        """Block updates of each group."""
        return self.rows + UPDATES


@dataclass(frozen=True)
class GraphSizes:
    """The sizes to which steps are padded."""

    max_num_seqs: int
    max_tokens: int
    max_samples: int

    def size(self, num_tokens: int, num_rows: int, num_samples: int) -> Size:
        """The smallest size with room for a step."""
        if num_tokens > TOKENS[-1] or num_rows > self.max_num_seqs:
            return Size(num_tokens, num_rows, num_samples, is_padded=False)
        tokens = min(TOKENS[bisect_left(TOKENS, num_tokens)], self.max_tokens)
        most = min(tokens, self.max_samples)
        samples = next((count for count in SAMPLES if num_samples <= count < most), most)
        return Size(tokens, min(tokens, self.max_num_seqs), samples)

    @property
    def largest(self) -> Size:
        """A size that no step exceeds in any respect."""
        return Size(self.max_tokens, self.max_num_seqs, self.max_samples, is_padded=False)

    @property
    def all(self) -> list[Size]:
        """All sizes, but for those that differ in samples alone: they have room for the most."""
        padded = [
            self.size(tokens, tokens, tokens) for tokens in TOKENS if tokens <= min(self.max_num_seqs, self.max_tokens)
        ]
        mixed = [self.size(min(tokens, self.max_tokens), 1, self.max_samples) for tokens in TOKENS]
        return list(dict.fromkeys([*padded, *mixed, self.largest]))

    @property
    def warm(self) -> list[Size]:
        """Sizes of decode steps that come first, largest first."""
        most = min(WARM, self.max_num_seqs, self.max_tokens)
        return list(dict.fromkeys(self.size(count, count, count) for count in range(most, 0, -1)))
