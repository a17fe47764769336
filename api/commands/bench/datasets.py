"""Where the prompts of a benchmark come from: files in the formats that vLLM's benchmarks read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DATASETS = ("random", "sharegpt", "custom")
COMMON_IDS = 32_000
"""Token ids below this are those of frequent tokens in most vocabularies, and exist in all models of a size."""


class Sample(NamedTuple):
    """A prompt, and how long its answer should be."""

    prompt: Any
    """A text, or chat messages."""
    output_len: int | None = None
    """Tokens; None if the file does not say."""
    answer: str = ""
    """What was answered once, if the file has it: its length is that of the answer to ask for."""


def read_samples(name: str, path: str) -> list[Sample]:
    """Reads a dataset.

    Args:
        name: ``sharegpt``: a JSON list of ``conversations``, of which the first two turns count. ``custom``: a JSON
            object on each line with ``prompt``, ``question``, ``text`` or ``messages``, and perhaps ``output_tokens``.
        path: The file.

    Raises:
        ValueError: It cannot be read, or nothing in it can be used.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        samples = list(_sharegpt(json.loads(text)) if name == "sharegpt" else _custom(text))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not samples:
        raise ValueError(f"{path}: no prompt in it")
    return samples


def _sharegpt(content: Any) -> Iterator[Sample]:
    if not isinstance(content, list):
        raise ValueError("a list of conversations is expected")
    for entry in content:
        turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
        if isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, dict) for turn in turns[:2]):
            prompt, answer = (str(turn.get("value") or "") for turn in turns[:2])
            if prompt and answer:
                yield Sample(prompt, answer=answer)


def _custom(text: str) -> Iterator[Sample]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                fields = json.loads(line)
                yield Sample(prompt_of(fields), fields.get("output_tokens"))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def prompt_of(line: dict[str, Any]) -> Any:
    """The prompt on a line of a JSONL file.

    Raises:
        ValueError: None of the known keys is there.
    """
    for key in ("question", "prompt", "text", "messages"):
        if isinstance(line, dict) and key in line:
            return line[key]
    raise ValueError(f"a line has none of question, prompt, text, messages: {str(line)[:80]}")


def plain(prompt: Any) -> Any:
    """Chat messages as a text, for an endpoint without a template; anything else as it is."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return "\n".join(str(message.get("content")) for message in prompt)
    return prompt


def vary(source: random.Random, length: int, ratio: float) -> int:
    """A length between (1 - ratio) and (1 + ratio) times the given one, at least 1."""
    return max(1, round(length * source.uniform(1 - ratio, 1 + ratio))) if ratio else length


def random_ids(source: random.Random, count: int, vocab_size: int) -> list[int]:
    """Token ids; the lowest are left out, which are special tokens in many vocabularies."""
    low = min(256, vocab_size - 1)
    return [source.randrange(low, vocab_size) for _ in range(count)]
