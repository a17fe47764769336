"""Beam search over an engine whose log probabilities are a function of the tokens before."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from api.config import ServerConfig
from api.errors import RequestError
from api.generation.beam_search import BeamSearch, BeamSearchParams
from engine_core.config import EngineConfig, SchedulerConfig
from tests.fakes import EOS, IM_END, VOCAB_SIZE, Connection, FakeServer, token_of, tokens_of
from tests.unit.conftest import Api
from tests.unit.sockets import until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
A, B, C = (token_of(ord(char)) for char in "abc")


def likely(tokens: list[int]) -> dict[int, float]:
    """Log probabilities of all tokens, which depend on the last two and on how many there are."""
    mixed = [(token * 7919 + sum(tokens[-2:]) * 104729 + len(tokens) * 31) % 1009 / 200 for token in range(VOCAB_SIZE)]
    total = math.log(sum(map(math.exp, mixed)))
    # What the engine says is float32.
    return {token: float(np.float32(value - total)) for token, value in enumerate(mixed)}


def definition(
    prompt: list[int], width: int, max_tokens: int, penalty: float, next_ones: Callable[[list[int]], dict[int, float]]
) -> list[tuple[list[int], float]]:
    """Outputs and cumulative log probabilities, searched without any short cut."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float, float]] = []
    for _ in range(max_tokens):
        longer = []
        for output, total in beams:
            best = sorted(next_ones(prompt + output).items(), key=lambda item: -item[1])[: 2 * width]
            for token, logprob in best:
                if token in (EOS, IM_END):
                    score = (total + logprob) / (len(prompt) + len(output)) ** penalty
                    ended.append((output, total + logprob, score))
                else:
                    longer.append(([*output, token], total + logprob))
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]
    ended += [(output, total, total / (len(prompt) + len(output)) ** penalty) for output, total in beams]
    return [(output, total) for output, total, _ in sorted(ended, key=lambda beam: -beam[2])[:width]]


def eager_to_end(tokens: list[int]) -> dict[int, float]:
    """The end is always among the likely ones."""
    return {**likely(tokens), EOS: -1.5 - len(tokens) % 3}


@pytest.mark.parametrize("next_ones", [likely, eager_to_end])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("width", [1, 2, 5])
async def test_the_search_finds_what_the_definition_says(
    server: FakeServer, next_ones: Callable[[list[int]], dict[int, float]], penalty: float, width: int
) -> None:
    server.engine.likely = next_ones
    prompt = tokens_of("a prompt")
    params = BeamSearchParams(beam_width=width, max_tokens=9, length_penalty=penalty, logprobs=2)
    search = BeamSearch(server.model, "id", prompt, params)
    search.start()
    beams = await search.run()
    expected = definition(prompt, width, 9, penalty, next_ones)
    assert [beam.token_ids for beam in beams] == [output for output, _ in expected]
    assert [beam.cum_logprob for beam in beams] == pytest.approx([total for _, total in expected], rel=1e-5)
    assert all(len(beam.logprobs) == len(beam.token_ids) for beam in beams)
    assert all(beam.finish_reason == ("length" if len(beam.token_ids) == 9 else "stop") for beam in beams)
    assert server.engine.num_unfinished == 0


async def test_a_search_ends_as_soon_as_it_is_decided(server: FakeServer) -> None:
    server.engine.likely = lambda tokens: {EOS: -0.1, A: -5.0, B: -6.0}
    search = BeamSearch(server.model, "id", [A], BeamSearchParams(beam_width=2, max_tokens=400, length_penalty=0))
    search.start()
    beams = await search.run()
    assert [beam.finish_reason for beam in beams] == ["stop", "stop"]
    assert beams[0].token_ids == [] and beams[0].stop_reason == EOS
    assert len(server.engine.submitted) < 50


async def test_completions_of_a_beam_search() -> None:
    api = Api(FakeServer(ServerConfig(max_logprobs=3)))
    table = {A: -0.5, B: -1.0, C: -1.5, EOS: -9.0}
    api.server.engine.likely = lambda tokens: table
    answer = await api.complete(["x", "y"], n=2, max_tokens=3, use_beam_search=True, temperature=0, logprobs=1)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == ["aaa", "aab"] * 2
    assert choices[1]["logprobs"]["tokens"] == ["a", "a", "b"]
    assert choices[1]["logprobs"]["token_logprobs"] == [-0.5, -0.5, -1.0]
    assert choices[1]["logprobs"]["top_logprobs"][2] == {"a": -0.5, "b": -1.0}
    assert answer["usage"]["completion_tokens"] == 12 and answer["usage"]["prompt_tokens"] == 4
    assert all(choice["finish_reason"] == "length" for choice in choices)
    # What a search asks the engine for is not bounded by what clients may ask for.
    assert (await api.complete("x", n=3, max_tokens=2, use_beam_search=True))["choices"][2]["text"]
    assert (await api.error(COMPLETIONS, {"prompt": "x", "use_beam_search": True, "logprobs": 4}))[
        "param"
    ] == "logprobs"


async def test_chat_with_a_beam_search(api: Api) -> None:
    api.server.engine.likely = lambda tokens: {EOS: -0.1} if tokens[-1] == B else {A: -3.0, B: -0.2, EOS: -8.0}
    answer = await api.chat("x", use_beam_search=True, n=2, include_stop_str_in_output=True, skip_special_tokens=False)
    first = answer["choices"][0]
    assert first["message"] == {"role": "assistant", "content": "b</s>", "refusal": None}
    assert first["finish_reason"] == "stop" and first["stop_reason"] == EOS
    answer = await api.chat("x", use_beam_search=True, echo=True)
    assert answer["choices"][0]["message"]["content"] == "b"


async def test_metrics_count_a_search_once(api: Api) -> None:
    await api.complete("x", n=2, max_tokens=4, use_beam_search=True)
    labels = {"model_name": "fake-model", "engine": "0"}

    def sample(name: str, labels: dict[str, str]) -> float:
        value = api.server.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    assert sample("vllm:request_params_n_count", labels) == 1
    assert sample("vllm:time_to_first_token_seconds_count", labels) == 1
    generated = sample("vllm:generation_tokens_total", labels)
    assert generated == sample("vllm:request_generation_tokens_sum", labels) > 0
    assert sample("vllm:prompt_tokens_total", labels) == sample("vllm:request_prompt_tokens_sum", labels) > 0
    assert sample("vllm:request_max_num_generation_tokens_count", labels) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "use_beam_search"),
        ({"n": 0}, "n"),
        ({"n": 257}, "n"),
        ({"length_penalty": 101}, "length_penalty"),
        ({"stop": "x"}, "stop"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"repetition_detection": {"max_pattern_size": 2, "min_count": 2}}, "repetition_detection"),
        ({"max_tokens": 5000}, "input_tokens"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"priority": 1}, "priority"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_a_search_cannot_do(api: Api, path: str, fields: dict[str, Any], param: str) -> None:
    prompt: dict[str, Any] = {"messages": [{"role": "user"}]} if path == CHAT else {"prompt": "x"}
    error = await api.error(path, {**prompt, "use_beam_search": True, **fields})
    assert error["param"] == param
    assert not api.server.engine.num_unfinished


async def test_bad_combinations_of_completions(api: Api) -> None:
    body = {"prompt": "x", "use_beam_search": True}
    assert (await api.error(COMPLETIONS, {**body, "best_of": 2, "n": 2}))["param"] == "best_of"
    assert (await api.error(COMPLETIONS, {**body, "echo": True, "logprobs": 1}))["param"] == "echo"
    assert (await api.complete("x", use_beam_search=True, echo=True))["choices"][0]["text"].startswith("x")


async def test_a_client_that_leaves_ends_its_search(api: Api) -> None:
    engine = api.server.engine
    engine.likely = likely
    connection = Connection(api.server.app, COMPLETIONS, {"prompt": "x", "max_tokens": 400, "use_beam_search": True})
    await until(lambda: len(engine.submitted) >= 5, interval=0)
    connection.leave()
    await connection.task
    await until(lambda: engine.num_unfinished == 0)
    assert connection.sent == []
    assert len(engine.submitted) < 100


async def test_an_engine_that_fails(api: Api) -> None:
    engine = api.server.engine
    engine.steps_left = 3
    request = asyncio.create_task(
        api.post(COMPLETIONS, {"prompt": ["x", "y"], "max_tokens": 9, "use_beam_search": True})
    )
    await until(lambda: not engine.steps_left and engine.num_unfinished, interval=0)
    engine.fail_one("bad logits")
    engine.steps_left = None
    response = await request
    assert response.status_code == 500 and "bad logits" in response.text
    assert engine.num_unfinished == 0


async def test_queue_limits_hold_for_the_start_alone() -> None:
    api = Api(FakeServer(ServerConfig(engine=EngineConfig(scheduler=SchedulerConfig(max_num_queued_reqs=1)))))
    api.server.engine.max_queued = 1
    await api.complete("x", n=4, use_beam_search=True)
    await api.error(COMPLETIONS, {"prompt": ["x", "y"], "use_beam_search": True}, 429)
    assert api.server.engine.num_unfinished == 0


def test_parameters_of_the_offline_class() -> None:
    with pytest.raises(RequestError, match="between 1 and 256"):
        BeamSearchParams(beam_width=0, max_tokens=4)
    with pytest.raises(RequestError, match="length_penalty"):
        BeamSearchParams(beam_width=1, max_tokens=4, length_penalty=math.nan)
    with pytest.raises(RequestError, match="max_tokens"):
        BeamSearchParams(beam_width=1, max_tokens=0)
