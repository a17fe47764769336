"""Late interaction (ColBERT, Khattab and Zaharia, arXiv:2004.12832): a text has a vector for each of its tokens, and a
document's score is the sum, over the query's vectors, of their largest product with one of its own.

What is read: PyLate's fields of ``config_sentence_transformers.json``, or ``artifact.metadata`` of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from api.model.tokenizer import Tokenizer, kept_tokens

F32 = npt.NDArray[np.float32]
Side = Literal["left", "right"]

QUERY_LENGTH, DOCUMENT_LENGTH = 32, 180
"""Tokens of a text, unless the files say so: the defaults of both programs."""
MAX_LENGTH = 1 << 20
MAX_WORDS = 4096
PUNCTUATION = tuple("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@dataclass(frozen=True)
class LateInteraction:
    """How texts become prompts, and which of their tokens have vectors."""

    query_prefix: str = "[Q] "
    """A token that follows the first one of a query."""
    document_prefix: str = "[D] "
    query_length: int = QUERY_LENGTH
    """Tokens of a query; longer ones are truncated."""
    document_length: int = DOCUMENT_LENGTH
    expands_queries: bool = True
    """Fill queries up with mask tokens, which have vectors like others."""
    attends_to_expansion: bool = False
    """Whether other tokens attend to these."""
    skipped_words: tuple[str, ...] = PUNCTUATION
    """Tokens of documents without vectors."""

    def query(self, tokenizer: Tokenizer, text: str, max_tokens: int = 0, side: Side = "right") -> LatePrompt:
        """The prompt of a query.

        Args:
            tokenizer: The model's.
            text: The query.
            max_tokens: Truncate it to this many tokens; 0: as the files say.
            side: Where to.

        Raises:
            ValueError: As for ``Tokenizer.encode``.
        """
        length = max_tokens or self.query_length
        ids = self._encode(tokenizer, text, self.query_prefix, length, side)
        count, mask = len(ids), tokenizer.special_tokens_map.get("mask_token")
        mask_id = None if mask is None else tokenizer.token_to_id(mask)
        added = min(length, self.query_length) - count
        if not self.expands_queries or mask_id is None or added <= 0:
            return LatePrompt(ids, 0, None)
        return LatePrompt([*ids, *[mask_id] * added], 0 if self.attends_to_expansion else count, None)

    def document(self, tokenizer: Tokenizer, text: str, max_tokens: int = 0, side: Side = "right") -> LatePrompt:
        """The prompt of a document. See ``query``."""
        ids = self._encode(tokenizer, text, self.document_prefix, max_tokens or self.document_length, side)
        skipped = {tokenizer.token_to_id(word) for word in self.skipped_words}
        kept = [place for place, token in enumerate(ids) if token not in skipped]
        return LatePrompt(ids, 0, kept)

    def _encode(self, tokenizer: Tokenizer, text: str, prefix: str, length: int, side: Side) -> list[int]:
        ids = tokenizer.encode(text)
        around = tokenizer.added_around(True)
        prefix_id = tokenizer.token_to_id(prefix)
        own = tokenizer.encode(prefix, False) if prefix_id is None else [prefix_id]
        ids = [ids[place] for place in kept_tokens(len(ids), max(1, length - len(own)), side, around)]
        return [*ids[: around[0]], *own, *ids[around[0] :]]


class LatePrompt(NamedTuple):
    """A prompt of which each token gets a vector."""

    token_ids: list[int]
    num_attended: int
    """Leading tokens to which others attend; 0: all."""
    kept: list[int] | None
    """Places of the tokens whose vectors count; None: all."""


def max_sim(query: F32, document: F32) -> float:
    """The sum of each query vector's largest product with a document's.

    Args:
        query: float32 [tokens, dimensions].
        document: float32 [any, dimensions]; none: the score is 0.
    """
    if not len(document) or not len(query):
        return 0.0
    return float((query.astype(np.float64) @ document.astype(np.float64).T).max(axis=1).sum())


FLAGS = {"do_query_expansion": "expands_queries", "attend_to_expansion_tokens": "attends_to_expansion"}
PREFIXES = ("query_prefix", "document_prefix")
LENGTHS = ("query_length", "document_length")


def from_pylate(settings: Mapping[str, Any]) -> LateInteraction:
    """Reads ``config_sentence_transformers.json``.

    Raises:
        ValueError: A field is damaged; one line names it.
    """
    values: dict[str, Any] = {}
    kinds: dict[str, Any] = {
        **dict.fromkeys(PREFIXES, str),
        **dict.fromkeys(LENGTHS, int),
        **dict.fromkeys(FLAGS, bool),
    }
    for name, kind in kinds.items():
        value: Any = settings.get(name)
        if value is None:
            continue
        if type(value) is not kind or (kind is int and not 3 <= value <= MAX_LENGTH):
            raise ValueError(f"{name} must be {'a number of tokens' if kind is int else kind.__name__}")
        values[FLAGS.get(name, name)] = value
    words = settings.get("skiplist_words")
    if words is not None:
        values["skipped_words"] = _words(words)
    return LateInteraction(**values)


def from_metadata(settings: Mapping[str, Any]) -> LateInteraction:
    """Reads ``artifact.metadata``. Raises the same error."""
    own = {
        "query_prefix": settings.get("query_token_id", "[unused0]"),
        "document_prefix": settings.get("doc_token_id", "[unused1]"),
        "query_length": settings.get("query_maxlen"),
        "document_length": settings.get("doc_maxlen"),
        "attend_to_expansion_tokens": settings.get("attend_to_mask_tokens"),
    }
    if settings.get("mask_punctuation") is False:
        own["skiplist_words"] = []
    return from_pylate(own)


def _words(words: Any) -> tuple[str, ...]:
    if not isinstance(words, Sequence) or isinstance(words, str) or len(words) > MAX_WORDS:
        raise ValueError(f"skiplist_words must be a list of at most {MAX_WORDS} texts")
    if not all(isinstance(word, str) for word in words):
        raise ValueError("skiplist_words must be texts")
    return tuple(words)
