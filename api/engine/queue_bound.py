"""How many requests may wait for the engine, and what those are told that may not.

What would wait longer than anybody waits is better refused at once. By Little's law that is a number of requests: the
rate at which they leave the queue, which is measured, times the longest wait; the same with prompt tokens, so that a
few long prompts count for what they are. As much may always wait as may run: such a queue takes no longer than the
requests before it. What comes at once to a server that had room may wait, too, within wider bounds.

A full queue still takes requests of tenants who have less than their share of it waiting. Those are counted apart, and
bounded as well.
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
"""Seconds that requests may have to wait by the measured rates."""
MAX_QUEUED_REQS = 2048
"""Bound where none is configured, however fast the engine is: each has a connection and a prompt in memory."""
MAX_QUEUED_TOKENS = 16 << 20
"""The same for prompt tokens, of which each takes four bytes in two processes."""
BURST_TIME = 5.0
"""Seconds after a calm moment in which only these two bounds hold: many requests at once are no overload yet."""
AVERAGING_TIME = 30.0
"""Seconds of work over which rates are averaged."""
MIN_MEASURED = 1.0
"""Seconds of work before rates mean something."""
MAX_RETRY_AFTER = 60
"""Seconds; clients ignore more."""

Tenant: TypeAlias = tuple[str, str]
"""Short names of an API key and of one of its users."""
NOBODY: Tenant = ("", "")


def queue_full(seconds: int) -> RequestError:
    """The error for a request that may not wait."""
    return RequestError(
        f"The server is busy and too many requests are waiting. Please try again in {seconds} s.",
        status=429,
        kind="RateLimitError",
        headers={"Retry-After": str(seconds)},
    )


class _Rates:
    """Requests and prompt tokens that leave the queue per second, as long as there is one."""

    def __init__(self) -> None:
        self._requests = 0.0
        self._tokens = 0.0
        self._busy = 0.0
        """Seconds with requests in the queue, the older the less they count; the others in the same way."""

    def advance(self, seconds: float) -> None:
        """Time went by in which requests waited."""
        kept = math.exp(-seconds / AVERAGING_TIME)
        self._requests *= kept
        self._tokens *= kept
        self._busy = self._busy * kept + AVERAGING_TIME * (1 - kept)

    def count(self, num_tokens: int) -> None:
        """A request left the queue."""
        self._requests += 1
        self._tokens += num_tokens

    @property
    def requests(self) -> float:
        """Per second; 0 if it is not known yet."""
        return self._requests / self._busy if self._busy >= MIN_MEASURED else 0.0

    @property
    def tokens(self) -> float:
        return self._tokens / self._busy if self._busy >= MIN_MEASURED else 0.0


@dataclass
class _Load:
    """What waits for somebody."""

    num_reqs: int = 0
    num_tokens: int = 0
    users: dict[str, _Load] = field(default_factory=dict)
    """Of a key."""

    def add(self, num_reqs: int, num_tokens: int) -> None:
        self.num_reqs += num_reqs
        self.num_tokens += num_tokens


class _Bounds(NamedTuple):
    """What may wait."""

    num_reqs: int
    num_tokens: float

    def share(self, load: _Load | None, count: int = 0, num_tokens: int = 0) -> float:
        """The part of the queue that a load takes together with more requests and tokens; 1 is all of it."""
        if load is not None:
            count += load.num_reqs
            num_tokens += load.num_tokens
        return max(count / self.num_reqs if self.num_reqs else math.inf, num_tokens / max(self.num_tokens, 1))


class _Entry(NamedTuple):
    tenant: Tenant
    num_tokens: int
    is_extra: bool


class QueueBound:
    """The queue of one engine as the api sees it: requests that had no output yet."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        enabled: bool = True,
        on_refused: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares.

        Args:
            config: The bounds, where they are given.
            enabled: False: everything may wait.
            on_refused: Called for each refusal.
            clock: Seconds.
        """
        self.num_unfinished = 0
        """Requests that wait or run."""
        self.is_saturated = False
        """The engine said last that requests wait: what comes now waits as well, even if there are slots."""
        self._config = config
        self._enabled = enabled
        self._on_refused = on_refused
        self._clock = clock
        self._rates = _Rates()
        self._entries: dict[int, _Entry] = {}
        """By index of the request."""
        self._all = _Load()
        self._keys: dict[str, _Load] = {}
        self._extra = _Load()
        """What came in although the queue was full."""
        self._kv_tokens = 0
        self._seen_at = clock()
        self._calm_at = -math.inf
        """When a request came last that found a slot free."""
        self._promised = 0.0
        """When the last of those who were told to come back will come."""

    def on_ready(self, ready: EngineReady) -> None:
        """Takes note of what the engine has room for."""
        self._kv_tokens = ready.num_kv_blocks * ready.block_size

    def __len__(self) -> int:
        return len(self._entries)

    # -- requests come and go ------------------------------------------------------------------------------

    def enter(self, index: int, tenant: Tenant, num_tokens: int, *, is_extra: bool = False) -> None:
        """A request waits from now on.

        Args:
            index: Of the request.
            tenant: Who it is for.
            num_tokens: Of its prompt.
            is_extra: What ``check`` said.
        """
        self._advance()
        entry = self._entries[index] = _Entry(tenant, num_tokens, is_extra)
        self._add(entry, 1)

    def begin(self, index: int) -> None:
        """A request had its first output."""
        entry = self._entries.get(index)
        if entry is not None:
            self.leave(index)
            self._rates.count(entry.num_tokens)

    def leave(self, index: int) -> None:
        """A request waits no more, for whatever reason."""
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

    # -- who may come in -----------------------------------------------------------------------------------

    def check(self, tenant: Tenant, count: int = 1, num_tokens: int = 0) -> bool:
        """Refuses requests that there is no room for.

        Args:
            tenant: Who they are for.
            count: How many there are; they come in together or not at all.
            num_tokens: Of all their prompts; 0: not known yet.

        Returns:
            Whether they come in although the queue is full.

        Raises:
            RequestError: 429, with the seconds after which to try again.
        """
        bounds = self._bounds_if_tight(count, num_tokens)
        if bounds is None:
            return False
        if bounds.num_reqs and self._has_share(bounds, tenant, count, num_tokens):
            return True
        raise self._refuse(bounds, count, num_tokens)

    def check_key(self, key: str) -> None:
        """Refuses what could not come in whichever user of the key it is for.

        Raises:
            RequestError: As in ``check``.
        """
        bounds = self._bounds_if_tight(1, 0)
        if bounds is not None:
            of_key = self._keys.get(key)
            num_keys = len(self._keys) + (of_key is None)
            if bounds.share(self._extra) >= 1 or (of_key is not None and bounds.share(of_key) * num_keys >= 2):
                raise self._refuse(bounds, 1, 0)

    def _bounds_if_tight(self, count: int, num_tokens: int) -> _Bounds | None:
        """What may wait, if that is too little; None if there is room."""
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
        """Whether the tenant may come into a full queue: keys have equal shares of it, and the users of a key have
        equal shares of that; who has nothing there may come in at least once.
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
        """Tells when there will be room: those who are told one after another come back one after another."""
        self._on_refused()
        now = self._clock()
        rate, token_rate = self._rates.requests, self._rates.tokens
        excess = len(self._entries) + count - bounds.num_reqs
        excess_tokens = self._all.num_tokens + num_tokens - bounds.num_tokens
        wait = max(excess / rate if rate else 1.0, excess_tokens / token_rate if token_rate else 1.0, 1.0)
        after = self._promised + (count / rate if rate else 0.0)
        self._promised = min(max(now + wait, after), now + MAX_RETRY_AFTER)
        return queue_full(min(math.ceil(self._promised - now), MAX_RETRY_AFTER))
