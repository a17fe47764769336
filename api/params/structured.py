"""Structured outputs: validates a user's constraints and converts them for the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from api.errors import RequestError
from api.model.tokenizer import Tokenizer
from api.params.closed_objects import close_objects
from api.params.regex_dialect import translate
from engine_core.messages import GrammarSpec, SetVocabulary

MAX_GRAMMAR_BYTES = 256 << 10
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 4096
MAX_MULTIPLE = 1000
"""Maximum ``multipleOf`` without its decimal point: the automaton that checks divisibility has as many states."""

KINDS = ("json", "regex", "choice", "grammar", "json_object")

_FORMATS = frozenset(
    (
        "date-time",
        "time",
        "date",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
    )
)
"""String formats that the engine enforces."""

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS = (
    "items",
    "additionalProperties",
    "additionalItems",
    "propertyNames",
    "contains",
    "not",
    "if",
    "then",
    "else",
)

_APPLICATORS = frozenset(("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"))
"""Keywords that apply other schemas to the same value."""
_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "deprecated", "$comment"))


class StructuredOutputsParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Constraints on an output: exactly one of the first five fields is set.

    Attributes:
        json: A JSON schema, as an object or as text.
        regex: A regular expression for the whole output.
        choice: The output is one of these strings.
        grammar: A context-free grammar in Lark's notation.
        json_object: Any JSON object.
        disable_any_whitespace: JSON without white space between its parts.
        disable_additional_properties: Objects whose schema lists properties have no others, unless it says otherwise.
        whitespace_pattern: Regular expression of the white space between parts of JSON.
        enable_in_reasoning: Apply the constraint from the first token instead of after the reasoning. Default: the
            server's setting.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = True
    whitespace_pattern: str | None = None
    enable_in_reasoning: bool | None = None

    @property
    def says_only_when(self) -> bool:
        """It sets only ``enable_in_reasoning``, for a constraint given elsewhere in the request."""
        when = self.enable_in_reasoning
        return when is not None and self == StructuredOutputsParams(enable_in_reasoning=when)


def grammar_spec(params: StructuredOutputsParams, name: str = "structured_outputs") -> GrammarSpec:
    """Converts a user's constraints to the engine's grammar.

    Args:
        params: The user's constraints.
        name: The field of the request, for errors here and in the engine.

    Raises:
        RequestError: No constraint or several are given, or it is malformed or too large.
    """
    given = [kind for kind in KINDS if getattr(params, kind) not in (None, False if kind == "json_object" else None)]
    if len(given) != 1:
        raise RequestError(f"{name} requires exactly one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}", name)
    kind = given[0]
    if kind in ("json", "json_object"):
        text = _schema_text(params, name)
    elif kind == "choice":
        text = _choices(params.choice or [], name)
    else:
        text = (params.regex if kind == "regex" else params.grammar) or ""
        if not text:
            raise RequestError(f"{name}.{kind} must not be empty", name)
        if kind == "regex":
            text = translate(text)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not valid text: it contains a lone surrogate", name) from None
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{name} must be at most {MAX_GRAMMAR_BYTES} bytes long, got {size}", name)
    return GrammarSpec(
        kind="json" if kind == "json_object" else kind,
        text=text,
        disable_any_whitespace=params.disable_any_whitespace,
        whitespace_pattern=params.whitespace_pattern,
        param=name,
    )


def _schema_text(params: StructuredOutputsParams, name: str) -> str:
    schema: Any = {"type": "object"} if params.json_object else params.json
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{name} is not valid JSON: {error}", name) from None
    if not isinstance(schema, (dict, bool)):
        raise RequestError(f"{name} is not a JSON schema: expected an object", name)
    if schema is False:
        raise RequestError(f"{name} is the schema false, which allows nothing", name)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise RequestError(f"{name} must not be nested more than {MAX_SCHEMA_DEPTH} deep", name)
    schema = json.loads(json.dumps(schema))
    if params.disable_additional_properties and isinstance(schema, dict):
        close_objects(schema)
    for part in _subschemas(schema):
        _check_multiple(part.get("multipleOf"), name)
        _check_min_properties(part, name)
        _say_otherwise(part)
        _put_into_engines_terms(part)
    return json.dumps(schema, ensure_ascii=False)


def _check_min_properties(schema: dict[str, Any], name: str) -> None:
    """Rejects a ``minProperties`` that repeating one property name could satisfy."""
    least = schema.get("minProperties")
    required = schema.get("required")
    num_required = len(set(required)) if isinstance(required, list) else 0
    has_free_names = schema.get("additionalProperties") is not False or "patternProperties" in schema
    if isinstance(least, int) and has_free_names and least > num_required + 1:
        raise RequestError(
            f"{name}: minProperties {least} is not supported for free property names, since a name may occur twice; "
            "list the properties under required, or omit minProperties and check the answer",
            name,
        )


def _say_otherwise(schema: dict[str, Any]) -> None:
    """Rewrites keywords that the engine does not support to equivalent ones, and removes those without effect."""
    if schema.get("not") in (False, {"not": {}}):
        del schema["not"]
    elif "not" in schema and schema["not"] in (True, {}):
        schema.clear()
        schema["enum"] = []  # matches nothing; zod writes z.never() like this
    for keyword in ("dependentRequired", "dependentSchemas"):
        if schema.get(keyword) == {}:
            del schema[keyword]
    if "if" not in schema:
        schema.pop("then", None)
        schema.pop("else", None)
    elif "then" not in schema and "else" not in schema:
        del schema["if"]
    for keyword in ("unevaluatedProperties", "unevaluatedItems"):
        if keyword in schema and schema[keyword] in (True, {}):
            del schema[keyword]
    if schema.get("unevaluatedProperties") is False and not schema.keys() & _APPLICATORS:
        del schema["unevaluatedProperties"]
        schema.setdefault("additionalProperties", False)
    _say_names_otherwise(schema)


def _say_names_otherwise(schema: dict[str, Any]) -> None:
    """Rewrites ``propertyNames``, which zod writes for every record, to ``patternProperties``."""
    names = schema.get("propertyNames")
    if names is True:
        names = {}
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return  # absent, or the engine reports that it is not supported
    constraints = names.keys() - _ANNOTATIONS - {"type"}
    if constraints and not schema.keys() & {"properties", "patternProperties", *_APPLICATORS}:
        if constraints == {"pattern"} and isinstance(names["pattern"], str):
            pattern = names["pattern"]
        elif constraints <= {"enum", "const"} and all(isinstance(name, str) for name in _allowed(names)):
            pattern = f"^({'|'.join(re.escape(name) for name in _allowed(names))})$"
        else:
            return
        schema["patternProperties"] = {pattern: schema.get("additionalProperties", True)}
        schema["additionalProperties"] = False
        constraints = set()
    if not constraints:
        del schema["propertyNames"]


def _allowed(names: dict[str, Any]) -> list[Any]:
    """The values of ``const`` or of ``enum``."""
    if "const" in names:
        return [names["const"]] if "enum" not in names or names["const"] in names["enum"] else [None]
    return names["enum"] if isinstance(names["enum"], list) and names["enum"] else [None]


def _put_into_engines_terms(schema: dict[str, Any]) -> None:
    """Removes annotations that the engine would reject as unknown constraints, and translates patterns."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
        del schema["format"]  # unknown formats are annotations (JSON Schema 2020-12 Validation, 7.2.3)
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = translate(schema["pattern"])
    by_pattern = schema.get("patternProperties")
    if isinstance(by_pattern, dict):
        schema["patternProperties"] = {translate(pattern): part for pattern, part in by_pattern.items()}


def _check_multiple(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return  # absent, or the engine reports what is wrong with it
    digits = f"{value:.15g}"
    if "e" in digits or int(digits.replace(".", "").replace("-", "") or 0) > MAX_MULTIPLE:
        raise RequestError(
            f"{name}: multipleOf {digits} is too large; without its decimal point it may be {MAX_MULTIPLE} at most",
            name,
        )


def _depth(value: Any) -> int:
    """Nesting depth of a JSON value, computed without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = (
            [
                inner
                for outer in level
                for inner in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(inner, (dict, list))
            ]
            if depth > 1 or isinstance(value, (dict, list))
            else []
        )
    return depth


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yields a schema and all its subschemas."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for key in _SCHEMAS_BY_NAME:
            if isinstance(part.get(key), dict):
                pending += part[key].values()
        for key in _SCHEMA_LISTS:
            if isinstance(part.get(key), list):
                pending += part[key]
        pending += [part[key] for key in _SCHEMAS if isinstance(part.get(key), dict)]


def _choices(choices: list[str], name: str) -> str:
    if not choices or not all(choices):
        raise RequestError(f"{name} must be a list of non-empty strings", name)
    if len(choices) > MAX_CHOICES:
        raise RequestError(f"{name} must have at most {MAX_CHOICES} choices, got {len(choices)}", name)
    return json.dumps(choices, ensure_ascii=False)


def vocabulary_frame(tokenizer: Tokenizer) -> bytes:
    """The encoded ``SetVocabulary`` of a tokenizer. Takes some tenths of a second for a large vocabulary."""
    return msgspec.msgpack.encode(
        SetVocabulary(
            tokens=tuple(tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)),
            special_token_ids=tuple(sorted({*tokenizer.all_special_ids, *tokenizer.eos_token_ids})),
            end_token_ids=tuple(tokenizer.eos_token_ids),
        )
    )
