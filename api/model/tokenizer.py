"""Converts text to token ids and back, with the ``tokenizers`` Rust library.

A tokenizer comes from a model's folder (``tokenizer.json`` and the files around it) or from a GGUF file. A folder
without ``tokenizer.json`` has a SentencePiece model (``sentencepiece_file.py``), Kimi's vocabulary
(``tiktoken_file.py``), or another older form, for which ``transformers`` is imported, which takes seconds.
``tokenizer.json`` is authoritative, including its post-processor: flags such as ``add_bos_token`` in
``tokenizer_config.json`` describe how that file was created, and are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, ParamSpec, TypeAlias, TypeVar

import tokenizers
from tokenizers import AddedToken

from api.errors import ModelFileError
from api.model.byte_level import BYTE_OF_CHAR
from api.model.gguf_file import GGUFFile
from api.model.gguf_tokenizer import convert_gguf_tokenizer
from api.model.sentencepiece_file import FILE_NAME as SENTENCEPIECE_FILE
from api.model.sentencepiece_file import read_sentencepiece
from api.model.tiktoken_file import FILE_NAME as TIKTOKEN_FILE
from api.model.tiktoken_file import read_tiktoken
from api.model.tokenizer_check import check_tokenizer_file
from api.model.tokenizer_trial import try_tokenizer
from engine_core.launch import read_document, read_json, why

P = ParamSpec("P")
T = TypeVar("T")

NAMED_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_TOKENIZER_FILE: Final = "tokenizer.json"
_CONFIG_FILE: Final = "tokenizer_config.json"
_OLDER_VOCABULARIES: Final = ("*.model", "*.spm", "*.tiktoken", "vocab.*", "vocab-*", "tekken.json")
_MAX_MODEL_LENGTH: Final = 1 << 40
"""transformers writes larger values of ``model_max_length`` for "unknown"."""

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
_NFC_SHRINK: Final = 4
"""Composition may merge up to four characters into one."""

# Steps that neither drop text nor merge an unlimited amount of it into one token.
_KEEPING_NORMALIZERS: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"})
_KEEPING_PRE_TOKENIZERS: Final = frozenset(
    {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"}
)


@dataclass(frozen=True)
class TokenDecoding:
    """How single tokens decode to text.

    Attributes:
        kind: ``byte_level``: tokens spell bytes. ``byte_fallback``: tokens are text, except those
            that stand for one byte. ``other``: only the backend can decode them.
        replacements: Texts to replace in every token, with their replacements (``byte_fallback``).
        strip_left: Character to remove from the start of a text, and the maximum number of times.
    """

    kind: Literal["byte_level", "byte_fallback", "other"]
    replacements: tuple[tuple[str, str], ...] = ()
    strip_left: tuple[str, int] = ("", 0)

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> TokenDecoding:
        """Analyses the decoder of a backend."""
        steps = _steps(_state(backend.decoder), "decoders")
        if [step["type"] for step in steps if step["type"] != "Fuse"] == ["ByteLevel"]:
            return cls("byte_level")
        replacements = []
        while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
            step = steps.pop(0)
            replacements.append((step["pattern"]["String"], step["content"]))
        strip_left = ("", 0)
        if steps and steps[-1]["type"] == "Strip" and steps[-1]["stop"] == 0:
            step = steps.pop()
            strip_left = (step["content"], step["start"])
        if [step["type"] for step in steps] == ["ByteFallback", "Fuse"]:
            return cls("byte_fallback", tuple(replacements), strip_left)
        return cls("other")

    def text_or_byte(self, token: str) -> str | int:
        """The text of a token, or the byte it stands for (``byte_fallback`` only)."""
        match = _BYTE_TOKEN.fullmatch(token) if token.startswith("<0x") else None
        if match is not None:
            return int(match[1], 16)
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token


AddedAround: TypeAlias = tuple[int, int]
"""Numbers of tokens that the tokenizer adds before and after those of a text."""
NOTHING_ADDED: Final[AddedAround] = (0, 0)


def kept_tokens(
    count: int, keep: int, side: Literal["left", "right"], around: AddedAround = NOTHING_ADDED
) -> Sequence[int]:
    """Positions of the tokens to keep when a prompt is truncated.

    Args:
        count: Tokens of the prompt.
        keep: Maximum number of tokens to keep.
        side: Side on which tokens are removed.
        around: Tokens that the tokenizer added around the text; they are kept, and the text is truncated.
    """
    if count <= keep:
        return range(count)
    before, after = around
    room = max(0, keep - before - after)
    end = count - after
    own = range(before, before + room) if side == "right" else range(end - room, end)
    return [*range(before), *own, *range(end, count)][:keep]


class Tokenizer:
    """A model's tokenizer, its special tokens and its chat template.

    Attributes:
        backend: The ``tokenizers.Tokenizer`` that does the work.
        decoding: How its tokens turn into text.
        special_tokens_map: ``bos_token``, ``eos_token`` and so on as text, for chat templates.
        bos_token_id: Id of the token that starts a text, if the model has one.
        eos_token_id: Id of the token that ends a text, if the model has one.
        eos_token_ids: All tokens that end the model's output; ``eos_token_id`` comes first.
        all_special_ids: Ids that ``skip_special_tokens`` omits.
        chat_template: Jinja source, or several by name.
        model_max_length: Maximum input length in the tokenizer's configuration, if it has one.
        vocab_size: One more than the largest token id, including added tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens_map: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | dict[str, str] | None = None,
        model_max_length: int | None = None,
        config: Mapping[str, Any] | None = None,
        vocabulary: Mapping[str, int] | None = None,
    ) -> None:
        """Wraps a backend. ``vocabulary``: all its tokens with their ids, if known, since getting them is slow."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.decoding = TokenDecoding.of(backend)
        self.special_tokens_map = dict(special_tokens_map or {})
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        self.config = dict(config or {})
        self.bos_token_id = self._special_token_id("bos_token")
        eos_token_id = self._special_token_id("eos_token")
        found = [] if eos_token_id is None else [eos_token_id]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*found, *eos_token_ids]))
        self.eos_token_id = self.eos_token_ids[0] if self.eos_token_ids else None
        added = backend.get_added_tokens_decoder()
        self.all_special_ids = frozenset(
            token_id for token_id, token in added.items() if self._is_skipped(token_id, token)
        )
        self.added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        vocab = vocabulary or backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        self._longest_token = max(map(len, vocab), default=1)
        self._token_bytes = _TokenBytes(self)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Loads the tokenizer of a model's folder.

        Raises:
            ModelFileError: A file is missing or damaged.
        """
        folder = Path(path)
        config = _read_json(folder / _CONFIG_FILE)
        if not (folder / _TOKENIZER_FILE).is_file():
            for read, name in ((read_sentencepiece, SENTENCEPIECE_FILE), (read_tiktoken, TIKTOKEN_FILE)):
                model = read(folder, config)
                if model is not None:
                    return cls._from_files(folder, config, convert_gguf_tokenizer(model).backend, folder / name)
            return _convert_slow_tokenizer(folder, config)
        try_tokenizer(folder / _TOKENIZER_FILE, check_tokenizer_file(folder / _TOKENIZER_FILE, config))
        try:
            backend = guarded(tokenizers.Tokenizer.from_file, str(folder / _TOKENIZER_FILE))
        except Exception as error:  # the Rust library raises nothing more specific
            raise ModelFileError(folder / _TOKENIZER_FILE, str(error)) from error
        return cls._from_files(folder, config, backend, folder / _TOKENIZER_FILE)

    @classmethod
    def _from_files(
        cls, folder: Path, config: dict[str, Any], backend: tokenizers.Tokenizer, source: Path
    ) -> Tokenizer:
        """A tokenizer with the special tokens and templates of a folder; ``source`` is the file of ``backend``."""
        try:
            more = _read_json(folder / "special_tokens_map.json")
            special_tokens_map = guarded(_add_special_tokens, backend, config, more)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ModelFileError(folder / _CONFIG_FILE, f"special tokens: {error!r}") from error
        eos_token_ids = _generation_eos_token_ids(folder)
        chat_template = _chat_template(folder, config)
        try:
            return cls(
                backend,
                special_tokens_map=special_tokens_map,
                eos_token_ids=eos_token_ids,
                chat_template=chat_template,
                model_max_length=_model_max_length(config.get("model_max_length")),
                config=config,
            )
        except ValueError as error:
            raise ModelFileError(source, str(error)) from error

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes.

        Raises:
            ModelFileError: The file has no tokenizer, or one of an unsupported kind.
        """
        converted = convert_gguf_tokenizer(file)
        return cls(
            converted.backend,
            special_tokens_map=converted.special_tokens_map,
            eos_token_ids=converted.eos_token_ids,
            chat_template=converted.chat_template,
            vocabulary=converted.vocabulary,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: The text contains a lone surrogate, or the tokenizer's patterns fail on it.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, computed in parallel.

        Raises:
            ValueError: As for ``encode``.
        """
        for text in texts:
            _check_unicode(text)
        encodings = guarded(self.backend.encode_batch_fast, list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_pair(
        self, first: str, second: str, max_tokens: int = 0, max_second: int = 0, max_first: int = 0
    ) -> tuple[list[int], int]:
        """Token ids of two texts, with the special tokens that the tokenizer puts around and between them.

        Args:
            first: The first text.
            second: The second.
            max_tokens: Truncate at the right to this many tokens, first the longer text; 0: do not.
            max_second: Before that, truncate the second text to this many tokens; 0: do not.
            max_first: The same for the first text.

        Returns:
            The ids, and the position from which on their type is 1; 0: there is none.

        Raises:
            ValueError: As for ``encode``.
        """
        _check_unicode(first)
        _check_unicode(second)
        (encoding,) = guarded(self.backend.encode_batch, [(first, second)], add_special_tokens=True)
        ids, types, sides = encoding.ids, encoding.type_ids, encoding.sequence_ids
        counts = [sides.count(0), sides.count(1)]
        kept = [min(counts[0], max_first or counts[0]), min(counts[1], max_second or counts[1])]
        room = max_tokens - (len(ids) - sum(counts))
        if max_tokens and sum(kept) > room:
            shorter = min(range(2), key=kept.__getitem__)
            kept[shorter] = min(kept[shorter], max(0, room // 2))
            kept[1 - shorter] = max(0, room - kept[shorter])
        if kept != counts:
            ends = [sides.index(side) + kept[side] if counts[side] else 0 for side in range(2)]
            places = [place for place, side in enumerate(sides) if side is None or place < ends[side]]
            ids, types = [ids[place] for place in places], [types[place] for place in places]
        return ids, types.index(1) if 1 in types else 0

    def offsets(
        self,
        text: str,
        add_special_tokens: bool = True,
        num_tokens: int | None = None,
        truncation_side: Literal["left", "right"] = "left",
    ) -> list[tuple[int, int]]:
        """Begin and end of each token in a text, in characters; (0, 0) for tokens that were added to it.

        Args:
            text: The text.
            add_special_tokens: See ``encode``.
            num_tokens: Maximum number of tokens to return; None: all.
            truncation_side: Side on which the other tokens are omitted.

        Raises:
            ValueError: As for ``encode``.
        """
        _check_unicode(text)
        # Unlike encode, encode_batch releases the GIL.
        (encoding,) = guarded(self.backend.encode_batch, [text], add_special_tokens=add_special_tokens)
        count = len(encoding)
        kept = kept_tokens(
            count, count if num_tokens is None else num_tokens, truncation_side, self.added_around(add_special_tokens)
        )
        # Fetched one by one: encoding.offsets would build the list of all in one long call.
        places = map(encoding.token_to_chars, kept)
        return [place or (0, 0) for place in places]

    def added_around(self, add_special_tokens: bool) -> AddedAround:
        """Numbers of tokens that ``encode`` adds before and after those of a text."""
        return self._added_around if add_special_tokens else NOTHING_ADDED

    @cached_property
    def _added_around(self) -> AddedAround:
        masks = (self.backend.encode(text).special_tokens_mask for text in ("a", "0", "."))
        mask = next((mask for mask in masks if 0 in mask), None)
        return NOTHING_ADDED if mask is None else (mask.index(0), mask[::-1].index(0))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; unknown ids are skipped.

        Raises:
            ValueError: An id is negative or too large for any vocabulary, or the decoder fails.
        """
        try:
            return guarded(self.backend.decode, token_ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise ValueError("a token id is negative or too large") from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text when it is not the first; empty for an unknown id."""
        return self._token_bytes[token_id]

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        if not 0 <= token_id < self.vocab_size:
            return None
        return self.backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        return self.backend.token_to_id(token)

    def to_json(self) -> str:
        """The tokenizer as the content of a ``tokenizer.json``."""
        return self.backend.to_str()

    @cached_property
    def max_chars_per_token(self) -> int | None:
        """Upper bound on the characters of a text that one token can represent; None if there is none.

        A text longer than n times this has more than n tokens, so an overlong prompt can be rejected before
        it is tokenised. A model that drops characters missing from its vocabulary may exceed the bound.
        """
        normalizers = _steps(_state(self.backend.normalizer), "normalizers")
        pre_tokenizers = _steps(_state(self.backend.pre_tokenizer), "pretokenizers")
        shrink = 1
        for step in normalizers:
            if step["type"] == "Replace":
                if len(step["pattern"].get("String", "")) > len(step["content"]) or "String" not in step["pattern"]:
                    return None
            elif step["type"] not in _KEEPING_NORMALIZERS:
                return None
            elif step["type"] in ("NFC", "NFKC"):
                shrink = _NFC_SHRINK
        for step in pre_tokenizers:
            if step["type"] not in _KEEPING_PRE_TOKENIZERS or step.get("behavior") == "Removed":
                return None
        if not isinstance(self.backend.model, tokenizers.models.BPE):
            return None
        model = self.backend.model
        if model.unk_token is not None and model.fuse_unk and not model.byte_fallback:
            return None
        return self._longest_token * shrink

    def _special_token_id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def _is_skipped(self, token_id: int, token: AddedToken) -> bool:
        # A token once added as special stays special for the backend, whatever its entry says later.
        if token.special:
            return True
        return bool(self.decode([token_id], False)) and not self.decode([token_id], True)


class _TokenBytes(dict[int, bytes]):
    """Bytes by token id, filled in on first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._anchor: int | None = None

    def __missing__(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        token = tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # not stored: a caller could pass any number of unknown ids
        if tokenizer.decoding.kind == "byte_level":
            value = byte_level_bytes(token)
        elif tokenizer.decoding.kind == "byte_fallback":
            piece = tokenizer.decoding.text_or_byte(token)
            value = bytes([piece]) if isinstance(piece, int) else piece.encode()
        else:
            value = self._decode_after_another(token_id)
        self[token_id] = value
        return value

    def _decode_after_another(self, token_id: int) -> bytes:
        decode = self._tokenizer.decode
        if self._anchor is None:
            ids = range(self._tokenizer.vocab_size)
            self._anchor = next((i for i in ids if decode([i], False).isalnum()), token_id)
        before = decode([self._anchor], False)
        both = decode([self._anchor, token_id], False)
        return (both[len(before) :] if both.startswith(before) else decode([token_id], False)).encode()


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary spells."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token, which is plain text
        return token.encode()


def guarded(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Calls the Rust library and converts panics, which no ``except Exception`` would catch.

    Raises:
        ValueError: The library panicked, for example because a regular expression took too many steps on a text.
    """
    try:
        return function(*args, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each extension defines its own class, which cannot be imported
            raise
        raise ValueError(f"the tokenizer failed: {error}") from None


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from None


# Components of a backend


def _state(component: Any) -> dict[str, Any]:
    """A component as written in ``tokenizer.json``."""
    if component is None:
        return {"type": "Sequence"}
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def _steps(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The components of a possibly nested sequence."""
    if state["type"] != "Sequence":
        return [state]
    return [step for part in state.get(key, ()) for step in _steps(part, key)]


# The files of a model's folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"cannot be read: {why(error)}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "is not a JSON object")
    return value


def _added_token(value: Any) -> AddedToken:
    """Converts an entry of ``tokenizer_config.json``: plain text, or an object with flags."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    flags = {name: bool(value[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(str(value["content"]), special=bool(value.get("special", True)), **flags)


def _add_special_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens_file: dict[str, Any]
) -> dict[str, str]:
    """Adds the configured tokens to the backend, and returns the named ones as text."""
    configured: dict[str, Any] = config.get("added_tokens_decoder") or {}
    settings = config if configured else {**config, **special_tokens_file}
    known = backend.get_added_tokens_decoder()
    tokens = [_added_token(value) for _, value in sorted(configured.items(), key=lambda item: int(item[0]))]
    backend.add_tokens([token for token in tokens if token not in known.values()])

    named: dict[str, Any] = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and value and isinstance(value, (str, dict))
    }
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named.update(extra)
        extra = []
    by_content = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    specials = []
    for value in named.values():
        token = _added_token(value)
        token = by_content.get(token.content, token)
        if token.content not in by_content or not token.special:
            token.special = True
            specials.append(token)
    specials += [token for value in extra if (token := _added_token(value)).content not in by_content]
    backend.add_special_tokens(specials)
    return {name: value if isinstance(value, str) else value["content"] for name, value in named.items()}


def _generation_eos_token_ids(folder: Path) -> list[int]:
    """EOS tokens of the generation configuration: a chat model may have more than its tokenizer names."""
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        text_config = config.get("text_config")
        nested = text_config.get("eos_token_id") if isinstance(text_config, dict) else None
        value = config.get("eos_token_id", nested)
        ids = value if isinstance(value, list) else [value]
        found = [item for item in ids if isinstance(item, int) and 0 <= item < 1 << 31]
        if found:
            return found
    return []


def read_chat_template(folder: Path) -> str | dict[str, str] | None:
    """The chat template of a model's folder, or several by name.

    Raises:
        ModelFileError: A file cannot be read.
    """
    return _chat_template(folder, _read_json(folder / _CONFIG_FILE))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template. Separate files take precedence over the entry in the configuration."""
    found: dict[str, str] = {}
    try:
        if (folder / "chat_template.jinja").is_file():
            found["default"] = read_document(folder / "chat_template.jinja").decode()
        for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[file.stem] = read_document(file).decode()
    except (OSError, ValueError) as error:
        raise ModelFileError(folder, f"chat template cannot be read: {why(error)}") from error
    if not found:
        entry = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
        if isinstance(entry, str):
            return entry
        if isinstance(entry, list):
            entry = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        if isinstance(entry, dict):
            found = {str(name): source for name, source in entry.items() if isinstance(source, str)}
    return found["default"] if set(found) == {"default"} else found or None


def _model_max_length(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and 0 < value < _MAX_MODEL_LENGTH else None


def _why_not_converted(error: Exception, config: Mapping[str, Any]) -> str:
    """What became of a conversion, and what helps, in one line."""
    if config.get("auto_map"):
        return (
            "the tokenizer needs Python code from the model's repository (auto_map in tokenizer_config.json), which is "
            f"never run: add a {_TOKENIZER_FILE}, choose another tokenizer with --tokenizer, or serve a GGUF version"
        )
    reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    return f"conversion by transformers failed: {reason}"


def _convert_slow_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Converts an older kind of tokenizer with transformers. The model's own code is never run."""
    if not folder.is_dir():
        raise ModelFileError(folder, "no such folder")
    if not any(next(folder.glob(pattern), None) for pattern in _OLDER_VOCABULARIES):
        # transformers would make up a tokenizer with an empty vocabulary.
        raise ModelFileError(folder, f"no {_TOKENIZER_FILE} and no vocabulary in an older format")
    for file in folder.iterdir():  # transformers opens them by name
        if not file.is_file() and not file.is_dir():
            raise ModelFileError(file, "not a regular file")
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the model's files may cause any error
        raise ModelFileError(folder, f"no {_TOKENIZER_FILE}, and {_why_not_converted(error, config)}") from error
    if not isinstance(slow, PreTrainedTokenizerFast):
        raise ModelFileError(folder, f"no {_TOKENIZER_FILE}, and {type(slow).__name__} has no fast equivalent")
    return Tokenizer(
        slow.backend_tokenizer,
        special_tokens_map={k: v for k, v in slow.special_tokens_map.items() if isinstance(v, str)},
        eos_token_ids=_generation_eos_token_ids(folder),
        chat_template=_chat_template(folder, config),
        model_max_length=_model_max_length(slow.model_max_length),
        config=config,
    )
