"""Tests a tokenizer with unknown regular expressions in a helper process before the server uses it.

The expressions run over every prompt, and may take time exponential in the length of a text. Those of common
tokenizers are known to be harmless and are not tested. With others, the file must load and split texts that are typical
worst cases for such expressions, within limits of time and memory.
"""

from __future__ import annotations

from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import pre_tokenizers

from api.errors import ModelFileError
from api.model import gguf_tokenizer
from engine_core.launch import Helper, HelperError, HelperLimits, JobError, get_logger

logger = get_logger()

LIMITS: Final = HelperLimits(cpu_seconds=20.0, deadline=90.0, memory_bytes=2 << 30)
"""A vocabulary of 256,000 tokens loads in about 2 s of CPU time and 300 MB."""
LENGTH: Final = 2000
"""Characters of a probe: long enough to reject cubic time, short enough to accept quadratic time."""
RUNS: Final = ("a", "A", "1", " ", "\n", "\t", ".", "_", "-", "'", '"', "é", "一", "👍", "ab ", "a1", " \n", "aA", "'s")

_HARMLESS: Final = frozenset({" +", " {2,}", r"\s+", r"\p{N}", r"\p{N}{1,3}", r"\d", "[0-9]", r"[\r\n]"})


@cache
def known_patterns() -> frozenset[str]:
    """The expressions of common tokenizers, from the table for GGUF files."""
    rules = [value for value in vars(gguf_tokenizer).values() if isinstance(value, gguf_tokenizer.PreRule)]
    return _HARMLESS | {
        split for rule in rules for split in rule.splits if not isinstance(split, pre_tokenizers.PreTokenizer)
    }


def try_tokenizer(path: Path, patterns: Set[str]) -> None:
    """Tests a tokenizer file, unless all its expressions are known.

    Args:
        path: The ``tokenizer.json``.
        patterns: The expressions that it applies to texts.

    Raises:
        ModelFileError: The tokenizer takes too much time or memory, or fails on a text.
    """
    if patterns <= known_patterns():
        return
    helper = Helper("octavo tokenizer trial", {"try": "api.model.tokenizer_trial:job"}, LIMITS)
    try:
        helper.call("try", str(path).encode())
    except JobError as error:
        raise ModelFileError(path, str(error)) from error
    except HelperError as error:
        if error.is_fault_of_data:
            raise ModelFileError(path, f"its regular expressions are too slow on a short text: {error}") from error
        logger.warning("%s: the tokenizer could not be tested before use: %s", path, error)
    finally:
        helper.close()


def job(data: bytes) -> bytes:
    """The helper process's job: loads the file and tokenizes all probes.

    Raises:
        ValueError: The file is damaged, or an expression failed.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(data.decode())
        for run in RUNS:
            text = run * (LENGTH // len(run))
            for end in ("", "!", "\0", "b"):
                tokenizer.encode(text + end)
    except BaseException as error:  # the library's panics do not derive from Exception
        raise ValueError(str(error)) from None
    return b""
