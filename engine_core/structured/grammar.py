"""Compiles the grammars that requests ask for."""

from __future__ import annotations

import json
import re
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from engine_core.messages import GrammarSpec
from engine_core.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

MAX_GRAMMAR_BYTES = 256 << 10
"""Longest text of a grammar in bytes."""

_HEADER = '%llguidance {"no_forcing": true}\n'
"""Otherwise llguidance would tokenise forced text itself; it is better to let the model choose the tokens."""
WHITE_SPACE = r"[ ]|\n([ ]{0,64}|\t{0,32})"
"""Default whitespace between parts of JSON: a space, or a line break with indentation. Without a limit, some models
write whitespace until they run out of tokens."""
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_PREFIXES = ("failed to compile JSON schema: ", "lexer error: ", "Lark error: ")
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[.*\])")
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("enum", "const", "default", "examples")
MAX_ERROR_CHARS = 300
MAX_ALTERNATIVES = 64
"""Alternatives that are tried to find the one at fault."""


class GrammarError(ValueError):
    """A grammar is unusable, which is the client's fault; the message says why."""


def parser_limits() -> LLParserLimits:
    """Limits on the cost of a grammar: about 0.1 s to compile, apart from the size of the text, and 20 ms per token."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=2_000_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=300_000,
        verbose_errors=False,
    )


def compile_grammar(spec: GrammarSpec, vocabulary: Vocabulary, text: str = "") -> LLMatcher:
    """A matcher at the start of its grammar, to be copied for each request.

    Args:
        spec: The requested grammar.
        vocabulary: The token vocabulary.
        text: Result of ``grammar_text``, if known.

    Raises:
        GrammarError: The grammar is malformed, uses unsupported features, or is too large.
    """
    from llguidance import LLMatcher

    if len(spec.text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"is longer than {MAX_GRAMMAR_BYTES} bytes")
    matcher = LLMatcher(vocabulary.tokenizer, text or grammar_text(spec), log_level=0, limits=parser_limits())
    if matcher.is_error():
        error = short_error(matcher.get_error())
        title = _alternative_at_fault(error, spec, vocabulary)
        raise GrammarError(_explained(error, spec) + (f" (in {title!r})" if title else ""))
    return matcher


def _alternative_at_fault(error: str, spec: GrammarSpec, vocabulary: Vocabulary) -> str:
    """Title of the alternative of a schema, such as a tool's, that has the same error by itself; "" if none has."""
    from llguidance import LLMatcher

    schema = json.loads(spec.text) if spec.kind == "json" else None
    while isinstance(schema, dict) and isinstance(schema.get("items"), dict):
        schema = schema["items"]
    alternatives = schema.get("anyOf") if isinstance(schema, dict) else None
    for part in alternatives[:MAX_ALTERNATIVES] if isinstance(alternatives, list) else ():
        title = part.get("title") if isinstance(part, dict) else None
        if isinstance(title, str):
            text = grammar_text(msgspec.structs.replace(spec, text=json.dumps(part)))
            matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=parser_limits())
            if matcher.is_error() and short_error(matcher.get_error()) == error:
                return title
    return ""


def _explained(error: str, spec: GrammarSpec) -> str:
    """Rephrases an error about a schema for its author: where the problem is, and what to do."""
    if match := _UNIMPLEMENTED.fullmatch(error):
        keys = json.loads(match[1])
        places = ", ".join(f"{key} (at {_place_of(key, json.loads(spec.text))})" for key in keys)
        one = "a keyword that is" if len(keys) == 1 else "keywords that are"
        return f"has {one} not supported: {places}; leave it out and check the answer yourself"[:MAX_ERROR_CHARS]
    if error.startswith("Unknown format: "):
        name = error.removeprefix("Unknown format: ")
        return f"has the unknown format {name!r}; leave it out, or write it as a pattern"
    if error.startswith("oneOf constraints are not supported"):
        return "has a oneOf whose alternatives may overlap, which is not supported; use anyOf"
    return f"cannot be used: {error}" if error[:1].isupper() else error


def _place_of(keyword: str, schema: Any) -> str:
    """Path of a keyword's first occurrence in a schema: ``$`` and the names along the path."""
    pending = deque([("$", schema, True)])
    while pending:
        place, value, is_schema = pending.popleft()
        if isinstance(value, list):
            pending += [(f"{place}[{i}]", inner, True) for i, inner in enumerate(value)]
        elif isinstance(value, dict):
            if is_schema and keyword in value:
                return place
            pending += [
                (f"{place}.{name}", inner, not is_schema or name not in _SCHEMAS_BY_NAME)
                for name, inner in value.items()
                if not is_schema or name not in _VALUES
            ]
    return "$"


def grammar_text(spec: GrammarSpec) -> str:
    """The grammar in llguidance's dialect of Lark.

    Raises:
        GrammarError: The text is malformed, as far as is detectable here.
    """
    if spec.kind == "json":
        return f"{_HEADER}start: %json {json.dumps(_schema(spec))}"
    if spec.kind == "regex":
        from llguidance import regex_to_lark

        return f"{_HEADER}start: /{regex_to_lark(spec.text, '')}/"
    if spec.kind == "choice":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(spec.text))
        return f"{_HEADER}start: {choices}"
    if spec.kind == "grammar":
        return _lark(spec.text)
    raise GrammarError(f"has the unknown kind {spec.kind!r}")


def _schema(spec: GrammarSpec) -> dict[str, Any]:
    try:
        schema = json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is not valid JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("is not a JSON schema, which must be an object")
    if "x-guidance" in schema:
        raise GrammarError("has the unsupported keyword x-guidance")
    options: dict[str, Any] = {"whitespace_flexible": not spec.disable_any_whitespace}
    if spec.whitespace_pattern is not None:
        options["whitespace_pattern"] = spec.whitespace_pattern
    elif not spec.disable_any_whitespace:
        options["whitespace_pattern"] = WHITE_SPACE
    return {**schema, "x-guidance": options}


def _lark(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        text = any_to_lark(text)
    except Exception as error:  # the converter may raise anything
        raise GrammarError(f"is neither Lark nor GBNF: {error}") from None
    return text if "%llguidance" in text else _HEADER + text


def short_error(message: str) -> str:
    """The error in a grammar, without a position in a text that the client never saw."""
    lines = _PLACE.sub("", message.strip()).splitlines() or ["cannot be used"]
    text = lines[0]
    for line in lines[1:]:
        if line.startswith("error: "):  # from the regex parser, whose first line says nothing
            text = line
            break
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix)
    return text[:MAX_ERROR_CHARS]
