"""A worker's place among the workers that share a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """Descriptor of an empty file that all ranks of this machine share (``SharedByRanks``); -1: there is none. With
    ``store``: the listening socket of the store, on rank 0."""
    store: tuple[str, int] | None = None
    """Host and port of the store through which ranks with memory of their own find those of other machines; None: there
    are none."""
    interface: str = ""
    """Network interface over which they then exchange data."""
    expert_parallel: bool = False
    """Ranks have whole experts."""
    node_rank: int = 0
    """The machine of the rank, out of ``ParallelConfig.nnodes``."""
    local_rank: int = 0
    """Rank among the workers of its machine."""


def hidden_event(rank: int) -> str:
    """Name of the event that hidden states have come for a rank."""
    return f"hidden.{rank}"


def tokens_event(rank: int) -> str:
    """Name of the event that tokens have come for a rank."""
    return f"tokens.{rank}"


def columns_event(rank: int, sender: int) -> str:
    """Name of the event that columns of another machine's ranks have come for a rank."""
    return f"columns.{rank}.{sender}"


def places(config: ParallelConfig) -> list[ParallelState]:
    """The place of each worker, by rank: ordered by pipeline stage, then by tensor parallel rank.

    The output rank is the first rank of the last stage. Each machine has consecutive stages; if there are more machines
    than stages, each stage has as many of them, with consecutive ranks of it.
    """
    tp_size, pp_size = config.tensor_parallel_size, config.pipeline_parallel_size
    cells = [(stage, shard) for _ in range(config.num_mirrors) for stage in range(pp_size) for shard in range(tp_size)]
    output_rank = (pp_size - 1) * tp_size
    nodes = _nodes(config)
    of_node: Counter[int] = Counter()
    result = []
    for rank, (stage, shard) in enumerate(cells):
        node = nodes[rank % len(nodes)]
        result.append(
            ParallelState(
                shard,
                tp_size,
                stage,
                pp_size,
                rank,
                is_output_rank=rank == output_rank,
                node_rank=node,
                local_rank=of_node[node],
                expert_parallel=config.enable_expert_parallel,
            )
        )
        of_node[node] += 1
    return result


def _nodes(config: ParallelConfig) -> list[int]:
    """The machine of each rank of one copy of the model."""
    tp_size, pp_size, nnodes = config.tensor_parallel_size, config.pipeline_parallel_size, config.nnodes
    if nnodes <= pp_size:
        shares = split_evenly(pp_size, nnodes)
        return [node for node, share in enumerate(shares) for _ in range(share.size * tp_size)]
    each = nnodes // pp_size
    return [
        stage * each + node
        for stage in range(pp_size)
        for node, share in enumerate(split_evenly(tp_size, each))
        for _ in range(share.size)
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
    group = leaders(ranks, own)
    if own in group:
        result |= {columns_event(own.rank, each.rank): each for each in group if each != own}
    return result


def leaders(ranks: Sequence[ParallelState], own: ParallelState) -> list[ParallelState]:
    """The ranks that exchange columns with other machines, the first of each machine that has ranks of a stage.

    Args:
        ranks: All ranks, in order, of one copy of the model.
        own: One of the stage.
    """
    first: dict[int, ParallelState] = {}
    for each in ranks:
        if each.pp_rank == own.pp_rank:
            first.setdefault(each.node_rank, each)
    return list(first.values())


def near_place(ranks: Sequence[ParallelState], own: ParallelState) -> ParallelState:
    """A rank's place among those of its stage on its machine, as if there were no others.

    Args:
        ranks: All ranks, in order.
        own: One of them.
    """
    near = [each for each in ranks if (each.pp_rank, each.node_rank) == (own.pp_rank, own.node_rank)]
    return replace(own, tp_rank=own.tp_rank - near[0].tp_rank, tp_size=len(near))
