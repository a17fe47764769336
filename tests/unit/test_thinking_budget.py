"""Budgets of thinking: what the front end makes of them, and what the sampler forces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ops
from api.config import ServerConfig
from executor.device.steps import ImmediateSteps, wait_for
from executor.messages import NewRequest, ResolvedParams, ThinkingBudget
from executor.request_states import RequestStates
from executor.sampling.base import SampleRows, TokenMask
from executor.sampling.sampler import Sampler
from executor.sampling.thinking import forced_token
from tests.fakes import FakeServer, tiny_tokenizer, tokens_of
from tests.ops.cpu import using
from tests.unit.conftest import Api

TOKENIZER = tiny_tokenizer()
START, END = (101,), (7, 8, 9)


def forced(output: list[int], max_tokens: int = 3, *, starts_open: bool = False) -> int | None:
    return forced_token(ThinkingBudget(max_tokens, START, END, starts_open), np.array(output, np.int32))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([], None),
        ([1, 2, 3, 4], None),  # it does not think
        ([101, 1, 2], None),
        ([101, 1, 2, 3], 7),
        ([5, 101, 1, 2, 3, 4], 7),
        ([101, 1, 2, 3, 7], 8),
        ([101, 1, 2, 3, 7, 8], 9),
        ([101, 1, 2, 3, 7, 8, 9], None),
        ([101, 1, 7, 8], 9),  # the model had begun to end it
        ([101, 1, 2, 3, 7, 8, 9, 4, 4, 4, 4], None),
        ([101, 7, 8, 9, 101, 1, 1, 1], 7),  # each section has the budget
    ],
)
def test_what_is_forced(output: list[int], expected: int | None) -> None:
    assert forced(output) == expected


def test_outputs_that_begin_inside_of_thinking() -> None:
    assert forced([1, 2], starts_open=True) is None
    assert forced([1, 2, 3], starts_open=True) == 7
    assert forced([1, 2, 3, 7, 8, 9, 1, 1, 1], starts_open=True) is None
    assert forced([101, 1, 2], starts_open=True) is None
    assert forced([], 0, starts_open=True) == 7
    assert forced([101], 0) == 7


@pytest.mark.parametrize("kernels", [True, False])
def test_the_sampler_takes_forced_tokens_and_leaves_other_rows_alone(kernels: bool) -> None:
    vocab_size = 150
    with using(ops.op_set("cpu") if kernels else "reference"):
        sampler = Sampler(4)
    states = RequestStates(4, 64, [32])
    outputs = {1: [101, 1, 2, 3], 2: [101, 1], 3: [101, 1, 2, 3]}
    for slot, output in outputs.items():
        thinking = ThinkingBudget(3, START, (149,)) if slot != 3 else None
        params = ResolvedParams(temperature=0.8, seed=slot, logprobs=1, thinking_budget=thinking)
        request = NewRequest(
            slot=slot,
            token_ids=np.array([5, *output], np.int32).tobytes(),
            num_prompt_tokens=1,
            num_computed_tokens=0,
            block_ids=(np.zeros(1, np.int32).tobytes(),),
            params=params,
        )
        states._add(request)
        sampler.add(slot, params)
    slots = np.array([3, 1, 2], np.int32)
    rows = SampleRows(slots, states.num_tokens[slots], np.arange(3, dtype=np.int32))
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0))
    bitmask = np.zeros((1, 5), np.int32)
    bitmask[0, 0] = 1 << 6
    for mask in (None, TokenMask(bitmask, np.array([-1, -1, 0], np.int32))):
        result = wait_for(sampler.sample(logits.clone(), rows, states, mask).output, ImmediateSteps())
        assert not result.row_errors
        assert result.token_ids[1] == 149
        if mask is not None:
            assert result.token_ids[2] == 6
        free = Sampler(4)
        free.add(3, ResolvedParams(temperature=0.8, seed=3, logprobs=1))
        first = SampleRows(slots[:1], rows.positions[:1], np.zeros(1, np.int32))
        alone = wait_for(free.sample(logits[:1].clone(), first, states).output, ImmediateSteps())
        assert result.token_ids[0] == alone.token_ids[0] and result.logprobs[0] == alone.logprobs[0]
        expected = torch.log_softmax(logits[1], 0)[149].item()  # of what the model said
        assert np.frombuffer(result.logprobs[1].logprobs, np.float32)[0] == pytest.approx(expected, abs=1e-4)


# -- over HTTP


def thinking_server(parser: str = "qwen3", **options: Any) -> Api:
    return Api(FakeServer(ServerConfig(reasoning_parser=parser, **options)))


def budgets(api: Api) -> list[ThinkingBudget | None]:
    return [message.sampling_params.thinking_budget for message in api.server.engine.submitted]  # type: ignore[union-attr]


async def test_the_engine_is_told_the_markers_and_where_thinking_begins() -> None:
    api = thinking_server()
    await api.chat("x", thinking_token_budget=5)
    await api.complete("x", thinking_token_budget=0)
    for prompt in ("x <think>", "<think>\n", "<think>a</think>", "a<think>b</think>c<think>d"):
        await api.complete(prompt, thinking_token_budget=5)
    found = budgets(api)
    assert all(budget is not None for budget in found)
    start, end = (tuple(TOKENIZER.encode(marker, False)) for marker in ("<think>", "</think>"))
    assert found[0] == ThinkingBudget(5, start, end, False)
    assert [budget.starts_open for budget in found if budget] == [False, False, True, True, False, True]
    api = thinking_server("deepseek_r1")
    for prompt in ("x", "<think></think>"):
        await api.complete(prompt, thinking_token_budget=5)
    assert [budget.starts_open for budget in budgets(api) if budget] == [True, False]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [5, 6]}, "thinking_token_budget"),
        ({"bad_words": [">"]}, "bad_words"),
        ({"bad_words": ["</think>"]}, "bad_words"),
        ({"min_tokens": 2, "stop_token_ids": tokens_of(">")}, "min_tokens"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"use_beam_search": True}, "thinking_token_budget"),
    ],
)
async def test_budgets_that_could_not_be_kept(fields: dict[str, Any], param: str) -> None:
    api = thinking_server()
    error = await api.error("/v1/completions", {"prompt": "x", "thinking_token_budget": 5, **fields})
    assert error["param"] == param
    assert not api.server.engine.submitted


async def test_a_budget_needs_a_parser(api: Api) -> None:
    error = await api.error("/v1/completions", {"prompt": "x", "thinking_token_budget": 5})
    assert error["param"] == "thinking_token_budget" and "--reasoning-parser" in error["message"]
