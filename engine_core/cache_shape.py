"""The engine core's view of the KV cache: groups of layers, each with its own blocks."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from engine_core.config import SchedulerConfig
from engine_core.snapshots import Snapshots


@dataclass(frozen=True)
class GroupShape:
    """The blocks of a group of layers that share block tables."""

    num_blocks: int
    block_size: int
    """Tokens in a block."""
    window: int | None = None
    """Tokens that a token attends to, itself included; None: all before it."""
    snapshots: Snapshots | None = None
    """Of a group that keeps states, which states are kept; others are overwritten. None: every block is one's own."""

    def max_live_blocks(self, num_tokens: int, step_tokens: int) -> int:
        """Maximum blocks that a sequence holds at any time until this many of its tokens are computed.

        Args:
            num_tokens: Tokens of the sequence.
            step_tokens: See ``max_step_tokens``.
        """
        num_blocks = -(-num_tokens // self.block_size)
        if self.window is None:
            return num_blocks
        span = self.window - 1 + step_tokens
        if self.snapshots is not None:
            return min(num_blocks, self.snapshots.max_states(num_tokens, span))
        return min(num_blocks, (span - 2) // self.block_size + 2)  # a span may begin anywhere in its first block

    def first_live_block(self, num_tokens: int) -> int:
        """Index of the first block that the token after ``num_tokens`` others attends to."""
        return 0 if self.window is None else max(0, num_tokens + 1 - self.window) // self.block_size

    def max_len(self, step_tokens: int) -> float:
        """The longest sequence that fits while nothing else runs, in tokens."""
        if self.window is not None and self.num_blocks >= self.max_live_blocks(1 << 62, step_tokens):
            return math.inf
        if self.snapshots is not None:  # as many as surely fit
            lengths = range(self.block_size, (self.num_blocks * self.snapshots.every) + 1, self.block_size)
            fits = bisect_right(lengths, self.num_blocks, key=lambda n: self.max_live_blocks(n, step_tokens))
            return fits * self.block_size
        return self.num_blocks * self.block_size


@dataclass(frozen=True)
class CacheShape:
    """All KV cache groups; none for a model without a KV cache."""

    groups: tuple[GroupShape, ...]
    has_states: bool = False
    """Some group keeps a state per block: what a block holds is lost when a later token is computed."""

    @property
    def alignment(self) -> int:
        """Length of the shortest sequence that fills whole blocks in every group."""
        return math.lcm(*(group.block_size for group in self.groups))

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds as long as no block is outside a window; with states alone, the most it may."""
        of_tokens = [group.num_blocks * group.block_size for group in self.groups if group.snapshots is None]
        of_states = [group.num_blocks * group.snapshots.every for group in self.groups if group.snapshots is not None]
        return max(of_tokens or of_states, default=0) // self.alignment * self.alignment

    def max_len(self, step_tokens: int) -> float:
        """The longest sequence that fits every group while nothing else runs, in tokens."""
        return min((group.max_len(step_tokens) for group in self.groups), default=math.inf)


def max_step_tokens(config: SchedulerConfig, max_draft_tokens: int, num_lookahead_tokens: int = 0) -> int:
    """Maximum tokens of a request beyond its confirmed ones that may have blocks.

    Prompt tokens are known, so they are confirmed when planned. Output tokens sampled by steps in flight are not, nor
    are the drafts that these steps verify. Plans of several steps take no more than that (``StepsPerPlan``).
    """
    return max(config.step_tokens, config.max_in_flight_steps * (1 + max_draft_tokens)) + num_lookahead_tokens
