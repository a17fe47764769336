"""Models whose weights are pickles (``pytorch_model.bin``): converted once to safetensors, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from api.errors import ModelFileError
from engine_core.launch import Helper, HelperError, HelperLimits, JobError, get_logger, read_json, why

logger = get_logger()

INDEX = "pytorch_model.bin.index.json"
PATTERN = "pytorch_model*.bin"
SLOWEST = 10e6
"""Bytes per second at which a conversion must at least proceed."""


def pickled_files(folder: Path) -> list[Path]:
    """The files of a model's pickled weights: those that its index names, or all of the usual name.

    Raises:
        ModelFileError: The index is damaged, or names files that are missing.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "pytorch_model.bin"
        return [single] if single.is_file() else sorted(folder.glob(PATTERN))
    try:
        weight_map = read_json(index)["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("files must lie beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = why(error) if isinstance(error, OSError | ValueError) else str(error)
        raise ModelFileError(index, f"not an index of weights: {reason}") from error
    for name in names:
        if not (folder / name).is_file():
            raise ModelFileError(folder / name, f"missing, although {INDEX} lists it")
    return [folder / name for name in names]


def converted_folder(folder: Path, files: list[Path]) -> Path:
    """The folder with the weights as safetensors; converts them if that has not been done before.

    Args:
        folder: The model.
        files: From ``pickled_files``.

    Raises:
        ModelFileError: A file is damaged or holds more than tensors, or there is no room.
    """
    target = cache_folder() / "converted" / f"{folder.name[:64]}-{fingerprint(files)}"
    if target.is_dir():
        return target
    size = sum(path.stat().st_size for path in files)
    logger.info("%s: converting %.2f GB of pickled weights to safetensors, once, in %s", folder, size / 1e9, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(target.parent).free
        if room < size:
            raise ModelFileError(
                target.parent, f"{room / 1e9:.1f} GB free, and the weights of {folder} need {size / 1e9:.1f} GB"
            )
        with tempfile.TemporaryDirectory(prefix="partial-", dir=target.parent, ignore_cleanup_errors=True) as partial:
            _convert(files, Path(partial))
            try:
                os.rename(partial, target)  # complete or not there
            except OSError:
                if not target.is_dir():  # another process was faster
                    raise
    except OSError as error:
        raise ModelFileError(target.parent, f"cannot keep converted weights: {error.strerror or error}") from error
    return target


def _convert(files: list[Path], target: Path) -> None:
    largest = max(path.stat().st_size for path in files)
    seconds = 60 + largest / SLOWEST
    limits = HelperLimits(
        cpu_seconds=seconds,
        deadline=4 * seconds,
        memory_bytes=3 * largest + (1 << 30),
        max_file_bytes=2 * largest + (64 << 20),
    )
    helper = Helper("octavo conversion", {"convert": "executor.conversion:convert"}, limits)
    weight_map: dict[str, str] = {}
    try:
        for number, path in enumerate(files, 1):
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            request = {"source": str(path), "target": str(target / name)}
            try:
                names = json.loads(helper.call("convert", json.dumps(request).encode()))
            except (HelperError, JobError) as error:
                raise ModelFileError(path, f"cannot be converted to safetensors: {error}") from error
            weight_map.update(dict.fromkeys(names, name))
    finally:
        helper.close()
    if len(files) > 1:
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cache_folder() -> Path:
    """Where this program keeps what it would otherwise have to make or to ask for again."""
    configured = os.environ.get("OCTAVO_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
    return Path(configured).expanduser() if configured else base


def fingerprint(files: list[Path]) -> str:
    """Differs if a file does, judging by place, size and time of change."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
