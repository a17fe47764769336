"""Where this worker stands among the workers that share a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelState:
    """Ranks and sizes. Layers take their shard of each weight by them."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def divide(self, number: int, what: str) -> int:
        """This rank's share of a dimension that must split evenly.

        Raises:
            ValueError: It does not.
        """
        if number % self.tp_size:
            raise ValueError(f"{what} ({number}) does not divide by the tensor parallel size {self.tp_size}")
        return number // self.tp_size
