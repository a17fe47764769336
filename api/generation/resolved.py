"""A request for completions, resolved once: everything after its handler takes this."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from api.engine.queue_bound import NOBODY, Tenant
from api.engine.request_state import OutputOptions
from api.params.sampling import SamplingParams
from engine_core.messages import GrammarSpec, ResolvedParams


@dataclass(frozen=True)
class ResolvedRequest:
    """What all completions of a request share, however many there are. ``ServedModel.resolve`` makes it."""

    params: SamplingParams
    """What was asked for, with the server's defaults."""
    engine_params: ResolvedParams
    """The same as numbers and token ids. Length and thinking budget depend on the prompt, seeds on the completion."""
    options: OutputOptions
    grammar: GrammarSpec | None = None
    """The language that the outputs must be in."""
    priority: int = 0
    cache_salt: str = ""
    tenant: Tenant = NOBODY
    """Who it is for."""
    opened: bool | UnsetType | None = UNSET
    """Whether the prompt of a conversation has begun the reasoning or ended it; unset: it is no conversation."""
    holds_in_reasoning: bool = False
    """The grammar holds from the first token on."""
