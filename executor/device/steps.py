"""How the numbers of a step reach a device, and how its results come back.

A step is launched without waiting: columns go up with ``upload``, results come back through ``download`` and are read
when they are there. In between, the host knows how many tokens a request has and not which; the device keeps the
latest ones for the steps that follow (``RecentTokens``). On the CPU all of this is immediate and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from executor.deferred import Array, Deferred
from executor.messages import I32, I64

T = TypeVar("T")


class Pending(Protocol):
    """Tensors on their way to the host."""

    def is_ready(self) -> bool:
        """Whether ``collect`` returns at once."""

    def collect(self) -> Sequence[Array]:
        """Waits for them. Called once; what the step uploaded may be overwritten from then on."""

    @property
    def device_ms(self) -> float:
        """Milliseconds that the device worked for the step after the host had launched it."""


class RecentTokens(Protocol):
    """The tokens that were sampled last, where the next step can read them."""

    def columns(self, slots: I32, positions: I64, num_known: I64) -> Mapping[str, Array]:
        """What a step has to upload so that its input ids can be completed.

        Args:
            slots: int32 [num_tokens]: whose tokens they are.
            positions: int64 [num_tokens]: their places in prompt and output.
            num_known: int64 [slots]: how many tokens of each request the host has.
        """

    def input_ids(self, views: Mapping[str, Tensor]) -> Tensor:
        """int32 [num_tokens]: the column ``input_ids``, with what the host does not have yet."""

    def store(self, slots: I32, positions: I64, token_ids: Tensor) -> None:
        """Keeps sampled tokens.

        Args:
            slots: int32 [samples].
            positions: int64 [samples]: the tokens' places in prompt and output.
            token_ids: int64 [samples], on the device.
        """


class StepChannel(Protocol):
    """The way from host to device and back. Steps pass it in order."""

    def upload(self, columns: Mapping[str, Array]) -> Mapping[str, Tensor]:
        """Columns as tensors of the device, of the same shapes and types.

        The arrays belong to the channel from then on. The tensors hold until the results of the step are collected.
        """

    def download(self, tensors: Sequence[Tensor]) -> Pending:
        """Ends a step: brings its results to the host, as they are now."""

    def recent_tokens(self, max_num_seqs: int) -> RecentTokens:
        """A place for sampled tokens, by slot."""

    def fileno(self) -> int | None:
        """A descriptor that is readable while a ``Pending`` is ready and not collected. None: all are, at once."""


def wait_for(deferred: Deferred[T], channel: StepChannel) -> T:
    """The value, after a transfer of its own."""
    return deferred.make(channel.download(deferred.tensors).collect())


# ---------------------------------------------------------------------------------------------------------
# where host and device are one


class ImmediateSteps:
    """The channel of a device that shares the host's memory, and whose calls return when the work is done.

    Results are views: they are read before the next step begins.
    """

    def upload(self, columns: Mapping[str, Array]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def download(self, tensors: Sequence[Tensor]) -> Pending:
        return _Ready(tensors)

    def recent_tokens(self, max_num_seqs: int) -> RecentTokens:
        return _HostTokens()

    def fileno(self) -> None:
        return None


class _Ready:
    device_ms = 0.0

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def is_ready(self) -> bool:
        return True

    def collect(self) -> Sequence[Array]:
        return [tensor.numpy() for tensor in self._tensors]


class _HostTokens:
    """Every token is in the host's table before the next step begins."""

    def columns(self, slots: I32, positions: I64, num_known: I64) -> Mapping[str, Array]:
        return {}

    def input_ids(self, views: Mapping[str, Tensor]) -> Tensor:
        return views["input_ids"]

    def store(self, slots: I32, positions: I64, token_ids: Tensor) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------
# where they are two

RECENT_TOKENS = 32
"""Tokens of a request that the device keeps: more than one request has in flight."""


class DeviceTokens:
    """Rings of tokens by slot, in the memory of a device."""

    def __init__(self, channel: StepChannel, tokens: Tensor) -> None:
        """
        Args:
            channel: Where the device is.
            tokens: int32 [max_num_seqs * RECENT_TOKENS] on it.
        """
        self._channel = channel
        self._tokens = tokens

    def columns(self, slots: I32, positions: I64, num_known: I64) -> Mapping[str, Array]:
        return {"recent_tokens": np.where(positions < num_known[slots], -1, _places(slots, positions))}

    def input_ids(self, views: Mapping[str, Tensor]) -> Tensor:
        places = views["recent_tokens"]
        return torch.where(places < 0, views["input_ids"], self._tokens[places.clamp(min=0)])

    def store(self, slots: I32, positions: I64, token_ids: Tensor) -> None:
        places = self._channel.upload({"places": _places(slots, positions)})["places"]
        self._tokens[places] = token_ids.int()


def _places(slots: I32, positions: I64) -> I64:
    places: I64 = slots.astype(np.int64) * RECENT_TOKENS + positions % RECENT_TOKENS
    return places


@dataclass(eq=False)
class Block:
    """Memory of the host that is copied to as much memory of the device."""

    host: npt.NDArray[np.uint8]
    device: Tensor
    """uint8 [size]."""
    used: int = 0


ALIGNMENT = 64
"""Bytes. Every column begins at a multiple."""
BLOCK_BYTES = 1 << 20


class BlockPool:
    """Persistent memory for the columns of the steps in flight.

    A step fills blocks from their beginnings, one copy per upload. They are free again when its results are collected,
    so a step that is launched never waits for one and never overwrites what another one reads. As many blocks are made
    as there are ever in flight.
    """

    def __init__(self, make: Callable[[int], Block], copy: Callable[[Block, int, int], None]) -> None:
        """
        Args:
            make: Makes a block of so many bytes.
            copy: Copies a range of bytes of a block from host to device, after all that was launched before.
        """
        self._make = make
        self._copy = copy
        self._free: list[Block] = []
        self._current: list[Block] = []

    def upload(self, columns: Mapping[str, Array]) -> dict[str, Tensor]:
        """See ``StepChannel``."""
        sizes = {name: -(-column.nbytes // ALIGNMENT) * ALIGNMENT for name, column in columns.items()}
        block = self._block(sum(sizes.values()))
        begin = block.used
        views = {}
        for name, column in columns.items():
            start, end = block.used, block.used + column.nbytes
            block.host[start:end] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
            dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
            views[name] = block.device[start:end].view(dtype).view(column.shape)
            block.used += sizes[name]
        self._copy(block, begin, block.used)
        return views

    def _block(self, num_bytes: int) -> Block:
        if self._current and self._current[-1].used + num_bytes <= len(self._current[-1].host):
            return self._current[-1]
        block = next((block for block in self._free if num_bytes <= len(block.host)), None)
        if block is None:
            block = self._make(max(BLOCK_BYTES, num_bytes))
        else:
            self._free.remove(block)
        self._current.append(block)
        return block

    def take(self) -> list[Block]:
        """The blocks of the step that ends."""
        blocks, self._current = self._current, []
        return blocks

    def give_back(self, blocks: list[Block]) -> None:
        """Blocks of a step whose results are collected."""
        for block in blocks:
            block.used = 0
        self._free += blocks
