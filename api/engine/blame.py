"""Requests that ended the engine must not do so again soon."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

import msgspec

from api.errors import RequestError
from engine_core.messages import EngineCoreRequest

REFUSAL_TIME = 600.0
"""Seconds for which a request is refused that ended the engine."""
MAX_CULPRITS = 1024
"""Requests that are remembered; the oldest are forgotten first."""
CULPRIT_ERROR = (
    "this request repeatedly crashed the engine; "
    f"the same request is rejected for the next {REFUSAL_TIME / 60:.0f} minutes"
)


def fingerprint(request: EngineCoreRequest) -> bytes:
    """Tells what a request asks of the engine, not who asks and when; another seed is the same request."""
    params = request.sampling_params
    asked = (
        None if params is None else msgspec.structs.replace(params, seed=0),
        request.pooling_params,
        request.grammar,
        request.lora_request,
        request.mm_features,
    )
    digest = hashlib.blake2b(msgspec.msgpack.encode(asked), digest_size=16)
    for column in (request.prompt_token_ids, request.resumed_output_token_ids):
        digest.update(len(column).to_bytes(8, "little") + column)
    return digest.digest()


class Culprits:
    """Remembers requests that ended the engine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def add(self, request: EngineCoreRequest) -> bytes:
        """Refuses a request from now on. Returns its fingerprint."""
        known = fingerprint(request)
        self._until.pop(known, None)
        self._until[known] = self._clock() + REFUSAL_TIME
        while len(self._until) > MAX_CULPRITS:
            del self._until[next(iter(self._until))]
        return known

    def check(self, request: EngineCoreRequest) -> None:
        """Lets a request pass, unless it is one of them.

        Raises:
            RequestError: With the time for which it stays refused.
        """
        if not self._until:
            return
        known = fingerprint(request)
        seconds = self._until.get(known, 0.0) - self._clock()
        if seconds <= 0:
            self._until.pop(known, None)
            return
        wait = math.ceil(seconds)
        raise RequestError(
            f"This request repeatedly crashed the engine and is rejected for another {wait} s; change it or wait.",
            status=422,
            kind="UnprocessableEntityError",
            headers={"Retry-After": str(wait), "x-should-retry": "false"},
        )
