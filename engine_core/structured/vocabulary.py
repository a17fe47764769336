"""The vocabulary as bytes: all that grammars need of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine_core.messages import SetVocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_JOINED_BYTES = 64
"""Longest token considered when tokenising bytes."""


class Vocabulary:
    """Token bytes, and the llguidance tokenizer over them.

    Attributes:
        size: Width of the logits; ids unknown to the tokenizer have no bytes and are never allowed.
        end_token: A token that llguidance allows where an output may end.
        mask_words: int32 words in a row of a bitmask.
        special_tokens: Tokens without text.
    """

    def __init__(self, message: SetVocabulary, size: int) -> None:
        """
        Args:
            message: The vocabulary from the api.
            size: Width of the logits.

        Raises:
            ValueError: The vocabulary has no token that ends an output.
        """
        from llguidance import LLTokenizer  # imported late: most servers need not pay its import time

        self.size = size
        self.mask_words = -(-size // 32)
        tokens = list(message.tokens[:size])
        self.token_bytes = message.tokens
        self.special_tokens = special = {token for token in message.special_token_ids if token < size}
        self.end_tokens = tuple(token for token in message.end_token_ids if token < size)
        if not self.end_tokens:
            # The model has none: use an id that no request treats as its end.
            self.end_tokens = (len(tokens),)
            tokens.append(b"<|end|>")
            special.add(len(tokens) - 1)
        self.end_token = self.end_tokens[0]
        tokens += [b""] * (size - len(tokens))
        self._ids: dict[bytes, int] = {}
        for token_id in range(len(tokens) - 1, -1, -1):
            if token_id not in special and 0 < len(tokens[token_id]) <= MAX_JOINED_BYTES:
                self._ids[tokens[token_id]] = token_id
        self._longest = max(map(len, self._ids), default=0)
        self.byte_tokens: dict[int, int] = {key[0]: token_id for key, token_id in self._ids.items() if len(key) == 1}
        """Single-byte tokens by their byte."""
        plain = LLTokenizer(
            _Tokens(tokens, sorted(special), self.end_token, self.spell),  # type: ignore[arg-type]
            n_vocab=len(tokens),
            eos_token=list(self.end_tokens),
            slices=[],
        )
        # In a call of its own, which takes as long: other threads may run in between.
        self.tokenizer: LLTokenizer = plain.with_slices(LLTokenizer.general_slices())

    def spell(self, text: bytes | str, is_usable: Callable[[int], bool] | None = None) -> list[int]:
        """Tokenises bytes greedily, longest token first; stops early if no token matches."""
        data = text.encode() if isinstance(text, str) else text
        tokens: list[int] = []
        position = 0
        while position < len(data):
            for length in range(min(self._longest, len(data) - position), 0, -1):
                token = self._ids.get(data[position : position + length])
                if token is not None and (is_usable is None or is_usable(token)):
                    tokens.append(token)
                    position += length
                    break
            else:
                break
        return tokens


class _Tokens:
    """The tokenizer interface that llguidance expects."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Sequence[int],
        eos_token_id: int,
        spell: Callable[[bytes | str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id
        self._spell = spell

    def __call__(self, text: bytes | str) -> list[int]:
        return self._spell(text)
