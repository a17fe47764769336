"""Shared parts of the offline benchmarks."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from api.commands.bench.datasets import COMMON_IDS, random_ids
from api.model.tokenizer import Tokenizer
from api.params.sampling import SamplingParams


class Engine(Protocol):
    """The part of ``LLM`` that benchmarks need."""

    def generate(
        self, prompts: Sequence[Any], sampling_params: Sequence[SamplingParams], *, use_tqdm: bool = True
    ) -> list[Any]: ...

    def get_tokenizer(self) -> Tokenizer: ...


def random_prompt(source: random.Random, tokenizer: Tokenizer, length: int) -> dict[str, list[int]]:
    """A prompt of ``length`` random token ids."""
    return {"prompt_token_ids": random_ids(source, length, min(tokenizer.vocab_size, COMMON_IDS))}


def sampling(output_len: int, n: int, *, detokenize: bool) -> SamplingParams:
    """Parameters of a request that generates exactly ``output_len`` tokens."""
    return SamplingParams(
        n=n, temperature=1.0, top_p=1.0, ignore_eos=True, max_tokens=output_len, detokenize=detokenize
    )


def write_json(path: str | None, report: Mapping[str, Any]) -> None:
    """Writes the results if a file is given; write errors are only reported."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(report, indent=4) + "\n")
    except OSError as error:
        print(f"octavo: --output-json {path}: {error.strerror}", file=sys.stderr)
