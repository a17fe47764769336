"""Renders chat templates: in the event loop while that is cheap, else in a helper process.

A template is untrusted code, wherever it comes from: the model's author, ``--chat-template``, or a request. Only the
cost of a rendering (``bounded_template.py``) decides where it runs: the usual template with a short conversation is
rendered in the event loop; long conversations go to the helper, and so do templates of requests, which must be
compiled first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import msgspec

from api.model.bounded_template import BeyondBoundsError
from api.model.chat_template import BrokenTemplateError, ChatTemplate, TemplateError
from api.model.history import normalize_messages
from api.model.template_uses import ContentFormat
from engine_core.launch import Helper, HelperError, HelperLimits, JobError

LIMITS = HelperLimits(cpu_seconds=1.5, deadline=6.0, memory_bytes=160 << 20, max_output_bytes=96 << 20)
_TEXT, _BROKEN = b"t", b"b"
JOBS = {"render": "api.model.template_renderer:render_job"}


class Rendering(msgspec.Struct, frozen=True):
    """Everything that a rendering depends on, as plain JSON."""

    source: str | dict[str, str]
    special_tokens: dict[str, str]
    content_format: str
    """``auto``: the format that the template expects."""
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    """Named arguments of ``ChatTemplate.render``."""
    variables: dict[str, Any]
    """Further variables, named by the user."""


class TemplateRenderer:
    """Renders conversations. Its helper process starts on first use."""

    def __init__(self) -> None:
        self._helper = Helper("octavo template helper", JOBS, LIMITS)

    async def render(
        self,
        template: ChatTemplate | str,
        messages: Sequence[Any],
        content_format: str,
        options: Mapping[str, Any],
        variables: Mapping[str, Any],
        *,
        is_short: bool,
        special_tokens: Mapping[str, str],
        threads: Executor,
        owner: str = "",
    ) -> str:
        """Renders a conversation to text.

        Args:
            template: A bounded template, or the source of one that came with a request.
            messages: The conversation, as structs or plain JSON, not yet normalised.
            content_format: The format of content that the template expects; ``auto``: detected from its source.
            options: ``tools``, ``documents``, ``add_generation_prompt``, ``continue_final_message``.
            variables: Further variables of the template.
            is_short: Try to render in the event loop first.
            special_tokens: Special tokens by the names that templates use.
            threads: Executor in which long conversations are encoded.
            owner: Whom the work is for; owners take turns if many jobs wait.

        Raises:
            ValueError: The conversation is malformed. A ``TemplateError``: the template rejects it or is too expensive.
            HelperError: No helper can render it now.
        """
        if is_short and isinstance(template, ChatTemplate):
            try:
                plain = msgspec.to_builtins(list(messages))
                return render_inline(template, plain, content_format, options, variables)
            except BeyondBoundsError:
                pass
        source = template if isinstance(template, str) else template.source

        def encode() -> bytes:
            return _encoded(source, special_tokens, messages, content_format, options, variables)

        data = encode() if is_short else await asyncio.get_running_loop().run_in_executor(threads, encode)
        try:
            result = await asyncio.wrap_future(self._helper.submit("render", data, owner=owner))
        except (JobError, HelperError) as error:
            raise _translated(error) from None
        return _text_of(result)

    def render_blocking(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        variables: Mapping[str, Any],
    ) -> str:
        """Like ``render``, for callers without an event loop."""
        try:
            return render_inline(template, messages, "auto", options, variables)
        except BeyondBoundsError:
            data = _encoded(template.source, template.special_tokens, messages, "auto", options, variables)
        try:
            return _text_of(self._helper.call("render", data))
        except (JobError, HelperError) as error:
            raise _translated(error) from None

    def close(self) -> None:
        """Ends the helper process."""
        self._helper.close()


def render_inline(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    content_format: str,
    options: Mapping[str, Any],
    variables: Mapping[str, Any],
) -> str:
    """Renders in this process.

    Raises:
        ValueError: The conversation is malformed, or the template rejects it.
        BeyondBoundsError: The template is bounded, and this rendering would exceed its budget.
    """
    uses = template.uses(has_tools=bool(options.get("tools")))
    if content_format != "auto":
        wanted: ContentFormat = "openai" if content_format == "openai" else "string"
        uses = replace(uses, content_format=wanted, tool_content_format=wanted)
    return template.render(normalize_messages(messages, uses), **options, **variables)


def render_job(data: bytes) -> bytes:
    """The helper process's job: renders a ``Rendering`` given as JSON. Returns the text, or the template's error.

    Raises:
        ValueError: As for ``render_inline``.
    """
    rendering = msgspec.json.decode(data, type=Rendering)
    source = rendering.source
    try:
        template = _compiled(
            source if isinstance(source, str) else tuple(sorted(source.items())),
            tuple(sorted(rendering.special_tokens.items())),
        )
    except TemplateError as error:
        return _BROKEN + str(error).encode(errors="replace")
    try:
        text = render_inline(
            template, rendering.messages, rendering.content_format, rendering.options, rendering.variables
        )
    except BrokenTemplateError as error:
        return _BROKEN + str(error).encode(errors="replace")
    return _TEXT + text.encode(errors="surrogatepass")


def _text_of(result: bytes) -> str:
    """Decodes the result of ``render_job``."""
    if result[:1] == _BROKEN:
        raise BrokenTemplateError(result[1:].decode())
    return str(memoryview(result)[1:], "utf-8", "surrogatepass")


@lru_cache(maxsize=8)
def _compiled(source: str | tuple[tuple[str, str], ...], special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source if isinstance(source, str) else dict(source), dict(special_tokens))


def _encoded(
    source: str | Mapping[str, str],
    special_tokens: Mapping[str, str],
    messages: Sequence[Any],
    content_format: str,
    options: Mapping[str, Any],
    variables: Mapping[str, Any],
) -> bytes:
    rendering = Rendering(
        source=source if isinstance(source, str) else dict(source),
        special_tokens=dict(special_tokens),
        content_format=content_format,
        messages=list(messages),
        options=dict(options),
        variables=dict(variables),
    )
    try:
        return msgspec.json.encode(rendering)
    except UnicodeEncodeError:
        raise TemplateError("the conversation is not valid text: it contains a lone surrogate") from None
    except TypeError as error:
        raise TemplateError(f"variables of a chat template must be JSON values: {error}") from None


def _translated(error: JobError | HelperError) -> Exception:
    if isinstance(error, JobError):
        return TemplateError(str(error))
    return BrokenTemplateError(f"chat template: {error}") if error.is_fault_of_data else error
