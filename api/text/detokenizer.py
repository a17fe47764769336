"""Detokenizes streams of token ids incrementally.

Emitted text is final: the joined deltas of a stream are exactly the text of decoding all its ids at once,
whatever the ids and wherever a character is split between tokens. This runs for every token of every
stream, so for the two kinds of decoders that nearly all models use it is one dictionary look-up per token,
a fraction of the time of ``tokenizers.decoders.DecodeStream`` (``scripts/bench_detokenizer.py``). Other
decoders run in the backend over a small window. That is slower than ``DecodeStream``, which however fails
on decoders that rewrite their text, and cannot flush an incomplete character at the end.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from os.path import commonprefix
from typing import Final, Protocol

from api.model.tokenizer import Tokenizer, guarded

_REPLACEMENT: Final = "\ufffd"
_REPLACEMENT_BYTES: Final = _REPLACEMENT.encode()


class IncrementalDetokenizer:
    """Detokenizes one stream of token ids.

    The prompt is context: it determines whether a leading space is kept, and the stream may complete a
    character that the prompt left incomplete. None of the prompt's own text is emitted.

    Attributes:
        skipped: Ids that are omitted from the text.
        append: Takes the next token id, returns the text that has become final.
        extend: The same for several ids.
        finish: Returns the text that was held back; no more ids may follow.
    """

    __slots__ = ("append", "extend", "finish", "skipped")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        kept_special_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Starts a stream.

        Args:
            tokenizer: The tokenizer of the ids.
            prompt_token_ids: The last ids of the prompt.
            skip_special_tokens: Omit special tokens from the text.
            spaces_between_special_tokens: Put spaces between special tokens (some tokenizers only).
            kept_special_ids: Special tokens to keep nevertheless, since a parser of the text needs them.
        """
        decoder: _Decoder
        kind = tokenizer.decoding.kind
        skipped: frozenset[int] = tokenizer.all_special_ids - kept_special_ids if skip_special_tokens else frozenset()
        if kind == "byte_level":
            decoder = _ByteLevelDecoder(tokenizer, prompt_token_ids, skipped)
        elif kind == "byte_fallback":
            decoder = _ByteFallbackDecoder(tokenizer, prompt_token_ids, skipped)
        else:
            joins_added = not skip_special_tokens and not spaces_between_special_tokens
            decoder = _WindowDecoder(tokenizer, prompt_token_ids, skipped, joins_added)
        self.skipped = skipped
        # Bound methods instead of delegation save one call per token.
        self.append: Callable[[int], str] = decoder.append
        self.extend: Callable[[Iterable[int]], str] = decoder.extend
        self.finish: Callable[[], str] = decoder.finish


class _Decoder(Protocol):
    def append(self, token_id: int) -> str: ...
    def extend(self, token_ids: Iterable[int]) -> str: ...
    def finish(self) -> str: ...


# Byte-level vocabularies


class _ByteLevelTexts(dict[int, "str | None"]):
    """Text by token id; None for a token that begins or ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        super().__init__()
        self._token_bytes = tokenizer.token_bytes
        self._vocab_size = tokenizer.vocab_size
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | None:
        if token_id in self._skipped or not 0 <= token_id < self._vocab_size:
            return ""
        try:
            text = self._token_bytes(token_id).decode()
        except UnicodeDecodeError:
            self[token_id] = None
            return None
        self[token_id] = text
        return text


@lru_cache(maxsize=16)
def _byte_level_texts(tokenizer: Tokenizer, skipped: frozenset[int]) -> _ByteLevelTexts:
    return _ByteLevelTexts(tokenizer, skipped)


class _ByteLevelDecoder:
    """Decodes tokens that spell bytes; only an incomplete character is held back."""

    __slots__ = ("_pending", "_prompt_text", "_texts", "_token_bytes")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skipped: frozenset[int]) -> None:
        self._texts = _byte_level_texts(tokenizer, skipped)
        self._token_bytes = tokenizer.token_bytes
        self._pending = self._prompt_tail(prompt_token_ids)
        # If nothing completes these bytes, the backend's replacement text for them belongs to the prompt.
        self._prompt_text = utf_8_decode(self._pending, "replace", True)[0]

    def append(self, token_id: int) -> str:
        text = self._texts[token_id]
        if text is None:
            return self._decode(self._token_bytes(token_id), False)
        if self._pending and text:
            return self._decode(text.encode(), False)
        return text

    def extend(self, token_ids: Iterable[int]) -> str:
        append = self.append
        return "".join([append(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._decode(b"", True) if self._pending else ""

    def _decode(self, data: bytes, final: bool) -> str:
        data = self._pending + data
        text, used = utf_8_decode(data, "replace", final)
        self._pending = data[used:]
        if self._prompt_text and text:
            prompt_text, self._prompt_text = self._prompt_text, ""
            if not data.startswith(_REPLACEMENT_BYTES):
                return text.removeprefix(prompt_text)
        return text

    def _prompt_tail(self, prompt_token_ids: Sequence[int]) -> bytes:
        """The bytes of a character that the prompt leaves incomplete, at most three."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            text = self._texts[token_id]
            if text is None:
                tail = self._token_bytes(token_id) + tail
            if text or len(tail) >= 3:
                break
        return tail[utf_8_decode(tail, "replace", False)[1] :]


# SentencePiece vocabularies with byte tokens


class _Pieces(dict[int, "str | int | None"]):
    """Text by token id; an int for a token that stands for one byte, None for an omitted token."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | int | None:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        piece = self._tokenizer.decoding.text_or_byte(token)
        self[token_id] = piece
        return piece


@lru_cache(maxsize=16)
def _pieces(tokenizer: Tokenizer, skipped: frozenset[int]) -> _Pieces:
    return _Pieces(tokenizer, skipped)


class _ByteFallbackDecoder:
    """Decodes tokens that are text or single bytes. A run of byte tokens is decoded as a whole at its end.

    If the run is not valid UTF-8, each of its bytes becomes U+FFFD, even those of valid characters. The
    backend decodes in this way, so no part of a run is final before its end.
    """

    __slots__ = ("_num_prompt_bytes", "_pieces", "_run", "_strip", "_strips_left")

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skipped: frozenset[int]) -> None:
        self._pieces = _pieces(tokenizer, skipped)
        self._run = bytearray()
        self._strip, self._strips_left = tokenizer.decoding.strip_left
        for token_id in reversed(prompt_token_ids):
            piece = self._pieces[token_id]
            if piece is None:
                continue
            if isinstance(piece, str):
                if piece:
                    self._strips_left = 0
                break
            self._strips_left = 0
            self._run.insert(0, piece)
            if len(self._run) == 3:
                break
        # Of the prompt's bytes, only those of an incomplete character affect the following text.
        del self._run[: utf_8_decode(self._run, "replace", False)[1]]
        self._num_prompt_bytes = len(self._run)

    def append(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if type(piece) is str and not self._run and not self._strips_left:
            return piece
        return self._append(piece)

    def extend(self, token_ids: Iterable[int]) -> str:
        append = self.append
        return "".join([append(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _append(self, piece: str | int | None) -> str:
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        return self._stripped(self._end_run() + piece)

    def _end_run(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = _REPLACEMENT * (len(self._run) - self._num_prompt_bytes)
        self._run.clear()
        self._num_prompt_bytes = 0
        return text

    def _stripped(self, text: str) -> str:
        while self._strips_left and text:
            if text[0] != self._strip:
                self._strips_left = 0
                break
            text = text[1:]
            self._strips_left -= 1
        return text


# Everything else


class _WindowDecoder:
    """Decodes a window of the last ids with the backend and emits the growth of its text.

    The window starts with ids whose text was already emitted, as context for decoders that depend on the
    preceding token: they put spaces between words, or treat the first one differently.
    """

    __slots__ = (
        "_added",
        "_backend",
        "_context_len",
        "_context_text",
        "_ids",
        "_last_added",
        "_skipped",
        "_vocab_size",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skipped: frozenset[int],
        joins_added: bool,
    ) -> None:
        self._backend = tokenizer.backend
        self._vocab_size = tokenizer.vocab_size
        self._skipped = skipped
        self._added: dict[int, str] = tokenizer.added_tokens if joins_added else {}
        self._last_added = len(prompt_token_ids) > 0 and prompt_token_ids[-1] in self._added
        self._ids: list[int] = []
        self._context_text = ""
        num_context = 4
        while not self._context_text and len(self._ids) < len(prompt_token_ids):
            tail = prompt_token_ids[-num_context:]
            self._ids = [token_id for token_id in tail if self._is_decoded(token_id)]
            self._context_text = self._decode(self._ids)
            if len(tail) == len(prompt_token_ids):
                break
            num_context *= 4
        self._context_len = len(self._ids)

    def append(self, token_id: int) -> str:
        if not self._is_decoded(token_id):
            return ""
        after_added, self._last_added = self._last_added, token_id in self._added
        if after_added and self._last_added:
            held = self.finish()
            self._ids.append(token_id)
            self._move_context(self._decode(self._ids))
            return held + self._added[token_id]
        self._ids.append(token_id)
        text = self._decode(self._ids)
        delta = "" if text.endswith(_REPLACEMENT) else self._growth(text)  # the last character may be incomplete
        if delta:
            self._move_context(text)
        return delta

    def extend(self, token_ids: Iterable[int]) -> str:
        return "".join([self.append(token_id) for token_id in token_ids])

    def finish(self) -> str:
        text = self._decode(self._ids)
        delta = self._growth(text)
        self._context_len, self._context_text = len(self._ids), text
        return delta

    def _growth(self, text: str) -> str:
        """The part of ``text`` after the context."""
        context = self._context_text
        common = len(context)
        if not text.startswith(context):
            # The completion of a character may have replaced the end of the context. Decoders that rewrite
            # more than that cannot be streamed exactly.
            shared = len(commonprefix((context, text)))
            if not context[shared:].strip(_REPLACEMENT):
                common = shared
        return text[common:]

    def _is_decoded(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size and token_id not in self._skipped

    def _decode(self, token_ids: list[int]) -> str:
        # Omitted ids were already filtered out.
        return guarded(self._backend.decode, token_ids, skip_special_tokens=False)

    def _move_context(self, text: str) -> None:
        """Moves the context after all ids have been emitted; keeps the fewest that still decode to text."""
        for start in range(self._context_len, max(self._context_len - 4, 0), -1):
            kept = self._decode(self._ids[start:])
            if kept and not kept.startswith(_REPLACEMENT):
                del self._ids[:start]
                text = kept
                break
        self._context_len, self._context_text = len(self._ids), text
