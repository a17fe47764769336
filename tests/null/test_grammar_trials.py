"""Grammars that would take the engine core's stack, time or memory: refused alone, while others go on."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from engine_core.messages import AbortRequests, FinishReason, GrammarSpec
from engine_core.structured import closing, compiler
from engine_core.structured.cost import MAX_REFERENCE_DEPTH, is_cheap, reference_depth
from engine_core.structured.grammar import GrammarError
from tests.grammars import Engine, random_schema

Schema = dict[str, Any]


def chain(length: int, link: Callable[[Schema], Schema]) -> GrammarSpec:
    """A schema that refers to one that refers to one, and so on."""
    schemas = {f"a{i}": link({"$ref": f"#/$defs/a{i + 1}"}) for i in range(length)}
    schemas[f"a{length}"] = {"type": "integer"}
    return GrammarSpec("json", json.dumps({"$ref": "#/$defs/a0", "$defs": schemas}))


LINKS: dict[str, Callable[[Schema], Schema]] = {
    "$ref": lambda inner: inner,
    "allOf": lambda inner: {"allOf": [inner]},
    "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "required": lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]},
    "optional": lambda inner: {"type": "object", "properties": {"a": inner}},
    "array": lambda inner: {"type": "array", "items": inner},
}
HOSTILE = {
    **{f"long {name}": chain(3000, link) for name, link in LINKS.items()},
    # Just short enough to be compiled at all; on no more than 8 MiB of stack, llguidance overflows it.
    **{f"tried {name}": chain(MAX_REFERENCE_DEPTH // 4, link) for name, link in LINKS.items() if name == "required"},
    "rules": GrammarSpec(
        "grammar", "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(6000)) + '\nr6000: "b"'
    ),
    "terminals": GrammarSpec(
        "grammar", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "b"'
    ),
    "options": GrammarSpec("regex", "\\w?" * 30_000 + "!1"),
    "other options": GrammarSpec("regex", "\\w?" * 30_000 + "!2"),
}
OBJECT = GrammarSpec("json", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
LARK = GrammarSpec("grammar", 'start: "x" start | "y"')


def test_hostile_grammars_end_alone_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = threading.active_count()
    with Engine() as engine:
        engine.add(1000, None, 400)
        for index, spec in enumerate(HOSTILE.values()):
            engine.add(index, spec)
        engine.add(1001, OBJECT, 40)
        while 1001 not in engine.reasons:
            engine.core.step()
        assert json.loads(engine.text(1001)), "it did not have to wait for a trial"
        engine.run()
        for index, name in enumerate(HOSTILE):
            message, param = engine.errors[index]
            if engine.reasons[index] != FinishReason.ERROR:
                assert name.startswith("tried"), name
                continue
            assert param == "structured_outputs" and message is not None, name
            assert message.startswith("structured_outputs "), (name, message)
        assert len(engine.tokens[1000]) == 400
        grammars = engine.core._grammars.compiler
        helper = grammars._helper if grammars is not None else None
        assert helper is not None
        monkeypatch.setattr(helper, "submit", lambda *_, **__: pytest.fail("verdicts are remembered"))
        for index, spec in enumerate(HOSTILE.values()):
            engine.add(2000 + index, spec)
        engine.run()
        assert all(engine.errors[2000 + index] == engine.errors[index] for index in range(len(HOSTILE)))
        assert len(helper.pids) <= 2
    assert not helper.pids
    deadline = time.monotonic() + 120
    while threading.active_count() > num_threads + compiler.NUM_THREADS:
        assert time.monotonic() < deadline, "a thread goes on"
        time.sleep(0.01)


def test_a_grammar_that_passes_its_trial_is_used() -> None:
    costly = GrammarSpec("regex", "(a|b){2}" + "c{1,40}" * 3 + "d")
    assert not is_cheap(costly) and not is_cheap(LARK)
    with Engine() as engine:
        for index, spec in enumerate([LARK, costly, LARK, LARK]):
            engine.add(index, spec, 200)
        engine.run()
        assert [engine.errors[index] for index in range(4)] == [(None, None)] * 4
        assert engine.text(1)[-1:] == b"d"


def test_what_grammars_need_is_there_before_them() -> None:
    with Engine() as engine:
        engine.add(0, None, 4)
        engine.run()
        prepared = engine.core._grammars.prepared
        assert prepared is not None and prepared._vocabulary is not None
        assert engine.core._grammars.compiler is None, "the loop has nothing to do with it yet"
        engine.add(1, OBJECT, 40)
        engine.run()
        assert engine.core._grammars.compiler is prepared


def test_patterns_of_a_schema_are_cheap_together() -> None:
    """For each of them a text that matches is looked for, which took a second for each of these."""
    patterns = [{"pattern": f"^{number}(\\w\\d?){{300}}!$"} for number in range(4)]
    assert is_cheap(GrammarSpec("json", json.dumps({"anyOf": patterns[:3]})))
    assert not is_cheap(GrammarSpec("json", json.dumps({"anyOf": patterns})))


def test_cheap_grammars_start_no_process() -> None:
    with Engine() as engine:
        engine.add(1, OBJECT, 40)
        engine.add(2, GrammarSpec("regex", "[a-c]{3,40}(x|yz)"), 60)
        engine.add(3, GrammarSpec("choice", '["a", "b"]'))
        engine.run()
        grammars = engine.core._grammars.compiler
        assert grammars is not None and grammars._helper is not None and not grammars._helper.pids


def test_requests_that_go_take_their_trials_along() -> None:
    with Engine() as engine:
        engine.add(0, None, 4)
        engine.run()
        specs = [GrammarSpec("regex", "\\w?" * 20_000 + f"!{index}") for index in range(20)]
        for index, spec in enumerate(specs, 1):
            engine.add(index, spec)
        engine.core.step()
        engine.inbox.append(AbortRequests(tuple(range(1, 20))))
        engine.num_open -= 19
        engine.run()
        assert engine.reasons[20] == FinishReason.ERROR
        helper = engine.core._grammars.compiler._helper if engine.core._grammars.compiler is not None else None
        assert helper is not None


def test_a_search_that_takes_too_long_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs much only later is met by the engine's loop, which cannot be killed."""
    monkeypatch.setattr(closing, "SECONDS", 0.0)
    with Engine() as engine:
        engine.add(
            1, GrammarSpec("json", '{"type": "array", "items": {"type": "string", "pattern": "^[a-c]{2,30}$"}}'), 60
        )
        engine.add(2, GrammarSpec("regex", "[a-c]{20}"), 60)
        engine.run()
        message, param = engine.errors[1]
        assert param == "structured_outputs" and "takes too long" in str(message)
        assert len(engine.text(2)) == 20


def test_most_schemas_are_cheap() -> None:
    rng = random.Random(3)
    specs = [GrammarSpec("json", json.dumps(random_schema(rng))) for _ in range(200)]
    assert sum(map(is_cheap, specs)) > 180
    tree = {"$defs": {"n": {"properties": {"c": {"items": {"$ref": "#/$defs/n"}}}}}, "$ref": "#/$defs/n"}
    assert is_cheap(GrammarSpec("json", json.dumps(tree)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "a?" * 200},
        {"type": "string", "pattern": "(a{1,50}){1,50}"},
        {"type": "array", "minItems": 500},
        {"type": "array", "minItems": 20, "items": {"type": "array", "minItems": 20}},
        {"allOf": [{"anyOf": [{"const": i}, {"const": -i}]} for i in range(1, 8)]},
        {"anyOf": [{"const": i} for i in range(500)]},
        {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
        {"$ref": "other#/a"},
        {"$defs": {"a": {"$id": "other"}}, "$ref": "#/$defs/a"},
        {"not": {"type": "string"}},
        {"patternProperties": {"x" * 300: {}}},
    ],
)
def test_what_may_cost_more_is_not_called_cheap(schema: Schema) -> None:
    assert not is_cheap(GrammarSpec("json", json.dumps(schema)))


def test_depth_follows_references() -> None:
    assert reference_depth({"type": "object"}) == 1
    assert reference_depth({"items": {"items": {}}}) == 3
    assert reference_depth({"$ref": "#"}) == 1
    assert reference_depth({"$defs": {"a~/b": {"items": {"$ref": "#/$defs/a~0~1b"}}}, "$ref": "#/$defs/a~0~1b"}) == 3
    assert reference_depth({"anyOf": [{"$ref": "#/anyOf/1"}, {"items": {}}]}) == 5
    with pytest.raises(GrammarError, match="levels deep"):
        is_cheap(chain(MAX_REFERENCE_DEPTH + 1, LINKS["$ref"]))
