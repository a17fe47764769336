"""Folders that are made once and found again at each later start, such as weights in another format."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from api.errors import ModelFileError


def cache_folder() -> Path:
    """Where this program keeps what it would otherwise have to make or to ask for again."""
    configured = os.environ.get("OCTAVO_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
    return Path(configured).expanduser() if configured else base


def kept_folder(
    kind: str, model: Path, files: Sequence[Path], make: Callable[[Path], None], settings: str = ""
) -> Path:
    """The folder of what is made from a model's files; makes it if that has not been done before.

    Args:
        kind: What it holds: the name of the folder above it.
        model: The model, after which it is named.
        files: It is made anew if one of these differs, judging by place, size and time of change.
        make: Fills an empty folder. Nothing is kept if it raises.
        settings: What else it depends on.

    Raises:
        ModelFileError: There is no room.
    """
    digest = hashlib.sha256(settings.encode())
    for path in files:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    above = cache_folder() / kind
    target = above / f"{model.name[:64]}-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    try:
        above.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=above, ignore_cleanup_errors=True) as partial:
            make(Path(partial))
            try:
                os.rename(partial, target)  # complete or not there
            except OSError:
                if not target.is_dir():  # another process was faster
                    raise
    except OSError as error:
        raise ModelFileError(above, f"cannot keep what is made from {model}: {error.strerror or error}") from error
    return target
