"""Where chat templates are rendered: here as long as that costs little, else in a helper process.

A template is code from outside, whoever gave it: the model's author, ``--chat-template``, or a request. None of them is
trusted more than another. What decides is what a rendering costs (``bounded_template.py``), so the usual template with
a short conversation is rendered in the event loop; long conversations, and templates of requests, which have to be
compiled first, go to the helper.
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
    """All that a rendering depends on, as plain JSON."""

    source: str | dict[str, str]
    special_tokens: dict[str, str]
    content_format: str
    """``auto``: what the template wants."""
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    """Arguments of ``ChatTemplate.render`` that have a name."""
    variables: dict[str, Any]
    """Further ones, which the user names."""


class TemplateRenderer:
    """Renders conversations. Its helper process starts when it is first needed."""

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
        """The text of a conversation.

        Args:
            template: Bounded; or the source of one that a request brings along.
            messages: The conversation, of structs or plain JSON, not normalised yet.
            content_format: How the template wants contents; ``auto``: as it looks.
            options: ``tools``, ``documents``, ``add_generation_prompt``, ``continue_final_message``.
            variables: What else the template is told.
            is_short: It is worth a try in the event loop.
            special_tokens: By the names that templates know.
            threads: Where long conversations are encoded.
            owner: Whose turn it is, if many wait.

        Raises:
            ValueError: The conversation is malformed. A ``TemplateError``: the template refuses it or costs too much.
            HelperError: Nobody can render it now.
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
        """The same for callers without an event loop."""
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
        ValueError: The conversation is malformed, or the template refuses it.
        BeyondBoundsError: The template is bounded, and this would cost more.
    """
    uses = template.uses(has_tools=bool(options.get("tools")))
    if content_format != "auto":
        wanted: ContentFormat = "openai" if content_format == "openai" else "string"
        uses = replace(uses, content_format=wanted, tool_content_format=wanted)
    return template.render(normalize_messages(messages, uses), **options, **variables)


def render_job(data: bytes) -> bytes:
    """The job of the helper process: a ``Rendering`` as JSON, to text or what is wrong with the template.

    Raises:
        ValueError: As ``render_inline``.
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
    text = render_inline(template, rendering.messages, rendering.content_format, rendering.options, rendering.variables)
    return _TEXT + text.encode(errors="surrogatepass")


def _text_of(result: bytes) -> str:
    """What ``render_job`` returned."""
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
