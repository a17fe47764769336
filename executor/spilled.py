"""Weights that the free memory cannot hold: packed into files of which the system keeps in memory what is used most.

So a mixture of experts larger than memory runs from the page cache: slowly, instead of being killed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from executor.base import ModelError
from executor.log import get_logger
from ops.cpu import memory

logger = get_logger()

RESERVE = 512 << 20
"""Bytes that must remain free beside the weights."""
ROOM = 1.1
"""Packed weights may take somewhat more than files'."""
SAMPLE_BYTES = 64 << 20


def spill_if_needed(weight_bytes: int, free_bytes: int, source: str) -> None:
    """Lets packed weights lie in files from now on, if the free memory does not suffice for them. Warns once.

    Args:
        weight_bytes: What the model's weights take.
        free_bytes: Memory that is free.
        source: How messages refer to the model.

    Raises:
        ModelError: The disk cannot hold them either.
    """
    if weight_bytes + RESERVE <= free_bytes:
        return
    sizes = f"the weights take {_gib(weight_bytes)} GiB and {_gib(free_bytes)} GiB of memory are free"
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free
        if room < weight_bytes * ROOM + SAMPLE_BYTES:
            raise ModelError(
                f"{source}: {sizes}, and {_gib(room)} GiB of the disk at {folder}; choose a smaller model or "
                "quantisation, or set OCTAVO_CACHE_DIR to a folder of a larger disk"
            )
        rate = _read_rate(folder)
    except OSError as error:
        raise ModelError(f"{source}: {sizes}, and {folder} cannot be used instead: {error.strerror}") from error
    memory.weights.spill(folder)
    logger.warning(
        "%s: %s, so they lie in a file at %s, and memory holds what is used most. The rest is read at %.2f GB/s "
        "(measured): a smaller quantisation, or fewer other programs, would be much faster",
        source,
        sizes,
        folder,
        rate / 1e9,
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.4g}"


def _folder() -> Path:
    configured = os.environ.get("OCTAVO_CACHE_DIR")
    if configured:
        return Path(configured).expanduser() / "weights"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "weights"


def _read_rate(folder: Path) -> float:
    """Bytes per second that the disk reads, of a file that is not in memory."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        block = os.urandom(1 << 20)
        for _ in range(SAMPLE_BYTES >> 20):
            file.write(block)
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        file.seek(0)
        while file.read(len(block)):
            pass
        return SAMPLE_BYTES / max(time.perf_counter() - begin, 1e-9)
