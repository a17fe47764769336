"""Collectives: ops of all ranks that share a model's layers, and ops on a rank's own shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ops.collective import Communicator
from ops.dispatch import Op, Spec, like_first, op

P = ParamSpec("P")
R = TypeVar("R")


class CollectiveOp(Op[P, R]):
    """An op of all ranks of a communicator, its second argument. With a single rank it is the identity and records no
    node."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]
        communicator: Any = args[1]
        return x if communicator.size == 1 else super().__call__(*args, **kwargs)


def collective(infer: Callable[..., Spec]) -> Callable[[Callable[P, R]], CollectiveOp[P, R]]:
    """Declares a collective; see ``ops.dispatch.op``."""
    return lambda reference: CollectiveOp(reference, infer)


@collective(like_first)
def all_reduce(x: Tensor, communicator: Communicator) -> Tensor:
    """The sum of the ranks' ``x``; see ``Communicator``."""
    return communicator.all_reduce(x)


@collective(lambda x, communicator, widths: Spec(x.spec.rows, sum(widths), x.spec.dtype))
def all_gather(x: Tensor, communicator: Communicator, widths: tuple[int, ...]) -> Tensor:
    """The ranks' ``x`` side by side; see ``Communicator``."""
    return communicator.all_gather(x, widths)


@collective(like_first)
def select_rows(x: Tensor, communicator: Communicator, is_here: Tensor) -> Tensor:
    """Each row of ``x`` from the rank that has it; see ``Communicator``."""
    return communicator.select_rows(x, is_here)


@op(lambda ids, first, count: (ids.spec, Spec(ids.spec.rows, 1, torch.bool)))
def shard_ids(ids: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Maps token ids to rows of a rank's shard of a table.

    Args:
        ids: int32 [num_tokens].
        first: Id of the shard's first row.
        count: Rows of the shard.

    Returns:
        int32 [num_tokens], the row, 0 for ids outside the shard; bool [num_tokens], whether the id is in the shard.
    """
    is_here = (ids >= first) & (ids < first + count)
    return torch.where(is_here, ids - first, 0), is_here


@op(like_first)
def keep_rows(x: Tensor, kept: Tensor) -> Tensor:
    """Zeroes the rows that are not kept. If each rank keeps its own rows, the sum over ranks assembles them.

    Args:
        x: [rows, width].
        kept: bool [rows].
    """
    return torch.where(kept.unsqueeze(1), x, 0)
