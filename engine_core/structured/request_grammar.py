"""The grammar state of one request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from enum import IntEnum
from typing import TYPE_CHECKING

from engine_core.messages import ResolvedParams, Thought
from engine_core.structured.closing import ClosingPaths
from engine_core.structured.grammar import GrammarError, short_error
from engine_core.structured.thinking import Thinking
from engine_core.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Verdict(IntEnum):
    """A grammar's verdict on a sampled token."""

    GOES_ON = 0
    ENDED = 1
    """The output is complete: the grammar allows nothing after the token."""
    REJECTED = 2
    """The token is not part of the output, which could not be completed after it. Another is sampled instead."""
    COMPLETE = 3
    """The token is not part of the output, which is complete without it."""
    FAILED = 4


class BudgetError(GrammarError):
    """The output cannot be completed within the request's token limit."""


class RequestGrammar:
    """The state of a grammar after a request's output so far. It survives preemption.

    With ``completes``, a closing path is known at all times: tokens that complete the output from its current state
    within the request's remaining tokens. A token is accepted only if such a path exists after it, too; once the path
    is as long as the remaining tokens, it is followed.

    Thinking may come first, in which all tokens are allowed except those that end an output. It must end when the
    remaining tokens just suffice for its end marker and the path.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        params: ResolvedParams,
        *,
        completes: bool,
        examples: Iterable[bytes] = (),
        thought: Thought | None = None,
    ) -> None:
        """
        Args:
            matcher: At the start of the grammar; this object takes ownership.
            vocabulary: The matcher's vocabulary.
            params: The request's sampling parameters.
            completes: Whether the output must be complete when the request's tokens run out.
            examples: See ``ClosingPaths``.
            thought: Thinking that may come first.
        """
        self.matcher = matcher
        self.vocabulary = vocabulary
        self.stop_token_ids = params.all_stop_token_ids
        self.was_cut = False
        """The output was completed because tokens ran out, not because the model was done."""
        self.error = ""
        """Reason why the grammar cannot continue, after ``FAILED``."""
        self._paths = ClosingPaths(vocabulary, _usable_tokens(params), examples) if completes else None
        self._path: list[int] = []
        self._first_path: tuple[int, ...] = ()
        """The closing path from the start of the grammar."""
        self._thinking = None if thought is None else Thinking(thought, vocabulary)
        """None once thinking is over or can no longer begin."""
        self._remaining = 0
        self._forced: int | None = None

    def start(self, remaining: int, outputs: Sequence[int] = ()) -> None:
        """Finds a closing path and replays the tokens that an earlier life of the request generated.

        Args:
            remaining: Tokens that the request may have, ``outputs`` included.
            outputs: Tokens generated before.

        Raises:
            BudgetError: The tokens are too few.
            GrammarError: The grammar cannot be completed with the request's tokens, or does not accept ``outputs``.
        """
        self._remaining = remaining
        if self._paths is not None:
            path = self._paths.find(self.matcher, [], 1 << 14, is_first=True)
            if path is None:
                raise GrammarError(
                    "has no output that can be completed with the tokens that the request allows, or none was found: "
                    "use simpler patterns, smaller bounds or other allowed tokens"
                )
            self._path, self._first_path = path, tuple(path)
        self._start_thinking()
        for token in outputs:
            if self.accept(token) is not Verdict.GOES_ON:
                raise GrammarError("does not fit the output so far")

    def _start_thinking(self) -> None:
        """Checks that the remaining tokens suffice for the path and for thinking before it."""
        thinking = self._thinking
        is_inside = thinking is not None and thinking.is_inside
        num_needed = len(self._path) + (thinking.num_needed if thinking is not None else 0)
        if thinking is not None and not is_inside and num_needed > self._remaining:
            self._thinking = None  # there is no room for it
            num_needed = len(self._path)
        if self._paths is not None and num_needed > self._remaining:
            what = "the thought to end and this grammar" if is_inside else "this grammar"
            raise BudgetError(f"must be at least {num_needed} for {what} to be completed, got {self._remaining}")

    @property
    def is_thinking(self) -> bool:
        """Whether all tokens are allowed except those that end an output."""
        return self._thinking is not None and self._thinking.is_inside

    @property
    def may_begin_thought(self) -> int | None:
        """A token that is allowed in addition to the grammar's, if any."""
        return None if self._thinking is None else self._thinking.expected

    @property
    def forced_token(self) -> int | None:
        """The only token allowed next, if it is forced."""
        if self._forced is not None:
            return self._forced
        thinking = self._thinking
        if thinking is not None and thinking.is_inside:
            return thinking.next_end_token if thinking.is_spent or self._must_answer else None
        if self._path and len(self._path) == self._remaining:
            return self._path[0]
        return None

    def likely_tokens(self) -> list[int]:
        """Tokens that follow because the grammar allows no other text. They may be spelled with other tokens."""
        forced = self.forced_token
        if forced is not None:
            follows_path = self._thinking is None and self._path and len(self._path) == self._remaining
            return list(self._path) if follows_path else [forced]
        if self._thinking is not None:
            return []
        copied = self.matcher.deep_copy()  # limits that a search exceeds must not end the request
        tokens: list[int] = copied.compute_ff_tokens()
        return [] if copied.is_error() else tokens

    @property
    def _must_answer(self) -> bool:
        """Whether the remaining tokens just suffice to end thinking and follow the path."""
        assert self._thinking is not None
        return self._paths is not None and self._remaining <= self._thinking.num_end_tokens + len(self._path)

    def _think(self, token: int, thinking: Thinking) -> Verdict:
        """Accepts a token of thinking."""
        was_cut = self._must_answer and not thinking.is_spent
        if not thinking.think(token):
            self._forced = thinking.next_end_token
            return Verdict.REJECTED
        self.was_cut |= was_cut
        self._remaining -= 1
        self._forced = None
        if not thinking.is_inside:
            self._thinking = None
        return Verdict.GOES_ON

    def _begin_thought(self, token: int, thinking: Thinking) -> bool:
        """Whether a token belongs to the start marker of thinking and cannot belong to the grammar."""
        if token != thinking.expected:
            self._thinking = None
            return False
        thinking.begin()
        if thinking.is_inside:
            self.matcher.reset()
            self._path = list(self._first_path)
            self._forced = None
        elif self._paths is None and self.matcher.validate_tokens([token]) == 1:
            return False  # the grammar may also begin this way: the next token will tell
        else:
            self._forced = thinking.expected
        self._remaining -= 1
        return True

    def copy(self) -> RequestGrammar:
        """An independent copy of the state."""
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        other._path = list(self._path)
        other._thinking = copy(self._thinking)
        return other

    def accept(self, token: int) -> Verdict:
        """Accepts a token of the output."""
        thinking = self._thinking
        if thinking is not None:
            if thinking.is_inside:
                return self._think(token, thinking)
            if self._begin_thought(token, thinking):
                return Verdict.GOES_ON
        matcher = self.matcher
        self.was_cut |= self.forced_token is not None
        if not matcher.consume_token(token):
            self.error = short_error(matcher.get_error())
            return Verdict.FAILED
        try:
            follows = self._paths is None or self._follow(token)
        except GrammarError as error:
            self.error = str(error)
            return Verdict.FAILED
        if not follows:
            self.was_cut = True
            if not self._path:
                return Verdict.COMPLETE
            if not matcher.rollback(1):
                self.error = short_error(matcher.get_error())
                return Verdict.FAILED
            self._forced = self._path[0]
            return Verdict.REJECTED
        self._remaining -= 1
        self._forced = None
        return Verdict.ENDED if matcher.is_stopped() else Verdict.GOES_ON

    def _follow(self, token: int) -> bool:
        """Updates the closing path. Returns False if none is short enough."""
        assert self._paths is not None
        if self._path and token == self._path[0]:
            del self._path[0]
            return True
        path = self._paths.find(self.matcher, self._path, self._remaining - 1)
        if path is None or len(path) >= self._remaining:
            return False
        self._path = path
        return True


def _usable_tokens(params: ResolvedParams) -> Callable[[int], bool] | None:
    """Which tokens a closing path may use, given the request's other constraints; None: all."""
    last_of_bad_words = {word[-1] for word in params.bad_words_token_ids}
    banned = last_of_bad_words | set(params.stop_token_ids)
    if params.allowed_token_ids is None:
        return (lambda token: token not in banned) if banned else None
    allowed = set(params.allowed_token_ids) - banned
    return lambda token: token in allowed
