"""``octavo bench throughput``: how many tokens a second the engine makes of many requests at once."""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from typing import Any

from api.commands.bench.datasets import DATASETS, plain, read_samples, vary
from api.commands.bench.offline import Engine, random_prompt, sampling, write_json
from api.params.sampling import SamplingParams

DESCRIPTION = "Measure the throughput of many requests, without a server."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. Lengths are in tokens."""

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 100
    input_len: int = 128
    """Of random prompts."""
    output_len: int | None = None
    """None: 128 for random prompts, else what the dataset says."""
    random_range_ratio: float = 0.0
    n: int = 1
    """Completions of each prompt."""
    disable_detokenize: bool = False
    output_json: str | None = None
    backend: str = "octavo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``Settings``."""
    defaults = Settings()
    add = parser.add_argument_group("Benchmark").add_argument
    add("--dataset-name", choices=DATASETS, default=defaults.dataset_name, help="Source of prompts (default: random).")
    add("--dataset-path", "--dataset", metavar="FILE", help="File for --dataset-name sharegpt or custom.")
    add("--num-prompts", type=int, metavar="N", default=defaults.num_prompts, help="Number of requests (default: 100).")
    add("--input-len", "--random-input-len", type=int, metavar="N", default=defaults.input_len,
        help="Tokens per random prompt (default: 128).")  # fmt: skip
    add("--output-len", "--random-output-len", type=int, metavar="N",
        help="Tokens per answer. Default: from the dataset, or else 128.")  # fmt: skip
    add("--random-range-ratio", type=float, metavar="X", default=0.0, help="Vary lengths uniformly by this fraction.")
    add("--n", type=int, metavar="N", default=defaults.n, help="Completions per prompt (default: 1).")
    add("--disable-detokenize", action="store_true", help="Skip detokenisation.")
    add("--output-json", metavar="FILE", help="Write the results to this file.")
    add("--backend", choices=("octavo", "vllm"), default=defaults.backend, help=argparse.SUPPRESS)


def requests(engine: Engine, settings: Settings) -> tuple[list[Any], list[SamplingParams]]:
    """Prompts and their parameters.

    Raises:
        ValueError: The dataset cannot be read.
    """
    source = random.Random(0)
    tokenizer = engine.get_tokenizer()
    prompts: list[Any] = []
    lengths: list[int] = []
    if settings.dataset_name == "random":
        for _ in range(settings.num_prompts):
            length = vary(source, settings.input_len, settings.random_range_ratio)
            prompts.append(random_prompt(source, tokenizer, length))
            lengths.append(vary(source, settings.output_len or 128, settings.random_range_ratio))
    else:
        if settings.dataset_path is None:
            raise ValueError(f"--dataset-name {settings.dataset_name} needs --dataset-path")
        samples = read_samples(settings.dataset_name, settings.dataset_path)
        for index in range(settings.num_prompts):
            sample = samples[index % len(samples)]
            answered = len(tokenizer.encode(sample.answer, False)) if sample.answer else 256
            prompts.append(plain(sample.prompt))
            lengths.append(max(1, settings.output_len or sample.output_len or answered))
    detokenize = not settings.disable_detokenize
    return prompts, [sampling(length, settings.n, detokenize=detokenize) for length in lengths]


def run(engine: Engine, settings: Settings) -> dict[str, Any]:
    """Measures, prints the figures and returns them.

    Raises:
        ValueError: The dataset cannot be read, or a request does not fit the model.
    """
    prompts, params = requests(engine, settings)
    engine.generate(prompts[:1], params[:1], use_tqdm=False)  # what is made ready by the first request
    begin = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - begin
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    report = {
        "elapsed_time": seconds,
        "num_requests": len(outputs),
        "total_num_tokens": num_prompt + num_output,
        "requests_per_second": len(outputs) / seconds,
        "tokens_per_second": (num_prompt + num_output) / seconds,
        "output_tokens_per_second": num_output / seconds,
    }
    print(
        f"Throughput: {report['requests_per_second']:.2f} requests/s, "
        f"{report['tokens_per_second']:.2f} total tokens/s, {report['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens: {num_prompt}\nTotal num output tokens: {num_output}")
    write_json(settings.output_json, report)
    return report
