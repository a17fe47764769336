"""The same request gives the same tokens, however the engine is set up, and those of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from api import LLM, SamplingParams
from engine_core.messages import StatusRequest

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def questions(test_data: Path) -> list[str]:
    lines = (test_data / "gsm8k_test.jsonl").read_text().splitlines()[:64]
    return [json.loads(line)["question"] for line in lines]


def status(llm: LLM) -> dict[str, Any]:
    return llm._run(llm._model.client.call(StatusRequest))


def tokens(llm: LLM, prompts: list[Any], params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    result = status(llm)
    assert result["num_free_blocks"] == result["num_blocks"] and result["integrity"] == ""
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def demo(demo_model: Path) -> Iterator[LLM]:
    with LLM(str(demo_model), dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def batch(demo: LLM, questions: list[str]) -> list[list[int]]:
    """What the demo model answers to 64 prompts at once."""
    return tokens(demo, questions, GREEDY)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_greedy_tokens_are_those_of_transformers(
    demo_model: Path, demo: LLM, questions: list[str], batch: list[list[int]]
) -> None:
    """transformers gets what we generated and must choose each of its tokens as well."""
    from transformers import AutoModelForCausalLM, GgufConfig

    prompts = [demo.get_tokenizer().encode(question) for question in questions]
    model = AutoModelForCausalLM.from_pretrained(
        demo_model.parent,
        gguf_file=demo_model.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=demo_model.name, dequantize=True),
    ).eval()
    for prompt, output in zip(prompts, batch, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)).logits[0]
        assert logits.argmax(dim=-1).tolist() == output


@pytest.mark.timeout(900)
def test_the_demo_model_alone_in_a_batch_and_preempted(
    demo_model: Path, demo: LLM, questions: list[str], batch: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    expected = [output[:16] for output in batch]
    assert [tokens(demo, [question], params)[0] for question in questions[:8]] == expected[:8]
    with LLM(str(demo_model), dtype="float32", tensor_parallel_size=2, num_threads=1) as llm:  # heads: 6 and 3
        assert tokens(llm, questions[:8], params) == expected[:8]
    with LLM(
        str(demo_model), dtype="float32", num_gpu_blocks_override=60, max_model_len=1024, max_num_batched_tokens=256
    ) as llm:
        assert tokens(llm, questions, params) == expected
        assert status(llm)["num_preemptions"] > 0


SETUPS: dict[str, dict[str, Any]] = {
    "depth 1, eager": {"max_in_flight_steps": 1, "enforce_eager": True, "num_scheduler_steps": 1},
    "depth 2, chunks of 16": {"max_in_flight_steps": 2, "max_num_batched_tokens": 16, "max_num_seqs": 16},
    "no prefix cache, one at a time": {"enable_prefix_caching": False, "max_num_seqs": 1},
    "few blocks, checked": {"num_gpu_blocks_override": 40, "max_model_len": 512, "check_every_step": True},
    "two engines": {"data_parallel_size": 2},
    "two workers": {"tensor_parallel_size": 2, "num_threads": 1, "num_scheduler_steps": 4},
}


@pytest.mark.timeout(900)
def test_tokens_do_not_depend_on_the_setup(tiny_model: Path) -> None:
    """Greedy tokens of a tiny model, for every setup, cold and from the cache."""
    prompts: list[Any] = [[(7 * i * j + i + j) % 250 + 3 for j in range(5 + (i * 13) % 90)] for i in range(64)]
    prompts += [prompts[5] + [9], prompts[5] + [8]]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, repetition_penalty=1.1)
    expected: list[list[list[int]]] | None = None
    for name, options in SETUPS.items():
        with LLM(str(tiny_model), dtype="float32", kv_cache_memory="64MiB", **options) as llm:
            got = [tokens(llm, prompts, params) for params in (greedy, greedy)]
            if "num_gpu_blocks_override" in options:
                assert status(llm)["num_preemptions"] > 0
        expected = expected or got
        assert got[0] == got[1], f"{name}: cold and from the cache"
        assert got == expected, name
