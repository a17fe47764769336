"""``octavo cluster-key``: the file by which the machines of a cluster know each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from api.flags import ConfigError, Parser
from engine_core.launch import ModelError, create_key_file

DESCRIPTION = "Write a new key for --cluster-key. Copy the file to all machines of the cluster, and keep it secret."


def create_parser() -> Parser:
    """The flags of the command."""
    parser = Parser("octavo cluster-key", DESCRIPTION, "FILE")
    parser.add_argument("file", metavar="FILE", help="File to write; it must not exist.")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code.

    Raises:
        ConfigError: The file cannot be written.
    """
    path = Path(create_parser().parse(arguments)["file"])
    try:
        create_key_file(path)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    print(f"{path}: written. All machines need it: --cluster-key {path}")
    return 0
