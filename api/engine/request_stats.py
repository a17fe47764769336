"""How long the parts of a request took, as vLLM's users know it: ``RequestOutput.metrics``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from api.engine.request_state import RequestState


@dataclass
class RequestStateStats:
    """Of a prompt and all its completions; 0 stands for what did not happen."""

    num_generation_tokens: int = 0
    """Of all completions, up to and including the tokens that ended them."""
    arrival_time: float = 0.0
    """When the request came, in seconds since the epoch. The other moments are seconds of ``time.monotonic()``."""
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    """When the first of its completions began."""
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    """Seconds from its arrival to the first token."""


def request_stats(states: Sequence[RequestState]) -> RequestStateStats:
    """What the states of a request's completions, of which there is at least one, tell when they have ended."""
    arrival = min(state.arrival_time for state in states)
    first = min((state.first_token_time for state in states if state.first_token_time is not None), default=0.0)
    return RequestStateStats(
        num_generation_tokens=sum(len(state.output_token_ids) for state in states),
        arrival_time=time.time() - (time.monotonic() - arrival),
        queued_ts=arrival,
        scheduled_ts=min((state.scheduled_time for state in states if state.scheduled_time is not None), default=0.0),
        first_token_ts=first,
        last_token_ts=max(state.last_token_time for state in states),
        first_token_latency=first - arrival if first else 0.0,
    )
