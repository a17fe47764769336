"""The place of an engine among the replicas of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from api.engine.blame import Culprits
from api.engine.output import Queue
from api.engine.queue_bound import QueueBound
from api.engine.remote import RemoteReplicas
from api.errors import RequestError
from engine_core.messages import EngineReady

RANK_HEADER = "X-data-parallel-rank"
"""Header of a request for one of the replicas."""
INDEX_BITS = 40
"""Each replica numbers its requests in a range of its own, so that another can take them over."""


class Pool(Protocol):
    """What a client that is one of several replicas needs of the others."""

    queue: QueueBound
    """Their common queue."""
    culprits: Culprits
    """Requests that crashed any of them."""

    @property
    def events(self) -> Queue:
        """Is told of requests that begin and end."""

    def recovers(self, rank: int) -> None:
        """An engine serves, perhaps again."""

    def fails(self, rank: int) -> None:
        """An engine does not compute for now, or is dead for good: others may take over its requests."""

    def cache_lost(self, rank: int) -> None:
        """An engine's prefix cache is empty."""

    def convict(self, known: bytes) -> None:
        """Ends all requests with that fingerprint."""

    def objection(self, rank: int, ready: EngineReady) -> str | None:
        """Why an engine that is ready cannot be one of the replicas; None: it can."""


@dataclass(frozen=True)
class Place:
    """A client's place among the replicas of a model."""

    rank: int = 0
    """Number of the replica, which also labels its metrics."""
    local_rank: int = 0
    """Its number among those on this machine."""
    pool: Pool | None = None
    """None: no other replica is known here."""
    remote: RemoteReplicas | None = None
    """It is on another machine; None: on this one."""

    def shares(self, queue: QueueBound) -> tuple[QueueBound, Queue, Culprits]:
        """The queue, who is told of requests that begin and end, and the culprits: the pool's, or ``queue`` alone."""
        if self.pool is None:
            return queue, queue, Culprits()
        return self.pool.queue, self.pool.events, self.pool.culprits


ALONE = Place()


def no_such_rank(rank: int | None, ranks: Sequence[int]) -> RequestError:
    """The error for a request for a replica that does not exist."""
    known = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
    return RequestError(f"there is no data parallel rank {rank}; this server has {known}", RANK_HEADER)
