"""Benchmarks: a server under load, and the engine without one."""

from __future__ import annotations

from collections.abc import Sequence

USAGE = """\
usage: octavo bench serve [flags]          measure a running server under load
       octavo bench COMMAND --help         all flags of a benchmark"""


def main(arguments: Sequence[str]) -> int:
    """``octavo bench``: runs a benchmark and returns the exit code."""
    if arguments and arguments[0] == "serve":
        from api.bench import serve

        return serve.main(arguments[1:])
    print(USAGE)
    return 0 if arguments and arguments[0] in ("-h", "--help") else 2
