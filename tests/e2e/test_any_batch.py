"""The promise in full: tokens and log probabilities of a request, bit for bit, whatever runs beside it and wherever."""

from __future__ import annotations

import random
from typing import Any

import pytest

from api import LLM, SamplingParams
from tests import tiny

BATCHES = 40
"""Of each setup; there are eight."""

SETUPS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "depth 1, short chunks": {"max_in_flight_steps": 1, "max_num_batched_tokens": 24, "max_num_seqs": 24},
    "few blocks, several steps at a time": {
        "num_gpu_blocks_override": 24,
        "max_model_len": 256,
        "max_num_batched_tokens": 100,
        "num_scheduler_steps": 3,
    },
    "eager, without prefix cache": {"enforce_eager": True, "enable_prefix_caching": False},
}


def random_requests(rng: random.Random, count: int) -> list[tuple[dict[str, Any], SamplingParams]]:
    """Prompts, some of which begin alike, and what is asked of them."""
    stems = [[rng.randrange(3, 250) for _ in range(80)] for _ in range(3)]
    requests: list[tuple[dict[str, Any], SamplingParams]] = []
    for _ in range(count):
        prompt = [rng.randrange(3, 250) for _ in range(rng.choice([1, 2, 7, 31, 32, 33, 60, 100]))]
        if rng.random() < 0.4:
            prompt = rng.choice(stems)[: rng.randint(20, 80)] + prompt
        greedy = rng.random() < 0.4
        requests.append(
            (
                {"prompt_token_ids": prompt},
                SamplingParams(
                    temperature=0 if greedy else rng.choice([0.7, 1.0, 1.3]),
                    top_p=rng.choice([1.0, 0.9]),
                    top_k=rng.choice([0, 40]),
                    seed=rng.randrange(1 << 32),
                    repetition_penalty=rng.choice([1.0, 1.2]),
                    presence_penalty=rng.choice([0.0, 0.5]),
                    max_tokens=rng.choice([1, 3, 8, 16]),
                    logprobs=rng.choice([0, 3]),
                    prompt_logprobs=1 if rng.random() < 0.1 else None,
                    ignore_eos=True,
                ),
            )
        )
    return requests


def run(llm: LLM, requests: list[tuple[dict[str, Any], SamplingParams]]) -> list[Any]:
    """What each request gets, with the bits of its log probabilities."""
    prompts: list[Any] = [prompt for prompt, _ in requests]
    outputs = llm.generate(prompts, [params for _, params in requests], use_tqdm=False)
    return [(result.outputs[0].token_ids, result.outputs[0].logprobs, result.prompt_logprobs) for result in outputs]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_hundreds_of_random_batches(dtype: str) -> None:
    model = tiny.checkpoint("qwen3", tied=True)
    requests = random_requests(random.Random(dtype), 48)
    common: dict[str, Any] = {"dtype": dtype, "kv_cache_memory": "64MiB"}
    one_at_a_time: dict[str, Any] = {"max_num_seqs": 1, "max_in_flight_steps": 1, "num_scheduler_steps": 1}
    with LLM(str(model), enable_prefix_caching=False, **common, **one_at_a_time) as llm:
        alone = run(llm, requests)
    assert len({tuple(tokens) for tokens, _, _ in alone}) > 30, "outputs that are all alike prove nothing"
    for name, setup in SETUPS.items():
        rng = random.Random(name)
        with LLM(str(model), **common, **setup) as llm:
            for _ in range(BATCHES):
                chosen = [rng.randrange(len(requests)) for _ in range(rng.choice([1, 2, 5, 13, 30, 70]))]
                results = run(llm, [requests[index] for index in chosen])
                for index, result in zip(chosen, results, strict=True):
                    assert result == alone[index], f"request {index}, {name}"
