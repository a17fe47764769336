"""The engine core's view of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine_core.fair_shares import Account
from engine_core.messages import I32, EngineCoreRequest, ResolvedParams, Suspicion, TokenLogprobs, i32
from engine_core.repetition import RepetitionDetector
from engine_core.single_type_kv_cache_manager import BlockTable

if TYPE_CHECKING:
    from engine_core.structured.request_grammar import RequestGrammar

MAX_STOP_IDS = 8
"""Maximum stop token ids compared for all rows at once; a request with more takes the slow path."""


class Request:
    """One request from arrival to its last token.

    While it runs, state that changes every step lives in the scheduler's arrays by slot; this holds its identity and
    the state that survives a preemption.
    """

    __slots__ = (
        "account",
        "block_hashes",
        "block_tables",
        "grammar",
        "index",
        "message",
        "num_cached_tokens",
        "num_kept_tokens",
        "num_prefix_tokens",
        "num_prompt_tokens",
        "params",
        "prompt_logprobs",
        "repetition",
        "scheduled_time",
        "slot",
        "suspicion",
        "token_ids",
    )

    def __init__(self, message: EngineCoreRequest) -> None:
        self.message = message
        self.index = message.index
        self.params = message.sampling_params or ResolvedParams(max_tokens=1)
        prompt = i32(message.prompt_token_ids)
        self.num_prompt_tokens = len(prompt)
        outputs = i32(message.resumed_output_token_ids)
        # Completions of one prompt share its bytes, so avoid copying them.
        self.token_ids: I32 = np.concatenate((prompt, outputs)) if len(outputs) else prompt
        """Prompt and confirmed output; up to date while the request waits. Read-only."""
        self.slot = -1
        self.block_tables: list[BlockTable] = []
        """One per KV cache group while the request runs; empty while it waits, unless it keeps what it has computed."""
        self.block_hashes: dict[int, list[bytes]] = {}
        """Block size -> hashes of the full blocks of all known tokens."""
        self.num_kept_tokens = 0
        """While it waits: tokens computed in the blocks that it keeps."""
        self.num_prefix_tokens = 0
        """While it runs: tokens that were computed when it started."""
        self.num_cached_tokens: int | None = None
        self.scheduled_time: float | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        wanted = self.params.repetition_detection
        self.repetition = (
            None if wanted is None else RepetitionDetector(wanted, self.token_ids[self.num_prompt_tokens :])
        )
        self.grammar: RequestGrammar | None = None
        """State of the grammar; set once it is compiled."""
        self.account: Account
        """The tenant's account; set when the request is added to the scheduler."""
        self.suspicion: Suspicion | None = message.suspicion
        """Deaths that implicate this request; None once it has passed the position at which they happened."""

    @property
    def grammar_param(self) -> str | None:
        """The field of the client's request to blame if the grammar cannot be satisfied."""
        grammar = self.message.grammar
        return None if grammar is None else grammar.param

    @property
    def is_special(self) -> bool:
        """Whether its tokens take the slow path, row by row instead of vectorised over all rows."""
        params = self.params
        many_stops = len(params.all_stop_token_ids) > MAX_STOP_IDS
        return params.logprobs is not None or many_stops or self.repetition is not None

    @property
    def is_pooling(self) -> bool:
        return self.message.pooling_params is not None

    @property
    def needs_all_positions(self) -> bool:
        """Whether the whole prompt must be computed, even if parts of it are cached."""
        pooling = self.message.pooling_params
        return self.params.needs_all_positions if pooling is None else pooling.needs_all_positions

    @property
    def priority(self) -> tuple[int, float, int]:
        """Sort key, most urgent first."""
        return self.message.priority, self.message.arrival_time, self.index
