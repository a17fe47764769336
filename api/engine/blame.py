"""Rejects requests that crashed the engine, so that they cannot do it again soon."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

import msgspec

from api.errors import RequestError
from engine_core.messages import EngineCoreRequest

REFUSAL_TIME = 600.0
"""Seconds for which a request that crashed the engine is rejected."""
MAX_CULPRITS = 1024
"""Maximum number of remembered requests; the oldest are forgotten first."""
CULPRIT_ERROR = (
    "this request repeatedly crashed the engine; "
    f"the same request is rejected for the next {REFUSAL_TIME / 60:.0f} minutes"
)


def fingerprint(request: EngineCoreRequest) -> bytes:
    """Hash of the work that a request asks for, whoever sends it and when; the seed does not count."""
    params = request.sampling_params
    asked = (
        None if params is None else msgspec.structs.replace(params, seed=0),
        request.pooling_params,
        request.grammar,
        request.lora_request,
        [(each.identifier, each.offset) for each in request.mm_features],  # hashes stand for what may be large
    )
    digest = hashlib.blake2b(msgspec.msgpack.encode(asked), digest_size=16)
    for column in (request.prompt_token_ids, request.resumed_output_token_ids):
        digest.update(len(column).to_bytes(8, "little") + column)
    return digest.digest()


class Culprits:
    """Remembers requests that crashed the engine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def add(self, request: EngineCoreRequest) -> bytes:
        """Rejects a request from now on. Returns its fingerprint."""
        known = fingerprint(request)
        self._until.pop(known, None)
        self._until[known] = self._clock() + REFUSAL_TIME
        while len(self._until) > MAX_CULPRITS:
            del self._until[next(iter(self._until))]
        return known

    def check(self, request: EngineCoreRequest) -> None:
        """Rejects a request that crashed the engine recently.

        Raises:
            RequestError: 422, with the seconds for which the request is still rejected.
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
