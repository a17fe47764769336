"""What a client of the engine asks for, apart from prompts and seeds."""

from __future__ import annotations

import time

import msgspec

from api.engine.queue_bound import NOBODY, Tenant
from api.engine.request_state import OutputOptions
from engine_core.messages import (
    EngineCoreRequest,
    GrammarSpec,
    LoRARequest,
    MultiModalFeature,
    ResolvedParams,
    ResolvedPoolingParams,
)


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """What requests that are submitted together have in common."""

    params: ResolvedParams | ResolvedPoolingParams
    options: OutputOptions
    priority: int = 0
    cache_salt: str = ""
    tenant: Tenant = NOBODY
    is_extra: bool = False
    """The result of ``check_queue``, which callers call first: submitting does not check the queue."""
    grammar: GrammarSpec | None = None
    """One that the engine cannot use ends the request with an error that has an ``error_param``."""
    mm_features: tuple[MultiModalFeature, ...] = ()
    lora_request: LoRARequest | None = None
    """The adapter to compute it with."""
    data_parallel_rank: int | None = None
    """The replica that must run it."""

    def request(
        self,
        request_id: str,
        index: int,
        prompt_token_ids: bytes,
        *,
        seed: int | None = None,
        output_token_ids: bytes = b"",
    ) -> EngineCoreRequest:
        """The message for the engine core.

        Args:
            request_id: Id of the request in logs.
            index: Its index.
            prompt_token_ids: int32.
            seed: Its seed, in place of the parameters'.
            output_token_ids: int32: the beginning of its output.
        """
        params = self.params
        if seed is not None and isinstance(params, ResolvedParams):
            params = msgspec.structs.replace(params, seed=seed)
        return EngineCoreRequest(
            request_id=request_id,
            index=index,
            prompt_token_ids=prompt_token_ids,
            sampling_params=params if isinstance(params, ResolvedParams) else None,
            pooling_params=params if isinstance(params, ResolvedPoolingParams) else None,
            arrival_time=time.monotonic(),
            priority=self.priority,
            cache_salt=self.cache_salt,
            tenant=self.tenant,
            resumed_output_token_ids=output_token_ids,
            grammar=self.grammar,
            mm_features=self.mm_features,
            lora_request=self.lora_request,
        )
