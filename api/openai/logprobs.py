"""Log probabilities in the three formats that clients expect."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from api.config import ServerConfig
from api.model.tokenizer import Tokenizer
from api.openai.protocol import (
    ChatLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    SamplingFields,
    TopLogprob,
)
from engine_core.messages import TokenLogprobs, i32

LEAST_LOGPROB = -9999.0
"""Represents minus infinity, which JSON cannot."""


def columns(entry: TokenLogprobs) -> tuple[list[int], list[float]]:
    """Token ids and log probabilities; the actual token of the position comes first."""
    logprobs = np.frombuffer(entry.logprobs, np.float32).tolist()
    # Not max(): with a NaN it returns its first argument.
    return i32(entry.token_ids).tolist(), [value if value > LEAST_LOGPROB else LEAST_LOGPROB for value in logprobs]


def spells_ids(config: ServerConfig, request: SamplingFields) -> bool:
    """Whether log probabilities show token ids: the request's setting, or else the server's."""
    wanted = request.return_tokens_as_token_ids
    return config.return_tokens_as_token_ids if wanted is None else wanted


class TokenSpelling:
    """The text of tokens in log probabilities."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False, broken_prefix: str = "") -> None:
        """Args:
        tokenizer: Gives the bytes of each token.
        as_ids: Write ``token_id:17``.
        broken_prefix: Precedes the escaped bytes of a token that is not valid text on its own.
        """
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._broken_prefix = broken_prefix

    def bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        """Distinct tokens with the same text get distinct spellings, since clients use them as keys."""
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self._tokenizer.token_bytes(token_id)
        if not data and self._tokenizer.id_to_token(token_id) is None:
            return f"token_id:{token_id}"  # the model has more ids than the tokenizer
        try:
            return data.decode()
        except UnicodeDecodeError:
            return self._broken_prefix + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(
    entries: Iterable[TokenLogprobs], spelling: TokenSpelling, *, lists_sampled: bool = False
) -> list[ChatLogprob]:
    """One entry per token.

    Args:
        entries: The engine's log probabilities of each token.
        spelling: Text of tokens.
        lists_sampled: List the sampled token first in ``top_logprobs``, before tokens requested by id.
    """
    result = []
    first = 0 if lists_sampled else 1
    for entry in entries:
        ids, logprobs = columns(entry)
        texts = [spelling.text(token_id) for token_id in ids]
        data = [list(spelling.bytes(token_id)) for token_id in ids]
        top = [
            TopLogprob(token=token, logprob=logprob, bytes=numbers)
            for token, logprob, numbers in zip(texts[first:], logprobs[first:], data[first:], strict=True)
        ]
        result.append(ChatLogprob(token=texts[0], logprob=logprobs[0], bytes=data[0], top_logprobs=top))
    return result


def prompt_logprobs(
    num_prompt_tokens: int, entries: Iterable[TokenLogprobs], spelling: TokenSpelling
) -> PromptLogprobs:
    """A dictionary per prompt token, except the first."""
    result: PromptLogprobs = [None] * num_prompt_tokens
    for entry in entries:
        ids, logprobs = columns(entry)
        described = {
            token_id: PromptLogprob(logprob=logprob, rank=rank, decoded_token=spelling.text(token_id))
            for rank, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True))
        }
        described[ids[0]].rank = entry.rank
        result[entry.position] = described
    return result


class CompletionColumns:
    """The log probabilities of one choice as columns, delta by delta; tracks the length of the text."""

    def __init__(self, spelling: TokenSpelling, skipped_ids: frozenset[int]) -> None:
        """Args:
        spelling: Text of tokens.
        skipped_ids: Tokens that are omitted from the text of an output.
        """
        self._spelling = spelling
        self._skipped_ids = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def prompt(
        self,
        token_ids: Sequence[int],
        text: str,
        entries: Iterable[TokenLogprobs],
        offsets: Sequence[int] | None = None,
    ) -> CompletionLogprobs:
        """The columns of an echoed prompt.

        Args:
            token_ids: Token ids of the prompt.
            text: The echoed text.
            entries: The engine's log probabilities.
            offsets: Start of each token in the text; None: the text is the concatenation of the tokens.
        """
        by_position = {entry.position: entry for entry in entries}
        result = CompletionLogprobs()
        if offsets is None:
            spelled = b"".join(map(self._spelling.bytes, token_ids))
            # Some tokenizers prepend a space, which is in the tokens but not in the text.
            self._length = len(text) - len(spelled.decode("utf-8", "replace"))
        for position, token_id in enumerate(token_ids):
            if offsets is not None:
                self._length = offsets[position]
            self._append(result, token_id, by_position.get(position), is_shown=offsets is None)
        self._length = len(text)
        return result

    def output(self, token_ids: Iterable[int], entries: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        """The columns of generated tokens."""
        result = CompletionLogprobs()
        for token_id, entry in _pairs(token_ids, entries):
            self._append(result, token_id, entry, is_shown=token_id not in self._skipped_ids)
        return result

    def _append(self, into: CompletionLogprobs, token_id: int, entry: TokenLogprobs | None, *, is_shown: bool) -> None:
        into.tokens.append(self._spelling.text(token_id))
        into.text_offset.append(max(0, self._length))
        if is_shown:
            # A character made of several tokens counts at its last token.
            self._length += len(self._decoder.decode(self._spelling.bytes(token_id)))
        if entry is None:
            into.token_logprobs.append(None)
            into.top_logprobs.append(None)
            return
        ids, logprobs = columns(entry)
        into.token_logprobs.append(logprobs[0])
        into.top_logprobs.append(
            {self._spelling.text(token): logprob for token, logprob in zip(ids, logprobs, strict=True)}
        )


def _pairs(token_ids: Iterable[int], entries: Iterable[TokenLogprobs]) -> Iterator[tuple[int, TokenLogprobs | None]]:
    """Tokens with their entries; a token computed before an engine restart may have none."""
    known = iter(entries)
    for token_id in token_ids:
        yield token_id, next(known, None)
