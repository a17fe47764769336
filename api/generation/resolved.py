"""A request for completions with its parameters resolved, as all code after the request's handler uses it."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from api.engine.queue_bound import NOBODY, Tenant
from api.engine.request_state import OutputOptions
from api.params.sampling import SamplingParams
from engine_core.messages import GrammarSpec, MultiModalFeature, ResolvedParams


@dataclass(frozen=True)
class ResolvedRequest:
    """What all completions of a request share. Created by ``ServedModel.resolve``."""

    params: SamplingParams
    """The requested parameters, with the server's defaults."""
    engine_params: ResolvedParams
    """The same as numbers and token ids. Length and thinking budget depend on the prompt, seeds on the completion."""
    options: OutputOptions
    grammar: GrammarSpec | None = None
    """The grammar of the outputs."""
    priority: int = 0
    cache_salt: str = ""
    tenant: Tenant = NOBODY
    """Whom the request is for."""
    opened: bool | UnsetType | None = UNSET
    """Whether the prompt of a conversation has begun or ended the reasoning; unset: it is not a conversation."""
    mm_features: tuple[MultiModalFeature, ...] = ()
    """Images of the prompt, of a request with one prompt."""
    holds_in_reasoning: bool = False
    """The grammar applies from the first token."""
