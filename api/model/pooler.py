"""Reads the pooling configuration from a model's files: sentence-transformers' modules, or a key of a GGUF file.

Only configurations that a ``PoolerConfig`` can express are used: a transformer, then one pooling, then optionally
normalisation. Anything else is ignored as a whole, with a note that names the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from api.config import PoolerConfig
from api.model.gguf_file import GGUFFile
from engine_core.launch import read_json, why

PoolingType = Literal["LAST", "MEAN", "CLS"]

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
"""The usual path of the pooling module's configuration."""
SETTINGS = "config_sentence_transformers.json"
MAX_DOCUMENT = 1 << 20

_MODES: dict[str, PoolingType] = {
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_mean_tokens": "MEAN",
    "pooling_mode_lasttoken": "LAST",
}
_NAMED_MODES: dict[str, PoolingType] = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}
_GGUF_TYPES: dict[int, PoolingType] = {1: "MEAN", 2: "CLS", 3: "LAST"}
"""Pooling types by llama.cpp's numbers."""


class ModelPooler(NamedTuple):
    """The pooling configuration of a model's files, and notes on what was ignored."""

    config: PoolerConfig = PoolerConfig()
    notes: tuple[str, ...] = ()
    """A line for each ignored file that would have changed vectors."""


class _UnclearError(Exception):
    """A file cannot be expressed as a ``PoolerConfig``; the message names it and says why."""


def find_pooler(path: Path, gguf: GGUFFile | None) -> ModelPooler:
    """Reads a model's pooling configuration, as far as it is supported. Never rejects a model.

    Args:
        path: The model's folder or file.
        gguf: Its header, if it is a GGUF file.
    """
    if gguf is not None:
        return _from_gguf(gguf)
    notes = []
    config = PoolerConfig()
    try:
        if (path / MODULES).exists():
            config = _from_modules(path)
        elif (path / POOLING).exists():
            raise _UnclearError(f"{POOLING} belongs to {MODULES}, which is missing")
    except _UnclearError as unclear:
        notes.append(f"{path}: {unclear}; ignored, so vectors differ from those that the model was trained for")
    try:
        settings = _read(path, SETTINGS) if (path / SETTINGS).exists() else {}
        prompt = settings.get("default_prompt_name") if isinstance(settings, dict) else None
        if prompt is not None:
            notes.append(
                f"{path / SETTINGS}: the prompt {str(prompt)[:40]!r} is not added to texts; clients must add it"
            )
    except _UnclearError as unclear:
        notes.append(f"{path}: {unclear}; ignored")
    return ModelPooler(config, tuple(notes))


def merge_pooler(wanted: PoolerConfig, own: PoolerConfig) -> PoolerConfig:
    """Merges the pooling configurations: the server's options take precedence over the model's files."""
    return PoolerConfig(
        pooling_type=wanted.pooling_type or own.pooling_type,
        use_activation=own.use_activation if wanted.use_activation is None else wanted.use_activation,
    )


def _from_gguf(gguf: GGUFFile) -> ModelPooler:
    architecture = gguf.metadata.get("general.architecture")
    number = gguf.metadata.get(f"{architecture}.pooling_type")
    if not isinstance(number, int) or number == 0:
        return ModelPooler()
    if number not in _GGUF_TYPES:
        return ModelPooler(notes=(f"{gguf.path}: {architecture}.pooling_type {number} is not supported; ignored",))
    return ModelPooler(PoolerConfig(pooling_type=_GGUF_TYPES[number]))


def _from_modules(folder: Path) -> PoolerConfig:
    modules = _read(folder, MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise _UnclearError(f"{MODULES} is not a list of modules")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _UnclearError(
            f"{MODULES} has the modules {', '.join(kind[:40] for kind in kinds[:8])}, not all of which are supported"
        )
    if len(kinds) == 1:
        return PoolerConfig()
    name = modules[1].get("path")
    if not isinstance(name, str) or Path(name).name != name:
        raise _UnclearError(f"{MODULES} has a pooling module outside the model's folder")
    return PoolerConfig(pooling_type=_pooling_type(folder, f"{name}/config.json"), use_activation=len(kinds) == 3)


def _pooling_type(folder: Path, name: str) -> PoolingType:
    fields = _read(folder, name)
    if not isinstance(fields, dict):
        raise _UnclearError(f"{name} is not a JSON object")
    named = fields.get("pooling_mode")
    modes = [key for key, value in fields.items() if key.startswith("pooling_mode_") and value is True]
    if named is None and len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    if isinstance(named, str) and not modes and named in _NAMED_MODES:
        return _NAMED_MODES[named]
    shown = ", ".join(modes) or str(named)
    raise _UnclearError(f"{name} asks for {shown[:200]}, but only cls, mean and lasttoken are supported")


def _read(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name, MAX_DOCUMENT)
    except (OSError, ValueError) as error:
        raise _UnclearError(f"{name} cannot be read: {why(error)}") from error
