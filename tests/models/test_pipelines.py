"""An engine core with pipeline stages: what it gives for requests of all kinds is what one worker gives."""

from __future__ import annotations

from typing import Any

import pytest

from engine_core.config import SpeculativeConfig
from engine_core.messages import AbortRequests, GrammarSpec, ResolvedParams, ResolvedPoolingParams, SetVocabulary
from tests import tiny
from tests.null.core_harness import make_request
from tests.ops.cpu import NEEDS_KERNELS
from tests.thread_workers import Engine, engine

pytestmark = NEEDS_KERNELS

FIRST = 10
"""Index of the first request."""


def prompt(number: int, length: int = 20) -> list[int]:
    return [(7 * number + i * i) % 200 + 3 for i in range(length)]


def requests() -> list[dict[str, Any]]:
    """Requests of all kinds."""
    text = ResolvedParams(max_tokens=24, temperature=0.8, seed=3)
    penalties: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    return [
        {"params": ResolvedParams(max_tokens=24, temperature=0.0)},
        {"params": text},
        {"params": ResolvedParams(max_tokens=24, temperature=0.7, seed=5, **penalties)},
        {"params": ResolvedParams(max_tokens=9, temperature=0.0, logprobs=3, prompt_logprobs=2)},
        {"params": ResolvedParams(max_tokens=24, temperature=0.0), "grammar": GrammarSpec("regex", "[ab]{8}c+")},
        {"params": None, "pooling_params": ResolvedPoolingParams(pooling_type="MEAN")},
        {"params": ResolvedParams(max_tokens=60, temperature=0.0)},
    ]


def answers(one: Engine) -> list[Any]:
    """Tokens, log probabilities and vectors of the requests, which run together."""
    tokens = tuple(bytes([token]) if 32 <= token < 127 else b"" for token in range(tiny.VOCAB_SIZE))
    one.inbox.append(SetVocabulary(tokens, (), (2,)))
    wanted = requests()
    indices = range(FIRST, FIRST + len(wanted))
    for index, fields in zip(indices, wanted, strict=True):
        one.inbox.append(make_request(index, prompt(index, 20 + 7 * (index % 4)), **fields))
    one.finish(indices)
    seen = []
    for index in indices:
        outputs = [output for sent in one.sent for output in getattr(sent, "outputs", ()) if output.index == index]
        logprobs = [(entry.token_ids, entry.logprobs) for out in outputs for entry in out.new_logprobs]
        logprobs += [(entry.token_ids, entry.logprobs) for out in outputs for entry in out.prompt_logprobs]
        vectors = [out.pooling_output.data for out in outputs if out.pooling_output is not None]
        seen.append((one.outputs[index], one.reasons[index], logprobs, vectors))
    return seen


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    with engine(tiny.checkpoint("llama", num_hidden_layers=4)) as one:
        result = answers(one)
    assert result[3][2] and result[5][3] and bytes(result[4][0][:8]).strip(b"ab") == b""
    return result


@pytest.mark.parametrize(
    ("num_ranks", "num_stages", "place"),
    [
        (1, 2, {}),
        (1, 3, {}),
        (2, 2, {}),
        (2, 3, {"nnodes": 2}),
        (2, 3, {"nnodes": 2, "interface": "lo"}),
        (2, 1, {"nnodes": 2}),
        (2, 2, {"nnodes": 4, "interface": "lo"}),
    ],
)
@pytest.mark.parametrize("drafts", [False, True])
def test_requests_of_all_kinds(
    num_ranks: int, num_stages: int, place: dict[str, Any], drafts: bool, expected: list[Any]
) -> None:
    speculative = SpeculativeConfig(method="ngram", num_speculative_tokens=3) if drafts else None
    model = tiny.checkpoint("llama", num_hidden_layers=4)
    with engine(model, num_ranks, num_stages, speculative=speculative, **place) as several:
        assert answers(several) == expected


@pytest.mark.parametrize("name", ["gemma3", "lfm2", "qwen3_5"])
def test_caches_of_several_kinds(name: str) -> None:
    """A stage may lack some of the kinds."""
    outputs = []
    for num_stages in (1, 2):
        with engine(tiny.checkpoint(name), num_stages=num_stages) as some:
            indices = range(FIRST, FIRST + 4)
            for index in indices:
                params = ResolvedParams(max_tokens=40, temperature=index % 2 * 0.8, seed=index)
                some.inbox.append(make_request(index, prompt(index, 60), params=params))
            outputs.append(some.finish(indices))
    assert outputs[0] == outputs[1]


def test_requests_that_leave_and_are_preempted() -> None:
    model = tiny.checkpoint("llama", num_hidden_layers=4)
    indices = range(FIRST, FIRST + 8)

    def tokens(one: Engine, aborts: bool) -> list[list[int]]:
        for index in indices:
            params = ResolvedParams(max_tokens=90, temperature=index % 2 * 0.8, seed=index)
            one.inbox.append(make_request(index, prompt(index), params=params))
        if aborts:
            one.run_until(lambda: len(one.outputs.get(FIRST + 7, [])) > 3)
            one.inbox.append(AbortRequests(indices=tuple(indices[1::3])))
            for number, index in enumerate(indices[1::3]):  # others come in their slots
                one.inbox.append(make_request(100 + number, prompt(index), 9))
        kept = [index for index in indices if index not in indices[1::3]]
        return one.finish(kept if aborts else list(indices))

    with engine(model) as one:
        expected = tokens(one, aborts=False)
    with engine(model, num_stages=2, num_blocks=12) as two:
        result = tokens(two, aborts=True)
        assert two.core._scheduler is not None and two.core._scheduler.num_preemptions > 0
        two.run_until(lambda: {100, 101, 102} <= two.reasons.keys() and not two.core._awaited)
    assert result == [output for place, output in enumerate(expected) if place % 3 != 1]
