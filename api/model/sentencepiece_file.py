"""Reads ``tokenizer.model``: a SentencePiece model, for folders without ``tokenizer.json``.

The result is what llama.cpp's converter writes into a GGUF file, whose numbers for the kinds of pieces are
SentencePiece's. Only byte-pair encoding without text normalisation is read: the tokenizers of Llama 2 and of the models
that took over its form (Yi, InternLM, Mistral, Gemma).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from api.model.folder_tokenizer import add_tokens, content_of, header
from api.model.gguf_file import GGUFFile
from api.model.gguf_tokenizer import TOKEN_NORMAL

FILE_NAME: Final = "tokenizer.model"

_Value = int | float | bytes

# Fields of sentencepiece_model.proto: of ModelProto, of its parts, and the algorithm.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _UNK_ID, _BOS_ID, _EOS_ID = 3, 40, 41, 42
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4
_BPE = 2


def read_sentencepiece(folder: Path, config: Mapping[str, Any]) -> GGUFFile | None:
    """The tokenizer of a folder, as the header of a GGUF file.

    Args:
        folder: The model's folder.
        config: ``tokenizer_config.json``, which may rename and add tokens.

    Returns:
        None: there is no such file, or it is of another kind.

    Raises:
        ModelFileError: The file cannot be read, or ``added_tokens_decoder`` does not fit it.
    """
    path = folder / FILE_NAME
    content = content_of(path)
    if content is None:
        return None
    try:
        model = _model(content)
    except (ValueError, TypeError, struct.error):
        return None  # other tokenizers have files of this name, too
    if model is None:
        return None
    add_tokens(model, folder, config)
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(config.get(name), bool):
            model[name] = config[name]
    return header(path, model)


def _model(content: bytes) -> dict[str, Any] | None:
    """The fields of a model; None: not BPE, or with rules that change text. Raises ValueError if it is no model."""
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    parts: dict[int, dict[int, _Value]] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, value in _fields(content):
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is not a message")
        if number == _PIECES:
            piece = dict(_fields(value))
            tokens.append(_bytes(piece[_PIECE]).decode() if _PIECE in piece else "")
            scores.append(float(_number(piece.get(_SCORE, 0.0))))
            types.append(int(_number(piece.get(_TYPE, TOKEN_NORMAL))))
        elif number in parts:
            parts[number].update(_fields(value))
    trainer, normalizer = parts[_TRAINER], parts[_NORMALIZER]
    if not tokens or not trainer:
        raise ValueError("no pieces")
    changes_text = normalizer.get(_CHARSMAP) or normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1)
    if trainer.get(_MODEL_TYPE) != _BPE or changes_text:
        return None
    named = {
        "unknown_token_id": trainer.get(_UNK_ID, 0),
        "bos_token_id": trainer.get(_BOS_ID, 1),
        "eos_token_id": trainer.get(_EOS_ID, 2),
    }
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        **{name: value for name, value in named.items() if _number(value) < len(tokens)},  # -1: none
        "add_space_prefix": bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)),
    }


def _fields(message: bytes) -> Iterator[tuple[int, _Value]]:
    """The fields of a message in the wire format of Protocol Buffers. Raises ValueError if it is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
        elif kind == 2:
            size, at = _varint(message, at)
            yield number, _cut(message, at, size)
            at += size
        elif kind == 5:
            yield number, struct.unpack("<f", _cut(message, at, 4))[0]
            at += 4
        elif kind == 1:
            yield number, struct.unpack("<d", _cut(message, at, 8))[0]
            at += 8
        else:
            raise ValueError(f"type {kind} of field {number}")


def _cut(message: bytes, at: int, size: int) -> bytes:
    if at + size > len(message):
        raise ValueError("truncated")
    return message[at : at + size]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at an offset, and the offset of what follows it."""
    result = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("truncated")


def _bytes(value: _Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("not a string")
    return value


def _number(value: _Value) -> int | float:
    if isinstance(value, bytes):
        raise ValueError("not a number")
    return value
