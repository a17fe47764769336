"""Prompts of rerankers that are decoders: a query and a document in a template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.model.tokenizer import Tokenizer

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class PairTemplate:
    """``prefix``, the instruction, the query and the document, ``suffix``."""

    prefix: str
    suffix: str

    def encode(
        self,
        tokenizer: Tokenizer,
        query: str,
        document: str,
        max_tokens: int = 0,
        max_document: int = 0,
        instruction: str | None = None,
        max_query: int = 0,
    ) -> tuple[list[int], int]:
        """Token ids of a pair; see ``Tokenizer.encode_pair``.

        Args:
            tokenizer: The model's.
            query: The query.
            document: The document.
            max_tokens: Truncate the document so that the prompt has this many tokens; 0: do not.
            max_document: Truncate the document to this many tokens; 0: do not.
            instruction: What counts as relevant; None: a web search.
            max_query: Truncate the query to this many tokens; 0: do not.

        Raises:
            ValueError: As for ``Tokenizer.encode``.
        """
        if max_query:
            query = tokenizer.decode(tokenizer.encode(query, False)[:max_query])
        if max_document:
            document = tokenizer.decode(tokenizer.encode(document, False)[:max_document])
        wanted = instruction or DEFAULT_INSTRUCTION
        text = f"{self.prefix}<Instruct>: {wanted}\n<Query>: {query}\n<Document>: {document}"
        body, end = tokenizer.encode(text, False), tokenizer.encode(self.suffix, False)
        return [*(body[: max(0, max_tokens - len(end))] if max_tokens else body), *end], 0


QWEN3_RERANKER = PairTemplate(
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)


def pair_template(fields: Mapping[str, Any]) -> PairTemplate | None:
    """The template of a model, by its config.json and ``--hf-overrides``; None: its tokenizer joins the texts."""
    return QWEN3_RERANKER if fields.get("is_original_qwen3_reranker") is True else None
