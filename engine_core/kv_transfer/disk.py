"""What ``--kv-cache-dir`` holds.

The folder has a folder for each digest of what determines K and V besides tokens (model, code, configuration), and in
that one for each rank, with a file per block: ``hash.group``. Hashes cover tokens, adapter and salt. The least recently
used blocks go first, whichever digest they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.kv_transfer.base import Key
from engine_core.request import Request
from executor.messages import HASH_BYTES, WorkerReady

ABOUT = "about.json"
"""File with the model's name and configuration, for people."""
_HEADER_BYTES = 64
"""At least what a file holds besides the block."""


_DRAFT_SECONDS = 3600.0
"""Age at which nobody is writing a file any more."""


class StoreError(Exception):
    """The folder cannot be used; the message is one line."""


class DiskStore:
    """An index of the files, in memory. Workers write and read them."""

    def __init__(self, folder: str, max_bytes: int, ready: Sequence[WorkerReady], about: dict[str, str]) -> None:
        """Opens a folder, and creates it if need be.

        Args:
            folder: The folder of all digests.
            max_bytes: Size of all files together.
            ready: What the workers said, by rank.
            about: For people.

        Raises:
            StoreError: Others could write it, or it cannot be created.
        """
        parts = [*(worker.fingerprint for worker in ready), about.get("max_model_len", "")]
        digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
        self._folder = Path(folder).expanduser().absolute()
        self._own = digest
        self._max_bytes = max_bytes
        groups = range(len(ready[0].kv_cache_groups))
        self._sizes = [
            sum(worker.kv_cache_groups[group].bytes_per_block + _HEADER_BYTES for worker in ready) for group in groups
        ]
        """Bytes of a block of each group, on all ranks."""
        self._files: OrderedDict[str, int] = OrderedDict()
        """``digest/hash.group`` -> bytes, least recently used first."""
        self.num_bytes = 0
        try:
            self._create(about)
            self._scan(len(ready))
        except OSError as error:
            raise StoreError(f"--kv-cache-dir {folder}: {error.strerror}") from error

    def _create(self, about: dict[str, str]) -> None:
        own = self._folder / self._own
        if not self._folder.exists():
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700)
        own.mkdir(mode=0o700, exist_ok=True)
        state = self._folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreError(
                f"--kv-cache-dir {self._folder}: others could write there, and so determine outputs; use a folder of "
                "this user with mode 0700"
            )
        (own / ABOUT).write_text(json.dumps(about))

    def _scan(self, num_ranks: int) -> None:
        """Finds out what is there."""
        found: dict[str, tuple[float, int, int]] = {}
        for digest in self._folder.iterdir():
            for rank in digest.iterdir() if digest.is_dir() else ():
                for entry in os.scandir(rank) if rank.is_dir() else ():
                    if entry.name.startswith("."):
                        _remove_draft(Path(entry.path))
                    elif _is_block(entry.name):
                        state = entry.stat(follow_symlinks=False)
                        name = f"{digest.name}/{entry.name}"
                        used, size, count = found.get(name, (0.0, 0, 0))
                        found[name] = max(used, state.st_mtime), size + state.st_size, count + 1
        for name, (_, size, count) in sorted(found.items(), key=lambda item: item[1][0]):
            if count == num_ranks or not name.startswith(self._own):
                self._files[name] = size
                self.num_bytes += size

    @property
    def location(self) -> str:
        return str(self._folder / self._own)

    @property
    def num_blocks(self) -> int:
        """Blocks of all digests."""
        return len(self._files)

    def _name(self, key: Key) -> str:
        return f"{self._own}/{key[1].hex()}.{key[0]}"

    def __contains__(self, key: object) -> bool:
        assert isinstance(key, tuple)
        return self._name(key) in self._files

    def get_num_new_matched_tokens(self, kv: KVCacheManager, request: Request, num_computed_tokens: int) -> int:
        return kv.longest_prefix(request, self) - num_computed_tokens if self._files else 0

    def use(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if (name := self._name(key)) in self._files:
                self._files.move_to_end(name)

    def add(self, keys: Sequence[Key]) -> tuple[str, ...]:
        for key in keys:
            name, size = self._name(key), self._sizes[key[0]]
            if name not in self._files:
                self._files[name] = size
                self.num_bytes += size
        removed: list[str] = []
        while self.num_bytes > self._max_bytes and self._files:
            name, size = self._files.popitem(last=False)
            self.num_bytes -= size
            removed.append(name)
        return tuple(removed)

    def discard(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.num_bytes -= self._files.pop(self._name(key), 0)


def _remove_draft(path: Path) -> None:
    """Removes what a worker that was killed had begun to write."""
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime > _DRAFT_SECONDS:
            path.unlink()


def _is_block(name: str) -> bool:
    digits, _, group = name.partition(".")
    return len(digits) == 2 * HASH_BYTES and group.isdecimal()
