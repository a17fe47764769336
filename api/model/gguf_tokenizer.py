"""Builds a ``tokenizers`` backend from the tokenizer arrays of a GGUF file.

A GGUF file stores the vocabulary, but only the names of the rules around it: ``tokenizer.ggml.model``
names the algorithm, and ``tokenizer.ggml.pre`` the way text is split before byte-pair merging. The tables
below hold the rules of each model's own ``tokenizer.json``, so that text gets the token ids the model was
trained with. They cover only models that can be loaded: to support a model whose files name another
``pre``, add a line to ``_PRE_RULES``, or a builder for another kind of tokenizer.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from api.errors import ModelFileError
from api.model.gguf_file import GGUFFile
from api.model.sentencepiece_merges import implied_merges

logger = logging.getLogger(__name__)

TOKEN_NORMAL: Final = 1
TOKEN_UNKNOWN: Final = 2
TOKEN_CONTROL: Final = 3
TOKEN_USER_DEFINED: Final = 4

SPACE: Final = "\u2581"
"""SentencePiece's mark for a space."""

_SPECIAL_TOKEN_KEYS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the format's own spelling
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}

_END_OF_TURN_KEYS: Final = ("eot_token_id", "eom_token_id")
_END_OF_TURN_TOKENS: Final = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
    }
)
"""Control tokens that end a turn. A file names one EOS token, but a chat model may have several."""


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a GGUF file says about its tokenizer."""

    backend: tokenizers.Tokenizer
    vocabulary: dict[str, int]
    """All tokens, added ones included, and their ids."""
    special_tokens_map: dict[str, str]
    eos_token_ids: tuple[int, ...]
    chat_template: str | dict[str, str] | None


# How text is split before the merges of byte-level BPE.

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, letters: str = r"\p{L}") -> str:
    letter = letters if letters == r"\p{L}" else f"[{letters}]"
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, end: str = "", among: str = "]", after: str = r"\r\n/") -> str:
    """``among`` ends the classes of letters, ``after`` is what may follow other characters."""
    upper, lower = f"{_UPPER[:-1]}{among}", f"{_LOWER[:-1]}{among}"
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[{after}]*|{_SPACES}"
    )


@dataclass(frozen=True)
class PreRule:
    """``splits`` apply in order, then GPT-2's own split if ``gpt2`` is set, then bytes are mapped to characters."""

    splits: tuple[str | pre_tokenizers.PreTokenizer, ...] = ()
    gpt2: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(split), behavior="isolated") if isinstance(split, str) else split
            for split in self.splits
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2))
        return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


_SINGLE_DIGITS: Final = pre_tokenizers.Digits(individual_digits=True)
_GPT2: Final = PreRule(gpt2=True)
_DIGITS_GPT2: Final = PreRule((_SINGLE_DIGITS,), gpt2=True)
_LLAMA3: Final = PreRule((_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_LLAMA3_MERGES: Final = PreRule((_words(r"\p{N}{1,3}"),))
_QWEN2: Final = PreRule((_words(r"\p{N}"),), nfc=True)
_QWEN35: Final = PreRule((_words(r"\p{N}", r"\p{L}\p{M}"),), nfc=True)
_STABLELM2: Final = PreRule((_words(r"\p{N}"),))
_TEKKEN: Final = PreRule((_cased_words(r"\p{N}"),), ignore_merges=True, add_bos=True)
_GPT4O: Final = PreRule((_cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))
_FALCON: Final = PreRule(
    (
        r"[\p{P}\$\+<=>\^~\|`]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"[0-9][0-9][0-9]",
    )
)
_DEEPSEEK_LLM: Final = PreRule(
    (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{1D400}-\x{1D7FF}]]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        r"[一-龥ࠀ-一가-퟿]+",
        _SINGLE_DIGITS,
    )
)
_DEEPSEEK_V3: Final = PreRule(
    (
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        rf"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    )
)
_KIMI: Final = PreRule(
    (r"\p{Han}+|" + _cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?", r"&&[^\p{Han}]]", r"\r\n"),), ignore_merges=True
)
_DEEPSEEK_CODER: Final = PreRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _SINGLE_DIGITS))
_VIKING: Final = PreRule((r" ?[^(\s|.,!?…。，、।۔،)]+", _SINGLE_DIGITS))
_SEED_CODER: Final = PreRule(
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)
)

_PRE_RULES: Final[dict[str, PreRule]] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "exaone4": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "trillion": _GPT2,
    "granite-docling": _GPT2,
    "gigachat": _GPT2,
    "a.x-4.0": _GPT2,
    "mellum": _GPT2,
    "command-r": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "smollm": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon": _FALCON,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "lfm2": _LLAMA3,
    "pixtral": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "chatglm-bpe": _LLAMA3_MERGES,
    "dbrx": _LLAMA3_MERGES,
    "glm4": _LLAMA3_MERGES,
    "smaug-bpe": _LLAMA3_MERGES,
    "qwen2": _QWEN2,
    "qwen35": _QWEN35,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "stablelm2": _STABLELM2,
    "kormo": _QWEN2,
    "f2llmv2": _QWEN2,
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "kanana2": _GPT4O,
    "minimax-m2": _GPT4O,
    "tekken": _TEKKEN,
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-v3": _DEEPSEEK_V3,
    "joyai-llm": _DEEPSEEK_V3,
    "kimi-k2": _KIMI,
    "deepseek-coder": _DEEPSEEK_CODER,
    "viking": _VIKING,
    "seed-coder": _SEED_CODER,
}
"""Rules of models whose architecture can be loaded."""


def convert_gguf_tokenizer(file: GGUFFile) -> GGUFTokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Raises:
        ModelFileError: The file has no tokenizer, one of an unsupported kind, or damaged arrays.
    """
    fields = _Fields(file)
    model = fields.text("model")
    if not model:
        raise ModelFileError(file.path, "tokenizer.ggml.model is missing: the file has no tokenizer")
    build = _BUILDERS.get(model)
    if build is None:
        raise ModelFileError(
            file.path, f"tokenizer.ggml.model {model!r} is not supported; expected one of {', '.join(_BUILDERS)}"
        )
    vocabulary = _Vocabulary.read(fields)
    special = {name: fields.token_id(key, len(vocabulary.tokens)) for name, key in _SPECIAL_TOKEN_KEYS.items()}
    special_ids = {name: token_id for name, token_id in special.items() if token_id is not None}
    try:
        with _no_garbage_collection():
            backend = build(fields, vocabulary, special_ids)
        vocabulary.add_to(backend)
        _add_post_processor(backend, fields, vocabulary, special_ids)
    except ModelFileError:
        raise
    except Exception as error:  # the Rust library raises nothing more specific
        raise ModelFileError(file.path, f"inconsistent tokenizer arrays: {error}") from error
    return GGUFTokenizer(
        backend=backend,
        vocabulary=vocabulary.ids,
        special_tokens_map={name: vocabulary.tokens[token_id] for name, token_id in special_ids.items()},
        eos_token_ids=_eos_token_ids(fields, vocabulary, special_ids),
        chat_template=gguf_chat_template(file),
    )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While hundreds of thousands of pairs are created, none of which is garbage, collections take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Fields:
    """Typed access to the ``tokenizer.ggml.*`` keys."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self._metadata = file.metadata

    def fail(self, key: str, detail: str) -> ModelFileError:
        return ModelFileError(self.path, f"tokenizer.ggml.{key}: {detail}")

    def text(self, key: str) -> str:
        value = self._metadata.get(f"tokenizer.ggml.{key}", "")
        if not isinstance(value, str):
            raise self.fail(key, "is not a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, (bool, int)):
            raise self.fail(key, "is not a boolean")
        return bool(value)

    def array(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        values = self._metadata.get(f"tokenizer.ggml.{key}", [])
        # All items of a GGUF array have one type, so checking the first is enough.
        if not isinstance(values, list) or (values and not isinstance(values[0], kind)):
            raise self.fail(key, "has values of the wrong type")
        return values

    def token_id(self, key: str, num_tokens: int) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < num_tokens:
            logger.warning(
                "%s: tokenizer.ggml.%s is %r, not one of %d tokens; ignored", self.path, key, value, num_tokens
            )
            return None
        return value


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    ids: dict[str, int]
    types: list[int]

    @classmethod
    def read(cls, fields: _Fields) -> _Vocabulary:
        tokens: list[str] = fields.array("tokens", str)
        if not tokens:
            raise fields.fail("tokens", "is missing or empty")
        types: list[int] = fields.array("token_type", int) or [TOKEN_NORMAL] * len(tokens)
        if len(types) < len(tokens):
            raise fields.fail("token_type", f"has {len(types)} items for {len(tokens)} tokens")
        if "" in tokens:
            tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
            raise fields.fail("tokens", f"duplicate {twice[:40]!r}")
        return cls(tokens, ids, types)

    def of_type(self, token_type: int) -> Iterable[str]:
        return (token for token, kind in zip(self.tokens, self.types, strict=False) if kind == token_type)

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Adds control tokens and the unknown one as special tokens, and user-defined tokens so that they are matched
        whole in text."""
        special = [*self.of_type(TOKEN_CONTROL), *self.of_type(TOKEN_UNKNOWN)]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        backend.add_tokens([AddedToken(token, normalized=False) for token in self.of_type(TOKEN_USER_DEFINED)])


_SpecialIds = dict[str, int]


def _byte_level_bpe(fields: _Fields, vocabulary: _Vocabulary, special_ids: _SpecialIds) -> tokenizers.Tokenizer:
    pre = fields.text("pre")
    rule = _PRE_RULES.get(pre)
    if rule is None:
        logger.warning("%s: unknown pre-tokenizer %r; splitting text as for GPT-2", fields.path, pre)
        rule = _GPT2
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=_merges(fields), ignore_merges=rule.ignore_merges)
    )
    normalizer = rule.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = rule.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(fields: _Fields, vocabulary: _Vocabulary, special_ids: _SpecialIds) -> tokenizers.Tokenizer:
    special_ids.setdefault("unk_token", 0)
    for name, default in (("bos_token", 1), ("eos_token", 2)):
        if default < len(vocabulary.tokens):
            special_ids.setdefault(name, default)
    merges = _merges(fields) or _sentencepiece_merges(fields, vocabulary)
    return _space_marked_bpe(vocabulary, merges, special_ids, add_space_prefix=fields.flag("add_space_prefix", True))


def _gemma4_bpe(fields: _Fields, vocabulary: _Vocabulary, special_ids: _SpecialIds) -> tokenizers.Tokenizer:
    add_space_prefix = fields.flag("add_space_prefix", False)
    return _space_marked_bpe(vocabulary, _merges(fields), special_ids, add_space_prefix=add_space_prefix)


def _space_marked_bpe(
    vocabulary: _Vocabulary, merges: list[tuple[str, str]], special_ids: _SpecialIds, *, add_space_prefix: bool
) -> tokenizers.Tokenizer:
    unk_id = special_ids.get("unk_token")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges,
            unk_token=None if unk_id is None else vocabulary.tokens[unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_marks = normalizers.Replace(" ", SPACE)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_marks])
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        backend.normalizer = to_marks
    backend.decoder = decoders.Sequence(steps)
    return backend


_BUILDERS: Final[dict[str, Callable[[_Fields, _Vocabulary, _SpecialIds], tokenizers.Tokenizer]]] = {
    "gemma4": _gemma4_bpe,
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece_bpe,
}


def _merges(fields: _Fields) -> list[tuple[str, str]]:
    lines: list[str] = fields.array("merges", str)
    pairs: list[tuple[str, str]] = []
    for index, line in enumerate(lines):
        # Search from the second character: the left half of a merge may itself be a space.
        cut = line.find(" ", 1)
        if cut < 0:
            raise fields.fail("merges", f"item {index} is not a pair: {line[:40]!r}")
        pairs.append((line[:cut], line[cut + 1 :]))
    return pairs


def _scores(fields: _Fields, vocabulary: _Vocabulary) -> list[float]:
    scores: list[float] = fields.array("scores", (int, float))
    if len(scores) < len(vocabulary.tokens):
        raise fields.fail("scores", f"has {len(scores)} items for {len(vocabulary.tokens)} tokens")
    return scores[: len(vocabulary.tokens)]


def _sentencepiece_merges(fields: _Fields, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply: two pieces merge if they form a piece, highest scores first."""
    ids = vocabulary.ids
    pieces = [index for index, kind in enumerate(vocabulary.types[: len(ids)]) if kind == TOKEN_NORMAL]
    scores = _scores(fields, vocabulary)
    pieces.sort(key=lambda index: -scores[index])
    return implied_merges(map(vocabulary.tokens.__getitem__, pieces), ids)


def _add_post_processor(
    backend: tokenizers.Tokenizer, fields: _Fields, vocabulary: _Vocabulary, special_ids: _SpecialIds
) -> None:
    model = fields.text("model")
    rule = _PRE_RULES.get(fields.text("pre"), _GPT2)
    add_bos = fields.flag("add_bos_token", model == "llama" or rule.add_bos)
    add_eos, add_sep = fields.flag("add_eos_token", False), fields.flag("add_sep_token", False)
    first = special_ids.get("bos_token")
    last = special_ids.get("eos_token") if add_eos else special_ids.get("sep_token") if add_sep else None
    parts = ["$A"]
    special_tokens: dict[str, int] = {}
    if add_bos and first is not None:
        parts.insert(0, vocabulary.tokens[first])
        special_tokens[vocabulary.tokens[first]] = first
    if last is not None:
        parts.append(vocabulary.tokens[last])
        special_tokens[vocabulary.tokens[last]] = last
    if special_tokens:
        backend.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=list(special_tokens.items())
        )


def _eos_token_ids(fields: _Fields, vocabulary: _Vocabulary, special_ids: _SpecialIds) -> tuple[int, ...]:
    found = [special_ids[name] for name in ("eos_token",) if name in special_ids]
    found += [i for key in _END_OF_TURN_KEYS if (i := fields.token_id(key, len(vocabulary.tokens))) is not None]
    control = set(vocabulary.of_type(TOKEN_CONTROL)) & _END_OF_TURN_TOKENS
    if {"<|return|>", "<|call|>"} <= control:
        control.discard("<|end|>")  # in this format it ends a message, not the turn
    found += sorted(vocabulary.ids[token] for token in control)
    return tuple(dict.fromkeys(found))


def gguf_chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    """The chat template of a GGUF file, or several by name."""
    metadata = file.metadata
    key = "tokenizer.chat_template"
    default = metadata.get(key)
    names: Sequence[Any] = metadata.get("tokenizer.chat_templates") or ()
    templates = {str(name): metadata.get(f"{key}.{name}") for name in names}
    found = {name: template for name, template in templates.items() if isinstance(template, str)}
    if isinstance(default, str):
        return {"default": default, **found} if found else default
    return found or None
