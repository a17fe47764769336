"""Reads ``tiktoken.model``: the byte-level vocabulary of Kimi's models, in folders without ``tokenizer.json``.

A line has a token in base64 and its rank, which is its id. There are no merges: of all neighbours, those that form the
token of the lowest rank are merged first. So any two tokens that form a third are a merge of its rank. How text is
split before that is known from the code in Kimi's repositories, which is the same in all and is not run. The result is
the header of a GGUF file, as for SentencePiece models.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from api.errors import ModelFileError
from api.model.byte_level import spelled
from api.model.folder_tokenizer import add_tokens, content_of, header
from api.model.gguf_file import GGUFFile
from api.model.gguf_tokenizer import TOKEN_NORMAL
from api.model.sentencepiece_merges import implied_merges

FILE_NAME: Final = "tiktoken.model"
_CLASS: Final = "TikTokenTokenizer"
"""``tokenizer_class`` of Kimi's models."""


def read_tiktoken(folder: Path, config: Mapping[str, Any]) -> GGUFFile | None:
    """The tokenizer of a folder, as the header of a GGUF file.

    Args:
        folder: The model's folder.
        config: ``tokenizer_config.json``, which has the special tokens.

    Returns:
        None: there is no such file, or text is split in another way than Kimi's.

    Raises:
        ModelFileError: The file cannot be read, or ``added_tokens_decoder`` does not fit it.
    """
    path = folder / FILE_NAME
    if config.get("tokenizer_class") != _CLASS:
        return None
    content = content_of(path)
    if content is None:
        return None
    tokens = _tokens(path, content)
    merges = [" ".join(pair) for pair in implied_merges(tokens, set(tokens))]
    model: dict[str, Any] = {"tokens": tokens, "token_type": [TOKEN_NORMAL] * len(tokens), "scores": []}
    add_tokens(model, folder, config)
    return header(path, {**model, "model": "gpt2", "pre": "kimi-k2", "merges": merges})


def _tokens(path: Path, content: bytes) -> list[str]:
    """The tokens in the order of their ranks, as a byte-level vocabulary spells them."""
    lines = [line for line in content.splitlines() if line]
    tokens: list[str | None] = [None] * len(lines)
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            place = int(rank)
            if place < 0 or tokens[place] is not None:
                raise ValueError(f"rank {place} is taken")
            tokens[place] = spelled(base64.b64decode(token, validate=True))
        except (ValueError, IndexError) as error:
            raise ModelFileError(path, f"line {number} is not a token and a rank of its own: {error}") from error
    return [token or "" for token in tokens]
