"""Limits how many requests may wait for the engine, and rejects the others with a time to retry.

A request that would wait longer than clients do is better rejected at once. By Little's law this gives a maximum queue
length: the measured rate at which requests leave the queue times the maximum wait. Prompt tokens have the same kind of
limit, so that a few long prompts count by their length. As many requests as can run may always wait, since such a queue
takes no longer than the requests before it. A burst that reaches a server with free slots may also wait, within wider
limits.

A full queue still accepts requests of tenants who use less than their share of it. These are counted separately, and
limited as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from api.errors import RequestError
from engine_core.config import SchedulerConfig
from engine_core.messages import EngineReady

MAX_WAIT = 30.0
"""Maximum expected wait in seconds, by the measured rates."""
MAX_QUEUED_REQS = 2048
"""Default limit, however fast the engine is: each request holds a connection and a prompt in memory."""
MAX_QUEUED_TOKENS = 16 << 20
"""The same for prompt tokens, each of which takes four bytes in two processes."""
BURST_TIME = 5.0
"""Seconds after a request last found a free slot in which only these two limits apply: a burst is not yet overload."""
AVERAGING_TIME = 30.0
"""Time constant in seconds over which rates are averaged."""
MIN_MEASURED = 1.0
"""Seconds of measurement before the rates are used."""
MAX_RETRY_AFTER = 60
"""Seconds; clients ignore larger values."""

Tenant: TypeAlias = tuple[str, str]
"""Short names of an API key and of one of its users."""
NOBODY: Tenant = ("", "")


def queue_full(seconds: int) -> RequestError:
    """The error for a request that is not accepted into the queue."""
    return RequestError(
        f"The server is busy and too many requests are waiting. Please try again in {seconds} s.",
        status=429,
        kind="RateLimitError",
        headers={"Retry-After": str(seconds)},
    )


class _Rates:
    """Rates at which requests and prompt tokens leave the queue, measured while it is not empty."""

    def __init__(self) -> None:
        self._requests = 0.0
        self._tokens = 0.0
        self._busy = 0.0
        """Seconds with requests in the queue, decayed exponentially like the other counts."""

    def advance(self, seconds: float) -> None:
        """Records time during which requests waited."""
        kept = math.exp(-seconds / AVERAGING_TIME)
        self._requests *= kept
        self._tokens *= kept
        self._busy = self._busy * kept + AVERAGING_TIME * (1 - kept)

    def count(self, num_tokens: int) -> None:
        """Records that a request left the queue."""
        self._requests += 1
        self._tokens += num_tokens

    @property
    def requests(self) -> float:
        """Requests per second; 0 if not known yet."""
        return self._requests / self._busy if self._busy >= MIN_MEASURED else 0.0

    @property
    def tokens(self) -> float:
        return self._tokens / self._busy if self._busy >= MIN_MEASURED else 0.0


@dataclass
class _Load:
    """What waits in the queue in total, or for one key or user."""

    num_reqs: int = 0
    num_tokens: int = 0
    users: dict[str, _Load] = field(default_factory=dict)
    """Loads of a key's users."""

    def add(self, num_reqs: int, num_tokens: int) -> None:
        self.num_reqs += num_reqs
        self.num_tokens += num_tokens


class _Bounds(NamedTuple):
    """Maximum size of the queue."""

    num_reqs: int
    num_tokens: float

    def share(self, load: _Load | None, count: int = 0, num_tokens: int = 0) -> float:
        """Fraction of the queue that a load would use with additional requests and tokens; 1 is all of it."""
        if load is not None:
            count += load.num_reqs
            num_tokens += load.num_tokens
        return max(count / self.num_reqs if self.num_reqs else math.inf, num_tokens / max(self.num_tokens, 1))


class _Entry(NamedTuple):
    tenant: Tenant
    num_tokens: int
    is_extra: bool


class QueueBound:
    """The queue of one engine as seen by the api process: requests without any output yet."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        enabled: bool = True,
        on_refused: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Creates an empty queue.

        Args:
            config: Its limits, if configured.
            enabled: False: accept all requests.
            on_refused: Called for each rejection.
            clock: Returns the time in seconds.
        """
        self.num_unfinished = 0
        """Requests that wait or run."""
        self.is_saturated = False
        """The engine last reported waiting requests, so new ones wait as well, even if there are free slots."""
        self._config = config
        self._enabled = enabled
        self._on_refused = on_refused
        self._clock = clock
        self._rates = _Rates()
        self._entries: dict[int, _Entry] = {}
        """Waiting requests by index."""
        self._all = _Load()
        self._keys: dict[str, _Load] = {}
        self._extra = _Load()
        """Requests accepted although the queue was full."""
        self._kv_tokens = 0
        self._seen_at = clock()
        self._calm_at = -math.inf
        """When a request last found a free slot."""
        self._promised = 0.0
        """When the last rejected client was told to retry."""

    def on_ready(self, ready: EngineReady) -> None:
        """Records the size of the engine's KV cache."""
        self._kv_tokens = ready.num_kv_blocks * ready.block_size

    def __len__(self) -> int:
        return len(self._entries)

    # -- requests come and go ------------------------------------------------------------------------------

    def enter(self, index: int, tenant: Tenant, num_tokens: int, *, is_extra: bool = False) -> None:
        """Adds a waiting request.

        Args:
            index: Index of the request.
            tenant: Whom the request is for.
            num_tokens: Tokens of its prompt.
            is_extra: The result of ``check``.
        """
        self._advance()
        entry = self._entries[index] = _Entry(tenant, num_tokens, is_extra)
        self._add(entry, 1)

    def begin(self, index: int) -> None:
        """Records that a request got its first output."""
        entry = self._entries.get(index)
        if entry is not None:
            self.leave(index)
            self._rates.count(entry.num_tokens)

    def leave(self, index: int) -> None:
        """Removes a request that no longer waits, for whatever reason."""
        entry = self._entries.get(index)
        if entry is not None:
            self._advance()
            del self._entries[index]
            self._add(entry, -1)

    def _add(self, entry: _Entry, sign: int) -> None:
        key, user = entry.tenant
        of_key = self._keys.setdefault(key, _Load())
        of_user = of_key.users.setdefault(user, _Load())
        for load in (self._all, of_key, of_user, *((self._extra,) if entry.is_extra else ())):
            load.add(sign, sign * entry.num_tokens)
        if not of_user.num_reqs:
            del of_key.users[user]
        if not of_key.num_reqs:
            del self._keys[key]

    def _advance(self) -> None:
        now = self._clock()
        if self._entries:
            self._rates.advance(now - self._seen_at)
        self._seen_at = now

    # -- admission -----------------------------------------------------------------------------------------

    def check(self, tenant: Tenant, count: int = 1, num_tokens: int = 0) -> bool:
        """Rejects requests for which there is no room.

        Args:
            tenant: Whom they are for.
            count: Number of requests; either all are accepted or none.
            num_tokens: Tokens of all their prompts; 0: not known yet.

        Returns:
            Whether they are accepted although the queue is full.

        Raises:
            RequestError: 429, with the seconds after which to retry.
        """
        bounds = self._bounds_if_tight(count, num_tokens)
        if bounds is None:
            return False
        if bounds.num_reqs and self._has_share(bounds, tenant, count, num_tokens):
            return True
        raise self._refuse(bounds, count, num_tokens)

    def check_key(self, key: str) -> None:
        """Rejects a request that could not be accepted for any user of the key.

        Raises:
            RequestError: As for ``check``.
        """
        bounds = self._bounds_if_tight(1, 0)
        if bounds is not None:
            of_key = self._keys.get(key)
            num_keys = len(self._keys) + (of_key is None)
            if bounds.share(self._extra) >= 1 or (of_key is not None and bounds.share(of_key) * num_keys >= 2):
                raise self._refuse(bounds, 1, 0)

    def _bounds_if_tight(self, count: int, num_tokens: int) -> _Bounds | None:
        """The limits if they would be exceeded; None if there is room."""
        num_slots = 0 if self.is_saturated else self._config.max_num_seqs - self.num_unfinished
        num_waiting = len(self._entries) if self.is_saturated else min(len(self._entries), max(0, -num_slots))
        if not self._enabled:
            return None
        if num_slots > 0 and not num_waiting:
            self._calm_at = self._clock()
            return None
        bounds = self._bounds()
        fits = num_waiting + count <= bounds.num_reqs and self._all.num_tokens + num_tokens <= bounds.num_tokens
        return None if fits else bounds

    def _bounds(self) -> _Bounds:
        config, rates = self._config, self._rates
        num_reqs = config.max_num_queued_reqs
        num_tokens: float | None = config.max_num_queued_tokens
        is_burst = self._clock() - self._calm_at < BURST_TIME
        if num_tokens is None:
            is_given = num_reqs is not None
            measured = MAX_QUEUED_TOKENS if is_burst else min(rates.tokens * MAX_WAIT, MAX_QUEUED_TOKENS)
            num_tokens = math.inf if is_given else max(measured, self._kv_tokens)
        if num_reqs is None:
            measured = MAX_QUEUED_REQS if is_burst else min(rates.requests * MAX_WAIT, MAX_QUEUED_REQS)
            num_reqs = max(int(measured), config.max_num_seqs)
        return _Bounds(num_reqs, num_tokens)

    def _has_share(self, bounds: _Bounds, tenant: Tenant, count: int, num_tokens: int) -> bool:
        """Whether a full queue accepts the tenant's requests.

        Keys have equal shares of the queue, and the users of a key equal shares of the key's. A tenant with nothing in
        the queue is accepted at least once.
        """
        if self._extra.num_reqs and bounds.share(self._extra, count, num_tokens) > 1:
            return False
        of_key = self._keys.get(tenant[0])
        if of_key is None:
            return bool(self._keys)
        share_of_key = bounds.share(of_key, count, num_tokens) * len(self._keys)
        if share_of_key <= 1:
            return True
        of_user = of_key.users.get(tenant[1])
        if of_user is None:
            return share_of_key <= 2
        share_of_user = bounds.share(of_user, count, num_tokens) * len(self._keys) * len(of_key.users)
        return share_of_key <= 2 and share_of_user <= 1

    def _refuse(self, bounds: _Bounds, count: int, num_tokens: int) -> RequestError:
        """The error with an estimate of when there will be room; consecutive rejections get increasing times."""
        self._on_refused()
        now = self._clock()
        rate, token_rate = self._rates.requests, self._rates.tokens
        excess = len(self._entries) + count - bounds.num_reqs
        excess_tokens = self._all.num_tokens + num_tokens - bounds.num_tokens
        wait = max(excess / rate if rate else 1.0, excess_tokens / token_rate if token_rate else 1.0, 1.0)
        after = self._promised + (count / rate if rate else 0.0)
        self._promised = min(max(now + wait, after), now + MAX_RETRY_AFTER)
        return queue_full(min(math.ceil(self._promised - now), MAX_RETRY_AFTER))
