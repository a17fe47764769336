"""How a request of the journal goes to another engine core, and what it is still suspected of."""

from __future__ import annotations

import msgspec

from api.engine.request_state import RequestState
from engine_core.messages import EngineCoreRequest
from engine_core.restart import ISOLATE_DEATHS, MAX_DEATHS


def runs_alone(state: RequestState) -> bool:
    """Whether the engine core runs a request in isolation, because it is suspected of enough deaths."""
    return state.suspicion is not None and state.suspicion.num_deaths >= ISOLATE_DEATHS


def trial_order(state: RequestState) -> int:
    """Sort key for resubmission: isolated requests first, by increasing number of deaths, then all others."""
    return state.suspicion.num_deaths if state.suspicion is not None and runs_alone(state) else MAX_DEATHS


def clear_suspicion(state: RequestState) -> None:
    """Clears the suspicion of a request that has computed past the position at which it was suspected."""
    num_outputs = len(state.output_token_ids)
    num_known = state.num_prompt_tokens + num_outputs
    if state.suspicion is not None and num_outputs > state.suspected_at and num_known > state.suspicion.last:
        state.suspicion = None


def resumed_request(state: RequestState) -> EngineCoreRequest:
    """The message that resubmits a request to another engine core, with the output that it has emitted."""
    return msgspec.structs.replace(
        state.message,
        resumed_output_token_ids=state.output_token_ids.tobytes(),
        suspicion=state.suspicion,
    )
