"""What tells programs and models apart, by their files. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from executor.config import ModelConfig

_ROOT = Path(__file__).resolve().parent.parent
_CODE = ("executor", "ops", "api/media")
"""Folders of what computes K and V, from pictures and tokens on."""
_SOURCES = (".py", ".cpp", ".h", ".so")
_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tensors")
_TELLING = ("config.json", "index.json")
"""Ends of the names of JSON files that say what a model computes, and from which files."""


def model_files(config: ModelConfig) -> Iterator[Path]:
    """The files from which a model is made, in order."""
    path = Path(config.model)
    folders = [path.parent if path.is_file() else path, *(path / name for name in config.dense)]
    if config.weights:
        folders.append(Path(config.weights))
    if path.is_file():
        yield from [path.parent / name for name in config.gguf.files] if config.gguf and config.gguf.files else [path]
        folders = folders[1:]
    for folder in dict.fromkeys(folders):
        entries = folder.iterdir() if folder.is_dir() else ()
        yield from sorted(entry for entry in entries if entry.suffix in _MODEL_SUFFIXES and entry.is_file())
    if config.imatrix:
        yield Path(config.imatrix)
    if config.vision is not None:
        yield config.vision.as_path


def code_digest() -> bytes:
    """Of the program, as far as it computes K and V."""
    return _digest_of(_CODE)


def _digest_of(folders: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in _SOURCES:
                digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.digest()


def program_digest() -> bytes:
    """Of the program, as far as machines must have it in common: what they compute, and say to each other."""
    return _digest_of(("engine_core", *_CODE))


def model_digest(config: ModelConfig) -> str:
    """Of a model, without reading its weights: of these, names and sizes count. Where the files are does not."""
    digest = hashlib.sha256()
    for path in model_files(config):
        if path.suffix != ".json":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        elif path.name.endswith(_TELLING):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
