"""Ranks: a worker's place among those that share a model, and its share of the model."""

from executor.parallel.cores import about_ranks, numa_nodes, split_cores, thread_places
from executor.parallel.memory import (
    RANKS,
    RENDEZVOUS,
    STAGES,
    SharedByRanks,
    create_shared_memory,
)
from executor.parallel.split import HeadShare, Share, split_columns, split_evenly, split_heads, split_layers
from executor.parallel.state import (
    ParallelState,
    awaited_from_afar,
    columns_event,
    hidden_event,
    leaders,
    near_place,
    num_sharers,
    places,
    tokens_event,
)

__all__ = [
    "RANKS",
    "RENDEZVOUS",
    "STAGES",
    "HeadShare",
    "ParallelState",
    "Share",
    "SharedByRanks",
    "about_ranks",
    "awaited_from_afar",
    "columns_event",
    "create_shared_memory",
    "hidden_event",
    "leaders",
    "near_place",
    "num_sharers",
    "numa_nodes",
    "places",
    "split_columns",
    "split_cores",
    "split_evenly",
    "split_heads",
    "split_layers",
    "thread_places",
    "tokens_event",
]
