"""Thinking budgets, and grammars that apply only after the thinking."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from api.errors import RequestError
from api.model.tokenizer import Tokenizer
from api.parsers import create_parser, is_last_turn_needed, prompt_opens_reasoning, resolve_reasoning_parser
from engine_core.messages import GrammarSpec, ResolvedParams, ThinkingBudget, Thought

FIELD = "thinking_token_budget"
_LAST_WORDS = "\ue000last-words\ue000"
TAIL = 64
"""Tokens at the end of a prompt that are searched for reasoning markers."""


@dataclass(frozen=True)
class PromptEnd:
    """The end of a prompt, from which it is determined whether the model is thinking."""

    reasoning_parser: str | None
    """Name of the server's reasoning parser, which defines the markers."""
    tokenizer: Tokenizer
    """Converts the markers to tokens."""
    vocab_size: int
    """Width of the logits."""
    prompt: Sequence[int]
    opened: bool | UnsetType | None = UNSET
    """Result of ``prompt_opens_reasoning`` for a conversation; unset: not a conversation, and the tokens decide."""


async def conversation_opens_reasoning(
    reasoning: str | None,
    render: Callable[..., Awaitable[str]],
    messages: Sequence[Any],
    prompt: str,
    *,
    continues: bool,
) -> bool | None:
    """Whether the prompt of a conversation ends in the middle of reasoning.

    Args:
        reasoning: Name of the reasoning parser, if there is one.
        render: Renders other messages in the same way; takes ``add_generation_prompt`` and ``continue_final_message``.
        messages: The conversation: structs or mappings.
        prompt: The rendered conversation.
        continues: The model continues the last message.

    Returns:
        See ``prompt_opens_reasoning``.
    """
    if reasoning is None:
        return None
    turn: str | None = prompt
    if is_last_turn_needed(reasoning, prompt):
        turn = await _last_turn(render, messages, prompt, continues=continues)
    return None if turn is None else prompt_opens_reasoning(reasoning, turn)


async def _last_turn(
    render: Callable[..., Awaitable[str]], messages: Sequence[Any], prompt: str, *, continues: bool
) -> str | None:
    """The part of a prompt that belongs to the turn that the model continues: its header, or the last message.

    Returns:
        None if it cannot be determined with this template.
    """
    last = messages[-1]
    try:
        if continues:
            before = ""
            if len(messages) > 1:
                before = await render(messages[:-1], add_generation_prompt=False, continue_final_message=False)
            if prompt.startswith(before):
                return prompt[len(before) :]
            content = last.get("content") if isinstance(last, Mapping) else last.content
            return content if isinstance(content, str) else None
        other = {"content": _LAST_WORDS}
        marked = {**last, **other} if isinstance(last, Mapping) else msgspec.structs.replace(last, **other)
        header = (await render([*messages[:-1], marked])).rpartition(_LAST_WORDS)[2]
    except RequestError as error:
        if error.status >= 500:
            raise
        return None
    except ValueError:
        return None
    return header if prompt.endswith(header) else None


def thinking_budget(num_tokens: int, place: PromptEnd, params: ResolvedParams) -> ThinkingBudget:
    """The budget of a completion of one prompt.

    Args:
        num_tokens: Maximum tokens of each section of thinking.
        place: The end of the prompt, which may be in the middle of thinking.
        params: The request's other parameters, which must allow the end marker.

    Raises:
        RequestError: The markers are unknown, or the end marker cannot be generated.
    """
    if place.reasoning_parser is None:
        raise RequestError(f"{FIELD} requires a server started with --reasoning-parser", FIELD)
    start, end = _markers(place.reasoning_parser, place.tokenizer)
    if not end or max((*start, *end)) >= place.vocab_size:
        raise RequestError(f"{FIELD}: the model has no token that ends the reasoning", FIELD)
    obstacle = _obstacle(end, params)
    if obstacle == "allowed_token_ids":
        raise RequestError(
            f"{FIELD}: allowed_token_ids must include the end of the reasoning, tokens {list(end)}", FIELD
        )
    if obstacle == "bad_words":
        raise RequestError(f"bad_words must not include the end of the reasoning, which {FIELD} needs", "bad_words")
    if params.min_tokens and set(end) & set(params.all_stop_token_ids):
        raise RequestError(f"{FIELD}: the end of the reasoning would end the output before min_tokens", "min_tokens")
    is_open = _opened_by_tokens(place, start, end) if place.opened is UNSET else place.opened
    starts_open = create_parser(place.reasoning_parser, prompt_opened=is_open).is_reasoning
    return ThinkingBudget(max_tokens=num_tokens, start_token_ids=start, end_token_ids=end, starts_open=starts_open)


def after_thought(
    grammar: GrammarSpec, num_tokens: int | None, place: PromptEnd, params: ResolvedParams
) -> GrammarSpec:
    """Makes a grammar apply only after the thinking, if the model thinks.

    The model thinks if the prompt has begun a thought. It may begin one if the prompt of a conversation has neither
    begun nor ended a thought and the start marker is a single token, or one whose first token begins nothing else
    (``ReasoningParserClass.thought``): the output then either begins with the marker or matches the grammar. In all
    other cases the grammar applies from the first token, since thoughts and answers cannot be told apart.

    Args:
        grammar: The grammar of the answer.
        num_tokens: Maximum tokens of the thought; None: as many as are left.
        place: The end of the prompt, which may be in the middle of thinking.
        params: The request's other parameters, which must allow the end marker.

    Raises:
        RequestError: The prompt has begun a thought that cannot end.
    """
    if place.reasoning_parser is None or place.opened is False:
        return grammar
    format = resolve_reasoning_parser(place.reasoning_parser)
    marks = format.thought or format.special_tokens[:2]
    start, end = (_token_ids(place.tokenizer, mark) for mark in marks)
    is_open = bool(_opened_by_tokens(place, start, end) if place.opened is UNSET else place.opened)
    # The first token of a longer marker may also begin other markup ("<tool_call>"), but it would decide for a thought.
    if not is_open and (place.opened is UNSET or (len(start) != 1 and format.thought is None)):
        return grammar
    obstacle = "reasoning" if not end or max((*start, *end)) >= place.vocab_size else _obstacle(end, params)
    if not obstacle and set(end) & set(params.all_stop_token_ids):
        obstacle = "stop_token_ids"
    if obstacle and is_open:
        raise RequestError(
            f"{obstacle} must allow the end of the reasoning, tokens {list(end)}, after which {grammar.param} "
            'applies; or constrain it from the first token: "structured_outputs": {"enable_in_reasoning": true}',
            obstacle if obstacle != "reasoning" else grammar.param,
        )
    if obstacle:
        return grammar
    thought = Thought(
        end=marks[1].encode(), end_token_ids=end, start_token_ids=start, is_open=is_open, max_tokens=num_tokens
    )
    return msgspec.structs.replace(grammar, thought=thought)


def _markers(reasoning_parser: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of the start and end markers of thinking."""
    start, end = resolve_reasoning_parser(reasoning_parser).special_tokens[:2]
    return _token_ids(tokenizer, start), _token_ids(tokenizer, end)


def _obstacle(end: Sequence[int], params: ResolvedParams) -> str:
    """The parameter that prevents the end marker from being generated; empty if none does."""
    allowed = params.allowed_token_ids
    if allowed is not None and not set(end) <= set(allowed):
        return "allowed_token_ids"
    words = params.bad_words_token_ids
    if any(word == tuple(end[place : place + len(word)]) for word in words for place in range(len(end))):
        return "bad_words"
    return ""


def _token_ids(tokenizer: Tokenizer, marker: str) -> tuple[int, ...]:
    token_id = tokenizer.token_to_id(marker)
    return (token_id,) if token_id is not None else tuple(tokenizer.encode(marker, add_special_tokens=False))


def _opened_by_tokens(place: PromptEnd, start: Sequence[int], end: Sequence[int]) -> bool | None:
    """Whether a prompt that is not a conversation ends in the middle of thinking; see ``PromptEnd.opened``."""
    assert place.reasoning_parser is not None
    if _last_place(place.prompt, start) > _last_place(place.prompt, end):
        return True
    tail = place.tokenizer.decode(place.prompt[-TAIL:], skip_special_tokens=False)
    return prompt_opens_reasoning(place.reasoning_parser, tail)


def _last_place(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    """Position of the last occurrence of a sequence; -1: none."""
    wanted, tokens = list(wanted), list(tokens)
    for place in range(len(tokens) - len(wanted), -1, -1):
        if tokens[place] == wanted[0] and tokens[place : place + len(wanted)] == wanted:
            return place
    return -1
