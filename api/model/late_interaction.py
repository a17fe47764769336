"""Late interaction (ColBERT, Khattab and Zaharia, arXiv:2004.12832): a text has a vector for each of its tokens, and a
document's score is the sum, over the query's vectors, of their largest product with one of its own.

What is read: what sentence-transformers saves of a ``MultiVectorEncoder``, PyLate's fields of
``config_sentence_transformers.json``, or ``artifact.metadata`` of the authors' code.
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
    """A token that follows the first one of a query, or what its text begins with."""
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
    prefixes_are_text: bool = False
    expanded_length: int = 0
    """Tokens of a query that is filled up; 0: ``query_length``."""
    expansion_token: str | None = None
    """What it is filled up with; None: the mask token, or else the one that ends texts."""
    skips_in_queries: bool = False
    skips_in_documents: bool = True
    kept_ids: tuple[int, ...] = ()
    """Tokens of documents that alone have vectors; empty: all do."""
    is_mean: bool = False
    """Whether a score is divided by the number of the query's vectors."""

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
        count, filler = len(ids), self._filler(tokenizer)
        added = min(length, self.expanded_length or self.query_length) - count
        if not self.expands_queries or filler is None or added <= 0:
            return LatePrompt(ids, 0, self._counted(tokenizer, ids) if self.skips_in_queries else None)
        ids += [filler] * added
        kept = self._counted(tokenizer, ids) if self.skips_in_queries else None
        return LatePrompt(ids, 0 if self.attends_to_expansion else count, kept)

    def document(self, tokenizer: Tokenizer, text: str, max_tokens: int = 0, side: Side = "right") -> LatePrompt:
        """The prompt of a document. See ``query``."""
        ids = self._encode(tokenizer, text, self.document_prefix, max_tokens or self.document_length, side)
        kept = self._counted(tokenizer, ids) if self.skips_in_documents else list(range(len(ids)))
        return LatePrompt(ids, 0, [place for place in kept if not self.kept_ids or ids[place] in self.kept_ids])

    def score(self, query: F32, document: F32) -> float:
        """``max_sim``, or its mean. See there."""
        return max_sim(query, document) / (max(1, len(query)) if self.is_mean else 1)

    def _filler(self, tokenizer: Tokenizer) -> int | None:
        usual = (tokenizer.special_tokens_map.get(name) for name in ("mask_token", "eos_token"))
        token = self.expansion_token or next((text for text in usual if text is not None), None)
        return None if token is None else tokenizer.token_to_id(token)

    def _counted(self, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
        """Places of the tokens that are not skipped."""
        skipped = {tokenizer.token_to_id(word) for word in self.skipped_words}
        return [place for place, token in enumerate(ids) if token not in skipped]

    def _encode(self, tokenizer: Tokenizer, text: str, prefix: str, length: int, side: Side) -> list[int]:
        around = tokenizer.added_around(True)
        if self.prefixes_are_text:
            ids = tokenizer.encode(prefix + text)
            return [ids[place] for place in kept_tokens(len(ids), max(1, length), side, around)]
        ids = tokenizer.encode(text)
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


TASKS = ("query", "document")
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of a document's prompt, the first that exists counts."""
STRATEGIES = ("fixed", "min")
MEAN_MAX_SIM = "meanmaxsim"


def from_multi_vector(
    transformer: Mapping[str, Any], mask: Mapping[str, Any], settings: Mapping[str, Any]
) -> LateInteraction:
    """Reads what sentence-transformers saves of a ``MultiVectorEncoder``. Raises the same error.

    Args:
        transformer: Settings of the transformer, such as ``sentence_bert_config.json``.
        mask: Those of the module that says which tokens count.
        settings: ``config_sentence_transformers.json``.
    """
    prompts = settings.get("prompts") or {}
    default = prompts.get(settings.get("default_prompt_name")) or ""
    lengths = {name: transformer.get(name) or MAX_LENGTH for name in LENGTHS}
    values: dict[str, Any] = dict(lengths)
    expansion = transformer.get("query_expansion")
    if expansion is not None:
        if not isinstance(expansion, Mapping) or expansion.get("strategy") not in STRATEGIES:
            raise ValueError(f"query_expansion must have a strategy: {' or '.join(STRATEGIES)}")
        length = expansion.get("length")
        token, attends = expansion.get("token"), expansion.get("attend", False)
        if not isinstance(token, str | None) or type(attends) is not bool:
            raise ValueError("query_expansion must have a text as its token, and attend is true or false")
        if type(length) is not int or not 3 <= length <= MAX_LENGTH:
            raise ValueError("query_expansion must have a number of tokens as its length")
        is_fixed = expansion["strategy"] == "fixed"
        values["query_length"] = length if is_fixed else lengths["query_length"]
        values |= {"expanded_length": length, "expansion_token": token, "attends_to_expansion": attends}
    for name in LENGTHS:
        if type(values[name]) is not int or not 3 <= values[name] <= MAX_LENGTH:
            raise ValueError(f"{name} must be a number of tokens")
    tasks, ids = mask.get("skiplist_tasks") or ["document"], mask.get("keep_only_token_ids") or []
    tasks = [tasks] if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list) or not all(task in TASKS for task in tasks):
        raise ValueError(f"skiplist_tasks must be some of {', '.join(TASKS)}")
    if not isinstance(ids, list) or len(ids) > MAX_WORDS or not all(type(each) is int for each in ids):
        raise ValueError(f"keep_only_token_ids must be at most {MAX_WORDS} token ids")
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), default)
    return LateInteraction(
        query_prefix=prompts.get("query", default) or "",
        document_prefix=document or "",
        prefixes_are_text=True,
        expands_queries=expansion is not None,
        skipped_words=_words(mask.get("skiplist_words") or []),
        skips_in_queries="query" in tasks,
        skips_in_documents="document" in tasks,
        kept_ids=tuple(ids),
        is_mean=settings.get("similarity_fn_name") == MEAN_MAX_SIM,
        **values,
    )
