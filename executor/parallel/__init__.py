"""Ranks: a worker's place among those that share a model, and its share of the model."""

from executor.parallel.cores import about_ranks, numa_nodes, split_cores
from executor.parallel.memory import create_shared_memory
from executor.parallel.split import HeadShare, Share, split_columns, split_heads
from executor.parallel.state import ParallelState, places

__all__ = [
    "HeadShare",
    "ParallelState",
    "Share",
    "about_ranks",
    "create_shared_memory",
    "numa_nodes",
    "places",
    "split_columns",
    "split_cores",
    "split_heads",
]
