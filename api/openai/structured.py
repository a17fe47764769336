"""The ways in which a request can say what language its output must be in."""

from __future__ import annotations

from collections.abc import Iterator

from api.errors import RequestError
from api.openai.protocol import GenerationRequest, ResponseFormat
from api.params.structured import StructuredOutputsParams, grammar_spec
from engine_core.messages import GrammarSpec


def requested_grammar(request: GenerationRequest) -> GrammarSpec | None:
    """The language that a request asks for; its ``param`` is the field that does.

    It is worked out once for a request, as schemas may be large.

    Raises:
        RequestError: Several fields do, or one is malformed.
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
        raise RequestError(f"only one of {', '.join(found)} may be given", list(found)[1])
    for name, params in found.items():
        return grammar_spec(params, name)
    return None


def _guided(request: GenerationRequest) -> Iterator[tuple[str, StructuredOutputsParams]]:
    """What the older fields ask for."""
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
            raise RequestError("response_format of type json_schema needs json_schema.schema", name)
        return StructuredOutputsParams(json=wanted.json_schema.schema)
    raise RequestError(
        f"response_format type {wanted.type[:40]!r} is not supported; use text, json_object or json_schema", name
    )
