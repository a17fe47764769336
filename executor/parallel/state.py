"""A worker's place among the workers that share a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from executor.config import ParallelConfig
from executor.parallel.split import split_evenly


@dataclass(frozen=True)
class ParallelState:
    """Ranks and group sizes, which determine a layer's shard of each weight."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    rank: int = 0
    """Rank among all workers of the executor."""
    is_output_rank: bool = True
    """Whether this rank reports results. The others only report that a step is done."""
    memory_fd: int = -1
    """Descriptor of memory that the ranks of this machine share (``create_shared_memory``); -1: there is none."""
    rendezvous_fd: int = -1
    """Descriptor of an empty file that all ranks of this machine share (``SharedByRanks``); -1: there is none."""
    node_rank: int = 0
    """The machine of the rank, out of ``ParallelConfig.nnodes``."""
    local_rank: int = 0
    """Rank among the workers of its machine."""

    @property
    def events(self) -> tuple[str, str]:
        """Names of the events that this rank waits for; not every rank has both."""
        return hidden_event(self.rank), tokens_event(self.rank)


def hidden_event(rank: int) -> str:
    """Name of the event that hidden states have come for a rank."""
    return f"hidden.{rank}"


def tokens_event(rank: int) -> str:
    """Name of the event that tokens have come for a rank."""
    return f"tokens.{rank}"


def places(config: ParallelConfig) -> list[ParallelState]:
    """The place of each worker, by rank: ordered by pipeline stage, then by tensor parallel rank.

    The output rank is the first rank of the last stage. Each machine has consecutive stages.
    """
    tp_size, pp_size = config.tensor_parallel_size, config.pipeline_parallel_size
    cells = [(stage, shard) for _ in range(config.num_mirrors) for stage in range(pp_size) for shard in range(tp_size)]
    output_rank = (pp_size - 1) * tp_size
    nodes = [node for node, share in enumerate(split_evenly(pp_size, config.nnodes)) for _ in range(share.size)]
    return [
        ParallelState(
            shard,
            tp_size,
            stage,
            pp_size,
            rank,
            is_output_rank=rank == output_rank,
            node_rank=nodes[stage],
            local_rank=rank - nodes.index(nodes[stage]) * tp_size,
        )
        for rank, (stage, shard) in enumerate(cells)
    ]


def num_sharers(config: ParallelConfig, node_rank: int) -> int:
    """How many ranks of one copy of the model share a machine's memory."""
    return sum(each.node_rank == node_rank for each in places(config)) // config.num_mirrors


def awaited_from_afar(ranks: Sequence[ParallelState], own: ParallelState) -> dict[str, ParallelState]:
    """Which of a rank's events ranks of other machines cause, by name, and which rank that is.

    Args:
        ranks: All ranks, in order.
        own: One of them.
    """
    result = {}
    for each in ranks:
        if each.node_rank == own.node_rank:
            continue
        if each.pp_rank == own.pp_rank - 1 and each.tp_rank == 0:
            result[hidden_event(own.rank)] = each
        if each.is_output_rank and own.pp_rank < own.pp_size - 1:
            result[tokens_event(own.rank)] = each
    return result
