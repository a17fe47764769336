#!/usr/bin/env python
"""Times speculative decoding against the same engine without it, in turn, in pairs of the same requests.

    python scripts/bench_speculation.py --model models/smollm2                        everything but draft models
    python scripts/bench_speculation.py --model models/smollm2 random64               a row: at most four minutes
    python scripts/bench_speculation.py --model models/smollm2 -q int8 --temperature 0.7 chat
    python scripts/bench_speculation.py --model models/1b --load-format dummy --draft models/smollm2 draft

Two engines run side by side, one of them idle. A pair is a set of requests that both answer; which goes first changes
from pair to pair. Speeds count from the first token of the last stream, so prompts are left out. The interval contains
the mean ratio with a probability of 95 % (Student's t over the logarithms of all pairs); that of the median, which
other work on the machine disturbs less, comes from the ranks of the pairs. A benchmark ends when its time is up, or
with its last pair.

``edits`` and ``edits16`` rewrite files (``edits.jsonl`` in the folder OCTAVO_TEST_DATA); the text that really came out
is forced on the model. ``random16`` and ``random64`` force tokens of which none occurs twice. ``chat``, ``gsm8k``,
``code`` and ``questions`` are the model's own answers; ``--temperature`` and ``--top-p`` make them random. ``draft``
forces its tokens on the draft model with a probability, so that random weights suffice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unittest import mock

import numpy as np
from intervals import interval, median_interval
from msgspec.structs import replace

import api.llm
from api import LLM, SamplingParams
from api.config import ServerConfig
from api.model.files import ModelFiles, with_model
from api.model.gguf_file import read_gguf
from api.model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = [
    "What is the difference between a comet and an asteroid?",
    "Give me five tips for a job interview.",
    "Explain photosynthesis to a child.",
    "Write a short story about a lighthouse keeper.",
    "How do I make tomato soup?",
    "What are the main causes of the French Revolution?",
    "Suggest a weekly plan for learning the guitar.",
    "Why is the sky blue?",
    "Write an email that declines a meeting politely.",
    "What should I look for when I buy a used car?",
]
ASKED = "Answer with sentences from the text. What does the text say about {}?"
CODE_LINES = 60
MAX_TOKENS = 200
FEWER_TOKENS = {"edits16": 100, "random16": 48, "random64": 24, "draft": 64}
"""Tokens of an output, where more would leave time for fewer than 30 pairs."""
NUM_PAIRS, MANY_PAIRS = 30, 100
"""Pairs, and those of benchmarks whose ratio is near 1."""
CONTEXT = 4096


@dataclass(frozen=True)
class Request:
    """A prompt and, if it is forced, its output."""

    prompt: list[int]
    output: list[int] | None = None


Pair = list[Request]
"""Requests that run at the same time."""


class Texts:
    """The requests of each benchmark."""

    def __init__(self, tokenizer: Tokenizer, data: Path | None, num_tokens: int | None, num_pairs: int | None) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._given = num_tokens, num_pairs
        self._num_tokens, self._num_pairs = MAX_TOKENS, NUM_PAIRS

    def of(self, name: str) -> list[Pair]:
        """The pairs of a benchmark."""
        num_tokens, num_pairs = self._given
        self._num_tokens = num_tokens or FEWER_TOKENS.get(name, MAX_TOKENS)
        self._num_pairs = num_pairs or (MANY_PAIRS if name.startswith("random") else NUM_PAIRS)
        makers: dict[str, Callable[[], list[Pair]]] = {
            "edits": self._edits,
            "edits16": lambda: self._together(self._edits(), 16),
            "random16": lambda: self._random(16),
            "random64": lambda: self._random(64),
            "chat": lambda: self._answers(QUESTIONS),
            "gsm8k": lambda: self._answers([row["question"] for row in self._rows("gsm8k_test.jsonl")]),
            "code": lambda: self._answers([f"Add docstrings to this file:\n\n{text}" for text in self._code()]),
            "questions": lambda: self._answers(self._about_texts()),
            "draft": lambda: self._random(1, repeats=True),
        }
        return makers[name]()

    def _rows(self, name: str) -> list[dict[str, Any]]:
        if self._data is None:
            raise SystemExit("OCTAVO_TEST_DATA must name the folder with edits.jsonl and gsm8k_test.jsonl")
        return [json.loads(line) for line in (self._data / name).read_text().splitlines()]

    def _edits(self) -> list[Pair]:
        """Prompts are a file and what to do; outputs are the start of the new file, changes included if possible."""
        found: list[Pair] = []
        for row in self._rows("edits.jsonl"):
            prompt = self._tokenizer.encode(f"{row['old']}\n\n{row['instruction']}\n\n")
            output = self._tokenizer.encode(row["new"])
            if len(prompt) <= CONTEXT - self._num_tokens - 8 and len(output) >= 100:
                found.append([Request(prompt, output[: self._num_tokens])])
        return [found[index % len(found)] for index in range(self._num_pairs)]

    def _together(self, pairs: list[Pair], size: int) -> list[Pair]:
        short = sorted((pair[0] for pair in pairs), key=lambda request: len(request.prompt))
        chosen = short[: max(size, len(short) // 2)]
        return [[chosen[(index + i) % len(chosen)] for i in range(size)] for index in range(0, 4 * size, size)]

    def _random(self, size: int, *, repeats: bool = False) -> list[Pair]:
        """Tokens of which none occurs twice, or few different ones."""
        generator = np.random.default_rng(size)
        pairs: list[Pair] = []
        for _ in range(self._num_pairs):
            pair = []
            for _ in range(size):
                tokens = generator.permutation(40_000)[: self._num_tokens + 32] + 100
                pair.append(Request(tokens[:32].tolist(), tokens[32:].tolist()))
            pairs.append(pair)
        return pairs

    def _answers(self, questions: Sequence[str]) -> list[Pair]:
        chosen = [questions[index % len(questions)] for index in range(self._num_pairs)]
        return [[Request(self._ask(text))] for text in chosen]

    def _ask(self, question: str) -> list[int]:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return self._tokenizer.encode(text)

    def _code(self) -> list[str]:
        return ["\n".join(row["old"].splitlines()[:CODE_LINES]) for row in self._rows("edits.jsonl")[:10]]

    def _about_texts(self) -> list[str]:
        parts = [part for part in (ROOT / "README.md").read_text().split("\n## ") if len(part) > 600]
        return [f"{part[:2400]}\n\n{ASKED.format(part.splitlines()[0].lower())}" for part in parts][:9]


def run(llm: LLM, pair: Pair, fields: dict[str, Any], salt: str, num_tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds per token and stream, and the tokens."""
    prompts = [{"prompt_token_ids": request.prompt, "cache_salt": salt} for request in pair]
    params = [
        SamplingParams(
            max_tokens=num_tokens if request.output is None else len(request.output),
            ignore_eos=request.output is not None,
            **fields,
        )
        for request in pair
    ]
    results = llm.generate(prompts, params, use_tqdm=False)
    begin = max(result.metrics.first_token_ts for result in results)
    end = max(result.metrics.last_token_ts for result in results)
    tokens = [result.outputs[0].token_ids for result in results]
    num_timed = sum(len(each) for each in tokens) - len(tokens)
    return (end - begin) / max(1, num_timed), tokens


def compare(off: LLM, on: LLM, name: str, pairs: list[Pair], fields: dict[str, Any], limits: tuple[int, float]) -> None:
    """Runs the pairs and prints a row of the table. ``limits``: tokens of an answer, and seconds for all pairs."""
    num_tokens, end = limits[0], time.perf_counter() + limits[1]
    logs: list[float] = []
    speeds: tuple[list[float], list[float]] = ([], [])
    before = counts(on)
    for index, pair in enumerate(pairs):
        if time.perf_counter() > end:
            break
        seconds: dict[LLM, float] = {}
        tokens: dict[LLM, list[list[int]]] = {}
        own = fields | {"seed": index}
        if pair[0].output is not None and len(pair[0].prompt) > 256:
            for llm in (off, on):  # the prompts are cached then
                llm.generate(
                    [{"prompt_token_ids": request.prompt, "cache_salt": f"{name}-{index}"} for request in pair],
                    SamplingParams(max_tokens=1),
                    use_tqdm=False,
                )
        for llm in (off, on) if index % 2 else (on, off):
            seconds[llm], tokens[llm] = run(llm, pair, own, f"{name}-{index}", num_tokens)
        if tokens[off] != tokens[on]:
            raise SystemExit(f"{name}: pair {index} has other tokens with speculation")
        if len(tokens[off][0]) < 20:
            continue
        logs.append(math.log(seconds[off] / seconds[on]))
        for column, llm in zip(speeds, (off, on), strict=True):
            column.append(1 / seconds[llm])
    verified, accepted = (after - before for after, before in zip(counts(on), before, strict=True))
    low, high = interval(logs)
    middle = [math.exp(value) for value in (statistics.median(logs), *median_interval(logs))]
    print(
        f"| {name} | {len(logs)} | {statistics.median(speeds[0]):.1f} | {statistics.median(speeds[1]):.1f} "
        f"| {math.exp(statistics.fmean(logs)):.3f} | {math.exp(low):.3f} to {math.exp(high):.3f} "
        f"| {middle[0]:.3f} | {middle[1]:.3f} to {middle[2]:.3f} | {accepted / max(1, verified):.0%} of {verified} |",
        flush=True,
    )


def counts(llm: LLM) -> tuple[int, int]:
    """Drafts verified and accepted since the start."""
    stats = llm._model.metrics.scheduler_stats
    return stats.num_draft_tokens, stats.num_accepted_tokens


NAMES = ["edits", "edits16", "random16", "random64", "chat", "gsm8k", "code", "questions", "draft"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time speculative decoding against the same engine without it.")
    parser.add_argument("names", nargs="*", help="benchmarks (default: all but draft)")
    parser.add_argument("--model", required=True, help="folder or GGUF file")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("-q", "--quantization", help="int8, for example")
    parser.add_argument("--config", type=json.loads, help="of speculation, JSON (default: suffix, or the draft model)")
    parser.add_argument("--draft", help="draft model, for the benchmark of that name")
    parser.add_argument("--acceptance", type=float, default=0.8, help="probability that one of its drafts is right")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, help="most pairs (default: by benchmark)")
    parser.add_argument("--tokens", type=int, help="most tokens of an output (default: by benchmark)")
    parser.add_argument("--seconds", type=float, default=190, help="after which a benchmark starts no further pair")
    options = parser.parse_args()
    names = options.names or NAMES[:-1]
    options.config = options.config or ({"method": "suffix"} if options.draft is None else {})
    data = os.environ.get("OCTAVO_TEST_DATA")
    fields: dict[str, Any] = {
        "load_format": options.load_format,
        "quantization": options.quantization,
        "kv_cache_memory": "1200MiB",
        "max_model_len": CONTEXT,
    }
    with tempfile.TemporaryDirectory() as folder:
        texts = Texts(tokenizer_of(options.model), Path(data) if data else None, options.tokens, options.pairs)
        found = {name: texts.of(name) for name in names}
        path = Path(folder) / "outputs.json"
        forced = [request for pairs in found.values() for pair in pairs for request in pair if request.output]
        path.write_text(json.dumps([{"prompt": each.prompt, "output": each.output} for each in forced]))
        fields["forced_outputs"] = str(path) if forced else ""
        begin = time.perf_counter()
        off = LLM(options.model, **fields, speculative_config={"method": "none"})
        with off, speculating(options, fields, path) as on:
            print("| benchmark | pairs | tokens/s off | on | mean ratio | 95 % | median | 95 % | accepted |")
            print("|---|---|---|---|---|---|---|---|---|")
            for name, pairs in found.items():
                own = {"temperature": 0.0 if pairs[0][0].output else options.temperature, "top_p": options.top_p}
                compare(off, on, name, pairs, own, (options.tokens or MAX_TOKENS, options.seconds))
        print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer of a folder or GGUF file."""
    path = Path(model)
    return Tokenizer.from_gguf(read_gguf(path)) if path.is_file() else Tokenizer.from_folder(path)


def speculating(options: argparse.Namespace, fields: dict[str, Any], outputs: Path) -> LLM:
    """The engine with speculation."""
    if options.draft is None:
        return LLM(options.model, **fields, speculative_config=options.config)
    config = {"method": "draft_model", **options.config, "model": options.draft}

    def with_outputs(config: ServerConfig, files: ModelFiles) -> ServerConfig:
        """The configuration with a draft model whose drafts are replaced."""
        config = with_model(config, files)
        executor = config.engine.executor
        assert executor.speculative is not None
        speculative = replace(executor.speculative, script=str(outputs), acceptance=options.acceptance)
        return replace(config, engine=replace(config.engine, executor=replace(executor, speculative=speculative)))

    with mock.patch.object(api.llm, "with_model", with_outputs):
        return LLM(options.model, **fields, speculative_config=config)


if __name__ == "__main__":
    main()
