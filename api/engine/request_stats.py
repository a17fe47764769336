"""Timestamps of a request in vLLM's format: ``RequestOutput.metrics``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from api.engine.request_state import RequestState


@dataclass
class RequestStateStats:
    """Timestamps of a prompt and all its completions; 0 if an event did not happen."""

    num_generation_tokens: int = 0
    """Tokens of all completions, up to and including the tokens that ended them."""
    arrival_time: float = 0.0
    """When the request arrived, in seconds since the epoch. The other timestamps are ``time.monotonic()`` seconds."""
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    """When its first completion started to run."""
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    """Seconds from arrival to the first token."""


def request_stats(states: Sequence[RequestState]) -> RequestStateStats:
    """The timestamps of a finished request, from the states of its completions, of which there is at least one."""
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
