"""Plans of several steps in a row: a worker computes them one after another and answers once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np

from executor.messages import I64, ModelRunnerOutput, RowError, SchedulerOutput, TokenLogprobs, i32, u8

E = TypeVar("E", RowError, TokenLogprobs)


def steps_of(plan: SchedulerOutput) -> Sequence[SchedulerOutput]:
    """The steps of a plan, as plans: ``num_steps`` of each is the number of those that are left, itself included."""
    if plan.num_steps == 1:
        return (plan,)
    following = SchedulerOutput(
        step_id=plan.step_id,
        slots=plan.slots,
        num_scheduled_tokens=plan.num_scheduled_tokens,
        num_sampled=plan.num_sampled,
        num_draft_tokens=plan.num_draft_tokens,
    )
    return plan, *(
        msgspec.structs.replace(following, num_steps=num_left) for num_left in range(plan.num_steps - 1, 0, -1)
    )


class Answers:
    """Joins the results of a plan's steps, which come in order."""

    def __init__(self) -> None:
        self._parts: list[ModelRunnerOutput] = []

    def add(self, part: ModelRunnerOutput, num_left: int) -> ModelRunnerOutput | None:
        """Takes the result of a step; the last one gives that of the plan.

        Args:
            part: The step's result.
            num_left: ``num_steps`` of the step, see ``steps_of``.
        """
        if num_left == 1 and not self._parts:
            return part
        self._parts.append(part)
        if num_left > 1:
            return None
        parts, self._parts = self._parts, []
        return _joined(parts)


def _joined(parts: Sequence[ModelRunnerOutput]) -> ModelRunnerOutput:
    """The result of a plan whose steps sample in each row."""
    tokens = [i32(part.sampled_token_ids) for part in parts]
    num_rows = len(tokens[0]) - sum(parts[0].num_accepted)
    accepted = _per_step([part.num_accepted for part in parts], num_rows)
    counts = np.ones((len(parts), num_rows), np.int64)
    if accepted:
        counts += u8(accepted).reshape(counts.shape)
    rows = np.tile(np.arange(num_rows), len(parts)).repeat(counts.ravel())
    errors: dict[int, RowError] = {}
    logprobs: list[TokenLogprobs] = []
    for part, begins in zip(parts, counts.cumsum(axis=0) - counts, strict=True):
        for error in part.row_errors:
            errors.setdefault(error.row, _behind(error, begins))
        logprobs += [_behind(entry, begins) for entry in part.logprobs]
    last = parts[-1]
    return ModelRunnerOutput(
        step_id=last.step_id,
        rank=last.rank,
        sampled_token_ids=np.concatenate(tokens)[rows.argsort(kind="stable")].tobytes(),
        num_accepted=accepted,
        num_verified=_per_step([part.num_verified for part in parts], num_rows),
        num_draft_tokens=last.num_draft_tokens,
        draft_token_ids=last.draft_token_ids,
        row_errors=tuple(errors.values()),
        logprobs=tuple(logprobs),
        forward_ms=sum(part.forward_ms for part in parts),
    )


def _per_step(columns: Sequence[bytes], num_rows: int) -> bytes:
    """uint8 [steps, rows] of the steps' columns, of which empty ones are zeros; empty if all are."""
    return b"".join(column or bytes(num_rows) for column in columns) if any(columns) else b""


def _behind(entry: E, begins: I64) -> E:
    """An entry of a step for one of a row's tokens, as that of the plan.

    Args:
        entry: The entry.
        begins: int64 [rows]: tokens of earlier steps.
    """
    return msgspec.structs.replace(entry, position=entry.position + int(begins[entry.row]))
