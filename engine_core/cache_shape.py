"""What the engine core knows of the KV cache: groups of layers, each with blocks of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine_core.config import SchedulerConfig


@dataclass(frozen=True)
class GroupShape:
    """The blocks of layers that share block tables."""

    num_blocks: int
    block_size: int
    """Tokens in a block."""
    window: int | None = None
    """A token sees itself and this many minus one before it; None: all before it."""

    def max_live_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """The most blocks that a sequence needs at a time until so many of its tokens are computed.

        Args:
            num_tokens: Of the sequence.
            step_tokens: See ``max_step_tokens``.
        """
        num_blocks = -(-num_tokens // self.block_size)
        if self.window is None:
            return num_blocks
        span = self.window - 1 + step_tokens
        return min(num_blocks, (span - 2) // self.block_size + 2)  # a span begins anywhere in its first block

    def first_live_block(self, num_tokens: int) -> int:
        """Index of the first block that the token after ``num_tokens`` others sees."""
        return 0 if self.window is None else max(0, num_tokens + 1 - self.window) // self.block_size

    def max_len(self, step_tokens: int) -> float:
        """The longest sequence that fits while nothing else runs, in tokens."""
        if self.window is not None and self.num_blocks >= self.max_live_blocks(1 << 62, step_tokens):
            return math.inf
        return self.num_blocks * self.block_size


@dataclass(frozen=True)
class CacheShape:
    """All groups; a model without a KV cache has none."""

    groups: tuple[GroupShape, ...]

    @property
    def alignment(self) -> int:
        """Tokens of the shortest sequence that is whole blocks in every group."""
        return math.lcm(*(group.block_size for group in self.groups))

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds while no block is behind a window."""
        return max((group.num_blocks * group.block_size for group in self.groups), default=0)

    def max_len(self, step_tokens: int) -> float:
        """The longest sequence that fits every group while nothing else runs, in tokens."""
        return min((group.max_len(step_tokens) for group in self.groups), default=math.inf)


def max_step_tokens(config: SchedulerConfig, max_draft_tokens: int) -> int:
    """The most tokens of a request that are planned beyond what is confirmed of it.

    A prompt is confirmed as it is planned: nothing of it is a guess. Of an output, tokens that steps in flight sample
    are not, nor are the drafts that they verify.
    """
    return max(config.max_num_batched_tokens, config.max_in_flight_steps * (1 + max_draft_tokens))
