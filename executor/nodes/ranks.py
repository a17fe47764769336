"""Ranks of one pipeline stage on several machines.

Those of a machine exchange what they have in memory that they share, and the first one, its leader, with the leaders of
the other machines: so each byte crosses the network once. Nothing is added up, so results have the bits of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from executor.nodes.gloo import GlooGather, GlooMeeting
from executor.nodes.links import NetworkLinks, NetworkSource, NetworkTarget
from executor.parallel import ParallelState, columns_event, leaders
from executor.stages import as_bytes
from ops import Communicator

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gather(Protocol):
    """A leader's end of what connects the machines of a stage, whose leaders call it in the same order."""

    def gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The tensors of all machines, in order.

        Args:
            own: uint8 [sizes[this machine]].
            sizes: Bytes that each machine contributes.

        Returns:
            uint8 [sizes[machine]] of each.
        """


class LinkGather:
    """Sends to each other machine on a link of its own, encrypted. See ``Gather``."""

    def __init__(
        self, place: int, targets: Sequence[NetworkTarget | None], sources: Sequence[NetworkSource | None]
    ) -> None:
        """
        Args:
            place: This machine's, among those of the stage.
            targets: The links to all machines, None to itself.
            sources: Likewise, from them.
        """
        self._place = place
        self._targets, self._sources = targets, sources
        self._number = 0

    def gather(self, own: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        self._number += 1
        for target in self._targets:
            if target is not None:
                target.send(self._number, own)
        return [own if source is None else source.receive(self._number) for source in self._sources]


class MachineRank:
    """A rank of a group that has members on several machines; see ``ops.Communicator``."""

    cuts_sums = False
    shares_rows = False

    def __init__(self, near: Communicator, far: Gather | None, members: Sequence[int], place: int) -> None:
        """
        Args:
            near: Connects the ranks of this machine.
            far: Connects the leaders, of which this rank is one; None: it is not.
            members: Number of ranks on each machine.
            place: This machine's, among them.
        """
        self._near, self._far, self._place = near, far, place
        ends = [0, *accumulate(members)]
        self._spans = [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
        self.rank = ends[place] + near.rank
        self.size = ends[-1]

    def _across(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """The machines' tensors side by side: [rows, sum(widths)].

        Args:
            x: [rows, widths[this machine]], the same on all its ranks.
            widths: Columns that each machine contributes.
        """
        rows = len(x)
        out = x.new_empty((rows, sum(widths)))
        if not rows:
            return out
        if self._far is not None:
            own = torch.from_numpy(as_bytes(x))
            parts = self._far.gather(own, [rows * width * x.itemsize for width in widths])
            for columns, part, width in zip(out.split(list(widths), dim=1), parts, widths, strict=True):
                if width:
                    columns.copy_(part.view(x.dtype).view(rows, width))
        return out if self._near.size == 1 else self._near.broadcast(out)

    def all_reduce(self, x: Tensor) -> Tensor:
        raise NotImplementedError("ranks of CPUs do not add the results of products")

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        assert x.shape[1] == widths[self.rank]
        of_machines = [widths[span] for span in self._spans]
        own = self._near.all_gather(x, of_machines[self._place])
        return self._across(own, [sum(each) for each in of_machines])

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        width = x.shape[1]
        bits = torch.where(is_here.unsqueeze(1), x, 0).view(_BITS[x.itemsize])  # one rank has what is not zero
        own = _united(self._near.all_gather(bits, [width] * self._near.size), width)
        found: Tensor = _united(self._across(own, [width] * len(self._spans)), width).view(x.dtype)
        return found

    def broadcast(self, x: Tensor) -> Tensor:
        row = x.reshape(1, -1)
        widths = [row.shape[1] if rank == 0 else 0 for rank in range(self.size)]
        return self.all_gather(row[:, : widths[self.rank]], widths).view(x.shape)

    def wait(self) -> None:
        self._gathered(0)

    def agree(self, number: int, what: str) -> None:
        """Checks that all ranks have the same number.

        Raises:
            RuntimeError: One has another; the message names ``what``.
        """
        numbers = self._gathered(number)
        if set(numbers) != {number}:
            raise RuntimeError(f"ranks differ in {what}: {numbers}")

    def _gathered(self, number: int) -> list[int]:
        result: list[int] = self.all_gather(torch.tensor([[number]]), [1] * self.size)[0].tolist()
        return result


def _united(x: Tensor, width: int) -> Tensor:
    """The bits of all ranks: [rows, width] of integers [rows, ranks * width]."""
    united: Tensor = reduce(torch.bitwise_or, x.split(width, dim=1))
    return united


def join_machines(
    ranks: Sequence[ParallelState],
    own: ParallelState,
    near: Communicator,
    links: NetworkLinks,
    meeting: GlooMeeting | None = None,
) -> Communicator:
    """Connects a rank with those of its stage on other machines.

    Args:
        ranks: The places of all ranks.
        own: The place of this one.
        near: Connects those of its machine.
        links: With ranks of other machines.
        meeting: Where leaders meet who exchange columns by Gloo, not encrypted. None: the links take them.

    Raises:
        PeerLostError: The others cannot be reached.
    """
    first = leaders(ranks, own)
    if len(first) == 1:
        return near
    nodes = [each.node_rank for each in first]
    of_stage = [each.node_rank for each in ranks if each.pp_rank == own.pp_rank]
    place = nodes.index(own.node_rank)
    far: Gather | None = None
    if near.rank == 0 and meeting is not None:
        far = GlooGather(meeting, f"columns.{own.pp_rank}", place, nodes)
    elif near.rank == 0:
        targets = [links.targets.get(columns_event(each.rank, own.rank)) for each in first]
        sources = [links.sources.get(columns_event(own.rank, each.rank)) for each in first]
        far = LinkGather(place, targets, sources)
    return MachineRank(near, far, [of_stage.count(node) for node in nodes], place)
