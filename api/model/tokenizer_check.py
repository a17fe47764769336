"""Checks how much a ``tokenizer.json`` can lengthen a text, before it is loaded.

The file comes from a hub and is not trusted. Its steps may lengthen a text without limit: a dozen replacements of ``a``
by ``aaaa`` fill the memory, and already while the file is loaded, since added tokens pass through them too. So an upper
bound on the growth of each step is computed from its parameters, and a file that may lengthen a text by more than real
tokenizers do is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from api.errors import ModelFileError
from engine_core.launch import read_document, why

MAX_FILE: Final = 512 << 20
MAX_GROWTH: Final = 1024
"""Maximum growth by ``_growth``; real tokenizers stay below 500."""
MAX_ADDED: Final = 256 << 20
"""Maximum bytes of all added tokens together after normalization."""
MAX_COPIES: Final = 4
"""Maximum number of times that a post-processor may repeat a text."""

_GROWTH: Final = {
    "BertNormalizer": 8,
    "ByteLevel": 2,
    "Lowercase": 2,
    "NFC": 3,
    "NFD": 3,
    "NFKC": 11,
    "NFKD": 11,
    "Precompiled": 11,
}
"""Maximum factor by which a step multiplies the bytes of a text; others do not lengthen it.

See https://unicode.org/faq/normalization.html.
"""


class _Added(msgspec.Struct):
    content: str = ""


class _File(msgspec.Struct):
    """The parts of a tokenizer.json that this module reads; the vocabulary, of any size, is skipped."""

    added_tokens: list[_Added] = []
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    decoder: Any = None


def check_tokenizer_file(path: Path, config: Mapping[str, Any]) -> frozenset[str]:
    """Rejects a file whose steps may lengthen texts too much.

    Args:
        path: The ``tokenizer.json``.
        config: Content of ``tokenizer_config.json``, which may add tokens.

    Returns:
        The regular expressions that the tokenizer applies to texts.

    Raises:
        ModelFileError: The file cannot be read, is not a tokenizer, or may lengthen texts too much.
    """
    try:
        file = msgspec.json.decode(read_document(path, MAX_FILE), type=_File)
        growth = _growth(file.normalizer)
        decoded = _growth(file.decoder)
        copies = _copies(file.post_processor)
        patterns = frozenset(
            pattern for part in (file.normalizer, file.pre_tokenizer, file.decoder) for pattern in _patterns(part)
        )
    except (OSError, ValueError) as error:
        raise ModelFileError(path, why(error)) from error
    except (msgspec.MsgspecError, TypeError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise ModelFileError(path, f"not a tokenizer: {error}") from error
    for what, number, most in (
        ("normalizer may make a text", growth, MAX_GROWTH),
        ("decoder may make a token", decoded, MAX_GROWTH),
        ("post_processor may make a prompt", copies, MAX_COPIES),
    ):
        if number > most:
            raise ModelFileError(path, f"its {what} {number:.3g} times as long (at most {most} times is accepted)")
    added = sum(len(token.content.encode("utf-8", "replace")) for token in file.added_tokens)
    if (added + len(str(config).encode("utf-8", "replace"))) * growth > MAX_ADDED:
        raise ModelFileError(path, f"its added tokens may exceed {MAX_ADDED >> 20} MiB after normalization")
    return patterns


def _steps(part: Any) -> list[dict[str, Any]]:
    """The components of a possibly nested sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for key in ("normalizers", "pretokenizers", "processors", "decoders") for inner in part.get(key, ())
            for step in _steps(inner)]  # fmt: skip


def _growth(part: Any) -> float:
    """Upper bound on the factor by which steps lengthen a text, in bytes of UTF-8."""
    growth = 1.0
    for step in _steps(part):
        if step["type"] == "Replace":
            content = len(step["content"].encode("utf-8", "replace"))
            old = step["pattern"].get("String", "")
            # A pattern that matches the empty string inserts the content between all characters.
            growth *= max(1.0, content / len(old.encode("utf-8", "replace"))) if old else 1.0 + content
        elif step["type"] == "Prepend":
            growth *= 1.0 + len(step["prepend"].encode("utf-8", "replace"))
        else:
            growth *= _GROWTH.get(step["type"], 1)
    return growth


def _copies(part: Any) -> int:
    """How many times a post-processor repeats a text."""
    copies = 1
    for step in _steps(part):
        if step["type"] == "TemplateProcessing":
            copies *= max(1, *(sum("Sequence" in piece for piece in step[key]) for key in ("single", "pair")))
    return copies


def _patterns(part: Any) -> Iterator[str]:
    for step in _steps(part):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and "Regex" in pattern:
            yield str(pattern["Regex"])
