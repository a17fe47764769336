"""Searches an output for stop strings and patterns, including special tokens that are not shown.

A stop may contain a special token, which ``skip_special_tokens`` omits from the text. So two texts are searched: the
text as shown, and the text as the model wrote it. The second search starts at the first omitted special token; up to
there both texts are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from api.stop_regex import StopRegexChecker
from api.text.stop_strings import StopChecker

Checker = StopChecker | StopRegexChecker


class StopSearch:
    """Finds the first stop in an output that arrives token by token.

    Text that may be the beginning of a stop is held back, since text that was sent cannot be taken back.
    """

    __slots__ = ("_end", "_out", "_pending", "_shown", "_written")

    def __init__(self, stop: Sequence[str], stop_regex: Sequence[str], include_stop_str_in_output: bool) -> None:
        self._shown: Checker
        if stop_regex:
            self._shown = StopRegexChecker(stop, stop_regex, include_stop_str_in_output)
        else:
            self._shown = StopChecker(stop, include_stop_str_in_output)
        self._written: _WrittenText | None = None
        # Used from the first hidden token on; positions count shown characters from the text that was held back then.
        self._pending = ""
        self._out = 0
        """Where ``_pending`` begins; the text before it was sent."""
        self._end = 0

    def feed(self, text: str, hidden: str = "", armed: bool = True) -> tuple[str, str | None]:
        """Takes the text that a token adds.

        Args:
            text: The shown text.
            hidden: The special token that follows it and is not shown.
            armed: False: the output must not end here yet. A stop that begins here and ends later is found.

        Returns:
            The text that can be sent, and the stop string or pattern that ends the output, if any.
        """
        if self._written is not None:
            return self._feed_both(self._written, text, hidden, armed)
        out, matched = self._shown.feed(text, armed)
        if not hidden or matched is not None:
            return out, matched
        self._written = _WrittenText(self._shown)
        self._pending = self._shown.held
        self._end = len(self._pending)
        more, matched = self._feed_both(self._written, "", hidden, armed)
        return out + more, matched

    def _feed_both(self, written: _WrittenText, text: str, hidden: str, armed: bool) -> tuple[str, str | None]:
        cut = self._end - len(self._shown.held)
        out, matched = self._shown.feed(text, armed)
        cut += len(out)
        self._pending += text
        self._end += len(text)
        other_cut, other_matched = written.feed(text, hidden, armed)
        if (matched is None) == (other_matched is None):
            cut, matched = min((cut, matched), (other_cut, other_matched), key=lambda found: found[0])
        elif matched is None:
            cut, matched = other_cut, other_matched
        length = cut - self._out
        ready, self._pending, self._out = self._pending[:length], self._pending[length:], cut
        return ready, matched

    def finish(self) -> str:
        """Returns the text that was held back; no more text may follow."""
        return self._shown.finish() if self._written is None else self._pending


class _WrittenText:
    """A search in the text as the model wrote it, with the hidden special tokens."""

    __slots__ = ("_checker", "_end", "_hidden", "_num_hidden")

    def __init__(self, checker: Checker) -> None:
        """Continues from the state of the search in the shown text."""
        self._checker = copy.copy(checker)
        self._end = len(checker.held)
        self._hidden: list[tuple[int, int]] = []
        """Begin and end of hidden tokens that are not yet entirely before the cut."""
        self._num_hidden = 0
        """Characters of hidden tokens before those."""

    def feed(self, text: str, hidden: str, armed: bool) -> tuple[int, str | None]:
        """Takes the text that a token adds.

        Returns:
            The position in the shown text up to which it can be sent, and the stop that was found, if any.
        """
        cut = self._end - len(self._checker.held)
        out, matched = self._checker.feed(text, armed)
        cut += len(out)
        self._end += len(text)
        if hidden and matched is None:
            self._hidden.append((self._end, self._end + len(hidden)))
            self._end += len(hidden)
            out, matched = self._checker.feed(hidden, armed)
            cut += len(out)
        while self._hidden and self._hidden[0][1] <= cut:
            begin, end = self._hidden.pop(0)
            self._num_hidden += end - begin
        behind = sum(max(0, min(end, cut) - begin) for begin, end in self._hidden)
        return cut - self._num_hidden - behind, matched
