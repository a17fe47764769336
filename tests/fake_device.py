"""A device for tests of the scheduler: it executes plans as a worker must, and checks that it could.

Tokens are a function of everything before them, computed from what really lies in the blocks, so a plan that loses,
mixes up or reuses a block too early changes the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine_core.cache_shape import GroupShape
from executor.messages import ModelRunnerOutput, NewRequest, SchedulerOutput, Tensor, TokenLogprobs, i32, to_tensor, u8


class FakeDevice:
    """Keeps for each block the tokens that were written into it, and reads a request's context back from them."""

    def __init__(
        self,
        groups: Sequence[GroupShape],
        vocab_size: int,
        stop_token: int,
        propose: Callable[[list[int]], list[int]] = lambda tokens: [],
    ) -> None:
        """``propose`` takes the tokens of a request and gives drafts of the next ones."""
        self.groups = [_Group(shape) for shape in groups]
        self.vocab_size = vocab_size
        self.stop_token = stop_token
        self.propose = propose
        self.num_accepted = 0
        self.slots: dict[int, _Slot] = {}
        self.last_step = 0

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        assert plan.step_id > self.last_step, "plans come in order"
        self.last_step = plan.step_id
        for slot in i32(plan.finished_slots).tolist():
            del self.slots[slot]
        for request in plan.new_reqs:
            assert request.slot not in self.slots, "a slot is given out twice"
            self.slots[request.slot] = _Slot(request, len(self.groups))
        self._update_blocks(plan.block_updates)
        rows = list(
            zip(
                i32(plan.slots).tolist(),
                i32(plan.num_scheduled_tokens).tolist(),
                u8(plan.num_sampled).tolist(),
                u8(plan.num_draft_tokens).tolist() or [0] * len(i32(plan.slots)),
                strict=True,
            )
        )
        assert len({slot for slot, *_ in rows}) == len(rows), "a slot has one row"
        assert not any(allowance and not wanted for _, _, wanted, allowance in rows), "drafts are for rows that sample"
        prompt_logprobs = [
            TokenLogprobs(row, position, b"", b"", 1)
            for row, (slot, count, _, _) in enumerate(rows)
            for position in self.slots[slot].told_positions(count)
        ]
        assert plan.num_steps == 1 or all(wanted and count == 1 + allowance for _, count, wanted, allowance in rows)
        steps: list[list[list[int]]] = []
        for _ in range(plan.num_steps):
            for slot, count, _, allowance in rows:  # all K and V of a step are written before any is read
                del self.slots[slot].drafts[allowance:]
                self._write(self.slots[slot], count - allowance)
            for slot, count, _, allowance in rows:
                self._read(self.slots[slot], count - allowance)
            steps.append([self._sample(self.slots[slot]) for slot, _, wanted, _ in rows if wanted])
            drafts = [self._propose(self.slots[slot]) for slot, _, wanted, _ in rows if wanted]
        pooled = [
            (row, self._pool(self.slots[slot])) for row, (slot, *_) in enumerate(rows) if self.slots[slot].is_pooled
        ]
        return ModelRunnerOutput(
            step_id=plan.step_id,
            sampled_token_ids=np.array(
                [token for row in zip(*steps, strict=True) for token in sum(row, [])], np.int32
            ).tobytes(),
            num_accepted=bytes(len(tokens) - 1 for step in steps for tokens in step),
            num_draft_tokens=bytes(len(tokens) for tokens in drafts),
            draft_token_ids=np.array(sum(drafts, []), np.int32).tobytes(),
            prompt_logprobs=tuple(prompt_logprobs),
            pooler_output=tuple(pooled),
        )

    def spoil(self, plan: SchedulerOutput) -> None:
        """Begins to execute a plan, and dies: whatever it writes is garbage."""
        for slot in i32(plan.finished_slots).tolist():
            del self.slots[slot]
        for request in plan.new_reqs:
            self.slots[request.slot] = _Slot(request, len(self.groups))
        self._update_blocks(plan.block_updates)
        for slot, count in zip(i32(plan.slots).tolist(), i32(plan.num_scheduled_tokens).tolist(), strict=True):
            row, count = self.slots[slot], count * plan.num_steps
            for group, blocks in zip(self.groups, row.blocks, strict=True):
                for position in range(row.num_computed, row.num_computed + count):
                    group.write(blocks[position // group.block_size], position, -7)
                    group.states[blocks[position // group.block_size]] = [-7]
            row.num_computed += count

    def _update_blocks(self, columns: Sequence[bytes]) -> None:
        assert len(columns) in (0, len(self.groups))
        for group, column in enumerate(columns):
            for slot, index, block in i32(column).reshape(-1, 3).tolist():
                blocks = self.slots[slot].blocks[group]
                assert index == len(blocks), "blocks are appended one after another"
                blocks.append(block)

    def _write(self, slot: _Slot, count: int) -> None:
        begin, end = slot.num_computed, slot.num_computed + count
        assert count >= 1 and end <= len(slot.tokens), "only known tokens are computed"
        tokens = slot.tokens + slot.drafts
        for group, blocks in zip(self.groups, slot.blocks, strict=True):
            if group.shape.snapshots is not None:
                group.advance(blocks, slot.tokens, begin - slot.num_replayed, begin, end)
                continue
            for position in range(begin, end + len(slot.drafts)):
                group.write(blocks[position // group.block_size], position, tokens[position])
        slot.num_computed = end
        slot.num_replayed = 0

    def _read(self, slot: _Slot, count: int) -> None:
        """What the row's tokens see must be there in every group."""
        begin, end = slot.num_computed - count, slot.num_computed + len(slot.drafts)
        tokens = slot.tokens + slot.drafts
        for group, blocks in zip(self.groups, slot.blocks, strict=True):
            if group.shape.snapshots is not None:
                continue
            first = 0 if group.window is None else max(0, begin + 1 - group.window)
            seen = [group.read(blocks[position // group.block_size], position) for position in range(first, end)]
            assert seen == tokens[first:end], "the blocks hold the request's own tokens"

    def _pool(self, slot: _Slot) -> Tensor:
        """The context, and how many tokens of it were computed for this request."""
        return to_tensor(np.array([*slot.tokens, slot.num_computed - slot.num_cached], np.float32))

    def _sample(self, slot: _Slot) -> list[int]:
        assert slot.num_computed == len(slot.tokens), "a row samples after its last token"
        sampled: list[int] = []
        for draft in [*slot.drafts, None]:
            sampled.append(next_token(slot.tokens, self.vocab_size, self.stop_token))
            slot.tokens.append(sampled[-1])
            if sampled[-1] != draft:
                break
        slot.num_computed += len(sampled) - 1
        slot.num_replayed = len(sampled) - 1
        self.num_accepted += len(sampled) - 1
        return sampled

    def _propose(self, slot: _Slot) -> list[int]:
        slot.drafts = self.propose(slot.tokens)
        for group in self.groups:
            if group.shape.snapshots is not None:  # as ``RequestStates.draft_room`` has it
                every = group.shape.snapshots.every_of_output
                offset = len(slot.tokens) % every
                del slot.drafts[every - 1 - offset if offset else 0 :]
        return list(slot.drafts)


@dataclass
class _Group:
    """The blocks of a KV cache group."""

    shape: GroupShape

    def __post_init__(self) -> None:
        self.block_size = self.shape.block_size
        self.window = self.shape.window
        self.blocks = np.full((self.shape.num_blocks, self.block_size), -1, np.int64)
        self.states: dict[int, list[int]] = {}
        """The tokens that a block's state has seen, of a group that keeps states."""

    def advance(self, blocks: list[int], tokens: list[int], known: int, begin: int, end: int) -> None:
        """Advances a state that has seen ``known`` tokens, by accepted drafts up to ``begin`` and a step's up to
        ``end``."""
        if known:
            assert self.states[blocks[(known - 1) // self.block_size]] == tokens[:known], "the state is the request's"
        for position in range(begin, end):
            if position == end - 1 or (position + 1) % self.block_size == 0:
                assert blocks[position // self.block_size] >= 0
                self.states[blocks[position // self.block_size]] = tokens[: position + 1]

    def write(self, block: int, position: int, token: int) -> None:
        assert block >= 0, "a block that was freed is written"
        if position % self.block_size == 0:
            self.blocks[block] = -1
        self.blocks[block, position % self.block_size] = token

    def read(self, block: int, position: int) -> int:
        return int(self.blocks[block, position % self.block_size]) if block >= 0 else -1


class _Slot:
    def __init__(self, request: NewRequest, num_groups: int) -> None:
        self.tokens: list[int] = i32(request.token_ids).tolist()
        self.drafts: list[int] = []
        self.num_prompt = request.num_prompt_tokens
        self.num_computed = self.num_cached = request.num_computed_tokens
        self.num_replayed = 0
        self.pools = request.pooling_params is not None
        assert len(request.block_ids) == num_groups
        offsets = request.block_offsets or (0,) * num_groups
        self.blocks: list[list[int]] = [
            [-1] * offset + i32(column).tolist() for offset, column in zip(offsets, request.block_ids, strict=True)
        ]
        self.tells_prompt = request.params is not None and request.params.prompt_logprobs is not None

    @property
    def is_pooled(self) -> bool:
        """Whether the prompt of a request that generates nothing is complete."""
        return self.pools and self.num_computed == self.num_prompt

    def told_positions(self, count: int) -> range:
        """The prompt tokens that follow the next ``count`` ones, if their log probabilities are wanted."""
        if not self.tells_prompt:
            return range(0)
        return range(self.num_computed + 1, min(self.num_computed + count, self.num_prompt - 1) + 1)


def next_token(tokens: list[int], vocab_size: int, stop_token: int) -> int:
    """A token that depends on all before it; now and then the stop token."""
    mixed = 17
    for token in tokens[-40:]:
        mixed = (mixed * 1_000_003 + token + len(tokens)) % 2_147_483_647
    return stop_token if mixed % 29 == 0 else mixed % vocab_size
