"""A worker's place among the workers that share a model."""

from __future__ import annotations

from dataclasses import dataclass

from executor.config import ParallelConfig


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


def places(config: ParallelConfig) -> list[ParallelState]:
    """The place of each worker, by rank: ordered by pipeline stage, then by tensor parallel rank.

    The output rank is the first rank of the last stage.
    """
    tp_size, pp_size = config.tensor_parallel_size, config.pipeline_parallel_size
    cells = [(stage, shard) for _ in range(config.num_mirrors) for stage in range(pp_size) for shard in range(tp_size)]
    output_rank = (pp_size - 1) * tp_size
    return [
        ParallelState(shard, tp_size, stage, pp_size, rank, is_output_rank=rank == output_rank)
        for rank, (stage, shard) in enumerate(cells)
    ]
