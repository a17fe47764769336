"""Builds the outputs sent to the api from a request's row in the slot table. Nothing here affects scheduling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine_core.in_flight import I64, InFlight
from engine_core.messages import EngineCoreOutput, FinishReason, Tensor, TokenLogprobs
from engine_core.request import Request
from engine_core.slot_table import SlotTable


def token_output(
    table: SlotTable,
    slot: int,
    tokens: list[int],
    ended: FinishReason | None,
    logprobs: list[TokenLogprobs],
    drafts: Callable[[int], tuple[int, int]] = lambda num_kept: (0, 0),
) -> EngineCoreOutput:
    """The output of a row on the slow path; its tokens are already in the table.

    Removes tokens after the request's end from the table.

    Args:
        table: The slot table.
        slot: The request's slot.
        tokens: The row's new tokens, at least one.
        ended: The reason, if the grammar allows nothing after the last token.
        logprobs: Log probabilities to report.
        drafts: For how many of the tokens, counted from the first, says how many drafts were verified and accepted.
    """
    request = table.request(slot)
    first = int(table.num_known[slot]) - len(tokens)
    stopped, reason = False, None
    for count, token in enumerate(tokens, 1):
        length = first + count
        stopped = _is_stop(request, token) and bool(length >= table.min_tokens[slot])
        is_loop = _is_loop(table, request, length)
        if stopped:
            reason = FinishReason.STOP
        elif ended is not None and count == len(tokens):
            reason = ended
        elif is_loop:
            reason = FinishReason.REPETITION
        elif length >= table.max_tokens[slot]:
            reason = FinishReason.LENGTH
        if reason is not None:
            table.num_known[slot] = length
            tokens = tokens[:count]
            break
    output_index = first - request.num_prompt_tokens
    is_first = output_index == 0 or bool(request.prompt_logprobs)
    prompt_logprobs, request.prompt_logprobs = tuple(request.prompt_logprobs), []
    num_verified, num_accepted = drafts(len(tokens))
    return EngineCoreOutput(
        index=request.index,
        first_output_index=output_index,
        new_token_ids=tuple(tokens),
        finish_reason=reason,
        stop_reason=tokens[-1] if stopped and tokens[-1] in request.params.stop_token_ids else None,
        ends_with_stop_token=stopped,
        new_logprobs=tuple(logprobs[: len(tokens)]),
        num_draft_tokens=num_verified,
        num_accepted_tokens=num_accepted,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens if is_first else None,
        scheduled_time=request.scheduled_time if is_first else None,
    )


def _is_stop(request: Request, token: int) -> bool:
    return token in request.params.stop_token_ids or token in request.params.eos_token_ids


def _is_loop(table: SlotTable, request: Request, length: int) -> bool:
    """Records the last of ``length`` tokens. Returns whether the output up to it is stuck in a loop."""
    if request.repetition is None:
        return False
    found = request.repetition.append(table.token_ids[request.slot, request.num_prompt_tokens : length])
    return found and bool(length >= table.min_tokens[request.slot])


def end_output(table: SlotTable, request: Request, reason: FinishReason) -> EngineCoreOutput:
    """The output of a request that ends between two tokens."""
    num_outputs = int(table.num_known[request.slot]) - request.num_prompt_tokens
    return EngineCoreOutput(
        index=request.index,
        first_output_index=num_outputs,
        finish_reason=reason,
        num_cached_tokens=None if num_outputs else request.num_cached_tokens,
        scheduled_time=None if num_outputs else request.scheduled_time,
    )


def pooling_output(request: Request, value: Tensor) -> EngineCoreOutput:
    """The only output of a pooling request."""
    return EngineCoreOutput(
        index=request.index,
        first_output_index=0,
        finish_reason=FinishReason.STOP,
        pooling_output=value,
        num_cached_tokens=request.num_cached_tokens,
        scheduled_time=request.scheduled_time,
    )


def error_output(request: Request, num_tokens: int, message: str) -> EngineCoreOutput:
    """The output of a request that failed with this many tokens known."""
    return EngineCoreOutput(
        index=request.index,
        first_output_index=num_tokens - request.num_prompt_tokens,
        finish_reason=FinishReason.ERROR,
        error=message,
    )


def keep_prompt_logprobs(table: SlotTable, step: InFlight, entries: tuple[TokenLogprobs, ...]) -> None:
    """Keeps prompt log probabilities for the first token's output. A prompt recomputed later has already reported
    them."""
    for entry in entries:
        request = table.owner(step, entry.row)
        if request is not None and table.num_known[request.slot] == request.num_prompt_tokens:
            request.prompt_logprobs.append(entry)
            table.is_special[request.slot] = True


def token_columns(
    indices: I64, output_indices: I64, offsets: I64 | None, drafts: tuple[I64, I64] | None
) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """The columns of ``EngineCoreOutputs`` for rows with only new tokens.

    Args:
        indices: int64 [tokens]: request of each token.
        output_indices: int64 [tokens]: index of each token in its output.
        offsets: int64 [tokens]: index of each token among its row's tokens; None: one token per row.
        drafts: int64 [tokens] each: drafts verified and accepted in each token's row; None: none.

    Returns:
        ``indices``, ``output_indices``, ``num_tokens``, ``num_draft_tokens`` and ``num_accepted_tokens``.
    """
    counts = b""
    if offsets is not None:
        firsts = (offsets == 0).nonzero()[0]
        ends = np.empty_like(firsts)
        ends[:-1], ends[-1:] = firsts[1:], len(offsets)
        counts = (ends - firsts).astype(np.uint8).tobytes()
        indices, output_indices = indices[firsts], output_indices[firsts]
        drafts = None if drafts is None else (drafts[0][firsts], drafts[1][firsts])
    verified, accepted = (b"", b"") if drafts is None else (each.astype(np.uint8).tobytes() for each in drafts)
    return indices.tobytes(), output_indices.astype(np.int32).tobytes(), counts, verified, accepted
