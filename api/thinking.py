"""From ``thinking_token_budget`` to what the engine needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence

from api.errors import RequestError
from api.parsers import create_parser, prompt_opens_reasoning, resolve_reasoning_parser
from api.tokenizer import Tokenizer
from engine_core.messages import ResolvedParams, ThinkingBudget

FIELD = "thinking_token_budget"
TAIL = 64
"""Tokens at the end of a prompt that are looked at for what the template says of reasoning."""


def thinking_budget(
    num_tokens: int,
    reasoning_parser: str | None,
    tokenizer: Tokenizer,
    vocab_size: int,
    prompt: Sequence[int],
    params: ResolvedParams,
) -> ThinkingBudget:
    """The budget of a completion of one prompt.

    Args:
        num_tokens: Tokens that each section of thinking may have.
        reasoning_parser: The server's; it knows the markers.
        tokenizer: Spells the markers in tokens.
        vocab_size: Width of the logits.
        prompt: Its token ids; it may leave the model in the middle of thinking.
        params: The request's other parameters, which must leave room for the end marker.

    Raises:
        RequestError: The markers are not known, or the end marker could not be generated.
    """
    if reasoning_parser is None:
        raise RequestError(f"{FIELD} needs a server started with --reasoning-parser", FIELD)
    start, end = (
        _token_ids(tokenizer, marker) for marker in resolve_reasoning_parser(reasoning_parser).special_tokens[:2]
    )
    if not end or max((*start, *end)) >= vocab_size:
        raise RequestError(f"{FIELD}: the model has no tokens for the end of thinking", FIELD)
    allowed = params.allowed_token_ids
    if allowed is not None and not set(end) <= set(allowed):
        raise RequestError(f"{FIELD} needs the end of thinking, tokens {list(end)}, in allowed_token_ids", FIELD)
    if any(word == end[place : place + len(word)] for word in params.bad_words_token_ids for place in range(len(end))):
        raise RequestError(f"bad_words must leave room for the end of thinking, which {FIELD} needs", "bad_words")
    if params.min_tokens and set(end) & set(params.all_stop_token_ids):
        raise RequestError(f"the end of thinking, which {FIELD} needs, ends the output before min_tokens", "min_tokens")
    return ThinkingBudget(
        max_tokens=num_tokens,
        start_token_ids=start,
        end_token_ids=end,
        starts_open=_starts_open(reasoning_parser, tokenizer, prompt, start, end),
    )


def _token_ids(tokenizer: Tokenizer, marker: str) -> tuple[int, ...]:
    token_id = tokenizer.token_to_id(marker)
    return (token_id,) if token_id is not None else tuple(tokenizer.encode(marker, add_special_tokens=False))


def _starts_open(
    reasoning_parser: str, tokenizer: Tokenizer, prompt: Sequence[int], start: Sequence[int], end: Sequence[int]
) -> bool:
    """Whether the output begins inside of thinking."""
    if _last_place(prompt, start) > _last_place(prompt, end):
        return True
    tail = tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
    return create_parser(reasoning_parser, prompt_opened=prompt_opens_reasoning(reasoning_parser, tail)).is_reasoning


def _last_place(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    """Where a sequence stands last; -1: nowhere."""
    wanted, tokens = list(wanted), list(tokens)
    for place in range(len(tokens) - len(wanted), -1, -1):
        if tokens[place] == wanted[0] and tokens[place : place + len(wanted)] == wanted:
            return place
    return -1
