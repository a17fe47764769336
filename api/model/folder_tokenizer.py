"""Tokenizers of folders without ``tokenizer.json``, as headers of GGUF files, which are converted like others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from api.errors import ModelFileError
from api.model.gguf_file import GGUFFile
from api.model.gguf_tokenizer import TOKEN_CONTROL, TOKEN_USER_DEFINED
from engine_core.launch import read_document, why

MAX_ADDED: Final = 1 << 16
"""More tokens than this beyond the file's are a mistake."""


def content_of(path: Path) -> bytes | None:
    """The content of a tokenizer's file; None: there is none.

    Raises:
        ModelFileError: It cannot be read.
    """
    try:
        return read_document(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelFileError(path, why(error) if isinstance(error, OSError) else str(error)) from error


def add_tokens(model: dict[str, Any], folder: Path, config: Mapping[str, Any]) -> None:
    """Renames tokens, and adds others after the last.

    Args:
        model: ``tokens``, ``token_type`` and ``scores``, which change.
        folder: The model's folder.
        config: Its ``tokenizer_config.json``, of which ``added_tokens_decoder`` says what to add.

    Raises:
        ModelFileError: The tokens do not fit those that there are.
    """
    try:
        _add(model, config.get("added_tokens_decoder") or {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(folder / "tokenizer_config.json", f"added_tokens_decoder: {error!r}") from error


def _add(model: dict[str, Any], added: Mapping[str, Mapping[str, Any]]) -> None:
    tokens, types, scores = model["tokens"], model["token_type"], model["scores"]
    for token_id, token in sorted((int(key), value) for key, value in added.items()):
        if not 0 <= token_id < len(tokens) + MAX_ADDED or not isinstance(token["content"], str):
            raise ValueError(f"token {token_id} does not follow {len(tokens)} tokens")
        while len(tokens) <= token_id:
            tokens.append("")
            types.append(TOKEN_CONTROL)
            scores.append(0.0)
        tokens[token_id] = token["content"]
        types[token_id] = TOKEN_CONTROL if token.get("special") else TOKEN_USER_DEFINED


def header(path: Path, model: Mapping[str, Any]) -> GGUFFile:
    """The header of a GGUF file with fields of a tokenizer that comes from another file."""
    metadata = {f"tokenizer.ggml.{name}": value for name, value in model.items()}
    return GGUFFile(path=str(path), metadata=metadata, tensors=[])
