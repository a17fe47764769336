"""Thinking before a constrained output: detects where it begins and ends.

The end is searched for in the text, as reasoning parsers do, so that it is found however the model tokenises it.
"""

from __future__ import annotations

from engine_core.messages import Thought
from engine_core.structured.vocabulary import Vocabulary


class Thinking:
    """Tracks whether the next token belongs to thinking.

    Attributes:
        is_inside: The output is inside thinking.
        expected: The next token of the start marker; None: thinking has begun.
    """

    def __init__(self, thought: Thought, vocabulary: Vocabulary) -> None:
        """Starts at the beginning of an output."""
        self.is_inside = thought.is_open
        self.expected = None if thought.is_open else thought.start_token_ids[0]
        self._thought = thought
        self._vocabulary = vocabulary
        self._num_begun = 0
        self._num_tokens = 0
        self._text = b""
        """The last bytes, one fewer than the end marker has."""
        self._tokens: tuple[int, ...] = ()
        """The last tokens, as many as the end or start marker has."""

    @property
    def num_needed(self) -> int:
        """Upper bound on the tokens needed to end thinking, and to begin it if necessary."""
        thought = self._thought
        return len(thought.end_token_ids) + (0 if thought.is_open else len(thought.start_token_ids))

    @property
    def is_spent(self) -> bool:
        """Whether the budget is used up."""
        return self._thought.max_tokens is not None and self._num_tokens >= self._thought.max_tokens

    @property
    def num_end_tokens(self) -> int:
        return len(self._thought.end_token_ids)

    @property
    def next_end_token(self) -> int:
        """The next token of the end marker."""
        end = self._thought.end_token_ids
        for length in range(min(len(end) - 1, len(self._tokens)), 0, -1):
            if self._tokens[-length:] == end[:length]:
                return end[length]
        return end[0]

    def begin(self) -> None:
        """Records the expected token."""
        start = self._thought.start_token_ids
        self._num_begun += 1
        self.is_inside = self._num_begun == len(start)
        self.expected = None if self.is_inside else start[self._num_begun]

    def think(self, token: int) -> bool:
        """Accepts a token of thinking. Returns False, without accepting it, if it would also begin the answer."""
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
            self._num_tokens = 0  # the model repeats the start marker
        self._tokens = tokens[-max(len(thought.end_token_ids), len(start)) :]
        self._text = text[-len(thought.end) + 1 :]
        self.is_inside = not is_end and place < 0
        return True
