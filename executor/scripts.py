"""Outputs that are known in advance, for tests and benchmarks: prompts, and what follows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from executor.messages import I32

NO_OUTPUT = np.empty(0, np.int32)


class Script(msgspec.Struct, frozen=True):
    """A prompt and its output."""

    prompt: list[int]
    output: list[int]


def read_scripts(path: str) -> Callable[[I32], I32]:
    """Reads a JSON list of ``Script``.

    Args:
        path: The file.

    Returns:
        A function from a prompt to its output, empty if it has none: int32 [tokens] -> int32 [tokens].

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        scripts = msgspec.json.decode(Path(path).read_bytes(), type=list[Script])
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f'{path}: not a JSON list of {{"prompt": [ids], "output": [ids]}}: {error}') from None
    outputs = {np.array(script.prompt, np.int32).tobytes(): np.array(script.output, np.int32) for script in scripts}
    return lambda prompt: outputs.get(prompt.astype(np.int32, copy=False).tobytes(), NO_OUTPUT)
