"""Every field that changes tokens: a request gives the same alone, beside others, in chunks and after a preemption."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from api import LLM, BeamSearchParams, SamplingParams
from api.engine.client import EngineClient
from api.llm import RequestOutput
from api.params.sampling import RepetitionDetectionParams
from engine_core.messages import StatusRequest

PROMPT = [(7 * i * i + 11 * i) % 250 + 3 for i in range(45)]
OTHERS = [[(13 * i * j + 5 * i + j) % 250 + 3 for j in range(5 + (i * 17) % 60)] for i in range(24)]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 40, "ignore_eos": True}
FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "seed": None},
    "seed": {},
    "n": {"n": 3},
    "best_of": {"n": 2, "best_of": 4},
    "top_p top_k min_p": {"top_p": 0.9, "top_k": 30, "min_p": 0.02},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "logprob_token_ids": {"logprobs": 0, "logprob_token_ids": [9, 5, 200]},
    "logit_bias": {"logit_bias": {20: 5.0, 30: -100.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(40, 90)), "logprobs": 1},
    "bad_words": {"bad_words": ["a", "th"], "temperature": 0.3},
    "min_tokens": {"min_tokens": 20, "ignore_eos": False, "stop_token_ids": list(range(3, 120))},
    "stop": {"stop": ["e", "zz"]},
    "stop_regex": {"stop_regex": [r"[a-f]\W", r"\d\d"]},
    "repetition_detection": {
        "repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_count=3),
        "allowed_token_ids": [40, 41],
        "seed": 3,
    },
    "thinking_token_budget": {"thinking_token_budget": 6, "logprobs": 1},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 10},
    "truncation_side": {"truncate_prompt_tokens": 10, "truncation_side": "right"},
}
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "64MiB", "reasoning_parser": "deepseek_r1"}


def all_params() -> list[SamplingParams]:
    return [SamplingParams(**(SAMPLED | fields)) for fields in FIELDS.values()]


def comparable(output: RequestOutput) -> Any:
    """What must be the same, log probabilities to the last bit."""
    return (output.prompt_token_ids, output.prompt_logprobs, output.outputs)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    """An engine without further options."""
    with LLM(str(tiny_model), **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(plain: LLM) -> dict[str, RequestOutput]:
    return {
        name: plain.generate([PROMPT], params, use_tqdm=False)[0]
        for name, params in zip(FIELDS, all_params(), strict=True)
    }


SETUPS: dict[str, dict[str, Any]] = {
    "in a batch": {},
    "in chunks": {"max_num_batched_tokens": 24, "max_num_seqs": 16},
    "preempted": {"num_gpu_blocks_override": 24, "max_model_len": 256},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_a_request_gives_the_same_beside_others(tiny_model: Path, alone: dict[str, RequestOutput], setup: str) -> None:
    params = all_params()
    background = SamplingParams(temperature=0.7, max_tokens=50, ignore_eos=True)
    with LLM(str(tiny_model), **OPTIONS, **SETUPS[setup]) as llm:
        outputs = llm.generate(
            [*OTHERS[:12], *[PROMPT] * len(params), *OTHERS[12:]],
            [*[background] * 12, *params, *[background] * 12],
            use_tqdm=False,
        )
        status = llm._run(llm._model.client.call(StatusRequest))
    assert status["integrity"] == "" and status["num_free_blocks"] == status["num_blocks"]
    if setup == "preempted":
        assert int(status["num_preemptions"]) > 0
    for name, output in zip(FIELDS, outputs[12:-12], strict=True):
        assert comparable(output) == comparable(alone[name]), name


def test_what_the_fields_do(plain: LLM, alone: dict[str, RequestOutput]) -> None:
    seeded = alone["seed"].outputs[0]
    assert len(alone["n"].outputs) == 3 and alone["n"].outputs[0].token_ids == seeded.token_ids
    totals = [output.cumulative_logprob or 0.0 for output in alone["best_of"].outputs]
    assert len(totals) == 2 and totals == sorted(totals, reverse=True)
    assert all(output.logprobs is None for output in alone["best_of"].outputs)
    assert seeded.token_ids == alone["logprobs"].outputs[0].token_ids
    prompt_logprobs = alone["prompt_logprobs"].prompt_logprobs
    assert prompt_logprobs is not None and len(prompt_logprobs) == len(PROMPT) and prompt_logprobs[0] is None
    assert all(position and token in position for position, token in zip(prompt_logprobs[1:], PROMPT[1:], strict=True))
    for token, position in zip(seeded.token_ids, alone["logprob_token_ids"].outputs[0].logprobs or (), strict=True):
        assert set(position) == {token, 9, 5, 200}
    assert set(alone["allowed_token_ids"].outputs[0].token_ids) <= set(range(40, 90))
    assert 30 not in alone["logit_bias"].outputs[0].token_ids
    assert len(alone["min_tokens"].outputs[0].token_ids) >= 20
    assert alone["min_tokens"].outputs[0].finish_reason == "stop"
    loop = alone["repetition_detection"].outputs[0]
    assert loop.finish_reason == "repetition" and len(loop.token_ids) < 40
    thinking = alone["thinking_token_budget"].outputs[0]
    tokenizer = plain.get_tokenizer()
    end = tokenizer.encode("</think>", add_special_tokens=False)
    assert thinking.token_ids[:6] == seeded.token_ids[:6]
    assert thinking.token_ids[6 : 6 + len(end)] == end
    for params in ({"best_of": 2, "temperature": 0}, {"stop_regex": "a$"}, {"repetition_detection": {"a": 1}}):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            SamplingParams(**params)
    salted = [{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in ("a", "a", "b")]
    cached = [plain.generate([prompt], SamplingParams(max_tokens=1))[0].num_cached_tokens for prompt in salted]
    assert cached[0] == cached[2] == 0 and cached[1] > 0
    assert alone["truncate_prompt_tokens"].prompt_token_ids == PROMPT[-10:]
    assert alone["truncation_side"].prompt_token_ids == PROMPT[:10]
    stopped = alone["stop"].outputs[0]
    assert stopped.finish_reason == "stop" and "e" not in stopped.text
    assert all(math.isfinite(output.outputs[0].cumulative_logprob or 0.0) for output in alone.values())


def kill_in_the_middle(llm: LLM, num_tokens: int, work: Callable[[], Any]) -> Any:
    """The result of some work during which the engine core is killed, once a request has that many tokens."""
    client = llm._model.client
    assert isinstance(client, EngineClient)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):  # this thread may hear of the work when it is done
            result = pool.submit(work)
            while not result.done():
                states = list(client._processor.states.values())
                if any(len(state.output_token_ids) >= num_tokens for state in states):
                    pid = client.engine_pid
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
                    return result.result()
                time.sleep(0.0005)
            result.result()
        raise AssertionError("the work was done before anything could be killed")


def test_fields_hold_after_the_death_of_the_engine_core(tiny_model: Path) -> None:
    """What is forced, counted or searched goes on where it was."""
    thinking = SamplingParams(**SAMPLED | {"thinking_token_budget": 200, "max_tokens": 400})
    loop = SamplingParams(
        **SAMPLED
        | {
            "allowed_token_ids": [40, 41],
            "max_tokens": 400,
            "seed": 3,
            "repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_count=7),
        }
    )
    beams = BeamSearchParams(beam_width=3, max_tokens=30)
    with LLM(str(tiny_model), **OPTIONS) as llm:
        prompts = [PROMPT, PROMPT]
        expected = llm.generate(prompts, [thinking, loop], use_tqdm=False)
        assert expected[1].outputs[0].finish_reason == "repetition"
        half = len(expected[1].outputs[0].token_ids) // 2
        got = kill_in_the_middle(llm, half, lambda: llm.generate(prompts, [thinking, loop], use_tqdm=False))
        assert [output.outputs[0].token_ids for output in got] == [output.outputs[0].token_ids for output in expected]
        assert [output.outputs[0].finish_reason for output in got] == ["length", "repetition"]
        searched = llm.beam_search(PROMPT, beams)
        assert kill_in_the_middle(llm, 12, lambda: llm.beam_search(PROMPT, beams)) == searched
