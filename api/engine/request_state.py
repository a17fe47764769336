"""One engine request as the api knows it: the journal from which it can be run again, and the state of its text."""

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
    """What is done with a request's tokens in this process."""

    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    kept_special_ids: frozenset[int] = frozenset()
    """Special tokens that stay in the text although others are left out."""
    detokenize: bool = True
    min_tokens: int = 0
    """Stop strings do not count before this many tokens."""
    is_part: bool = False
    """It is a part of a client's request, which is not counted as a request of its own."""


class Siblings:
    """The completions of one prompt that a client asked for together."""

    __slots__ = ("_longest", "_num_left")

    def __init__(self, count: int) -> None:
        self._num_left = count
        self._longest = 0

    def end(self, num_tokens: int) -> int | None:
        """One of them is over. Returns the tokens of the longest one once all are."""
        self._num_left -= 1
        self._longest = max(self._longest, num_tokens)
        return None if self._num_left else self._longest


class RequestState:
    """One engine request as the api knows it: its journal, and the state of its text."""

    __slots__ = (
        "arrival_time",
        "channel",
        "choice",
        "detokenizer",
        "finished",
        "first_token_time",
        "hides_stop_token",
        "index",
        "is_part",
        "last_token_time",
        "message",
        "min_tokens",
        "num_cached_tokens",
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
        self.message = message
        """What the engine was told: with ``output_token_ids`` the request's journal."""
        self.output_token_ids = array("i", message.resumed_output_token_ids)
        self.channel = channel
        self.choice = choice
        self.num_prompt_tokens = len(message.prompt_token_ids) // 4
        self.num_cached_tokens = 0
        self.suspicion: Suspicion | None = None
        """Deaths of engine cores that point at it."""
        self.suspected_at = 0
        """Output tokens at the last of them."""
        self.pooling_output: npt.NDArray[np.float32] | None = None
        """The result of a request that generates nothing."""
        self.finished = False
        self.arrival_time = message.arrival_time
        self.siblings: Siblings | None = None
        """Those that a client asked for together with it, itself included."""
        self.trace_headers: Mapping[str, str] | None = None
        """The client's headers that say which trace it is part of, where there are traces."""
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time = 0.0
        self.min_tokens = options.min_tokens
        self.is_part = options.is_part
        self.hides_stop_token = not options.include_stop_str_in_output
        """The token that ends the output is no part of the text."""
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

    def append_text(self, tokens: Sequence[int], num_tokens: int) -> tuple[str, str | None, int]:
        """Decodes tokens and searches their text for what ends the output.

        Args:
            tokens: They follow those that were decoded before.
            num_tokens: Length of the output without them.

        Returns:
            The text that is final; the stop string or pattern that ends it, if there is one; and how many of the tokens
            there are up to the one that completes it.
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
        """Text that was held back, and the stop that ends it, if there is one; nothing may follow."""
        text = "" if self.detokenizer is None else self.detokenizer.finish()
        if self.stop_search is None:
            return text, None
        text, matched = self.stop_search.feed(text, armed=len(self.output_token_ids) >= self.min_tokens)
        return text if matched is not None else text + self.stop_search.finish(), matched
