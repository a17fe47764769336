"""The thought before an output that must be in a language: where it begins, and where it has ended.

Its end is looked for in the text, as parsers of reasoning do, so that it counts however the model spells it.
"""

from __future__ import annotations

from engine_core.messages import Thought
from engine_core.structured.vocabulary import Vocabulary


class Thinking:
    """Whether the next token belongs to a thought.

    Attributes:
        is_inside: The output is in the middle of the thought.
        expected: The token that would begin it, or go on with what begins it; None: it has begun.
    """

    def __init__(self, thought: Thought, vocabulary: Vocabulary) -> None:
        """At the beginning of an output."""
        self.is_inside = thought.is_open
        self.expected = None if thought.is_open else thought.start_token_ids[0]
        self._thought = thought
        self._vocabulary = vocabulary
        self._num_begun = 0
        self._num_tokens = 0
        self._text = b""
        """The last bytes, one fewer than the end has."""
        self._tokens: tuple[int, ...] = ()
        """The last tokens, as many as the end has or the beginning."""

    @property
    def num_needed(self) -> int:
        """Tokens that it takes at most to end it, and before that to begin it."""
        thought = self._thought
        return len(thought.end_token_ids) + (0 if thought.is_open else len(thought.start_token_ids))

    @property
    def is_spent(self) -> bool:
        """It has had the tokens that it may have."""
        return self._thought.max_tokens is not None and self._num_tokens >= self._thought.max_tokens

    @property
    def num_end_tokens(self) -> int:
        return len(self._thought.end_token_ids)

    @property
    def next_end_token(self) -> int:
        """What brings it closer to its end."""
        end = self._thought.end_token_ids
        for length in range(min(len(end) - 1, len(self._tokens)), 0, -1):
            if self._tokens[-length:] == end[:length]:
                return end[length]
        return end[0]

    def begin(self) -> None:
        """The expected token has come."""
        start = self._thought.start_token_ids
        self._num_begun += 1
        self.is_inside = self._num_begun == len(start)
        self.expected = None if self.is_inside else start[self._num_begun]

    def think(self, token: int) -> bool:
        """Takes in a token of the thought. False: it would begin what follows, too, and is not taken in."""
        thought, vocabulary = self._thought, self._vocabulary
        tokens = (*self._tokens, token)
        is_end = tokens[-len(thought.end_token_ids) :] == thought.end_token_ids
        text = self._text
        if is_end or token not in vocabulary.special_tokens:
            text += vocabulary.token_bytes[token] if token < len(vocabulary.token_bytes) else b""
        place = text.find(thought.end)
        if place >= 0 and text[place + len(thought.end) :].strip(b"\n"):
            return False
        self._num_tokens += 1
        start = thought.start_token_ids
        if thought.is_open and self._num_tokens == len(start) and tokens[-len(start) :] == start:
            self._num_tokens = 0  # the model says it although it is there already
        self._tokens = tokens[-max(len(thought.end_token_ids), len(start)) :]
        self._text = text[-len(thought.end) + 1 :]
        self.is_inside = not is_end and place < 0
        return True
