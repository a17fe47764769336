"""Kimi's tokenizers: the ids that its ranks define, split as its own code splits."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from api.errors import ModelFileError
from api.model.byte_level import BYTE_OF_CHAR
from api.model.gguf_tokenizer import _PRE_RULES
from api.model.tokenizer import Tokenizer
from tests.unit.test_tokenizer import TEXTS, byte_level

CHINESE = "我们Kimi在ABC想2026年's Don'T!!\r\n  ok/"
SPECIAL = {"content": "<|im_end|>", "special": True}


def some_tokens() -> list[bytes]:
    """All bytes, tokens that merges form, and some that none of two tokens form."""
    vocabulary = sorted(byte_level().get_vocab().items(), key=lambda item: item[1])
    trained = [bytes(map(BYTE_OF_CHAR.__getitem__, token)) for token, _ in vocabulary if token[0] != "<"]
    trained.append(b"<")
    return [*trained, "我们".encode(), b"aa", b"aaa", b" dog's"]


def write(folder: Path, tokens: Sequence[bytes], **settings: Any) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    fields = {"tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_kimi.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, **settings}))
    return folder


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The neighbours that form the token of the lowest rank become one, until no more do; a whole token stays one."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(pairwise(parts))]
        lowest, at = min(pairs, default=(len(ranks), 0))
        if lowest == len(ranks):
            return [ranks[part] for part in parts]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_the_ids_are_those_of_the_ranks(tmp_path: Path) -> None:
    tokens = some_tokens()
    count = len(tokens)
    added = {str(count + 2): SPECIAL, str(count): {"content": "[BOS]", "special": True}}
    settings = {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "chat_template": "T", "added_tokens_decoder": added}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokens, **settings))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    split = _PRE_RULES["kimi-k2"].pre_tokenizer()
    for text in [*TEXTS, CHINESE, "aaaa aaaaaaa the dog's"]:
        pieces = [text[begin:end] for _, (begin, end) in split.pre_tokenize_str(text)]
        expected = [number for piece in pieces for number in merged(piece.encode(), ranks)]
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("[BOS]a<|im_end|>") == [count, ranks[b"a"], count + 2]
    assert (tokenizer.eos_token_ids, tokenizer.vocab_size, tokenizer.chat_template) == ((count + 2,), count + 3, "T")


def test_chinese_is_split_from_other_letters() -> None:
    spans = [span for _, span in _PRE_RULES["kimi-k2"].pre_tokenizer().pre_tokenize_str(CHINESE)]
    assert [CHINESE[begin:end] for begin, end in spans] == [
        *("我们", "Kimi", "在", "ABC", "想", "202", "6", "年", "'s", " Don'T", "!!\r\n", " ", " ok", "/"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"YQ== 0\nYg==\n", "line 2 is not a token and a rank of its own"),
        (b"YQ== 0\nYg== 0\n", "line 2 .*rank 0 is taken"),
        (b"YQ== 1\n", "line 1"),
        (b"YQ= 0\n", "line 1"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, expected: str) -> None:
    folder = write(tmp_path, [])
    (folder / "tiktoken.model").write_bytes(content)
    with pytest.raises(ModelFileError, match=expected):
        Tokenizer.from_folder(folder)
    write(tmp_path, [b"a"], added_tokens_decoder={"5": {"content": None}})
    with pytest.raises(ModelFileError, match="added_tokens_decoder"):
        Tokenizer.from_folder(folder)
