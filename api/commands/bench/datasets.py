"""Prompts for benchmarks, from files in the formats of vLLM's benchmarks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DATASETS = ("random", "sharegpt", "custom")
COMMON_IDS = 32_000
"""Token ids below this are frequent tokens in most vocabularies, and exist in all common models."""


class Sample(NamedTuple):
    """A prompt and the length of its answer."""

    prompt: Any
    """Text or chat messages."""
    output_len: int | None = None
    """In tokens; None if the file has none."""
    answer: str = ""
    """The recorded answer, if any, which sets the output length."""


def read_samples(name: str, path: str) -> list[Sample]:
    """Reads a dataset.

    Args:
        name: ``sharegpt``: a JSON list of ``conversations``, of which the first two turns are used. ``custom``: a JSON
            object per line with ``prompt``, ``question``, ``text`` or ``messages``, and optionally ``output_tokens``.
        path: The file.

    Raises:
        ValueError: The file cannot be read, or has no usable prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        samples = list(_sharegpt(json.loads(text)) if name == "sharegpt" else _custom(text))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not samples:
        raise ValueError(f"{path}: no prompts found")
    return samples


def _sharegpt(content: Any) -> Iterator[Sample]:
    if not isinstance(content, list):
        raise ValueError("expected a list of conversations")
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
    """The prompt in a line of a JSONL file.

    Raises:
        ValueError: The line has none of the known keys.
    """
    for key in ("question", "prompt", "text", "messages"):
        if isinstance(line, dict) and key in line:
            return line[key]
    raise ValueError(f"expected one of question, prompt, text, messages in each line, got {str(line)[:80]}")


def plain(prompt: Any) -> Any:
    """Chat messages as plain text, for an endpoint without a template; anything else unchanged."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return "\n".join(str(message.get("content")) for message in prompt)
    return prompt


def vary(source: random.Random, length: int, ratio: float) -> int:
    """A length between (1 - ratio) and (1 + ratio) times the given one, at least 1."""
    return max(1, round(length * source.uniform(1 - ratio, 1 + ratio))) if ratio else length


def random_ids(source: random.Random, count: int, vocab_size: int) -> list[int]:
    """Random token ids, without the lowest, which are often special tokens."""
    low = min(256, vocab_size - 1)
    return [source.randrange(low, vocab_size) for _ in range(count)]
