"""Grammars that hold once a thought is over: the same tokens in any company, JSON whole whatever the thought costs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from engine_core.messages import FinishReason, GrammarSpec, ResolvedParams, Thought
from engine_core.structured.grammar import compile_grammar
from engine_core.structured.request_grammar import RequestGrammar, Verdict
from engine_core.structured.thinking import Thinking
from engine_core.structured.vocabulary import Vocabulary
from tests.fakes import EOS, IM_END, IM_START, VOCAB_SIZE, token_of, tokens_of
from tests.grammars import TOKENIZER, VOCABULARY, Engine, random_schema
from tests.null.test_structured import KINDS, check_valid, schema_spec

START, END = (tuple(TOKENIZER.encode(tag, False)) for tag in ("<think>", "</think>"))
OPEN = Thought(b"</think>", END, START, is_open=True)
FREE = Thought(b"</think>", END, START)
SPECIAL = Thought(b"<|im_start|>", (IM_START,), (IM_START,))
"""Markers that are one token each, and no text for any grammar; one that begins and ends, as it happens."""
THOUGHTS = (
    OPEN,
    FREE,
    msgspec.structs.replace(OPEN, max_tokens=6),
    SPECIAL,
    msgspec.structs.replace(SPECIAL, is_open=True),
)


def late(grammar: GrammarSpec | None, thought: Thought) -> GrammarSpec | None:
    return None if grammar is None else msgspec.structs.replace(grammar, thought=thought)


def split(tokens: Sequence[int], thought: Thought) -> tuple[bytes | None, bytes]:
    """The thought and the answer of an output; None: it has not thought."""
    text = b"".join(VOCABULARY.tokens[token] for token in tokens if token not in (EOS, IM_END))
    start = b"".join(VOCABULARY.tokens[token] for token in thought.start_token_ids)
    if not thought.is_open:
        if not text.startswith(start):
            return None, text
        text = text.removeprefix(start)
    inner, found, answer = text.partition(thought.end)
    return inner, answer.lstrip(b"\n") if found else b""


def check_ended_once(tokens: Sequence[int]) -> None:
    assert not {EOS, IM_END} & set(tokens[:-1])


def run(indices: list[int], max_tokens: int = 60, **options: Any) -> dict[int, tuple[list[int], int]]:
    """The tokens of requests of every kind of grammar and thought, and why they ended."""
    with Engine(**options) as engine:
        for index in indices:
            add(engine, index, max_tokens)
        engine.run()
        return {index: (engine.tokens[index], engine.reasons[index]) for index in indices}


def add(engine: Engine, index: int, max_tokens: int, resumed: Sequence[int] = ()) -> None:
    grammar = late(KINDS[index % len(KINDS)], THOUGHTS[index % len(THOUGHTS)])
    prompt = [10 + index] * (5 + index % 9)
    engine.add(index, grammar, max_tokens, prompt=prompt, resumed=resumed, eos_token_ids=(EOS, IM_END))


def test_json_is_whole_within_any_budget() -> None:
    rng = random.Random(2)
    schemas = [random_schema(rng) for _ in range(120)]
    thoughts: dict[int, Thought] = {}
    num_thoughts = num_refused = num_cut = 0
    with Engine() as engine:
        for number, schema in enumerate(schemas):
            for place, budget in enumerate(rng.sample((1, 2, 4, 7, 12, 20, 33, 60, 90), 5)):
                index = number * 10 + place
                thoughts[index] = THOUGHTS[index % len(THOUGHTS)]
                engine.add(index, late(schema_spec(schema), thoughts[index]), budget, eos_token_ids=(EOS, IM_END))
        engine.run()
        for index, reason in engine.reasons.items():
            tokens = engine.tokens[index]
            if reason == FinishReason.ERROR:
                assert engine.errors[index][1] == "max_tokens" and not tokens, engine.errors[index]
                num_refused += 1
                continue
            thought, answer = split(tokens, thoughts[index])
            check_valid(answer, schemas[index // 10])
            check_ended_once(tokens)
            num_thoughts += thought is not None
            num_cut += reason == FinishReason.LENGTH
    assert num_thoughts > 100 and num_refused > 50 and num_cut > 100


def test_tokens_do_not_depend_on_what_else_runs() -> None:
    indices = [index for index in range(len(KINDS) * len(THOUGHTS)) if index % len(KINDS)]
    expected = run(indices)
    assert run(indices, depth=1) == run(indices, depth=3) == expected
    assert run(indices, num_blocks=38) == expected, "preempted"
    for index in indices[::3]:
        assert run([index]) == {index: expected[index]}
    assert len({split(expected[index][0], THOUGHTS[index % len(THOUGHTS)])[0] is None for index in indices}) == 2


@pytest.mark.parametrize("index", [1, 2, 8, 10, 15, 29])
def test_a_request_goes_on_in_another_engine(index: int) -> None:
    ((tokens, reason),) = run([index]).values()
    for done in range(1, len(tokens), 2):
        with Engine() as engine:
            add(engine, index, 60, resumed=tokens[:done])
            engine.run()
            assert engine.tokens[index][done:] == tokens[done:], engine.errors
            assert engine.reasons[index] == reason or reason == FinishReason.LENGTH


def test_too_few_tokens_are_refused_at_once() -> None:
    number = schema_spec({"type": "integer", "minimum": 100, "maximum": 999})
    with Engine() as engine:
        engine.add(1, late(number, OPEN), len(END) + 2)
        engine.add(2, late(number, OPEN), len(END) + 3)
        engine.add(3, late(number, FREE), 3)
        engine.run()
        message, param = engine.errors[1]
        assert param == "max_tokens" and f"at least {len(END) + 3} for the thought to end" in str(message)
        assert not engine.tokens[1]
        assert engine.text(2).startswith(b"</think>") and 100 <= int(engine.text(2)[len("</think>") :]) <= 999
        assert engine.reasons[2] == FinishReason.LENGTH
        assert 100 <= int(engine.text(3)) <= 999, "there is no room for a thought, so none begins"


@pytest.mark.parametrize("thought", [OPEN, SPECIAL, msgspec.structs.replace(SPECIAL, is_open=True)])
def test_a_budget_ends_the_thought_and_not_the_answer(thought: Thought) -> None:
    budget = msgspec.structs.replace(thought, max_tokens=4)
    with Engine() as engine:
        for index in range(1, 40):
            engine.add(index, late(schema_spec({"type": "integer", "maximum": 9, "minimum": 1}), budget), 80)
        engine.run()
        thoughts = [split(engine.tokens[index], thought) for index in range(1, 40)]
        assert all(1 <= int(answer) <= 9 for _, answer in thoughts)
        assert {engine.reasons[index] for index in range(1, 40)} == {FinishReason.STOP}
        lengths = {len(engine.tokens[index]) for index, (inner, _) in enumerate(thoughts, 1) if inner is not None}
        assert max(lengths) <= 4 + len(thought.end_token_ids) + len(thought.start_token_ids) + 2


def test_other_kinds_are_cut_in_the_middle_of_the_thought() -> None:
    with Engine() as engine:
        engine.add(1, late(GrammarSpec("choice", '["the"]'), OPEN), 5)
        engine.run()
        assert len(engine.tokens[1]) == 5 and engine.reasons[1] == FinishReason.LENGTH


@pytest.mark.parametrize(
    ("text", "is_thinking"),
    [("<think>", True), ("<think<", False), ("<that>", False), ("<thin", False)],
)
def test_a_text_of_the_language_that_begins_like_a_thought(text: str, is_thinking: bool) -> None:
    """Both are possible until one of them is not."""
    grammar = state_of(GrammarSpec("choice", '["<think<", "<that>"]'))
    *tokens, last = TOKENIZER.encode(text, False)
    for token in tokens:
        assert grammar.forced_token is None and not grammar.is_thinking
        assert grammar.accept(token) is Verdict.GOES_ON
    assert grammar.accept(last) is (Verdict.ENDED if text in ("<think<", "<that>") else Verdict.GOES_ON)
    assert grammar.is_thinking is is_thinking
    if is_thinking:
        for token in (*tokens_of("<that> is it"), *END, *tokens_of("<that")):
            assert grammar.accept(token) is Verdict.GOES_ON
        assert not grammar.is_thinking and grammar.may_begin_thought is None
        assert grammar.accept(token_of(ord(">"))) is Verdict.ENDED


def test_what_begins_a_thought_is_forced_once_it_can_be_nothing_else() -> None:
    grammar = state_of(schema_spec({"type": "integer"}))
    assert grammar.may_begin_thought == START[0] and grammar.forced_token is None
    for before, token in pairwise(START):
        assert grammar.accept(before) is Verdict.GOES_ON
        assert grammar.forced_token == token
    assert grammar.accept(START[-1]) is Verdict.GOES_ON and grammar.is_thinking and grammar.forced_token is None


def state_of(spec: GrammarSpec, thought: Thought = FREE, max_tokens: int = 40) -> RequestGrammar:
    vocabulary = Vocabulary(VOCABULARY, VOCAB_SIZE)
    params = ResolvedParams(eos_token_ids=(EOS,))
    matcher = compile_grammar(spec, vocabulary)
    grammar = RequestGrammar(matcher, vocabulary, params, completes=spec.completes, thought=thought)
    grammar.start(max_tokens)
    return grammar


@pytest.mark.parametrize(
    ("spelt", "is_over"),
    [
        (END, True),
        (tokens_of("hm</think>"), True),  # another spelling than the tokenizer's
        (tokens_of("</</think"), False),
        (tokens_of("</think<"), False),
        ((*tokens_of("</thin"), IM_END, *tokens_of("k>")), True),  # special tokens are no text
    ],
)
def test_the_end_is_found_in_the_text(spelt: Sequence[int], is_over: bool) -> None:
    thinking = Thinking(OPEN, Vocabulary(VOCABULARY, VOCAB_SIZE))
    for token in spelt:
        assert thinking.is_inside and thinking.think(token)
    assert thinking.is_inside is not is_over


def test_a_token_that_begins_the_answer_too_is_not_taken() -> None:
    odd = msgspec.structs.replace(OPEN, end=b"t", end_token_ids=(token_of(ord("t")),))
    thinking = Thinking(odd, Vocabulary(VOCABULARY, VOCAB_SIZE))
    the = VOCABULARY.tokens.index(b"the")
    assert not thinking.think(the) and thinking.is_inside
    with Engine() as engine:
        for index in range(1, 20):
            engine.add(index, late(schema_spec({"type": "boolean"}), odd), 300)
        engine.run()
        for index in range(1, 20):
            assert json.loads(engine.text(index).partition(b"t")[2].decode()) in (True, False)
            assert the not in engine.tokens[index]
            check_ended_once(engine.tokens[index])
