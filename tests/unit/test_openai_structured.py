"""The ways in which a request asks for structured outputs, and what is refused before the engine hears of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.errors import RequestError
from api.params.sampling import SamplingParams
from api.params.structured import MAX_GRAMMAR_BYTES, StructuredOutputsParams
from engine_core.messages import GrammarSpec
from tests.unit.conftest import Api

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = json.dumps({**SCHEMA, "additionalProperties": False})


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "x"}
    return {**prompt, "max_tokens": 4, **fields}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GrammarSpec("json", '{"type": "object"}')),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            GrammarSpec("json", TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarSpec("json", TEXT)),
        ({"structured_outputs": {"json": TEXT}}, GrammarSpec("json", TEXT)),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            GrammarSpec("json", TEXT, disable_any_whitespace=True),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": False}},
            GrammarSpec("json", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"regex": "[a-z]+"}}, GrammarSpec("regex", "[a-z]+")),
        ({"structured_outputs": {"choice": ["é", 'b"']}}, GrammarSpec("choice", '["é", "b\\""]')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, GrammarSpec("grammar", 'start: "a"')),
        ({"guided_json": SCHEMA}, GrammarSpec("json", TEXT)),
        ({"guided_json": TEXT}, GrammarSpec("json", TEXT)),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            GrammarSpec("json", TEXT, whitespace_pattern=" ?"),
        ),
        ({"guided_regex": "x"}, GrammarSpec("regex", "x")),
        ({"guided_choice": ["a", "b"]}, GrammarSpec("choice", '["a", "b"]')),
        ({"guided_grammar": "root ::= x"}, GrammarSpec("grammar", "root ::= x")),
    ],
)
async def test_what_the_engine_is_told(
    api: Api, path: str, fields: dict[str, Any], expected: GrammarSpec | None
) -> None:
    await api.ok(path, body(path, n=2, **fields))
    for request in api.server.engine.submitted:
        grammar = request.grammar
        if expected is None or grammar is None:
            assert grammar is expected
            continue
        assert grammar.param == next(iter(fields))
        assert (grammar.kind, grammar.text) == (expected.kind, expected.text)
        assert grammar.whitespace_pattern == expected.whitespace_pattern
        assert grammar.disable_any_whitespace == expected.disable_any_whitespace


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "text"}, "body.response_format"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "x"}, "guided_regex"),
        ({"guided_choice": ["a"], "guided_regex": "x"}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "body.structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs"),
        ({"structured_outputs": {"json": False}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"multipleOf": 9999999}}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"items": {"anyOf": [{"multipleOf": 1e-9}]}}}}, "structured_outputs"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": "x" * (MAX_GRAMMAR_BYTES + 1)}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": ["a"] * 5000}, "guided_choice"),
    ],
)
async def test_what_is_refused(api: Api, path: str, fields: dict[str, Any], param: str) -> None:
    error = await api.error(path, body(path, **fields))
    assert error["param"] == param
    assert not api.server.engine.submitted


def test_a_deeply_nested_schema_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested"):
        SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_error_of_the_client_that_the_engine_finds_is_a_400(api: Api, path: str, stream: bool) -> None:
    api.server.engine.refusal = ("guided_regex is no regular expression", "guided_regex")
    error = await api.error(path, body(path, guided_regex="(", stream=stream))
    assert error["param"] == "guided_regex" and "no regular expression" in error["message"]
    assert error["type"] == "BadRequestError"
