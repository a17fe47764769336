"""Blocks in files, one per block: a prefix cache that survives the server.

A file holds a header and the block of each layer, in order. It is written under another name and then renamed, so a
reader never sees half of it; and it has a checksum, so damage of any kind is a miss. Whoever may write the folder
determines outputs, so it belongs to the server's user alone.
"""

from __future__ import annotations

import os
import queue
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import TypeAlias

from executor.kv_transfer.base import Blocks
from executor.log import get_logger
from executor.messages import HASH_BYTES, FinishedTransfer, KVTransfer, i32

logger = get_logger()

_HEADER = struct.Struct("<8s32sIIQ")
"""Magic number, hash, group, CRC-32 and size of what follows."""
_MAGIC = b"octavoKV"
_MAX_VECTORS = 1000
"""Buffers per system call; Linux takes 1,024."""
Buffer: TypeAlias = bytes | bytearray | memoryview
_READERS = 4
"""Threads that read: a disk is fast only if it has several requests at a time."""


class DamagedError(Exception):
    """A file does not hold what its name says."""


class DiskConnector:
    """Reads and writes files in threads, which hold the interpreter's lock only between system calls."""

    def __init__(self, store: str, rank: int, groups: Sequence[Blocks]) -> None:
        """
        Args:
            store: Folder of all ranks' files.
            rank: This worker's.
            groups: The KV cache.
        """
        self._store = Path(store)
        self._folder = self._store / str(rank)
        self._rank = rank
        self._groups = groups
        self._readers = ThreadPoolExecutor(_READERS, "kv load")
        self._writer = ThreadPoolExecutor(1, "kv save")
        self._done: queue.SimpleQueue[FinishedTransfer] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._numbers = count()
        self._has_complained = False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fileno(self) -> int:
        return self._event

    def start_load_kv(self, transfer: KVTransfer) -> None:
        results = bytearray(len(transfer.hashes))
        places = iter(range(len(results)))  # shared: each reader takes the next block
        num_readers = min(_READERS, len(results))
        others = iter(range(num_readers - 1))

        def read() -> None:
            try:
                for place in places:
                    results[place] = self._load(transfer, place)
            finally:
                if next(others, None) is None:  # the last reader
                    self._finish(transfer, bytes(results))

        for _ in range(num_readers):
            self._readers.submit(read)

    def save_kv_layer(self, transfer: KVTransfer) -> None:
        results = bytearray(len(transfer.hashes))

        def write() -> None:
            try:
                for name in transfer.removed:
                    self._remove(name)
                for place in range(len(results)):
                    results[place] = self._save(transfer, place)
            finally:
                self._finish(transfer, bytes(results))

        self._writer.submit(write)

    def get_finished(self) -> list[FinishedTransfer]:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        finished = []
        with suppress(queue.Empty):
            while True:
                finished.append(self._done.get_nowait())
        return finished

    def close(self) -> None:
        for pool in (self._readers, self._writer):
            pool.shutdown(cancel_futures=True)
        os.close(self._event)

    def _finish(self, transfer: KVTransfer, results: bytes) -> None:
        self._done.put(FinishedTransfer(self._rank, transfer.transfer_id, results))
        os.eventfd_write(self._event, 1)

    def _path(self, transfer: KVTransfer, place: int) -> Path:
        return self._folder / f"{transfer.hashes[place].hex()}.{transfer.groups[place]}"

    def _pieces(self, transfer: KVTransfer, place: int) -> list[memoryview]:
        """A block in the cache, tensor by tensor."""
        block = int(i32(transfer.block_ids)[place])
        return [memoryview(tensor[block]) for tensor in self._groups[transfer.groups[place]]]

    def _load(self, transfer: KVTransfer, place: int) -> bool:
        """Fills a block from its file. Returns whether that worked; if not, the block holds anything."""
        path = self._path(transfer, place)
        try:
            with open(path, "rb", buffering=0) as file:
                _read(file.fileno(), transfer.hashes[place], transfer.groups[place], self._pieces(transfer, place))
            os.utime(path)  # files are removed in the order of their last use
        except FileNotFoundError:
            return False
        except (OSError, DamagedError) as error:
            logger.warning("--kv-cache-dir: ignored %s: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return False
        return True

    def _save(self, transfer: KVTransfer, place: int) -> bool:
        """Writes a block to its file."""
        path = self._path(transfer, place)
        draft = path.with_name(f".{os.getpid()}.{next(self._numbers)}")
        pieces = self._pieces(transfer, place)
        header = _header(transfer.hashes[place], transfer.groups[place], pieces)
        try:
            if path.exists():
                return True
            try:
                descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileNotFoundError:  # somebody cleared the folder
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                for vectors in _batches([header, *pieces]):
                    _write(descriptor, vectors)
            finally:
                os.close(descriptor)
            draft.rename(path)
        except OSError as error:
            if not self._has_complained:
                logger.warning("--kv-cache-dir: cannot write %s: %s", path, error)
            self._has_complained = True
            with suppress(OSError):
                draft.unlink()
            return False
        return True

    def _remove(self, name: str) -> None:
        """Removes a block's files, of all ranks.

        Args:
            name: ``store/hash.group``, from the folder of all stores.
        """
        store, _, file = name.rpartition("/")
        if self._rank == 0:
            for path in (self._store.parent / store).glob(f"[0-9]*/{file}"):
                with suppress(OSError):
                    path.unlink()


def _batches(vectors: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """Pieces of a list that fit one system call each."""
    rest = iter(vectors)
    while batch := list(islice(rest, _MAX_VECTORS)):
        yield batch


def _checksum(pieces: Sequence[memoryview]) -> int:
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def _header(block_hash: bytes, group: int, pieces: Sequence[memoryview]) -> bytes:
    assert len(block_hash) == HASH_BYTES
    return _HEADER.pack(_MAGIC, block_hash, group, _checksum(pieces), sum(piece.nbytes for piece in pieces))


def _read(descriptor: int, block_hash: bytes, group: int, pieces: Sequence[memoryview]) -> None:
    """Reads a file into memory.

    Raises:
        DamagedError: It holds something else.
    """
    header = bytearray(_HEADER.size)
    size = sum(piece.nbytes for piece in pieces)
    if os.fstat(descriptor).st_size != len(header) + size:
        raise DamagedError("it has another size")
    for vectors in _batches([header, *pieces]):
        if os.readv(descriptor, vectors) != sum(len(vector) for vector in vectors):
            raise DamagedError("it ends early")
    if bytes(header) != _header(block_hash, group, pieces):
        raise DamagedError("its checksum is wrong")


def _write(descriptor: int, vectors: Sequence[Buffer]) -> None:
    whole = sum(len(vector) for vector in vectors)
    if os.writev(descriptor, vectors) != whole:
        raise OSError("it was not written whole; the disk may be full")
