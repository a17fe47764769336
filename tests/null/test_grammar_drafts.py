"""Grammars and drafts: a mask for each position, and the output is the one without drafts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import pytest

from engine_core import grammar_rows
from engine_core.messages import GrammarSpec
from engine_core.request import Request
from engine_core.structured.drafts import mask_counts, states_along
from engine_core.structured.request_grammar import RequestGrammar
from tests.fakes import VOCAB_SIZE
from tests.grammars import Drafts, Engine, random_schema
from tests.null.test_late_grammars import add as add_late
from tests.null.test_structured import KINDS, schema_spec

Results = dict[int, tuple[list[int], int]]


def run(specs: dict[int, tuple[GrammarSpec | None, int]], drafts: Drafts | None = None, depth: int = 2) -> Results:
    with Engine(depth=depth, drafts=drafts, num_blocks=60) as engine:
        for index, (grammar, max_tokens) in specs.items():
            engine.add(index, grammar, max_tokens, prompt=[10 + index % 200] * (5 + index % 9))
        engine.run()
        return {index: (engine.tokens.get(index, []), engine.reasons[index]) for index in specs}


def outputs_of(results: Results) -> dict[int, list[int]]:
    return {index: tokens for index, (tokens, _) in results.items()}


@pytest.mark.parametrize(("count", "wrong_every", "depth"), [(4, 0, 2), (7, 3, 1), (3, 1, 2), (1, 2, 3)])
def test_constrained_outputs_do_not_depend_on_drafts(count: int, wrong_every: int, depth: int) -> None:
    specs = {index: (KINDS[index % len(KINDS)], 40) for index in range(4 * len(KINDS))}
    expected = run(specs)
    drafts = Drafts(count, outputs_of(expected), wrong_every)
    assert run(specs, drafts, depth) == expected
    assert drafts.num_accepted > 50 or wrong_every == 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_a_grammar_forces_needs_no_proposer(depth: int) -> None:
    text = '{"properties": {"first_name": {"maxLength": 6}, "favourite": {"enum": ["one thing", "another"]}}, '
    text += '"required": ["first_name", "favourite"], "additionalProperties": false}'
    specs: dict[int, tuple[GrammarSpec | None, int]] = {
        index: (GrammarSpec(kind="json", text=text), 60 + index) for index in range(6)
    }
    specs |= {10 + index: (kind, 40) for index, kind in enumerate(KINDS)}
    expected = run(specs, depth=depth)
    drafts = Drafts(6, {})
    assert run(specs, drafts, depth) == expected
    assert drafts.num_accepted > 5, "this device spells what is forced in any way"


def test_json_is_the_same_within_any_budget() -> None:
    rng = random.Random(5)
    specs: dict[int, tuple[GrammarSpec | None, int]] = {}
    for number in range(60):
        schema = schema_spec(random_schema(rng))
        for place, budget in enumerate((4, 12, 33, 60)):
            specs[number * 10 + place] = schema, budget
    expected = run(specs)
    for wrong_every in (0, 4):
        drafts = Drafts(5, outputs_of(expected), wrong_every)
        assert run(specs, drafts) == expected
        assert drafts.num_accepted > 100


def test_what_comes_after_a_thought_is_the_same() -> None:
    def run_late(drafts: Drafts | None = None) -> Results:
        with Engine(drafts=drafts) as engine:
            for index in range(4 * len(KINDS)):
                if index % len(KINDS):
                    add_late(engine, index, 60)
            engine.run()
            return {index: (tokens, engine.reasons[index]) for index, tokens in engine.tokens.items()}

    expected = run_late()
    for wrong_every in (0, 3):
        drafts = Drafts(6, outputs_of(expected), wrong_every)
        assert run_late(drafts) == expected
        assert drafts.num_accepted > 100


def test_drafts_that_a_grammar_forbids() -> None:
    """They come from somewhere else: the output of another request."""
    specs = {index: (KINDS[index % len(KINDS)], 40) for index in range(2 * len(KINDS))}
    expected = run(specs)
    outputs = outputs_of(expected)
    shifted = {index: outputs[(index + 1) % len(outputs)] for index in outputs}
    assert run(specs, Drafts(4, shifted)) == expected


@pytest.mark.parametrize("position", [1, 3])
def test_tokens_that_had_no_mask_are_not_output(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that fails at a later position has no mask there, and the worker samples any token."""
    specs = {index: (KINDS[index % len(KINDS)], 40) for index in range(2 * len(KINDS))}
    expected = run(specs)
    num_failed = 0

    def failing(request: Request, drafts: Sequence[int], num_outputs: int) -> list[RequestGrammar]:
        nonlocal num_failed
        states = states_along(request, drafts, num_outputs)
        if len(states) > position:
            matcher = states[position].matcher
            forbidden = (token for token in range(VOCAB_SIZE) if not matcher.validate_tokens([token]))
            num_failed += any(not matcher.consume_token(token) for token in islice(forbidden, 1))
        return states

    monkeypatch.setattr(grammar_rows, "states_along", failing)
    drafts = Drafts(4, outputs_of(expected))
    assert run(specs, drafts) == expected
    assert num_failed > 20 and drafts.num_accepted > 20


def test_positions_without_a_token_end_rows_or_masks() -> None:
    assert mask_counts([1, 3, 2], []) == ([], [1, 3, 2])
    problems = [(0, None), (2, "why"), (4, None)]
    assert mask_counts([1, 3, 2], problems) == ([(0, None), (2, None)], [0, 1, 0])
