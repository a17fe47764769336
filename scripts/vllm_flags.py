#!/usr/bin/env python3
"""Writes docs/vllm-flags.md: what happens to each of vLLM's flags and keyword arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from api.config import ServerConfig  # noqa: E402
from api.flags import options  # noqa: E402
from api.vllm_options import FOREIGN, WORKING, Verdict  # noqa: E402

TARGET = ROOT / "docs" / "vllm-flags.md"
HEAD = """\
# vLLM's flags and keyword arguments

What each option of `vllm serve` and `LLM(...)` does here (vLLM 0.33, with those that older versions had). The names of
flags and keyword arguments are the same, with dashes or underscores; `--no-` turns a switch off; keys of JSON objects
may be flags (`--hf-overrides.rope_theta 1e6`). `octavo serve --help` explains those that work.

* **works**: it does what it does in vLLM.
* **given**: what it asks for is always the case.
* **accepted**: it has no meaning here. The server starts, and one line in the log names all such options.
* **refused**: the feature does not exist yet. The server does not start, and says so by name. The default values, and
  `false` for a switch, are fine.

Of vLLM's environment variables, `VLLM_API_KEY`, `VLLM_LOGGING_LEVEL`, `VLLM_CPU_KVCACHE_SPACE` and
`VLLM_HTTP_MAX_REQUEST_BODY_SIZE` do what they do there; with `--log-level debug`, the log names others that are set.

`scripts/vllm_flags.py` writes this file.

| option | | |
|---|---|---|
"""
WORDS = {Verdict.DONE: "given", Verdict.NOTED: "accepted", Verdict.REFUSED: "refused"}


def rows() -> Iterator[tuple[str, str]]:
    """Each option with its row."""
    known = {name: option for option in options(ServerConfig) for name in option.names}
    for name in WORKING:
        flag, own = "--" + name.replace("_", "-"), known[name].flag
        yield name, f"| `{flag}` | works | {'' if flag == own else f'the same as `{own}`'} |"
    for name, option in FOREIGN.items():
        if name in known:
            continue
        values = "" if option.kind == "bool" or not option.neutral else f" (`{'`, `'.join(option.neutral)}` is fine)"
        flags = ", ".join(f"`{flag}`" for flag in (option.flag, *option.short))
        yield name, f"| {flags} | {WORDS[option.verdict]} | {option.reason}{values} |"


def text() -> str:
    """The whole file."""
    return HEAD + "".join(f"{row}\n" for _, row in sorted(rows()))


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text())
