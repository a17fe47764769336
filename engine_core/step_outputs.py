"""What the api is told of a request: built from its row of the slot table. Nothing here changes who runs."""

from __future__ import annotations

from engine_core.in_flight import InFlight
from engine_core.messages import EngineCoreOutput, FinishReason, Tensor, TokenLogprobs
from engine_core.request import MAX_STOP_IDS, Request
from engine_core.slot_table import SlotTable


def token_output(
    table: SlotTable,
    slot: int,
    token: int,
    output_index: int,
    *,
    stopped: bool,
    ended: FinishReason | None,
    logprobs: TokenLogprobs | None,
) -> EngineCoreOutput:
    """The output of a row that is done or has more to say than its token, which is in the table already.

    Args:
        table: Has the row.
        slot: The request's.
        token: The row's new token.
        output_index: Its index in the output.
        stopped: It is one of the stop tokens in the table's columns, and counts.
        ended: The grammar allows nothing after it; why.
        logprobs: What is reported of it.
    """
    request = table.request(slot)
    params = request.params
    num_tokens = int(table.num_tokens[slot])
    if not stopped and num_tokens >= table.min_tokens[slot]:
        stopped = token in params.all_stop_token_ids[MAX_STOP_IDS:]
    is_loop = _is_loop(table, request)
    reason: FinishReason | None = None
    if stopped:
        reason = FinishReason.STOP
    elif ended is not None:
        reason = ended
    elif is_loop:
        reason = FinishReason.REPETITION
    elif num_tokens >= table.max_tokens[slot]:
        reason = FinishReason.LENGTH
    is_first = output_index == 0 or bool(request.prompt_logprobs)
    prompt_logprobs, request.prompt_logprobs = tuple(request.prompt_logprobs), []
    return EngineCoreOutput(
        index=request.index,
        first_output_index=output_index,
        new_token_ids=(token,),
        finish_reason=reason,
        stop_reason=token if stopped and token in params.stop_token_ids else None,
        ends_with_stop_token=stopped,
        new_logprobs=(logprobs,) if logprobs else (),
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens if is_first else None,
        scheduled_time=request.scheduled_time if is_first else None,
    )


def _is_loop(table: SlotTable, request: Request) -> bool:
    """Takes note of a request's last token; whether its output goes round in circles."""
    if request.repetition is None:
        return False
    slot = request.slot
    num_tokens = table.num_tokens[slot]
    found = request.repetition.append(table.token_ids[slot, request.num_prompt_tokens : num_tokens])
    return found and bool(num_tokens >= table.min_tokens[slot])


def end_output(table: SlotTable, request: Request, reason: FinishReason) -> EngineCoreOutput:
    """The output of a request that ends between two tokens."""
    num_outputs = int(table.num_tokens[request.slot]) - request.num_prompt_tokens
    return EngineCoreOutput(
        index=request.index,
        first_output_index=num_outputs,
        finish_reason=reason,
        num_cached_tokens=None if num_outputs else request.num_cached_tokens,
        scheduled_time=None if num_outputs else request.scheduled_time,
    )


def pooling_output(request: Request, value: Tensor) -> EngineCoreOutput:
    """The only output of a request that generates nothing."""
    return EngineCoreOutput(
        index=request.index,
        first_output_index=0,
        finish_reason=FinishReason.STOP,
        pooling_output=value,
        num_cached_tokens=request.num_cached_tokens,
        scheduled_time=request.scheduled_time,
    )


def error_output(request: Request, num_tokens: int, message: str) -> EngineCoreOutput:
    """The output of a request that failed with so many tokens known."""
    return EngineCoreOutput(
        index=request.index,
        first_output_index=num_tokens - request.num_prompt_tokens,
        finish_reason=FinishReason.ERROR,
        error=message,
    )


def keep_prompt_logprobs(table: SlotTable, step: InFlight, entries: tuple[TokenLogprobs, ...]) -> None:
    """Keeps them for the first token's output. A prompt that is computed again after that has told them already."""
    for entry in entries:
        request = table.owner(step, entry.row)
        if request is not None and table.num_tokens[request.slot] == request.num_prompt_tokens:
            request.prompt_logprobs.append(entry)
            table.is_special[request.slot] = True
