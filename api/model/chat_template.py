"""Renders chat messages to prompt text with a model's Jinja template.

Templates are written for transformers, so the environment offers the same functions as there and renders
the same text. Templates are untrusted code: they run in Jinja's sandbox, see only copies of plain JSON
values, and cannot build or loop over more than a prompt could need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment
from jinja2.utils import Namespace

from api.model.bounded_template import BeyondBoundsError, bound_filters, make_bounded, start_budget
from api.model.template_uses import TemplateUses, find_uses

Message: TypeAlias = dict[str, Any]

MAX_OUTPUT_CHARS: Final = 32 << 20
MAX_RANGE_ITEMS: Final = 1_000_000
"""Maximum numbers that all ``range`` calls of one rendering may yield in total."""

_MAX_MESSAGE_CHARS: Final = 400
_CONTINUE_TAG: Final = "\ue000continue-here\ue000 "
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")


class TemplateError(ValueError):
    """A chat template is invalid, or rejected or failed to render a conversation."""


class BrokenTemplateError(TemplateError):
    """The template itself is at fault, whatever the conversation: it is invalid or too expensive."""


class ChatTemplate:
    """A compiled chat template, or several by name.

    Attributes:
        source: The Jinja source, or several by name.
        special_tokens: Special tokens by the names that templates use.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens_map: Mapping[str, str] | None = None,
        *,
        is_bounded: bool = False,
    ) -> None:
        """
        Args:
            source: Jinja text, or several by name.
            special_tokens_map: Special tokens by the names that templates use, such as ``bos_token``.
            is_bounded: Renderings that would take much time or memory end with ``BeyondBoundsError``. Without this,
                render only in a process that can be killed.

        Raises:
            TemplateError: The template is invalid.
        """
        self.source = source
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if not sources:
            raise TemplateError("the chat template is empty")
        self._templates = {name: _Template(text, is_bounded) for name, text in sources.items()}
        self.special_tokens = dict(special_tokens_map or {})

    def uses(self, *, has_tools: bool) -> TemplateUses:
        """The message format that the template for conversations with or without tools expects.

        Raises:
            TemplateError: There is no such template.
        """
        return self._choose(has_tools).uses

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Renders a conversation.

        Args:
            messages: The conversation as ``normalize_messages`` returns it; values are plain JSON.
            tools: Function definitions. If there are any, a template named ``tool_use`` is preferred.
            documents: Documents for retrieval-augmented templates.
            add_generation_prompt: End with the header of an assistant message.
            continue_final_message: End inside the last message, so that the model continues it.
            **kwargs: Further variables of the template; they take precedence over special tokens.

        Raises:
            TemplateError: The template fails, rejects the conversation or exceeds a limit.
            BeyondBoundsError: The template is bounded, and this rendering would exceed its budget.
        """
        if not messages:
            raise TemplateError("messages must not be empty")
        if continue_final_message and add_generation_prompt:
            raise TemplateError("continue_final_message and add_generation_prompt cannot both be true")
        template = self._choose(bool(tools))
        chat = [_prepared(_plain(message)) for message in messages]
        if template.uses.refuses_both:
            chat = [_with_one_text(message) for message in chat]
        if template.uses.needs_parts:
            for message in chat:
                prints = message.get("role") == "tool" and template.uses.tool_content_format == "string"
                if isinstance(message.get("content"), str) and not prints:
                    message["content"] = [{"type": "text", "text": message["content"]}]
        final_text = _mark_final_message(chat[-1]) if continue_final_message else ""
        variables = {
            **self.special_tokens,
            **_plain(kwargs),
            "messages": chat,
            # Templates test for tools with "is not none".
            "tools": _plain(list(tools)) if tools else None,
            "documents": _plain(list(documents)) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = template.render(variables)
        return _cut_at_mark(text, final_text) if continue_final_message else text

    def _choose(self, with_tools: bool) -> _Template:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        if len(self._templates) == 1:
            return next(iter(self._templates.values()))
        raise TemplateError(f"none of the model's chat templates, {sorted(self._templates)}, is called 'default'")


def load_chat_template(argument: str) -> str:
    """Loads the template that ``--chat-template`` gives: a file, or the Jinja text itself.

    Raises:
        ValueError: It is neither a readable file nor looks like Jinja.
    """
    if "{{" in argument or "{%" in argument or "\n" in argument:
        return argument
    path = Path(argument).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"chat template {argument!r} is neither a readable file nor a Jinja template: {error}"
        ) from error
    if path.suffix != ".json":
        return text
    try:
        source = json.loads(text)["chat_template"]
    except (ValueError, TypeError, KeyError):
        source = None
    if not isinstance(source, str):
        raise ValueError(f"{argument}: expected a JSON object with a string under 'chat_template'")
    return source


# Preparing a conversation


def _plain(value: Any) -> Any:
    """Copies a value to plain JSON types, so that a template sees no objects with other methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float):
        return float(value) if isinstance(value, float) else int(value)
    raise TemplateError(f"variables of a chat template must be JSON values, not {type(value).__name__}")


def _prepared(message: Any) -> Message:
    """Drops None fields, which templates would print as ``None``, and stores reasoning under its usual names."""
    if not isinstance(message, dict):
        raise TemplateError("messages must be objects")
    prepared: Message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((prepared[name] for name in _REASONING_FIELDS if name in prepared), None)
    if reasoning is not None:
        prepared["reasoning_content"] = reasoning
        prepared.setdefault("thinking", reasoning)
    return prepared


def _with_one_text(message: Message) -> Message:
    """Adds the text before a call to the reasoning before it."""
    content, thinking = message.get("content"), message.get("thinking")
    if not (message.get("tool_calls") and content and thinking and isinstance(content, str)):
        return message
    return {**message, "content": "", "thinking": f"{thinking}\n\n{content}"}


def _mark_final_message(message: Message) -> str:
    """Appends a marker to the last text of a message; returns that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _CONTINUE_TAG
            return text
    raise TemplateError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str, final_text: str) -> str:
    position = text.rfind(_CONTINUE_TAG.strip())
    if position < 0 or final_text.strip() not in text:
        raise TemplateError("continue_final_message: the chat template changes or drops the last message")
    if text.startswith(_CONTINUE_TAG, position):
        return text[:position]
    # The template trims messages: it removed the space after the marker, so it would also strip the message's own.
    return text[:position].rstrip()


# The environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, which marks assistant text for training; here only its body matters."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a limit on the result of a multiplication or power."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            size = _repeated_size(left, right) or _repeated_size(right, left)
            if size > MAX_OUTPUT_CHARS:
                raise SecurityError("the result of a multiplication is too large")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 1 << 16:
            raise SecurityError("the result of a power is too large")
        return super().call_binop(context, operator, left, right)


def _repeated_size(value: Any, times: Any) -> int:
    return len(value) * times if isinstance(value, (str, list, tuple)) and isinstance(times, int) else 0


class _TemplateNamespace(Namespace):
    """``namespace()`` that rejects names with a leading underscore, which have a meaning in Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"invalid name in a namespace: {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts keys, but models are trained on text without either.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_environment(kind: type[SandboxedEnvironment] = _Environment) -> SandboxedEnvironment:
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _TemplateNamespace
    del environment.globals["lipsum"]
    return environment


_ENVIRONMENT: Final = _make_environment()
_BOUNDED_ENVIRONMENT: Final = _make_environment(make_bounded(_Environment))
bound_filters(_BOUNDED_ENVIRONMENT, _ENVIRONMENT)


def _make_range() -> Callable[..., range]:
    """Creates the ``range`` of one rendering, which limits the numbers yielded so that nested loops end."""
    left = MAX_RANGE_ITEMS

    def bounded_range(*args: int) -> range:
        nonlocal left
        numbers = range(*args)
        left -= len(numbers)
        if left < 0:
            raise SecurityError(f"range() yields more than {MAX_RANGE_ITEMS} numbers")
        return numbers

    return bounded_range


class _Template:
    """One compiled template."""

    def __init__(self, source: str, is_bounded: bool) -> None:
        try:
            self.uses = find_uses(_parse(source))
        except RecursionError as error:
            raise BrokenTemplateError("chat template: nested too deeply") from error
        self._is_bounded = is_bounded
        self._template: jinja2.Template | None = None
        try:
            self._template = (_BOUNDED_ENVIRONMENT if is_bounded else _ENVIRONMENT).from_string(source)
        except BeyondBoundsError:
            pass  # and so does each rendering
        except Exception as error:
            raise BrokenTemplateError(f"chat template: {_describe(error)}") from error

    def render(self, variables: dict[str, Any]) -> str:
        if self._template is None:
            raise BeyondBoundsError
        if self._is_bounded:
            start_budget()
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate({**variables, "range": _make_range()}):
                num_chars += len(piece)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise TemplateError(f"chat template: the rendered text exceeds {MAX_OUTPUT_CHARS} characters")
                pieces.append(piece)
        except (TemplateError, BeyondBoundsError, MemoryError):
            raise  # MemoryError occurs only in a helper process, which reports its limit
        except Exception as error:  # an expression in a template may raise anything
            is_broken = isinstance(error, (RecursionError, SecurityError))  # whatever the conversation
            if self._is_bounded and is_broken:
                raise BeyondBoundsError from error
            raise (BrokenTemplateError if is_broken else TemplateError)(f"chat template: {_describe(error)}") from error
        return "".join(pieces)


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, jinja2.TemplateSyntaxError):
        text = f"line {error.lineno}: {text}"
    elif not isinstance(error, jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _MAX_MESSAGE_CHARS else f"{text[:_MAX_MESSAGE_CHARS]}..."


def _parse(source: str) -> nodes.Template:
    try:
        return _ENVIRONMENT.parse(source)
    except Exception as error:  # hostile text may also overflow the parser's stack
        raise BrokenTemplateError(f"chat template: {_describe(error)}") from error
