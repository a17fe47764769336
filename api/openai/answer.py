"""From a conversation to a parsed answer: the common part of all chat endpoints.

Chat completions, Anthropic's messages and responses represent conversations and answers differently. Each converts its
request to a ``ChatCompletionRequest``, gets a ``ChatAnswer`` for it, and encodes its events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from api.engine.channel import Delta
from api.engine.queue_bound import NOBODY, Tenant
from api.errors import RequestError
from api.generation.beam_search import BeamSearchParams
from api.generation.generation import Generation
from api.generation.served_model import ServedModel
from api.openai.beam import beam_search_params, create_generation
from api.openai.images import read_images, with_images
from api.openai.prompts import (
    prompt_opened,
    prompt_token_ids,
    prompt_token_offsets,
    render_messages,
    text_of,
)
from api.openai.protocol import ChatCompletionRequest, TokenOffsets
from api.openai.refusals import refuse_chat
from api.openai.sampling import check_stream_fields, sampling_params
from api.openai.structured import requested_grammar
from api.openai.tools import ToolUse, forced_grammar, resolve_tools
from api.params.sampling import SamplingParams
from api.parsers import (
    Content,
    Event,
    ParserChain,
    Reasoning,
    Tool,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    create_parser,
    merge,
)
from engine_core.messages import GrammarSpec

MAX_TOOLS_LOOKED_FOR = 8
"""Tools to search for in a prompt: a template that renders tools renders the first ones, and more would be slow."""
TOOLS_IGNORED = "the model's chat template ignores tools, so the model does not see them; see --chat-template"


class TextFormat(msgspec.Struct, frozen=True):
    """How to parse the text of an answer; see ``create_parser``."""

    reasoning: str | None = None
    tool: str | None = None
    tools: Sequence[Tool] = ()
    forced: bool = False
    prompt_opened: bool | None = None
    is_constrained: bool = False
    """A grammar constrains the text after the reasoning."""
    single_call: bool = False
    """Drop calls after the first."""
    shows_reasoning: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether all of the text is content."""
        return self.reasoning is None and self.tool is None and not self.forced

    def parser(self) -> ParserChain:
        """A parser for one choice."""
        return create_parser(
            self.reasoning,
            self.tool,
            self.tools,
            forced=self.forced,
            prompt_opened=self.prompt_opened,
            needs_mark=self.is_constrained,
        )


class Ending(msgspec.Struct, frozen=True):
    """Why a choice ended, in a form that each protocol translates."""

    reason: str
    """``stop``, ``tool_calls``, ``length``, ``repetition``, ``abort`` or ``error``."""
    stop_string: str | None = None
    """The stop string or pattern that matched."""
    is_context_full: bool = False
    """With ``length``: the end of the context was the limit, not ``max_tokens``."""


class ChoiceText:
    """The text of one choice, delta by delta.

    Attributes:
        num_reasoning_tokens: Tokens inside reasoning, without its tags.
    """

    __slots__ = (
        "_format",
        "_num_broken_calls",
        "_num_calls",
        "_only_whole_calls",
        "_open_call",
        "_parser",
        "num_reasoning_tokens",
    )

    def __init__(self, text_format: TextFormat, *, only_whole_calls: bool = False) -> None:
        """Args:
        text_format: How to parse the text.
        only_whole_calls: Hold back tool calls until they are complete; an incomplete one becomes content, as the
            model wrote it. For protocols that cannot represent a partial call.
        """
        self._format = text_format
        self._parser = text_format.parser()
        self._only_whole_calls = only_whole_calls
        self._open_call: list[Event] | None = None
        """Events of a call that may still be cut off."""
        self._num_calls = 0
        self._num_broken_calls = 0
        self.num_reasoning_tokens = 0

    @property
    def has_calls(self) -> bool:
        """Whether the choice has tool calls, all of them complete."""
        return self._num_calls > 0 and not self._num_broken_calls

    def events(self, delta: Delta) -> list[Event]:
        """The events that a delta completes; the last delta completes all. Adjacent events of a kind are merged."""
        parser = self._parser
        was_reasoning = parser.is_reasoning
        events = parser.feed(delta.text)
        if was_reasoning and parser.is_reasoning:
            self.num_reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            events += parser.finish()
        if not events:
            return events
        if self._only_whole_calls:
            events = self._whole_calls(events)
        else:
            for event in events:
                self._count(event)
        kept = [event for event in events if self._is_wanted(event)]
        return merge(kept) if len(kept) > 1 else kept

    def _count(self, event: Event) -> None:
        if isinstance(event, ToolCallStart):
            self._num_calls += 1
        elif isinstance(event, ToolCallEnd) and not event.complete and self._is_wanted(event):
            self._num_broken_calls += 1

    def _whole_calls(self, events: Iterable[Event]) -> list[Event]:
        """The events, with calls held back until they are complete."""
        result: list[Event] = []
        for event in events:
            if isinstance(event, ToolCallStart):
                self._open_call = [msgspec.structs.replace(event, index=self._num_calls)]
            elif isinstance(event, ToolCallArguments):
                assert self._open_call is not None
                self._open_call.append(msgspec.structs.replace(event, index=self._num_calls))
            elif isinstance(event, ToolCallEnd):
                assert self._open_call is not None
                if event.complete:
                    result += [*self._open_call, ToolCallEnd(self._num_calls)]
                    self._num_calls += 1
                else:
                    result.append(Content(event.text))
                self._open_call = None
            else:
                result.append(event)
        return result

    def _is_wanted(self, event: Event) -> bool:
        if isinstance(event, Content):
            return True
        if isinstance(event, Reasoning):
            return self._format.shows_reasoning
        return event.index == 0 or not self._format.single_call


class ChatAnswer:
    """A generation with the parsed text of its choices."""

    def __init__(
        self,
        generation: Generation,
        text_format: TextFormat,
        *,
        names_call: bool = False,
        context_is_limit: bool = False,
        prompt_text: str = "",
        prompt_token_offsets: TokenOffsets | UnsetType = UNSET,
    ) -> None:
        """Args:
        generation: The generation, not started yet.
        text_format: How to parse its text.
        names_call: Whether the client chose the function to call.
        context_is_limit: The context ends the answer before ``max_tokens`` does.
        prompt_text: The conversation as rendered by the chat template.
        prompt_token_offsets: Positions of the prompt's tokens in that text, if requested.
        """
        self.prompt_text = prompt_text
        self.prompt_token_offsets = prompt_token_offsets
        self.generation = generation
        self.text_format = text_format
        self.names_call = names_call
        self._context_is_limit = context_is_limit
        self._only_whole_calls = False
        self._choices: dict[int, ChoiceText] = {}

    def use_whole_calls(self) -> None:
        """Only complete tool calls are calls; see ``ChoiceText``. Call it before the first delta."""
        self._only_whole_calls = True

    def events(self, delta: Delta) -> list[Event]:
        """The events that a delta completes; see ``ChoiceText``."""
        text = self._choices.get(delta.choice)
        if text is None:
            text = ChoiceText(self.text_format, only_whole_calls=self._only_whole_calls)
            self._choices[delta.choice] = text
        return text.events(delta)

    def finish_reason(self, delta: Delta) -> str | None:
        """The finish reason of chat completions: ``stop`` if the client chose the function to call."""
        if delta.finish_reason is None:
            return None
        reason = self.ending(delta).reason
        return "stop" if reason == "tool_calls" and self.names_call else reason

    def ending(self, delta: Delta) -> Ending:
        """Why a choice ended, from its last delta, after its events were taken."""
        text = self._choices.get(delta.choice)
        reason = delta.finish_reason or ""
        if reason == "stop" and text is not None and text.has_calls:
            return Ending("tool_calls")
        if reason == "length":
            return Ending(reason, is_context_full=self._context_is_limit)
        return Ending(reason, delta.stop_reason if isinstance(delta.stop_reason, str) else None)

    @property
    def num_reasoning_tokens(self) -> int:
        """Reasoning tokens of all choices so far."""
        return sum(text.num_reasoning_tokens for text in self._choices.values())


async def prepare_answer(
    model: ServedModel,
    request: ChatCompletionRequest,
    answer_id: str,
    *,
    tenant: Tenant = NOBODY,
    fits_max_tokens: bool = False,
    work: int = 0,
) -> ChatAnswer:
    """Validates a request, renders and tokenises its conversation. Nothing runs yet.

    Args:
        model: The model; its name has been checked.
        request: The conversation and its parameters.
        answer_id: Id of the generation.
        tenant: The client's tenant.
        fits_max_tokens: Reduce ``max_tokens`` to what fits in the context instead of rejecting the request.
        work: Approximate number of steps to walk the request.

    Raises:
        RequestError: The request is invalid. The error names the field of a chat completion.
    """
    refuse_chat(request)
    check_stream_fields(request)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs requires logprobs: true", "top_logprobs")
    use: ToolUse = await model.host.apart(work, resolve_tools, request, model.config)
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    grammar = await model.host.apart(work, requested_grammar, request)
    params = _sampling_params(model, request, use, grammar, max_tokens)
    if use.schema is not None:
        grammar = await model.host.apart(work, forced_grammar, use.schema)
    request, pictures = await read_images(model, request, tenant)
    text = await render_messages(model, request, request.messages, use.prompt_tools)
    tokens = await prompt_token_ids(model, request, text, add_special_tokens=False, max_tokens=max_tokens)
    prompt, features = with_images(model, request, tokens, pictures)
    room = max(1, model.limits.max_model_len - len(prompt))
    limits = [limit for limit in (params.max_tokens, model.limits.max_output_tokens) if limit]
    if fits_max_tokens and max_tokens is not None:
        params = msgspec.structs.replace(params, max_tokens=min(max_tokens, room))
    opened = await prompt_opened(model, request, use.prompt_tools, text)
    text_format = _text_format(model, request, use, is_constrained=grammar is not None, opened=opened)
    kept = frozenset[int]() if text_format.is_plain else model.special_ids(text_format.parser().special_tokens)
    more: dict[str, Any] = {"opened": opened, "kept_special_ids": kept, "tenant": tenant, "mm_features": features}
    generation = create_generation(model, answer_id, [prompt], params, request, grammar, **more)
    _warn_about_tools(model, request, use, text, generation)
    return ChatAnswer(
        generation,
        text_format,
        names_call=use.is_named,
        context_is_limit=all(limit > room for limit in limits),
        prompt_text=text,
        prompt_token_offsets=await _offsets(model, request, text, len(prompt)),
    )


def _warn_about_tools(
    model: ServedModel, request: ChatCompletionRequest, use: ToolUse, text: str, generation: Generation
) -> None:
    if use.prompt_tools and not _shows_tools(text, use.prompt_tools, request):
        model.host.warn_once(f"requests have tools, but {TOOLS_IGNORED}")
        generation.headers["x-octavo-warning"] = TOOLS_IGNORED


async def _offsets(
    model: ServedModel, request: ChatCompletionRequest, text: str, num_tokens: int
) -> TokenOffsets | UnsetType:
    if not request.return_token_offsets:
        return UNSET
    return await prompt_token_offsets(model, request, text, num_tokens, add_special_tokens=False)


def _text_format(
    model: ServedModel, request: ChatCompletionRequest, use: ToolUse, *, is_constrained: bool, opened: bool | None
) -> TextFormat:
    """How to parse the text of an answer.

    Args:
        model: Names the reasoning parser.
        request: The conversation.
        use: How its tools are used.
        is_constrained: Whether a grammar constrains the answer, or the part after the reasoning.
        opened: Whether the prompt has opened or closed the reasoning; see ``create_parser``.
    """
    is_thoughtless = is_constrained and model.holds_in_reasoning(request.structured_outputs)
    return TextFormat(
        reasoning=None if is_thoughtless else model.config.reasoning_parser,
        tool=use.parser if use.is_parsed else None,
        tools=use.prompt_tools or (),
        forced=use.schema is not None,
        prompt_opened=opened,
        is_constrained=is_constrained,
        single_call=use.is_single,
        shows_reasoning=request.include_reasoning is not False,
    )


def _shows_tools(prompt: str, tools: Sequence[Tool], request: ChatCompletionRequest) -> bool:
    """Whether the template rendered any tool: its name occurs more often than in the conversation."""
    said = [text_of(message) for message in request.messages]
    for tool in tools[:MAX_TOOLS_LOOKED_FOR]:
        name = str(tool["function"]["name"])
        if prompt.count(name) > sum(text.count(name) for text in said):
            return True
    return False


def _sampling_params(
    model: ServedModel,
    request: ChatCompletionRequest,
    use: ToolUse,
    grammar: GrammarSpec | None,
    max_tokens: int | None,
) -> SamplingParams | BeamSearchParams:
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.use_beam_search:
        if use.schema is not None:
            raise RequestError("use_beam_search does not support a tool_choice that forces calls", "tool_choice")
        return beam_search_params(request, grammar, max_tokens=max_tokens, logprobs=logprobs)
    return sampling_params(
        request,
        model.defaults,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )
