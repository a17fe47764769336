"""A program as people write it for vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api import LLM, SamplingParams

OPTIONS: dict[str, Any] = {
    "trust_remote_code": False,
    "tokenizer_mode": "auto",
    "swap_space": 4,
    "disable_log_stats": True,
    "skip_tokenizer_init": False,
    "task": "generate",
    "scheduling_policy": "priority",
    "kv_cache_memory_bytes": 64 << 20,
}


def tokens(model: Path, seed: int) -> list[list[int]]:
    """What prompts without a seed get."""
    with LLM(str(model), seed=seed, **OPTIONS) as llm:
        params = SamplingParams(max_tokens=8, ignore_eos=True, flat_logprobs=False, output_kind=2)
        outputs = llm.generate(["one", "two"], params, priority=5, use_tqdm=False)
        outputs += llm.generate(["three", "four"], params, priority=[1, 0], use_tqdm=False)
        with pytest.raises(ValueError, match="priority must have one entry per prompt; got 1 for 2 prompts"):
            llm.generate(["one", "two"], params, priority=[1])
        return [output.outputs[0].token_ids for output in outputs]


def test_a_seed_makes_a_program_repeatable(tiny_model: Path) -> None:
    first = tokens(tiny_model, 0)
    assert first == tokens(tiny_model, 0) != tokens(tiny_model, 1)
