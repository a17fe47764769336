"""Closing paths: sequences of tokens from a state of a grammar to a point where the output may end.

The search takes whatever leads to an end soon: all forced text, closing brackets and quotes, the shortest value where
one must begin. Where none of that is allowed (in a string with a pattern, say), it takes a byte that leads to a new
state, so as to leave repetitions. The path known for an earlier state helps: as soon as a tail of it completes the
current state, it is the rest of the path. So a new path costs only as much as closing what the last token opened.
Paths are short, but not always shortest.

The shortest completion of a context-free grammar could be computed directly (Knuth, A generalization of Dijkstra's
algorithm, 1977), but llguidance exposes a grammar only through a matcher: the allowed tokens, the forced bytes, and
whether given tokens would be accepted. So this is a greedy search over states, identified by the hash of their token
mask. Two states with equal masks may be confused; then a path may be missed, but never a wrong one found, since the
matcher accepts each token of a path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from engine_core.structured.grammar import GrammarError
from engine_core.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

FIRST_STEPS, FIRST_PROBES = 1 << 14, 20_000
"""Limits of a request's first search: steps, and states probed off its path. It runs outside the engine core's loop."""
STEPS, PROBES = 512, 1000
"""Limits of later searches, which hold up the loop: about 10 ms at most."""
FIRST_SECONDS, SECONDS = 2.0, 0.25
"""CPU time after which a request is ended; far more than ordinary grammars need within the above limits, but a hostile
one may make each state as costly as llguidance allows. Ending the request is the only option, since tokens must not
depend on time."""
MAX_BYTES_PER_TOKEN = 4
"""Largest factor by which retokenising is assumed to shorten a path."""
MAX_SHORTCUTS = 256
RESYNC = 8
"""How many tokens of the earlier path may be skipped to resynchronise."""

_CLOSERS = b"}]"
_PLAIN = bytes(
    dict.fromkeys(b'":,0123456789abcdefghijklmnopqrstuvwxyz' + bytes(range(0x21, 0x7F)) + b" \n\t\r")
).replace(b"\\", b"")
"""Bytes in order of how soon they may lead to an end."""
_OTHERS = b"\\" + bytes(range(0x80, 256))
"""Bytes that begin or continue something longer: the last resort."""


_ESCAPES = b'\\"/bfnrtu'
"""Bytes that may follow a backslash, shortest first."""


class _Tokens:
    """A set of tokens to look up in masks."""

    def __init__(self, token_ids: list[int]) -> None:
        ids = np.array(token_ids, np.int64)
        self._ids = ids
        self._bytes = ids // 8
        self._bits = (1 << (ids % 8)).astype(np.uint8)

    def allowed(self, mask: bytes) -> list[int]:
        """The tokens that a mask (one bit per token) allows, in order."""
        found: list[int] = self._ids[np.frombuffer(mask, np.uint8)[self._bytes] & self._bits != 0].tolist()
        return found


class ClosingPaths:
    """Finds closing paths from the tokens that a request may use."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        is_usable: Callable[[int], bool] | None = None,
        examples: Iterable[bytes] = (),
    ) -> None:
        """
        Args:
            vocabulary: The grammar's vocabulary.
            is_usable: Whether the request may use a token; None: all.
            examples: String contents that may complete a string; see ``examples.py``.
        """
        self._vocabulary = vocabulary
        self._is_usable = is_usable
        tokens = vocabulary.byte_tokens
        self._closers = self._usable(tokens.get(byte) for byte in _CLOSERS)
        self._quote, self._zero = ((self._usable([tokens.get(byte)]) or [-1])[0] for byte in b'"0')
        self._letter = tokens.get(ord("x"), -1)
        self.backslash = tokens.get(ord("\\"), -1)
        self._plain = _Tokens(self._usable(tokens.get(byte) for byte in _PLAIN))
        self._others = _Tokens(self._usable(tokens.get(byte) for byte in _OTHERS))
        self._escapes = _Tokens(self._usable(tokens.get(byte) for byte in _ESCAPES))

        self._examples = [spelt for example in examples if (spelt := self._spelt(example + b'"'))]

    def _spelt(self, text: bytes) -> list[int]:
        """Usable tokens that spell a text completely; empty if there are none."""
        tokens = self._vocabulary.spell(text, self._is_usable)
        return tokens if self._vocabulary.tokenizer.decode_bytes(tokens) == text else []

    def _usable(self, tokens: Iterable[int | None]) -> list[int]:
        return [t for t in tokens if t is not None and (self._is_usable is None or self._is_usable(t))]

    def find(
        self,
        matcher: LLMatcher,
        known: list[int],
        limit: int,
        *,
        is_first: bool = False,
        seconds: float | None = None,
    ) -> list[int] | None:
        """Tokens that complete the output.

        Args:
            matcher: The current state; not modified.
            known: A path that completed an earlier state, as a hint.
            limit: Length of the longest useful path.
            is_first: Use the larger limits of a first search.
            seconds: CPU time limit of the search, if not the default.

        Returns:
            None: there is no path, or none was found.

        Raises:
            GrammarError: The search takes too long.
        """
        end = self._vocabulary.end_token
        hint = [*known, end]
        num_probes, usual_seconds = (FIRST_PROBES, FIRST_SECONDS) if is_first else (PROBES, SECONDS)
        search = _Search(self, matcher.deep_copy(), num_probes, usual_seconds if seconds is None else seconds)
        path: list[int] = []
        for _ in range(FIRST_STEPS if is_first else STEPS):
            probe = search.probe
            if probe.is_accepting():
                return self._respelt(matcher, path, [])
            for skipped in range(min(len(known), RESYNC)):
                rest = hint[skipped:]
                if probe.validate_tokens(rest) == len(rest):
                    path = self._respelt(matcher, path, rest[:-1])
                    return path if len(path) <= limit else None
            if len(path) > MAX_BYTES_PER_TOKEN * limit:
                return None
            step = search.advance()
            if step is None:
                return None
            path += step
        return None

    def _respelt(self, matcher: LLMatcher, path: list[int], rest: list[int]) -> list[int]:
        """Shortens a path by retokenising its first part, if possible."""
        if len(path) > 1:
            vocabulary = self._vocabulary
            tokens = vocabulary.spell(vocabulary.tokenizer.decode_bytes(path), self._is_usable)
            if len(tokens) < len(path):
                whole = [*tokens, *rest, vocabulary.end_token]
                if matcher.validate_tokens(whole) == len(whole):
                    return whole[:-1]
        return path + rest

    def shortcut(self, probe: LLMatcher, *, is_patient: bool) -> int | None:
        """A token that closes something or is a short value, if there is one.

        Args:
            probe: The current state.
            is_patient: Allow closing brackets. Disallowed after many of them, which may be part of a string.
        """
        has_quote = self._quote >= 0 and probe.validate_tokens([self._quote]) == 1
        is_text = self._letter >= 0 and probe.validate_tokens([self._letter]) == 1
        if not is_text and (is_patient or not has_quote):
            for token in self._closers:
                if probe.validate_tokens([token]) == 1:
                    return token
            # A number is shorter than a string.
            if has_quote and self._zero >= 0 and probe.validate_tokens([self._zero]) == 1:
                return self._zero
        return self._quote if has_quote else None

    def example(self, probe: LLMatcher) -> list[int]:
        """Tokens that complete and close a string, if one of the examples does."""
        return next((tokens for tokens in self._examples if probe.validate_tokens(tokens) == len(tokens)), [])

    def candidates(self, mask: bytes, *, is_escaped: bool) -> list[int]:
        """Tokens to continue with otherwise, those that may lead to an end soon first."""
        if is_escaped:
            return self._escapes.allowed(mask) or self._plain.allowed(mask)
        return self._plain.allowed(mask) + self._others.allowed(mask)

    def forced(self, probe: LLMatcher) -> list[int]:
        """Tokens of the forced text, if any."""
        text = probe.compute_ff_bytes()
        return self._vocabulary.spell(text, self._is_usable) if text else []


class _Search:
    """One search: its current state and the states seen."""

    def __init__(self, paths: ClosingPaths, probe: LLMatcher, max_probes: int, max_seconds: float) -> None:
        self.probe = probe
        self._end = time.thread_time() + max_seconds
        self._num_probes_left = max_probes
        self._paths = paths
        self._seen: set[int] = set()
        self._dull: set[int] = set()
        """Dead ends: states from which no byte leads on."""
        self._ways: set[tuple[int, int]] = set()
        """Transitions taken to states seen before."""
        self._state = 0
        self._num_shortcuts = 0
        """Number of consecutive shortcuts taken."""
        self._is_escaped = False
        """The previous byte was a backslash: a quote would be part of the string, not its end."""

    def advance(self) -> list[int] | None:
        """Advances by one or more tokens."""
        self._check_time()
        paths, probe = self._paths, self.probe
        tokens = paths.forced(probe)
        if not tokens:
            token = None
            if not self._is_escaped:
                token = paths.shortcut(probe, is_patient=self._num_shortcuts < MAX_SHORTCUTS)
            if token is not None:
                self._num_shortcuts += 1
                tokens = [token]
            elif not self._is_escaped and (tokens := paths.example(probe)):
                pass
            else:
                mask = probe.compute_bitmask()
                candidates = paths.candidates(mask, is_escaped=self._is_escaped)
                if not candidates:
                    return None
                self._num_shortcuts = 0
                self._state = hash(mask)
                self._seen.add(self._state)
                token = self.pick(candidates)
                self._is_escaped = token == paths.backslash and not self._is_escaped
                return [token] if probe.consume_token(token) else None
        self._is_escaped = False
        self._seen.clear()  # what follows is another string or number
        self._dull.clear()
        self._ways.clear()
        return tokens if probe.consume_tokens(tokens) else None

    def pick(self, candidates: list[int]) -> int:
        """A token that leads to an unseen state, or else by an unused transition to another state, or else any."""
        state = self._state
        if len(candidates) == 1 or state in self._dull:
            return candidates[0]
        detour: tuple[int, int] | None = None
        for token in candidates:
            self._num_probes_left -= 1
            if self._num_probes_left < 0:
                break
            self._check_time()
            trial = self.probe.deep_copy()
            if not trial.consume_token(token):
                continue
            if trial.is_accepting():
                return token
            reached = hash(trial.compute_bitmask())
            if reached not in self._seen:
                return token
            if detour is None and reached != state and (state, reached) not in self._ways:
                detour = (token, reached)
        if detour is not None:
            token, reached = detour
            self._ways.add((state, reached))
            return token
        self._dull.add(state)
        return candidates[0]

    def _check_time(self) -> None:
        if time.thread_time() > self._end:
            raise GrammarError("takes too long to find a completion of the output; simplify it")
