"""Fields that control how many completions there are, when they end and how they are streamed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import pytest

from api.config import ServerConfig
from api.engine.channel import Delta
from api.errors import RequestError
from api.generation.fanout import choose_best
from api.params.sampling import SamplingParams
from engine_core.messages import ResolvedParams
from tests.fakes import FakeServer, fake_logprobs, says
from tests.unit.conftest import Api, error_of

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "hi"}]


# -- best_of


def spelled_out(texts: list[str]) -> Any:
    """A script in which each completion of a prompt says another text."""
    known: dict[tuple[int, ...], str] = {}

    def script(prompt: list[int], params: ResolvedParams) -> Iterable[int]:
        text = known.setdefault((*prompt, params.seed), texts[len(known) % len(texts)])
        return says(text)(prompt, params)

    return script


async def test_the_best_completions_are_returned_best_first() -> None:
    """Each token has the log probability -1, so the shortest completion is the best."""
    api = Api(FakeServer(script=spelled_out(["long text", "a", "middle", "ab"])))
    answer = await api.complete("x", n=2, best_of=4, max_tokens=16)
    assert [choice["text"] for choice in answer["choices"]] == ["a", "ab"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 10 + 2 + 7 + 3  # all that was generated, end tokens included
    assert answer["usage"]["prompt_tokens"] == 2


async def test_the_best_of_each_prompt_with_log_probabilities() -> None:
    api = Api(FakeServer(script=spelled_out(["abc", "a", "ab", "abcd"])))
    answer = await api.complete(["x", "y"], n=1, best_of=2, max_tokens=16, logprobs=1)
    assert [choice["text"] for choice in answer["choices"]] == ["a", "ab"]
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [["a", "</s>"], ["a", "b", "</s>"]]


def test_of_equals_the_earlier_is_returned() -> None:
    deltas = [Delta(choice, token_ids=(choice,), logprobs=(fake_logprobs(9, 0, 0),)) for choice in range(3)]
    assert [(delta.choice, delta.token_ids) for delta in choose_best(deltas, 2, 3)] == [(0, (0,)), (1, (1,))]


@pytest.mark.parametrize("fields", [{"best_of": 1, "n": 2}, {"best_of": 20000}, {"best_of": 0}, {"best_of": -1}])
async def test_numbers_of_completions_that_make_no_sense(api: Api, fields: dict[str, Any]) -> None:
    assert (await api.error(COMPLETIONS, {"prompt": "x", **fields}))["param"] == "best_of"


async def test_the_best_cannot_be_streamed_or_greedy(api: Api) -> None:
    error = await api.error(COMPLETIONS, {"prompt": "x", "best_of": 2, "stream": True})
    assert error["param"] == "best_of" and "does not support stream" in error["message"]
    assert (await api.error(COMPLETIONS, {"prompt": "x", "best_of": 2, "temperature": 0}))["param"] == "best_of"
    assert len(await api.stream(COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 2, "max_tokens": 2})) == 4


# -- repetition_detection


async def test_repetition_detection_reaches_the_engine(api: Api) -> None:
    await api.complete("x", repetition_detection={"max_pattern_size": 4, "min_count": 3})
    await api.chat("x", repetition_detection={})
    params = [message.sampling_params for message in api.server.engine.submitted]
    loops = [given.repetition_detection for given in params if given is not None]
    assert loops[0] is not None and loops[1] is None
    assert (loops[0].min_pattern_size, loops[0].max_pattern_size, loops[0].min_count) == (1, 4, 3)


@pytest.mark.parametrize(
    "value",
    [
        {"max_pattern_size": 4},
        {"max_pattern_size": 4, "min_count": 1},
        {"max_pattern_size": -1, "min_count": 2},
        {"max_pattern_size": 2000, "min_count": 2},
        {"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2},
        {"max_pattern_size": 4, "min_pattern_size": -1, "min_count": 2},
        {"min_pattern_size": 2, "min_count": 2},
    ],
)
async def test_loops_that_cannot_be_looked_for(api: Api, value: dict[str, int]) -> None:
    assert (await api.error(COMPLETIONS, {"prompt": "x", "repetition_detection": value}))[
        "param"
    ] == "repetition_detection"


# -- stream_interval


async def test_chunks_of_several_tokens(api: Api) -> None:
    text = "abcdefghij"
    api.server.engine.script = says(text)
    body = {"prompt": "x", "max_tokens": 16, "stream_interval": 4}
    events = await api.stream(COMPLETIONS, {**body, "logprobs": 0, "return_token_ids": True})
    choices = [event["choices"][0] for event in events]
    assert [choice["text"] for choice in choices] == ["a", "bcde", "fghi", "j"]
    assert [len(choice["token_ids"]) for choice in choices] == [1, 4, 4, 2]
    assert sum((choice["logprobs"]["tokens"] for choice in choices), [])[:10] == list(text)
    assert (await api.complete("x", max_tokens=16, stream_interval=4))["choices"][0]["text"] == text


async def test_the_servers_stream_interval() -> None:
    api = Api(FakeServer(ServerConfig(stream_interval=100), says("abcdefgh")))
    body = {"messages": HI, "n": 2, "seed": 1}
    events = await api.stream(CHAT, body)
    texts = ["", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    assert texts == ["abcdefgh"] * 2
    assert len(events) == 2 * 3  # the role, the first token, the rest
    assert len(await api.stream(CHAT, {**body, "stream_interval": 1})) == 2 * 10


@pytest.mark.parametrize("value", [0, -1])
async def test_intervals_below_one_token(api: Api, value: int) -> None:
    error = await api.error(COMPLETIONS, {"prompt": "x", "stream": True, "stream_interval": value})
    assert error["param"] == "stream_interval"


# -- unknown fields


async def test_unknown_fields_are_ignored(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await api.complete("x", nonsense=1, metadata={"a": "b"})
    assert "nonsense" in caplog.text and "metadata" not in caplog.text


async def test_unknown_fields_are_refused_where_that_is_wanted() -> None:
    api = Api(FakeServer(ServerConfig(strict=True)))
    known = {"store": False, "metadata": {}, "service_tier": "auto", "session_id": "s", "vllm_xargs": {"a": 1}}
    await api.complete("x", **known)
    await api.chat("x", **known, stream_options=None)
    for path, prompt in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HI})):
        error = await api.error(path, {**prompt, "temp": 0, "top_q": 1, "x" * 5000: None})
        assert "temp, top_q, xxx" in error["message"] and error["param"] == "temp"
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usge": True, "include_obfuscation": False}}
    assert (await api.error(COMPLETIONS, body))["param"] == "stream_options.include_usge"
    assert (await api.error("/tokenize", {"prompt": "x", "text": 1}))["param"] == "text"
    many = {f"field{i}": i for i in range(50)}
    assert "field9, ..." in (await api.error(COMPLETIONS, {"prompt": "x", **many}))["message"]
    assert not api.server.engine.num_unfinished


# -- load


async def test_the_load_is_the_number_of_unfinished_completions(api: Api) -> None:
    assert (await api.get("/load")).json() == {"server_load": 0}
    api.server.engine.steps_left = 0
    waiting = asyncio.create_task(api.complete("x", n=3))
    while api.server.engine.num_unfinished < 3:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert (await api.get("/load")).json() == {"server_load": 3}
    api.server.engine.steps_left = None
    await waiting


def test_sampling_params_check_the_same() -> None:
    refused: list[dict[str, Any]] = [
        {"best_of": 1, "n": 2},
        {"best_of": 2, "temperature": 0},
        {"truncate_prompt_tokens": -2},
    ]
    for fields in refused:
        with pytest.raises(RequestError):
            SamplingParams(**fields)
    assert SamplingParams(n=2).num_completions == 2 and SamplingParams(n=2, best_of=5).num_completions == 5


async def test_a_body_of_the_wrong_type_says_so_first() -> None:
    api = Api(FakeServer(ServerConfig(strict=True)))
    assert error_of(await api.post(COMPLETIONS, {"prompt": 5, "nonsense": 1}), 400)["param"] == "body.prompt"


# -- stop_regex


async def test_a_pattern_ends_a_completion(api: Api) -> None:
    api.server.engine.script = says("I have 12 apples and 3 pears")
    choice = (await api.complete("x", max_tokens=64, stop_regex=r"\d+ apples"))["choices"][0]
    assert choice["text"] == "I have " and choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == r"\d+ apples"
    choice = (await api.chat("x", max_tokens=64, stop_regex=["zzz", r"\d p"], stop="12 ap"))["choices"][0]
    assert choice["message"]["content"] == "I have " and choice["stop_reason"] == "12 ap"
    choice = (await api.complete("x", max_tokens=64, stop_regex=r"\d+ p", include_stop_str_in_output=True))["choices"][
        0
    ]
    assert choice["text"] == "I have 12 apples and 3 p"
    # Nothing of a match is seen in a stream either.
    events = await api.stream(COMPLETIONS, {"prompt": "x", "max_tokens": 64, "stop_regex": r"\d+ apples"})
    assert "".join(event["choices"][0]["text"] for event in events) == "I have "
    choice = (await api.complete("x", max_tokens=64, stop_regex=r"\d+ a", min_tokens=12))["choices"][0]
    assert choice["text"] == "I have 12 apples and 3 pears"
    assert api.server.engine.num_unfinished == 0


@pytest.mark.parametrize("value", ["(", "a*", "a$", ["x"] * 17, r"(a)\1", "a{9999}"])
async def test_patterns_that_are_refused(api: Api, value: Any) -> None:
    assert (await api.error(COMPLETIONS, {"prompt": "x", "stop_regex": value}))["param"] == "stop_regex"


# -- what is told of the prompt


async def test_where_the_tokens_of_a_prompt_lie(api: Api) -> None:
    answer = await api.complete(["the hé", "x"], return_token_offsets=True, return_token_ids=True)
    first, second = answer["choices"]
    assert first["prompt_token_offsets"] == [[0, 0], [0, 3], [3, 4], [4, 5], [5, 6], [5, 6]]
    assert len(first["prompt_token_ids"]) == 6 and second["prompt_token_offsets"] == [[0, 0], [0, 1]]
    body = {"prompt": "abcdef", "return_token_offsets": True, "truncate_prompt_tokens": 2}
    assert (await api.ok(COMPLETIONS, body))["choices"][0]["prompt_token_offsets"] == [[0, 0], [5, 6]]
    body["truncation_side"] = "right"
    events = await api.stream(COMPLETIONS, body)
    assert events[0]["choices"][0]["prompt_token_offsets"] == [[0, 0], [0, 1]]
    assert "prompt_token_offsets" not in events[1]["choices"][0]
    error = await api.error(COMPLETIONS, {"prompt": [5, 6], "return_token_offsets": True})
    assert error["param"] == "return_token_offsets"


async def test_the_prompt_that_the_template_wrote(api: Api) -> None:
    answer = await api.chat("hi", return_prompt_text=True, return_token_offsets=True)
    text = answer["prompt_text"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer["prompt_token_offsets"][:2] == [[0, 12], [12, 13]]
    assert answer["prompt_token_offsets"][-1] == [len(text) - 1, len(text)]
    events = await api.stream(CHAT, {"messages": HI, "return_prompt_text": True, "n": 2, "max_tokens": 2, "seed": 1})
    assert [event.get("prompt_text") for event in events][:2] == [text, None]
    assert "prompt_text" not in await api.chat("hi")
