"""Finds texts that match the patterns of a schema, as hints for closing paths.

In a string whose pattern may match anywhere, every character is allowed until a match occurs, so the mask does not show
which characters lead to the end. A matching text does.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

from engine_core.messages import GrammarSpec
from engine_core.structured.closing import ClosingPaths
from engine_core.structured.grammar import GrammarError, compile_grammar
from engine_core.structured.vocabulary import Vocabulary

MAX_PATTERNS = 16
_LONGEST = 256
"""Maximum tokens of an example."""


@lru_cache(maxsize=256)
def pattern_examples(spec: GrammarSpec, vocabulary: Vocabulary) -> tuple[bytes, ...]:
    """Contents of JSON strings that match the patterns of a schema, one per pattern for which one is found."""
    if spec.kind != "json" or '"pattern' not in spec.text:
        return ()
    patterns: dict[str, None] = {}
    pending: list[Any] = [json.loads(spec.text)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(value.get("pattern"), str):
                patterns[value["pattern"]] = None
            if isinstance(value.get("patternProperties"), dict):
                patterns.update(dict.fromkeys(value["patternProperties"]))
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [_example(pattern, vocabulary) for pattern in list(patterns)[:MAX_PATTERNS]]
    return tuple(json.dumps(text, ensure_ascii=False)[1:-1].encode() for text in found if text)


def _example(pattern: str, vocabulary: Vocabulary) -> str | None:
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        pattern = pattern[:-1]
    if not pattern:
        return None
    try:
        matcher = compile_grammar(GrammarSpec("regex", pattern), vocabulary)
        # Bounded by steps, not time: tokens depend on the result, so it must not depend on the machine's speed.
        path = ClosingPaths(vocabulary).find(matcher, [], _LONGEST, seconds=math.inf)
    except GrammarError:
        return None  # compiling the schema itself reports the error
    try:
        return None if path is None else bytes(vocabulary.tokenizer.decode_bytes(path)).decode()
    except UnicodeDecodeError:
        return None
