"""Tokenizers from a SentencePiece model give the ids of the same pieces in tokenizer.json."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from api.errors import ModelFileError
from api.model.tokenizer import Tokenizer
from tests.unit.test_tokenizer import TEXTS, sentencepiece, tokens_of, types_of

BPE, UNIGRAM = 2, 1


def varint(number: int) -> bytes:
    head, rest = number & 0x7F, number >> 7
    return bytes([head | 0x80]) + varint(rest) if rest else bytes([head])


def field(number: int, value: int | float | bytes) -> bytes:
    """A field in the wire format of Protocol Buffers."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def model_file(folder: Path, *, prefix: bool = True, algorithm: int = BPE, charsmap: bytes = b"", bos: int = 1) -> Path:
    backend = sentencepiece(prefix=prefix)
    pieces = b""
    for index, (token, kind) in enumerate(zip(tokens_of(backend), types_of(backend), strict=True)):
        kind = 2 if token == "<unk>" else 6 if token.startswith("<0x") else kind
        pieces += field(1, field(1, token.encode()) + field(2, -float(index)) + field(3, kind))
    trainer = field(2, field(3, algorithm) + field(40, 0) + field(41, bos) + field(42, 2) + field(35, 1))
    normalizer = field(3, field(1, b"identity") + field(2, charsmap) + field(3, int(prefix)) + field(4, 0))
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(pieces + trainer + normalizer)
    return path


def settings(folder: Path, **fields: Any) -> None:
    given = {"tokenizer_class": "InternLM3Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**given, **fields}))


@pytest.mark.parametrize("prefix", [True, False])
def test_the_ids_are_those_of_tokenizer_json(tmp_path: Path, prefix: bool) -> None:
    model_file(tmp_path, prefix=prefix)
    settings(tmp_path, bos_token="<s>", eos_token="</s>", chat_template="T")
    tokenizer, backend = Tokenizer.from_folder(tmp_path), sentencepiece(prefix=prefix)
    for text in [*TEXTS, "the hello world", "hello    there", "日 ☃", "x<tool>y"]:
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.chat_template) == (1, (2,), "T")


def test_the_configuration_renames_and_adds_tokens(tmp_path: Path) -> None:
    model_file(tmp_path)
    count = len(tokens_of(sentencepiece()))
    added = {
        "258": {"content": "<|plugin|>", "special": True},
        str(count + 1): {"content": "<|im_end|>", "special": True},
    }
    settings(tmp_path, add_bos_token=False, eos_token="<|im_end|>", added_tokens_decoder=added)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|plugin|><|im_end|>") == [258, count + 1]
    assert tokenizer.eos_token_ids == (count + 1,)
    assert tokenizer.vocab_size == count + 2


@pytest.mark.parametrize("options", [{"algorithm": UNIGRAM}, {"charsmap": b"x"}], ids=["unigram", "normalised"])
def test_other_kinds_are_left_to_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    model_file(tmp_path, **options)
    settings(tmp_path)
    with pytest.raises(
        ModelFileError, match="auto_map in tokenizer_config.json.*, which is never run: add a tokenizer.j"
    ):
        Tokenizer.from_folder(tmp_path)
    settings(tmp_path, auto_map=None, tokenizer_class="LlamaTokenizer")
    with pytest.raises(ModelFileError, match="conversion by transformers failed: ") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_first_token(tmp_path: Path) -> None:
    model_file(tmp_path, bos=(1 << 64) - 1)  # -1
    settings(tmp_path, add_bos_token=False)
    assert Tokenizer.from_folder(tmp_path).encode("the") == sentencepiece().encode("the", add_special_tokens=False).ids


@pytest.mark.parametrize(
    "added",
    [{"x": {"content": "a"}}, {"3": {}}, {"99999999": {"content": "a"}}, {"3": {"content": 1}}, [1], "x"],
    ids=str,
)
def test_damaged_settings_are_named(tmp_path: Path, added: Any) -> None:
    model_file(tmp_path)
    settings(tmp_path, added_tokens_decoder=added)
    with pytest.raises(ModelFileError, match="added_tokens_decoder"):
        Tokenizer.from_folder(tmp_path)


def test_a_damaged_file_is_an_error_of_that_folder(tmp_path: Path) -> None:
    path = model_file(tmp_path)
    settings(tmp_path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], b"\xff" * 100, whole[:-3] + b"\xff\xff\xff", b"IQ== 0\nIg== 1\n"):
        path.write_bytes(content)
        with pytest.raises(ModelFileError):
            Tokenizer.from_folder(tmp_path)
