"""The fields by which a request can constrain its output."""

from __future__ import annotations

from collections.abc import Iterator

from api.errors import RequestError
from api.openai.protocol import GenerationRequest, ResponseFormat
from api.params.structured import StructuredOutputsParams, grammar_spec
from engine_core.messages import GrammarSpec


def requested_grammar(request: GenerationRequest) -> GrammarSpec | None:
    """The constraint of a request; its ``param`` is the field that sets it.

    Computed once per request, since schemas may be large.

    Raises:
        RequestError: Several fields set one, or one is malformed.
    """
    found: dict[str, StructuredOutputsParams] = {}
    own = request.structured_outputs
    if own is not None and not own.says_only_when:
        found["structured_outputs"] = own
    if request.response_format is not None:
        wanted = _response_format(request.response_format)
        if wanted is not None:
            found["response_format"] = wanted
    found.update(_guided(request))
    if len(found) > 1:
        raise RequestError(f"only one of {', '.join(found)} may be set", list(found)[1])
    for name, params in found.items():
        return grammar_spec(params, name)
    return None


def _guided(request: GenerationRequest) -> Iterator[tuple[str, StructuredOutputsParams]]:
    """The constraint of the older fields."""
    pattern = request.guided_whitespace_pattern
    if request.guided_json is not None:
        yield "guided_json", StructuredOutputsParams(json=request.guided_json, whitespace_pattern=pattern)
    if request.guided_regex is not None:
        yield "guided_regex", StructuredOutputsParams(regex=request.guided_regex, whitespace_pattern=pattern)
    if request.guided_choice is not None:
        yield "guided_choice", StructuredOutputsParams(choice=request.guided_choice, whitespace_pattern=pattern)
    if request.guided_grammar is not None:
        yield "guided_grammar", StructuredOutputsParams(grammar=request.guided_grammar, whitespace_pattern=pattern)


def _response_format(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    name = "response_format"
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema is None:
            raise RequestError("response_format of type json_schema requires json_schema.schema", name)
        return StructuredOutputsParams(json=wanted.json_schema.schema)
    raise RequestError(
        f"unknown response_format type {wanted.type[:40]!r}; choose from text, json_object, json_schema", name
    )
