"""The api process's state of an engine request: the journal from which it can be rerun, and its detokenization."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from api.engine.channel import Channel
from api.model.tokenizer import Tokenizer
from api.text.detokenizer import IncrementalDetokenizer
from api.text.stop_search import StopSearch
from engine_core.messages import EngineCoreRequest, Suspicion, i32


class OutputOptions(msgspec.Struct, frozen=True):
    """How this process handles a request's tokens."""

    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    kept_special_ids: frozenset[int] = frozenset()
    """Special tokens that stay in the text even if ``skip_special_tokens`` is set."""
    detokenize: bool = True
    min_tokens: int = 0
    """Stop strings are ignored before this many tokens."""
    is_part: bool = False
    """It is part of a larger request of a client, and is not counted as a request of its own."""


class Siblings:
    """The completions of one prompt that a client requested together."""

    __slots__ = ("_longest", "_num_left")

    def __init__(self, count: int) -> None:
        self._num_left = count
        self._longest = 0

    def end(self, num_tokens: int) -> int | None:
        """Records the end of one completion. After the last one, returns the tokens of the longest."""
        self._num_left -= 1
        self._longest = max(self._longest, num_tokens)
        return None if self._num_left else self._longest


class RequestState:
    """The api process's state of an engine request: its journal and its detokenization."""

    __slots__ = (
        "arrival_time",
        "channel",
        "choice",
        "detokenizer",
        "engine",
        "finished",
        "first_token_time",
        "hides_stop_token",
        "index",
        "is_part",
        "last_token_time",
        "message",
        "min_tokens",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_draft_tokens",
        "num_prompt_tokens",
        "output_token_ids",
        "pooling_output",
        "scheduled_time",
        "siblings",
        "stop_search",
        "trace_headers",
        "suspected_at",
        "suspicion",
        "tokenizer",
    )

    def __init__(
        self,
        message: EngineCoreRequest,
        options: OutputOptions,
        tokenizer: Tokenizer | None,
        channel: Channel,
        choice: int,
    ) -> None:
        self.index = message.index
        self.engine = 0
        """Rank of the engine that runs it."""
        self.message = message
        """The message to the engine; together with ``output_token_ids`` it is the request's journal."""
        self.output_token_ids = array("i", message.resumed_output_token_ids)
        self.channel = channel
        self.choice = choice
        self.num_prompt_tokens = len(message.prompt_token_ids) // 4
        self.num_cached_tokens = 0
        self.num_draft_tokens = 0
        """Drafts that were verified."""
        self.num_accepted_tokens = 0
        """Of these, drafts that were accepted."""
        self.suspicion: Suspicion | None = None
        """Deaths of engine cores that this request is suspected of."""
        self.suspected_at = 0
        """Number of output tokens at the last of these deaths."""
        self.pooling_output: npt.NDArray[np.float32] | None = None
        """The result of a pooling request."""
        self.finished = False
        self.arrival_time = message.arrival_time
        self.siblings: Siblings | None = None
        """The completions that the client requested together, including this one."""
        self.trace_headers: Mapping[str, str] | None = None
        """The client's trace context headers, if tracing is on."""
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time = 0.0
        self.min_tokens = options.min_tokens
        self.is_part = options.is_part
        self.hides_stop_token = not options.include_stop_str_in_output
        """Omit the token that ends the output from the text."""
        self.tokenizer = tokenizer
        self.detokenizer: IncrementalDetokenizer | None = None
        self.stop_search: StopSearch | None = None
        if options.detokenize and tokenizer is not None:
            self.detokenizer = IncrementalDetokenizer(
                tokenizer,
                i32(message.prompt_token_ids)[-64:].tolist(),
                options.skip_special_tokens,
                options.spaces_between_special_tokens,
                options.kept_special_ids,
            )
            if options.stop or options.stop_regex:
                self.stop_search = StopSearch(options.stop, options.stop_regex, options.include_stop_str_in_output)

    def note_drafts(self, num_verified: int, num_accepted: int) -> None:
        """Counts the drafts of a step."""
        self.num_draft_tokens += num_verified
        self.num_accepted_tokens += num_accepted

    def append_text(self, tokens: Sequence[int], num_tokens: int) -> tuple[str, str | None, int]:
        """Detokenizes tokens and searches their text for stop strings and patterns.

        Args:
            tokens: The next tokens.
            num_tokens: Length of the output before them.

        Returns:
            The text that is final; the stop string or pattern that ends it, if any; and the number of tokens read, up
            to the one that completes the stop.
        """
        detokenizer, search = self.detokenizer, self.stop_search
        if detokenizer is None:
            return "", None, len(tokens)
        if search is None:
            return detokenizer.extend(tokens), None, len(tokens)
        assert self.tokenizer is not None
        parts: list[str] = []
        matched: str | None = None
        num_read = 0
        for num_read, token in enumerate(tokens, 1):
            hidden = self.tokenizer.added_tokens.get(token, "") if token in detokenizer.skipped else ""
            part, matched = search.feed(detokenizer.append(token), hidden, num_tokens + num_read >= self.min_tokens)
            parts.append(part)
            if matched is not None:
                break
        return "".join(parts), matched, num_read

    def finish_text(self) -> tuple[str, str | None]:
        """Returns the text that was held back, and the stop that ends it, if any; no more tokens may follow."""
        text = "" if self.detokenizer is None else self.detokenizer.finish()
        if self.stop_search is None:
            return text, None
        text, matched = self.stop_search.feed(text, armed=len(self.output_token_ids) >= self.min_tokens)
        return text if matched is not None else text + self.stop_search.finish(), matched
