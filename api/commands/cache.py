"""``octavo cache``: what ``--kv-cache-dir`` holds, and how to empty it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from api.flags import ConfigError, Parser

ABOUT = "about.json"


@dataclass(frozen=True)
class Stored:
    """The blocks of one model and configuration."""

    folder: Path
    model: str
    kind: str
    num_blocks: int
    num_bytes: int
    used: float
    """When it was used last, in seconds since 1970."""


def create_parser() -> Parser:
    """The flags of ``octavo cache``."""
    parser = Parser(
        "octavo cache",
        "Show or clear the KV blocks that servers keep in --kv-cache-dir. Servers that run may stay.",
        usage="[show|clear] DIR [flags]",
    )
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show", help="What to do.")
    parser.add_argument("folder", metavar="DIR", help="Folder of --kv-cache-dir.")
    parser.add_argument("--model", help="Only what belongs to this model, as it was served.")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns the exit code.

    Raises:
        ConfigError: The folder does not exist.
    """
    given = create_parser().parse(arguments)
    root = Path(str(given["folder"])).expanduser()
    if not root.is_dir():
        raise ConfigError(f"DIR: {root} is no folder")
    wanted = given.get("model")
    found = [stored for stored in contents(root) if wanted in (None, stored.model)]
    if given.get("action", "show") == "clear":
        for stored in found:
            shutil.rmtree(stored.folder, ignore_errors=True)
        print(f"removed {sum(stored.num_blocks for stored in found)} blocks, {_size(sum(s.num_bytes for s in found))}")
        return 0
    for stored in sorted(found, key=lambda stored: -stored.used):
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(stored.used)) if stored.used else "never"
        print(f"{_size(stored.num_bytes):>9}  {stored.num_blocks:>7} blocks  used {day}  {stored.model}  {stored.kind}")
    print(f"{_size(sum(stored.num_bytes for stored in found)):>9}  in {root}")
    return 0


def contents(root: Path) -> Iterator[Stored]:
    """What a folder holds, by model and configuration."""
    for folder in sorted(root.iterdir()):
        if not (folder / ABOUT).is_file():
            continue
        about: dict[str, str] = {}
        with suppress(OSError, ValueError):
            about = json.loads((folder / ABOUT).read_text())
        count, size, used = 0, 0, 0.0
        for rank in folder.iterdir():
            for entry in os.scandir(rank) if rank.is_dir() else ():
                with suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    count, size, used = count + 1, size + state.st_size, max(used, state.st_mtime)
        kind = f"{about.get('dtype', '?')}, KV {about.get('kv_cache_dtype', '?')}"
        yield Stored(folder, about.get("model", "?"), kind, count, size, used)


def _size(count: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
