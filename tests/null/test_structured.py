"""Structured outputs in the engine core: what a grammar allows is all that comes, and JSON is always complete."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from engine_core.messages import AbortRequests, FinishReason, GrammarSpec
from engine_core.structured.grammar import GrammarError, compile_grammar
from engine_core.structured.vocabulary import Vocabulary
from tests.fakes import VOCAB_SIZE, token_of, tokens_of
from tests.grammars import VOCABULARY, Engine, random_schema, text_of

NUM_SCHEMAS = 300
BUDGETS = (1, 2, 4, 7, 12, 20, 33, 60)


def schema_spec(schema: Any, **options: Any) -> GrammarSpec:
    return GrammarSpec("json", json.dumps(schema), **options)


def check_valid(text: bytes, schema: dict[str, Any]) -> None:
    value = json.loads(text.decode(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.Draft202012Validator(schema).validate(value)


def test_json_is_complete_and_valid_within_any_budget() -> None:
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]
    num_valid = num_cut = num_refused = 0
    with Engine() as engine:
        for number, schema in enumerate(schemas):
            for place, budget in enumerate(rng.sample(BUDGETS, 4)):
                engine.add(number * 10 + place, schema_spec(schema), budget)
            engine.add(number * 10 + 9, None, 8)  # free ones run beside them
        engine.run()
        for index, reason in engine.reasons.items():
            schema = schemas[index // 10]
            message, param = engine.errors[index]
            if index % 10 == 9:
                assert reason == FinishReason.LENGTH and len(engine.tokens[index]) == 8
            elif reason == FinishReason.ERROR:
                assert param == "max_tokens" and not engine.tokens[index], (schema, message)
                num_refused += 1
            else:
                check_valid(engine.text(index), schema)
                num_valid += 1
                num_cut += reason == FinishReason.LENGTH
    assert num_valid > NUM_SCHEMAS and num_cut > 100 and num_refused > 100


KINDS = [
    None,
    schema_spec({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}),
    schema_spec({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
    GrammarSpec("regex", "[a-c]{3,40}(x|yz)"),
    GrammarSpec("choice", '["the", "then", "hello"]'),
    GrammarSpec("grammar", 'start: "a" start "b" | "c"'),
    GrammarSpec("grammar", 'root ::= "x" root | "y"'),
]


def run(indices: list[int], max_tokens: int = 40, **options: Any) -> dict[int, tuple[list[int], int]]:
    """The tokens of requests of every kind, and why they ended."""
    with Engine(**options) as engine:
        for index in indices:
            engine.add(index, KINDS[index % len(KINDS)], max_tokens, prompt=[10 + index] * (5 + index))
        engine.run()
        return {index: (engine.tokens[index], engine.reasons[index]) for index in indices}


def test_tokens_do_not_depend_on_what_else_runs() -> None:
    indices = list(range(3 * len(KINDS)))
    expected = run(indices)
    assert run(indices, depth=1) == run(indices, depth=3) == expected
    assert run(indices, num_blocks=38) == expected, "preempted"
    for index in indices[: len(KINDS)]:
        assert run([index]) == {index: expected[index]}
    for index, (tokens, _) in expected.items():
        kind = index % len(KINDS)
        if kind == 0:
            continue
        text = text_of(tokens).decode()
        if kind in (1, 2):
            json.loads(text)
        elif kind == 4:
            assert text in ("the", "then", "hello")
        elif kind == 3 and len(tokens) < 40:
            assert re.fullmatch("[a-c]{3,40}(x|yz)", text)
        elif kind == 5 and len(tokens) < 40:
            assert re.fullmatch("a*cb*", text) and text.count("a") == text.count("b")
        elif kind == 6:
            assert re.fullmatch("x*y?", text)


@pytest.mark.parametrize("kind", range(1, len(KINDS)))
def test_a_request_goes_on_in_another_engine(kind: int) -> None:
    ((tokens, reason),) = run([kind]).values()
    for done in range(1, len(tokens)):
        with Engine() as engine:
            engine.add(kind, KINDS[kind], 40, prompt=[10 + kind] * (5 + kind), resumed=tokens[:done])
            engine.run()
            assert engine.tokens[kind][done:] == tokens[done:], engine.errors
            assert engine.reasons[kind] == reason or reason == FinishReason.LENGTH


def test_a_grammar_that_cannot_be_used_harms_nobody_else() -> None:
    bad = {
        1: GrammarSpec("regex", "["),
        2: GrammarSpec("grammar", "start: nothing", param="guided_grammar"),
        3: schema_spec({"type": "array", "uniqueItems": True}, param="response_format"),
        4: schema_spec([1]),
        5: GrammarSpec("json", "{"),
        6: schema_spec({"x-guidance": {"lenient": True}}),
        7: GrammarSpec("json", '"' + "x" * (1 << 20) + '"'),
        8: GrammarSpec("sudoku", ""),
        9: schema_spec({}, whitespace_pattern="["),
        10: schema_spec({"$ref": "#"}),
        11: schema_spec({"type": "object", "required": ["a"], "properties": {"a": False}}),
    }
    with Engine() as engine:
        engine.add(100, None, 20)
        for index, spec in bad.items():
            engine.add(index, spec)
        engine.add(101, KINDS[4], 20)
        engine.run()
        for index, spec in bad.items():
            message, param = engine.errors[index]
            assert engine.reasons[index] == FinishReason.ERROR and not engine.tokens[index]
            assert param == spec.param and message is not None and message.startswith(spec.param), (index, message)
        assert len(engine.tokens[100]) == 20 and engine.text(101) in (b"the", b"then", b"hello")


def test_other_constraints_of_a_request_hold_as_well() -> None:
    number = schema_spec({"type": "integer", "minimum": 100})
    with Engine() as engine:
        engine.add(1, number, allowed_token_ids=tuple(tokens_of("123")))
        engine.add(2, number, 2)
        engine.add(3, GrammarSpec("choice", '["ab"]'), min_tokens=10)
        engine.add(4, GrammarSpec("choice", '["ab"]'), eos_token_ids=())
        engine.add(5, schema_spec({"type": "string"}), allowed_token_ids=tuple(tokens_of("ab")))
        engine.add(6, schema_spec({"const": "a"}), stop_token_ids=(token_of(ord('"')),), eos_token_ids=())
        engine.run()
        assert engine.errors[2][1] == "max_tokens" and "must be at least 3" in str(engine.errors[2][0])
        for index in (3, 4):
            assert engine.text(index) == b"ab" and engine.reasons[index] == FinishReason.STOP
        assert engine.errors[5][1] == "structured_outputs", "no quotes are allowed"


def test_requests_go_while_their_grammar_is_compiled() -> None:
    with Engine() as engine:
        engine.add(1, None, 5)
        engine.run()
        for index in range(10, 40):
            engine.add(index, schema_spec({"type": "string", "maxLength": index}))
        engine.core.step()
        engine.inbox.append(AbortRequests(tuple(range(10, 40))))
        engine.num_open = 0
        engine.core.step()
        engine.add(2, KINDS[1], 30)
        engine.run()
        assert set(engine.reasons) - {1, 2} <= set(range(10, 40))
        assert engine.core._status()["integrity"] == ""


@pytest.mark.parametrize("schema", [{"type": "object"}, {"type": "array", "items": {"type": "integer"}}])
def test_white_space_is_bounded(schema: Any) -> None:
    """A space, or a line break with its indent; not by the line, as some models would have it."""
    numbers = {"type": "integer"}
    num_runs = 0
    spec = schema_spec({**schema, "additionalProperties": numbers, "minItems": 3, "minProperties": 3})
    with Engine() as engine:
        for seed in range(1, 60):
            engine.add(seed, spec, 400)
        engine.run()
        for seed in range(1, 60):
            text = engine.text(seed).decode()
            json.loads(text)
            runs = re.findall(r"\s+", re.sub(r'"(?:[^"\\]|\\.)*"', "x", text))
            assert all(re.fullmatch(r" |\n( {0,64}|\t{0,32})", run) for run in runs), text
            num_runs += len(runs)
        assert num_runs > 20


def accepts(spec: GrammarSpec, text: str) -> bool:
    matcher = compile_grammar(spec, Vocabulary(VOCABULARY, VOCAB_SIZE))
    return all(matcher.consume_tokens([token]) for token in tokens_of(text)) and matcher.is_accepting()


def test_white_space_as_json_is_written() -> None:
    value = {"a": [1, {"b": [True, "x"]}], "c": {}}
    usual = [json.dumps(value, indent=indent) for indent in (None, 0, 1, 2, 4, 8, "\t")]
    compact = json.dumps(value, separators=(",", ":"))
    spec = schema_spec({"type": "object"})
    assert all(accepts(spec, text) for text in (*usual, compact))
    assert not accepts(spec, '{  "a": 1}') and not accepts(spec, '{\n\n"a": 1}') and not accepts(spec, '{"a":1}\n')
    tight = schema_spec({"type": "object"}, disable_any_whitespace=True)
    assert accepts(tight, compact) and not any(accepts(tight, text) for text in usual)
    own = schema_spec({"type": "object"}, whitespace_pattern=r"\s{3}")
    assert accepts(own, '{   "a":   1}') and not accepts(own, '{ "a": 1}')


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (
            {"properties": {"not": {"items": {"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}}}},
            "has a keyword that is not supported: uniqueItems (at $.properties.not.items.anyOf[1]); leave it out",
        ),
        ({"enum": [{"if": 1}], "if": {}, "then": {}}, "has keywords that are not supported: if (at $), then (at $);"),
        ({"$defs": {"not": {"not": {}}}, "$ref": "#/$defs/not"}, "not (at $.$defs.not)"),
        ({"type": "string", "format": "zip"}, "has the unknown format 'zip'; leave it out, or write it as a pattern"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "has a oneOf whose alternatives may overlap, which is"),
        ({"type": "thing"}, "cannot be used: Invalid type: thing"),
        (
            {"items": {"anyOf": [{"title": "good"}, {"title": "bad", "uniqueItems": True}]}},
            "leave it out and check the answer yourself (in 'bad')",
        ),
        ({"anyOf": [{"title": "A", "type": "thing"}]}, "cannot be used: Invalid type: thing (in 'A')"),
    ],
)
def test_errors_say_what_is_wrong_with_a_schema(schema: Any, expected: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compile_grammar(schema_spec(schema), Vocabulary(VOCABULARY, VOCAB_SIZE))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    ['"', r"\\", r"\n", r"^[\\\"]{3}$", "\t", r"a\\b", "abc", "a@b", "https?://", "(x|y)+z", "foo-[0-9]+", "é"],
)
def test_patterns_that_nothing_but_a_match_completes(pattern: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    with Engine() as engine:
        engine.add(1, schema_spec(schema), 60)
        engine.run()
        assert engine.reasons[1] in (FinishReason.STOP, FinishReason.LENGTH), engine.errors[1]
        check_valid(engine.text(1), schema)
