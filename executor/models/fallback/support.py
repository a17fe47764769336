"""Tells from the sources of the installed transformers what the fallback can run. Imports neither it nor torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

MIN_VERSION = (5, 0)
"""Of transformers: since then, models are built and their weights converted as the fallback expects."""
RECURRENT_LAYERS = ("conv", "linear_attention", "mamba", "mamba2", "recurrent", "hybrid")
"""Values of ``layer_types`` that stand for layers with a state of their own."""


def fallback_problem(architecture: str, fields: Mapping[str, Any]) -> str | None:
    """The reason why an architecture cannot run through transformers, or None if it can.

    Args:
        architecture: First entry of ``architectures`` in config.json.
        fields: Contents of config.json.
    """
    folder = _package()
    if folder is None:
        return "transformers, which may implement it, is not installed (pip install transformers)"
    version = metadata.version("transformers")
    if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
        return f"transformers {version}, which may implement it, is too old (pip install --upgrade transformers)"
    if not architecture.isidentifier():
        return "it is not the name of a class"
    file = _file_of(architecture, fields.get("model_type"))
    if file is None:
        if fields.get("auto_map"):
            return "it needs Python code from the model's repository (auto_map), which is never run"
        return "the installed transformers does not know it either"
    if architecture not in _causal_classes(folder) or fields.get("is_encoder_decoder") is True:
        return "it is not a causal language model"
    flags = _flags_of(architecture, file)
    if flags.get("_is_stateful") or _has_recurrent_layers(fields):
        return "it keeps a recurrent state, not only keys and values"
    if not flags.get("_supports_attention_backend"):
        return "transformers' implementation does not support other attention implementations"
    return None


def _has_recurrent_layers(fields: Mapping[str, Any]) -> bool:
    types = fields.get("layer_types")
    return isinstance(types, list) and any(kind in RECURRENT_LAYERS for kind in types)


def _package() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def _causal_classes(folder: Path) -> frozenset[str]:
    """Names of the causal language models in transformers' table of automatic classes."""
    tree = ast.parse((folder / "models/auto/modeling_auto.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in map(ast.unparse, node.targets):
            strings = [each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
            return frozenset(name for name in strings if isinstance(name, str))
    return frozenset()


@cache
def _file_of(architecture: str, model_type: object) -> Path | None:
    """The source file that defines a class."""
    folder = _package()
    assert folder is not None
    definition = f"\nclass {architecture}(".encode()
    for file in _likely_first(folder / "models", model_type):
        if definition in file.read_bytes():
            return file
    return None


def _likely_first(models: Path, model_type: object) -> Iterator[Path]:
    """All files with model classes, those of the model type's folder first: ``gemma3_text`` is in ``gemma3``."""
    name = model_type.replace("-", "_") if isinstance(model_type, str) and len(model_type) <= 100 else ""
    while name.isidentifier():
        yield from sorted((models / name).glob("modeling_*.py"))
        name = name.rpartition("_")[0]
    yield from sorted(models.glob("*/modeling_*.py"))


@cache
def _flags_of(name: str, file: Path) -> Mapping[str, bool]:
    """The constant attributes of a class and of its bases in the same file: whether they are true."""
    classes = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
    flags: dict[str, bool] = {}

    def collect(name: str) -> None:
        node = classes.get(name)
        if node is None:
            return
        for statement in node.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
                for target in map(ast.unparse, statement.targets):
                    flags.setdefault(target, bool(statement.value.value))
        for base in node.bases:
            collect(ast.unparse(base))

    collect(name)
    return flags
