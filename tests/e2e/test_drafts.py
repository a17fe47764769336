"""Whole engines with a proposer: outputs are those without one, whatever is asked for and whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

import api.llm
from api import LLM, SamplingParams
from api.model.files import with_model
from api.params.structured import StructuredOutputsParams
from executor.config import SpeculativeConfig
from tests.e2e.server import Server
from tests.e2e.test_faults import MAX_TOKENS, NUM_STREAMS, again, body, run_streams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "tags": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "tags"],
}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1, "logprobs": 3},
    {"seed": 2, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3, "logprobs": 0},
    {"temperature": 0, "presence_penalty": 1.0},
    {"seed": 3, "top_k": 20, "min_tokens": 12, "stop_token_ids": list(range(40, 60))},
    {"seed": 4, "stop": ["e", "a"], "min_tokens": 6},
    {"seed": 5, "stop": ["th", "\n"], "include_stop_str_in_output": True},
    {"seed": 6, "structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="[a-z]{3,9}( [0-9]+){2,8}")},
    {"seed": 7, "structured_outputs": StructuredOutputsParams(choice=["a rather long choice", "a rather short one"])},
    {"seed": 8, "structured_outputs": StructuredOutputsParams(json=SCHEMA), "logprobs": 1, "max_tokens": 70},
    {"seed": 9, "bad_words": ["a", "th"], "logit_bias": {45: 3.0}},
    {"seed": 10, "n": 2, "prompt_logprobs": 1},
]
SETUPS: list[tuple[dict[str, Any], int, int]] = [
    ({}, 4, 0),
    ({"max_in_flight_steps": 3, "num_gpu_blocks_override": 14, "max_num_batched_tokens": 48}, 5, 4),
    ({"max_in_flight_steps": 1, "enforce_eager": True}, 2, 2),
]
"""Of the engine; drafts of a row; one in how many is wrong, 0: none."""


def prompt(number: int) -> dict[str, Any]:
    return {"prompt_token_ids": [(number * 11 + i * i) % 250 + 3 for i in range(15 + number)]}


def outputs(llm: LLM, **fields: Any) -> list[Any]:
    """Everything that each kind of request gets."""
    params = [SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **fields, **kind}) for kind in KINDS]
    results = llm.generate([prompt(number) for number in range(len(KINDS))], params, use_tqdm=False)
    return [
        (
            [
                (output.token_ids, output.text, output.logprobs, output.finish_reason, output.stop_reason)
                for output in result.outputs
            ],
            result.prompt_logprobs,
        )
        for result in results
    ]


@pytest.mark.timeout(300)
def test_outputs_do_not_depend_on_drafts(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "16MiB", "max_model_len": 256}
    with LLM(str(tiny_model), **options, speculative_config={"method": "none"}) as llm:
        expected = outputs(llm)
        free = llm.generate(
            [prompt(number) for number in range(len(KINDS))],
            [
                # without what ends it: drafts go on behind the end
                SamplingParams(**{"max_tokens": 60, "ignore_eos": True, **kind, "stop": None, "stop_token_ids": None})
                for kind in KINDS
            ],
            use_tqdm=False,
        )
    path = tmp_path / "scripts.json"
    scripts = [
        {"prompt": prompt(number)["prompt_token_ids"], "output": result.outputs[0].token_ids}
        for number, result in enumerate(free)
    ]
    path.write_text(json.dumps(scripts))
    reasons = {output[3] for result, _ in expected for output in result}
    assert reasons == {"stop", "length"}
    for setup, count, wrong_every in SETUPS:
        speculative = SpeculativeConfig(
            method="scripted", num_speculative_tokens=count, script=str(path), wrong_every=wrong_every
        )

        def speculating(config: Any, files: Any, speculative: SpeculativeConfig = speculative) -> Any:
            config = with_model(config, files)
            executor = replace(config.engine.executor, speculative=speculative, check_every_step=True)
            return replace(config, engine=replace(config.engine, executor=executor))

        with monkeypatch.context() as patch:
            patch.setattr(api.llm, "with_model", speculating)
            with LLM(str(tiny_model), **options, **setup) as llm:
                found = outputs(llm)
        for number, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            assert got == wanted, f"request {number}, {setup}, {count} drafts, one in {wrong_every} wrong"
    own: dict[str, object] = {"method": "suffix", "suffix_decoding_min_token_prob": 0}
    for suffix in (own, {}):  # {}: the default
        with LLM(str(tiny_model), **options, speculative_config=suffix) as llm:
            for _ in range(2):  # then drafts come from the first outputs
                assert outputs(llm) == expected
    with LLM(str(tiny_model), **options, speculative_config={"model": str(tiny_model)}) as llm:
        assert outputs(llm) == expected, "the model drafts for itself"


@pytest.mark.timeout(600)
def test_streams_of_rows_survive_the_death_of_ranks_and_core(tiny_model: Path, tmp_path: Path) -> None:
    """Journal, stream and restart with several tokens a step: nothing is lost, nothing comes twice."""
    flags = ["--model", str(tiny_model), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-model-len", "512"]
    with Server(*flags) as server:
        undisturbed = asyncio.run(run_streams(server))
    path = tmp_path / "scripts.json"
    path.write_text(
        json.dumps([{"prompt": body(i)["prompt"], "output": undisturbed[i].tokens} for i in range(NUM_STREAMS)])
    )
    speculative = SpeculativeConfig(method="scripted", num_speculative_tokens=3, script=str(path), wrong_every=2)
    env = {"OCTAVO_TEST_SPECULATIVE": msgspec.json.encode(speculative).decode(), "OCTAVO_TEST_RANKS": "2"}
    with Server(*flags, "--num-threads", "1", env=env, module="tests.e2e.drafting") as server:
        for titles in ((), ("octavo worker 0", "octavo engine_core", "octavo worker 1")):
            streams = again(partial(run_streams, server, signal.SIGKILL, *titles))
            for before, after in zip(undisturbed, streams, strict=True):
                assert (after.tokens, after.text) == (before.tokens, before.text)
                assert after.finish_reason == "length"
                assert after.usage is not None and after.usage["completion_tokens"] == MAX_TOKENS
        server.restarted(2)  # two deaths at once are one restart
        assert 2 <= server.metric("octavo:engine_restarts_total") <= server.num_kills
        server.rests()
