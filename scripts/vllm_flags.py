#!/usr/bin/env python3
"""Writes docs/vllm-flags.md: how each vLLM flag and keyword argument is handled."""

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

How each option of `vllm serve` and `LLM(...)` behaves here (vLLM 0.33, plus options of older versions). Flags and
keyword arguments have the same names, with dashes or underscores; `--no-` turns a switch off; keys of JSON objects can
be set as flags (`--hf-overrides.rope_theta 1e6`). `octavo serve --help` explains those that work.

* **works**: behaves as in vLLM.
* **given**: always on.
* **accepted**: has no effect here. The server starts, and one log line names all such options.
* **refused**: the feature does not exist yet. The server exits with an error that names the option. Default values, and
  `false` for a switch, are accepted.

Of vLLM's environment variables, `VLLM_API_KEY`, `VLLM_LOGGING_LEVEL`, `VLLM_CPU_KVCACHE_SPACE`,
`VLLM_HTTP_MAX_REQUEST_BODY_SIZE` and `VLLM_USE_MODELSCOPE` work as in vLLM; with `--log-level debug`, the log names
others that are set.

`scripts/vllm_flags.py` generates this file.

| option | | |
|---|---|---|
"""
WORDS = {Verdict.DONE: "given", Verdict.NOTED: "accepted", Verdict.REFUSED: "refused"}


def rows() -> Iterator[tuple[str, str]]:
    """Names and table rows of all options."""
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
