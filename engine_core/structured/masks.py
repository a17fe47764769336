"""Token bitmasks of a step's constrained rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine_core.messages import I32
from engine_core.structured.grammar import short_error
from engine_core.structured.request_grammar import RequestGrammar
from engine_core.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLExecutor

NOTHING_ALLOWED = "the grammar allows no token here"
ALL = np.int32(-1)


class MaskBuilder:
    """Fills the rows of a step in parallel, without holding the GIL."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance import LLExecutor

        self._vocabulary = vocabulary
        self._executor: LLExecutor = LLExecutor()
        self._ends = _places(vocabulary.end_tokens)
        self._end_ids = [token for token in vocabulary.end_tokens if token < vocabulary.size]

    def fill(self, grammars: Sequence[RequestGrammar | None]) -> tuple[I32, list[tuple[int, str | None]]]:
        """Computes a mask for each row.

        Args:
            grammars: One per row; None: every token is allowed.

        Returns:
            int32 [rows, words], and the rows whose requests end here: with an error, or with None if the output is
            complete and no token may follow, not even an end token. Those rows allow every token.
        """
        masks = np.zeros((len(grammars), self._vocabulary.mask_words), np.int32)
        matchers = []
        for row, grammar in enumerate(grammars):
            if grammar is None:
                masks[row] = ALL
            elif (token := grammar.forced_token) is not None:
                ((word, bit),) = _places([token])
                masks[row, word] = bit
            elif grammar.is_thinking:
                masks[row] = ALL
                for word, bit in _places([*self._end_ids, *grammar.stop_token_ids]):
                    masks[row, word] &= ~bit
            else:
                matchers.append((grammar.matcher, row))
        if not matchers:
            return masks, []
        width = 4 * masks.shape[1]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, width, len(masks))
        ended = []
        for _, row in matchers:
            grammar = grammars[row]
            assert grammar is not None
            problem = self._finish(masks[row], grammar)
            if problem is not None:
                ended.append((row, problem or None))
                masks[row] = ALL
            elif grammar.may_begin_thought is not None:
                ((word, bit),) = _places([grammar.may_begin_thought])
                masks[row, word] |= bit
        return masks, ended

    def _finish(self, mask: I32, grammar: RequestGrammar) -> str | None:
        """Replaces the vocabulary's end tokens with the request's. Returns why the row cannot continue; "": it is
        complete."""
        can_end = False
        for word, bit in self._ends:
            value = int(mask[word])
            if value & bit:
                can_end = True
                mask[word] = value & ~bit
        if not mask.any():
            if grammar.matcher.is_error():
                return short_error(grammar.matcher.get_error()) or NOTHING_ALLOWED
            return "" if can_end else NOTHING_ALLOWED
        if can_end:
            for word, bit in _places(grammar.stop_token_ids):
                mask[word] |= bit
        return None


def _places(token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Places of tokens in a row of a mask: word index and bit value as int32."""
    return [(token // 32, int(np.int32(np.uint32(1 << token % 32).view(np.int32)))) for token in token_ids]
