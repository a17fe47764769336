"""Tokenizers that are made to do harm."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from api.errors import ModelFileError
from api.model import tokenizer_trial
from api.model.tokenizer import Tokenizer

VOCAB = {chr(code): index for index, code in enumerate(range(32, 127))}
CATASTROPHIC = "(a+)+$"
TRAP = "a" * 40 + "b"


def write(folder: Path, edit: Callable[[dict[str, Any]], None] = lambda _: None, **parts: Any) -> Path:
    """A folder with a tokenizer of single characters."""
    backend = tokenizers.Tokenizer(models.BPE(VOCAB, []))
    for name, part in parts.items():
        setattr(backend, name, part)
    content = json.loads(backend.to_str())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_folder(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("old", ["a", Regex("a"), "", Regex("")])
@pytest.mark.parametrize("place", ["normalizer", "decoder"])
def test_steps_that_multiply(tmp_path: Path, old: Any, place: str) -> None:
    """An added token of some characters took gigabytes when it was normalized, and so would any prompt."""
    make = normalizers if place == "normalizer" else decoders
    steps = make.Sequence([make.Replace(old, "aaaa") for _ in range(16)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = write(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content[place] = json.loads(steps.__getstate__())
    content["added_tokens"] = [
        {"id": 95, "content": "aaaa", "special": False, "normalized": True, "single_word": False,
         "lstrip": False, "rstrip": False},
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "times as long" in refusal(folder) and place in refusal(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_a_prompt_is_not_copied_any_number_of_times(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        piece = {"Sequence": {"id": "A", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": [piece] * 1000, "pair": [piece], "special_tokens": {},
        }  # fmt: skip

    assert "post_processor may make a prompt 1e+03 times as long" in refusal(write(tmp_path, edit))


def test_long_added_tokens(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        flags = {"special": False, "normalized": True, "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"] = [{"id": 95, "content": "a" * (3 << 20), **flags}]

    folder = write(tmp_path, edit, normalizer=normalizers.Replace("a", "b" * 100))
    assert "added tokens may exceed 256 MiB" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"normalizer": 7}', b'{"added_tokens": [1]}', b"[]", b"", b'{"model": NaN}',
                b'{"normalizer": {"type": "Replace", "pattern": {"String": "a"}}}']
)  # fmt: skip
def test_what_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (write(tmp_path) / "tokenizer.json").write_bytes(content)
    assert refusal(tmp_path).startswith(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])},
        {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
        {"normalizer": normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.Replace(Regex(" +"), " ")])},
        {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()},
        {"normalizer": normalizers.NFC(), "pre_tokenizer": pre_tokenizers.ByteLevel(), "decoder": decoders.ByteLevel()},
    ],
)  # fmt: skip
def test_what_real_ones_do_is_accepted(tmp_path: Path, parts: dict[str, Any]) -> None:
    assert Tokenizer.from_folder(write(tmp_path, **parts)).encode("a") != []


def test_a_pattern_that_gives_up_is_an_error_of_the_text() -> None:
    """The library panics: an exception that is no Exception, which ended the thread that met it."""
    backend = tokenizers.Tokenizer(models.BPE(VOCAB, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(CATASTROPHIC), "isolated")
    tokenizer = Tokenizer(backend)
    for call in (tokenizer.encode, tokenizer.offsets):
        with pytest.raises(ValueError, match="the tokenizer failed: .*retry-limit"):
            call(TRAP)
    assert tokenizer.encode("aaa")


@pytest.mark.parametrize("pattern", [CATASTROPHIC, "([A-Z]+)+$", "a*a*a*a*a*$"])
def test_unknown_patterns_are_tried(tmp_path: Path, pattern: str) -> None:
    """In a process that may die of them; what this one would need is seen there."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    message = refusal(write(tmp_path, pre_tokenizer=split))
    assert message.startswith(str(tmp_path / "tokenizer.json"))
    assert "are too slow" in message or "retry-limit" in message


def test_harmless_patterns_pass_and_known_ones_need_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = pre_tokenizers.Split(Regex("[xyz]+|[0-9]{1,2}"), "isolated")
    assert Tokenizer.from_folder(write(tmp_path, pre_tokenizer=harmless)).encode("xa12")
    monkeypatch.setattr(tokenizer_trial, "Helper", None)  # none may be started
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert Tokenizer.from_folder(write(tmp_path, pre_tokenizer=pre_tokenizers.Split(Regex(words), "isolated")))


def test_a_pattern_that_gives_up_while_the_file_is_loaded(tmp_path: Path) -> None:
    """Added tokens are normalized when the file is loaded."""
    folder = write(tmp_path, normalizer=normalizers.Replace(Regex("(ß+)+$"), "a"))

    def add(config: dict[str, Any]) -> None:
        flags = {"special": False, "normalized": True, "single_word": False, "lstrip": False, "rstrip": False}
        config["added_tokens_decoder"] = {"95": {"content": TRAP.replace("a", "ß"), **flags}}

    config = json.loads((folder / "tokenizer_config.json").read_text())
    add(config)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "the tokenizer failed" in refusal(folder)
