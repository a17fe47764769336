"""``octavo completion SHELL``: shell completion of commands and flags, generated from their parsers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import shtab

from api.flags import Parser

SHELLS = ("bash", "zsh", "fish")
FILES = {
    *("model_tag", "words", "config", "chat_template", "tokenizer", "download_dir", "uds", "kv_cache_dir"),
    *("input_file", "output_file", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"),
}
"""Options whose value is a path."""

HOWTO = """\
bash:  octavo completion bash > ~/.local/share/bash-completion/completions/octavo
zsh:   octavo completion zsh > "${fpath[1]}/_octavo"
fish:  octavo completion fish > ~/.config/fish/completions/octavo.fish
"""


def main(arguments: Sequence[str], parsers: Mapping[str, argparse.ArgumentParser], summaries: Mapping[str, str]) -> int:
    """Prints the script for a shell.

    Args:
        arguments: The command line after ``octavo completion``.
        parsers: Parsers of commands by name; ``bench serve`` is a subcommand of ``bench``.
        summaries: One-line descriptions of commands.
    """
    parser = Parser("octavo completion", "Print a shell script that completes commands and flags.", usage="SHELL")
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish.")
    parser.epilog = "Install with: " + "; ".join(HOWTO.splitlines())
    print(script(str(parser.parse(arguments)["shell"]), parsers, summaries), end="")
    return 0


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser], summaries: Mapping[str, str]) -> str:
    """The completions of all commands."""
    root = argparse.ArgumentParser("octavo", allow_abbrev=False)
    commands = root.add_subparsers(metavar="COMMAND")
    nested: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name in summaries:
        if name not in parsers and not any(key.startswith(f"{name} ") for key in parsers):
            shells = commands.add_parser(name, help=summaries[name])
            if name == "completion":
                shells.add_argument("shell", choices=SHELLS)
    for name, parser in parsers.items():
        first, _, second = name.partition(" ")
        if second and first not in nested:
            nested[first] = commands.add_parser(first, help=summaries[first]).add_subparsers(metavar="COMMAND")
        place = nested[first] if second else commands
        child = place.add_parser(second or first, help=summaries.get(name, parser.description), add_help=False)
        _copy(parser, child)
    return shtab.complete(root, shell=shell)


def _copy(parser: argparse.ArgumentParser, child: argparse.ArgumentParser) -> None:
    """Copies the visible flags; those that take a path complete files."""
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        if action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        child._add_action(action)
