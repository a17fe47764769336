#!/usr/bin/env python3
"""Writes api/llm_options.py, the types of ``LLM``'s keyword arguments, from the configuration.

scripts/llm_options.py          # write it
scripts/llm_options.py --check  # exit code 1 if it is out of date; tests/unit/test_llm.py does the same
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from api.config import ServerConfig  # noqa: E402
from api.flags import Option, options  # noqa: E402
from api.vllm_options import FOREIGN, Verdict  # noqa: E402

TARGET = ROOT / "api" / "llm_options.py"
HEAD = '''"""Keyword arguments of ``LLM``, for editors and type checkers. Written by ``scripts/llm_options.py``."""

from __future__ import annotations

from typing import Literal, TypedDict


class LLMOptions(TypedDict, total=False):
    """The server's options by their long names with underscores, and vLLM's that are accepted.

    Sizes may be texts such as ``"4GiB"`` or ``"8k"``.
    """

'''


def render() -> str:
    """The content of the file."""
    lines = dict(_lines())
    return HEAD + "".join(f"    {name}: {kind}\n" for name, kind in lines.items())


def _lines() -> Iterator[tuple[str, str]]:
    for option in options(ServerConfig):
        for name in option.names:
            if name != "model":  # the first argument
                yield name, _type_of(option)
    for foreign in FOREIGN.values():
        if foreign.verdict is not Verdict.REFUSED:
            yield foreign.name, "object"


def _type_of(option: Option) -> str:
    kind = _render(option.hint)
    if option.extra.get("parse") or "auto" in option.extra:
        kind = " | ".join(dict.fromkeys(["int", "str", *kind.split(" | ")]))
    return kind


def _render(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _render(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_render(argument) for argument in arguments)
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]".replace("'", '"')
    if origin is list:
        return f"list[{_render(arguments[0])}] | {_render(arguments[0])}"
    if origin is dict:
        return f"dict[{', '.join(map(_render, arguments))}]"
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return "dict[str, object]"
    return str(hint.__name__)


def main() -> int:
    content = render()
    if "--check" in sys.argv[1:]:
        return int(TARGET.read_text() != content)
    TARGET.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
