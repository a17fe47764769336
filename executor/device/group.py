"""Ranks that have memory of their own, such as GPUs: torch.distributed moves data between them, and only data.

A library's sums have another order with each of its algorithms, so sums are taken by our kernels, in the order of the
ranks (``ops/triton/collectives.py``). All that is launched here is launched by all ranks in the same order, as their
plans are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions, FileStore, PrefixStore, Store

from executor.parallel import ParallelState
from executor.parallel.store import connect_store
from ops import PeerLostError

PATIENCE = timedelta(days=1)
"""How long an operation waits for other ranks. The engine core alone decides that they hang, and ends them."""
MUCH = 8 << 20
"""Bytes that a library moves in the way that it has for much."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GroupRank:
    """A rank of a pipeline stage; see ``ops.Communicator``, ``ops.Transport`` and ``device.base.StageTransfer``."""

    cuts_sums = True
    shares_rows = False

    def __init__(
        self, parallel: ParallelState, group: dist.ProcessGroup, stage: dist.ProcessGroup, device: torch.device
    ) -> None:
        """
        Args:
            parallel: The rank.
            group: All ranks of one copy of the model.
            stage: The ranks of this stage.
            device: Where its tensors are.
        """
        self.rank = parallel.tp_rank
        self.size = parallel.tp_size
        self._parallel = parallel
        self._group, self._stage = group, stage
        self._device = device
        self._options, self._swap_options = AllgatherOptions(), AllToAllOptions()
        self._options.asyncOp = self._swap_options.asyncOp = False  # on the current stream, as launches are

    def exchange(self, x: Tensor, out: Tensor) -> None:
        assert x.is_contiguous() and out.is_contiguous() and out.numel() == self.size * x.numel()
        with self._reaching_others():
            _finish(self._stage._allgather_base(_bytes(out), _bytes(x), self._options))

    def swap(self, x: Tensor, out: Tensor) -> None:
        assert x.is_contiguous() and out.is_contiguous() and x.shape == out.shape and len(x) == self.size
        with self._reaching_others():
            _finish(self._stage.alltoall_base(_bytes(out), _bytes(x), [], [], self._swap_options))

    @contextmanager
    def _reaching_others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(f"rank {self._parallel.rank} cannot reach another rank: {error}") from error

    def _gathered(self, x: Tensor) -> Tensor:
        """The ranks' tensors: [ranks, *shape]."""
        out = x.new_empty((self.size, *x.shape))
        if x.numel() and self.size == 1:
            out[0] = x
        elif x.numel():
            self.exchange(x.contiguous(), out)
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self._gathered(x)
        total: Tensor = first.float()
        for other in others:
            total += other.float()
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        assert x.shape[1] == widths[self.rank]
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1]))
        parts = self._gathered(padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def select_rows(self, x: Tensor, is_here: Tensor) -> Tensor:
        own = torch.where(is_here.unsqueeze(1), x, 0).view(_BITS[x.itemsize])
        bits, *others = self._gathered(own)  # zeros but for one
        for other in others:
            bits |= other
        found: Tensor = bits.view(x.dtype)
        return found

    def broadcast(self, x: Tensor) -> Tensor:
        return self._gathered(x)[0]

    def wait(self) -> None:
        self._gathered(torch.zeros(1, dtype=torch.int32, device=self._device)).cpu()

    def send(self, x: Tensor, stage: int) -> None:
        with self._reaching_others():
            _finish(self._group.send([_bytes(x.contiguous())], self._place(stage), 0))

    def receive(self, out: Tensor, stage: int) -> None:
        with self._reaching_others():
            _finish(self._group.recv([_bytes(out)], self._place(stage), 0))

    def _place(self, stage: int) -> int:
        """In the group of all ranks."""
        return stage * self.size + self.rank

    def memory(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def check(self) -> None:
        own = self._parallel.pp_rank
        x = self.memory(16)
        if own:
            self.receive(x, own - 1)
        if own < self._parallel.pp_size - 1:
            self.send(x, own + 1)

    def connect(self) -> None:
        """Exchanges little and much, so that the connections of both exist, with their memory. All ranks call it."""
        for count in (1, MUCH // self.size) if self.size > 1 else ():
            parts = self.memory(self.size * count).view(self.size, count)
            self.exchange(self.memory(count), parts)
            self.swap(parts, torch.empty_like(parts))
        self.wait()

    def agree(self, number: int, what: str) -> None:
        """Checks that all ranks have the same number.

        Raises:
            RuntimeError: One has another; the message names ``what``.
            PeerLostError: One has left.
        """
        numbers = self._gathered(torch.tensor([number], dtype=torch.int64, device=self._device)).flatten().tolist()
        if set(numbers) != {number}:
            raise RuntimeError(f"ranks differ in {what}: {numbers}")


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _finish(work: dist.Work | None) -> None:
    """Makes what is launched next wait for an operation; of the host's memory, the caller."""
    if work is not None:
        work.wait()


def join_group(parallel: ParallelState, backend: str, device: torch.device) -> GroupRank:
    """Connects a rank with all others, once per process. Returns once all have called it.

    Args:
        parallel: The rank.
        backend: As torch.distributed calls it: ``nccl``, or ``gloo`` for tensors of the host.
        device: Where its tensors are.

    Raises:
        PeerLostError: The store of machine 0 cannot be reached.
    """
    size = parallel.tp_size * parallel.pp_size
    copy, place = divmod(parallel.rank, size)
    dist.init_process_group(
        backend,
        store=PrefixStore(str(copy), _find_others(parallel, size)),
        rank=place,
        world_size=size,
        timeout=PATIENCE,
        device_id=None if device.type == "cpu" else device,
    )
    stage = group = dist.group.WORLD
    if parallel.pp_size > 1:  # all ranks make the groups of all stages, in the same order
        firsts = range(0, size, parallel.tp_size)
        groups = [dist.new_group([*range(first, first + parallel.tp_size)], timeout=PATIENCE) for first in firsts]
        stage = groups[parallel.pp_rank]
    assert group is not None and stage is not None
    rank = GroupRank(parallel, group, stage, device)
    rank.connect()
    return rank


def _find_others(parallel: ParallelState, size: int) -> Store:
    """What ranks find each other through: a file of this machine, or a server of rank 0."""
    if parallel.store is None:
        return FileStore(f"/proc/self/fd/{parallel.rendezvous_fd}", size)
    listener = None if parallel.rendezvous_fd < 0 else parallel.rendezvous_fd
    return connect_store(parallel.store, listener, parallel.interface)
