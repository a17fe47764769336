"""The files of an adapter, and the hash of their content. Needs no torch."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from executor.base import ModelError
from executor.files import MAX_DOCUMENT, open_regular, read_document, why

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
READ_BYTES = 4 << 20


class AdapterFileError(ModelError):
    """A file of an adapter is missing or cannot be read; the message names it."""


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder holds, read once: nothing that happens to the files later matters."""

    path: Path
    config: bytes
    """adapter_config.json; empty: the adapter is a GGUF file."""
    weights: bytearray

    @property
    def content_hash(self) -> str:
        """SHA-256 of both, in hexadecimal."""
        digest = _start(self.config)
        digest.update(self.weights)
        return digest.hexdigest()


def read_adapter_files(path: Path) -> AdapterFiles:
    """Reads an adapter: a folder with PEFT's two files, or a GGUF file.

    Raises:
        AdapterFileError: A file is missing or cannot be read.
    """
    config, weights_path = _open(path)
    weights = bytearray()
    try:
        with open_regular(weights_path) as file:
            weights = bytearray(os.fstat(file.fileno()).st_size)
            if file.readinto(weights) != len(weights):
                raise ValueError("it has become shorter")
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{weights_path}: cannot be read: {why(error)}") from error
    return AdapterFiles(path, config, weights)


def with_scale(content_hash: str, scale: float) -> str:
    """What identifies an adapter whose products have a factor."""
    return content_hash if scale == 1.0 else f"{content_hash} * {scale!r}"


def rescaled(identity: str, scale: float) -> str:
    """What identifies the adapter of the same files with another scale.

    Args:
        identity: What ``with_scale`` has returned.
        scale: Factor of what it adds.
    """
    return with_scale(identity.partition(" * ")[0], scale)


def adapter_hash(path: Path, scale: float = 1.0) -> str:
    """The hash of an adapter's files and scale, without having all of the weights in memory.

    Raises as ``read_adapter_files``.
    """
    config, weights_path = _open(path)
    digest = _start(config)
    try:
        with open_regular(weights_path) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise AdapterFileError(f"{weights_path}: cannot be read: {why(error)}") from error
    return with_scale(digest.hexdigest(), scale)


def _start(config: bytes) -> hashlib._Hash:
    digest = hashlib.sha256(len(config).to_bytes(8, "little"))
    digest.update(config)
    return digest


def _open(path: Path) -> tuple[bytes, Path]:
    """The configuration, and the file with the weights."""
    if path.suffix == ".gguf":
        return b"", path
    if not path.is_dir():
        raise AdapterFileError(f"{path}: no such folder; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    if not (path / WEIGHTS).exists() and (path / PICKLED).exists():
        raise AdapterFileError(
            f"{path / PICKLED}: pickled weights may run code when loaded; save the adapter again with PEFT's "
            "save_pretrained(safe_serialization=True)"
        )
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise AdapterFileError(f"{path}: {name} is missing; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    try:
        return read_document(path / CONFIG, MAX_DOCUMENT), path / WEIGHTS
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path / CONFIG}: cannot be read: {why(error)}") from error
