"""Transfers between host and device: a step's inputs and its results.

A step is launched without waiting: columns go up with ``upload``, results come back through ``download`` and are read
once they arrive. In between, the host knows how many tokens a request has, but not which; the device keeps the latest
ones for the following steps (``RecentTokens``). On the CPU all of this is immediate and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from executor.config import MAX_STEPS_AHEAD
from executor.deferred import Array, Deferred
from executor.messages import I32, I64

T = TypeVar("T")


class Pending(Protocol):
    """Tensors on their way to the host."""

    def is_ready(self) -> bool:
        """Whether ``collect`` returns at once."""

    def collect(self) -> Sequence[Array]:
        """Waits for the tensors. Called once; afterwards the step's uploads may be overwritten."""

    @property
    def device_ms(self) -> float:
        """Milliseconds that the device worked on the step after the host launched it."""


class RecentTokens(Protocol):
    """The most recently sampled tokens, kept where the next step can read them."""

    def columns(self, slots: I32, positions: I64, num_known: I64) -> Mapping[str, Array]:
        """Columns to upload so that the step's input ids can be completed on the device.

        Args:
            slots: int32 [num_tokens]: the slot of each token.
            positions: int64 [num_tokens]: positions of the tokens in the sequence.
            num_known: int64 [slots]: number of tokens that the host has of each request.
        """

    def input_ids(self, views: Mapping[str, Tensor]) -> Tensor:
        """int32 [num_tokens]: the column ``input_ids``, completed with tokens that the host lacks."""

    def store(self, slots: I32, positions: I64, token_ids: Tensor) -> None:
        """Keeps sampled tokens.

        Args:
            slots: int32 [samples].
            positions: int64 [samples]: positions of the tokens in the sequence.
            token_ids: int64 [samples], on the device.
        """


class Block(Protocol):
    """Device memory for the inputs of each step in turn."""

    @property
    def device(self) -> Tensor:
        """uint8 [size]."""

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        """Copies the inputs of a step to the start of the block, after all launches so far. Once per step; ``data`` may
        be reused at once."""


class Launch(Protocol):
    """A kernel with its arguments."""

    def compile(self) -> None:
        """Makes it ready, without launching it. Other threads may do the same with others."""

    def run(self) -> None:
        """Launches it."""


class Graphs(Protocol):
    """What keeps steps at the same addresses, and launches them as one."""

    @property
    def reserve_bytes(self) -> int:
        """Memory that graphs may take."""

    def block(self, num_bytes: int) -> Block:
        """Memory for inputs of up to this size."""

    def compile(self, launches: Sequence[Launch]) -> None:
        """Makes launches ready that will follow later, so that none of them stalls a step."""

    def capture(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """A function that runs these launches again. Captures without running them."""


class StepChannel(Protocol):
    """The channel between host and device. Steps use it in order."""

    @property
    def graphs(self) -> Graphs | None:
        """None: each step uploads and launches anew."""

    def upload(self, columns: Mapping[str, Array]) -> Mapping[str, Tensor]:
        """Copies columns to device tensors of the same shapes and dtypes.

        The channel takes ownership of the arrays. The tensors are valid until the step's results are collected.
        """

    def download(self, tensors: Sequence[Tensor]) -> Pending:
        """Ends a step: starts the transfer of its results, as they are now, to the host."""

    def recent_tokens(self, max_num_seqs: int) -> RecentTokens:
        """Creates the store of recently sampled tokens, by slot."""

    def fileno(self) -> int | None:
        """A descriptor that is readable while a ``Pending`` is ready but not collected. None: results are always
        ready."""


def wait_for(deferred: Deferred[T], channel: StepChannel) -> T:
    """Computes a deferred value after a dedicated transfer."""
    return deferred.make(channel.download(deferred.tensors).collect())


# ---------------------------------------------------------------------------------------------------------
# host and device are the same


class ImmediateSteps:
    """The channel of a device that shares the host's memory and whose calls return when the work is done.

    Results are views: read them before the next step begins.
    """

    graphs: Graphs | None = None

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
    """The host's table has every token before the next step begins."""

    def columns(self, slots: I32, positions: I64, num_known: I64) -> Mapping[str, Array]:
        return {}

    def input_ids(self, views: Mapping[str, Tensor]) -> Tensor:
        return views["input_ids"]

    def store(self, slots: I32, positions: I64, token_ids: Tensor) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------
# host and device are separate

RECENT_TOKENS = MAX_STEPS_AHEAD
"""Tokens that the device keeps per request: as many as it has in flight at most."""


class DeviceTokens:
    """Ring buffers of tokens by slot, in device memory."""

    def __init__(self, channel: StepChannel, tokens: Tensor) -> None:
        """
        Args:
            channel: Channel to the device.
            tokens: int32 [max_num_seqs * RECENT_TOKENS] on the device.
        """
        self._channel = channel
        self._tokens = tokens

    def columns(self, slots: I32, positions: I64, num_known: I64) -> Mapping[str, Array]:
        return {"recent_tokens": np.where(positions < num_known[slots], -1, places_of(slots, positions))}

    def input_ids(self, views: Mapping[str, Tensor]) -> Tensor:
        places = views["recent_tokens"]
        return torch.where(places < 0, views["input_ids"], self._tokens[places.clamp(min=0)])

    def store(self, slots: I32, positions: I64, token_ids: Tensor) -> None:
        places = self._channel.upload({"places": places_of(slots, positions)})["places"]
        self._tokens[places] = token_ids.int()


def places_of(slots: I32, positions: I64) -> I64:
    """Where the device keeps the tokens at these positions of these slots: int64 [tokens]."""
    places: I64 = slots.astype(np.int64) * RECENT_TOKENS + positions % RECENT_TOKENS
    return places


@dataclass(eq=False)
class StagingBuffer:
    """A host buffer with a device buffer of the same size to copy it to."""

    host: npt.NDArray[np.uint8]
    device: Tensor
    """uint8 [size]."""
    used: int = 0


ALIGNMENT = 64
"""Alignment of columns in bytes."""
BUFFER_BYTES = 1 << 20


def as_dtype(column: Array) -> torch.dtype:
    """torch's name of an array's type."""
    return torch.from_numpy(np.empty(0, column.dtype)).dtype


class StagingPool:
    """The staging buffers of the steps in flight.

    A step fills buffers from the start, one copy per upload. They are free again once its results are collected, so
    launching a step never waits for a buffer and never overwrites data that another step reads. The pool grows to the
    largest number of buffers in flight.
    """

    def __init__(self, make: Callable[[int], StagingBuffer], copy: Callable[[StagingBuffer, int, int], None]) -> None:
        """
        Args:
            make: Creates a buffer of the given size in bytes.
            copy: Copies a byte range of a buffer from host to device, ordered after all earlier launches.
        """
        self._make = make
        self._copy = copy
        self._free: list[StagingBuffer] = []
        self._current: list[StagingBuffer] = []

    def upload(self, columns: Mapping[str, Array]) -> dict[str, Tensor]:
        """See ``StepChannel``."""
        sizes = {name: -(-column.nbytes // ALIGNMENT) * ALIGNMENT for name, column in columns.items()}
        buffer = self._buffer(sum(sizes.values()))
        begin = buffer.used
        views = {}
        for name, column in columns.items():
            start, end = buffer.used, buffer.used + column.nbytes
            buffer.host[start:end] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
            views[name] = buffer.device[start:end].view(as_dtype(column)).view(column.shape)
            buffer.used += sizes[name]
        self._copy(buffer, begin, buffer.used)
        return views

    def _buffer(self, num_bytes: int) -> StagingBuffer:
        if self._current and self._current[-1].used + num_bytes <= len(self._current[-1].host):
            return self._current[-1]
        buffer = next((buffer for buffer in self._free if num_bytes <= len(buffer.host)), None)
        if buffer is None:
            buffer = self._make(max(BUFFER_BYTES, num_bytes))
        else:
            self._free.remove(buffer)
        self._current.append(buffer)
        return buffer

    @property
    def is_in_use(self) -> bool:
        """Whether the current step has uploaded anything."""
        return bool(self._current)

    def take(self) -> list[StagingBuffer]:
        """Hands over the buffers of the step that ends."""
        buffers, self._current = self._current, []
        return buffers

    def give_back(self, buffers: list[StagingBuffer]) -> None:
        """Returns the buffers of a step whose results are collected."""
        for buffer in buffers:
            buffer.used = 0
        self._free += buffers
