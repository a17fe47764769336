"""Models whose weights are pickles (``pytorch_model.bin``): converted once to safetensors, in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from api.errors import ModelFileError
from api.model.kept_folders import kept_folder
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
    size = sum(path.stat().st_size for path in files)

    def convert(target: Path) -> None:
        logger.info("%s: converting %.2f GB of pickled weights to safetensors, once, in %s", folder, size / 1e9, target)
        room = shutil.disk_usage(target).free
        if room < size:
            raise ModelFileError(
                target.parent, f"{room / 1e9:.1f} GB free, and the weights of {folder} need {size / 1e9:.1f} GB"
            )
        _convert(files, target)

    return kept_folder("converted", folder, files, convert)


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
