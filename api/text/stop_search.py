"""Where an output ends because of what it says: stop strings and patterns, special tokens included.

A stop may name a special token, which ``skip_special_tokens`` leaves out of the text. So the text is searched twice: as
it is shown, and as the model wrote it. The second search starts with the first special token that is left out; up to
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

    Text that may be the beginning of a stop is held back, so that nothing that went out has to be taken back.
    """

    __slots__ = ("_end", "_out", "_pending", "_shown", "_written")

    def __init__(self, stop: Sequence[str], stop_regex: Sequence[str], include_stop_str_in_output: bool) -> None:
        self._shown: Checker
        if stop_regex:
            self._shown = StopRegexChecker(stop, stop_regex, include_stop_str_in_output)
        else:
            self._shown = StopChecker(stop, include_stop_str_in_output)
        self._written: _WrittenText | None = None
        # From the first hidden token on; positions count shown characters from the text that was held back then.
        self._pending = ""
        self._out = 0
        """Where ``_pending`` begins: what is before it went out."""
        self._end = 0

    def feed(self, text: str, hidden: str = "", armed: bool = True) -> tuple[str, str | None]:
        """Takes what a token adds to the text.

        Args:
            text: As it is shown.
            hidden: The special token that follows it and is not shown.
            armed: False: the output may not end here yet. A stop that begins here and ends later is found.

        Returns:
            The text that may go out, and the stop string or pattern that ends the output, if one does.
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
        """The text that was held back; nothing may follow."""
        return self._shown.finish() if self._written is None else self._pending


class _WrittenText:
    """A search in the text with the special tokens that are not shown."""

    __slots__ = ("_checker", "_end", "_hidden", "_num_hidden")

    def __init__(self, checker: Checker) -> None:
        """Goes on where the search in the shown text stands."""
        self._checker = copy.copy(checker)
        self._end = len(checker.held)
        self._hidden: list[tuple[int, int]] = []
        """Beginnings and ends of hidden tokens that may still lie behind a cut."""
        self._num_hidden = 0
        """Characters of hidden tokens before those."""

    def feed(self, text: str, hidden: str, armed: bool) -> tuple[int, str | None]:
        """Takes what a token adds.

        Returns:
            Up to which character of the shown text the text may go out, and the stop that was found, if any.
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
