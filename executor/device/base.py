"""The device seam: one class per kind of device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from executor.base import ModelError
from executor.config import DeviceConfig
from executor.log import get_logger
from executor.registry import resolve

if TYPE_CHECKING:  # names can be listed without torch
    import torch

    from executor.device.steps import StepChannel
    from executor.parallel import ParallelState
    from ops import Communicator

logger = get_logger()


@dataclass(frozen=True)
class Memory:
    total_bytes: int
    free_bytes: int


class StageTransfer(Protocol):
    """Moves hidden states between pipeline stages, in the order of the device's work."""

    def send(self, x: torch.Tensor, stage: int) -> None:
        """Sends a tensor to the rank of a stage that has this one's place in it."""

    def receive(self, out: torch.Tensor, stage: int) -> None:
        """Receives as many bytes, contiguous, from such a rank."""

    def memory(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] on the device, zeroed."""

    def check(self) -> None:
        """Sends a little from each stage to the next one. All ranks call it."""


class Device(Protocol):
    """A worker's interface to the hardware it runs on."""

    name: str
    torch_device: torch.device
    kernels: str
    """Name of the device's op set; see ``ops.use``."""

    memory_utilization: float | None
    """Default of ``--gpu-memory-utilization``. None: ``default_kv_bytes`` says how large the KV cache is."""
    max_num_batched_tokens: int
    """Default of ``--max-num-batched-tokens``."""
    maps_kv: bool
    """Whether a KV cache may lie in memory that the worker maps and that outlives it."""
    shares_memory: bool
    """Whether the workers of a machine share the memory that ``memory`` tells of. Otherwise each has its own."""

    @classmethod
    def unavailable(cls) -> str | None:
        """The reason why this machine cannot use such a device, or None if it can. Takes no memory on the device."""

    def initialize(self, config: DeviceConfig, rank: int) -> None:
        """Prepares this process: its op set, threads, affinity, streams.

        Args:
            config: Flags.
            rank: Index among the workers of this machine, each of which has a device of its own if it can.

        Raises:
            ModelError: There are too few devices, or this one cannot be used.
        """

    def memory(self) -> Memory: ...

    def default_kv_bytes(self) -> int:
        """Default size of the KV cache."""

    def steps(self) -> StepChannel:
        """A channel to the device; called once per model."""

    def communicator(self, parallel: ParallelState) -> Communicator:
        """Connects the ranks that share a model's layers. Called once, after ``initialize``.

        Raises:
            ModelError: The device does not support that many ranks.
        """

    def stage_transfer(self) -> StageTransfer | None:
        """Moves hidden states between the ranks that ``communicator`` was told of. None: they go through the memory of
        the host."""

    def allocate_kv(
        self, shape: tuple[int, ...], dtype: torch.dtype, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A tensor for a KV cache.

        Args:
            shape: Shape of the tensor.
            dtype: Dtype of the tensor.
            memory: uint8 [>= bytes of the tensor] on the device, to place the tensor in; its content is kept. None: the
                tensor is allocated and zeroed, and if the device can, memory is committed only where it is written.

        Raises:
            ValueError: ``memory`` is too small.
        """


REGISTRY = {"cuda": "executor.device.cuda:CudaDevice", "cpu": "executor.device.cpu:CpuDevice"}
"""Best first."""
ENTRY_POINTS = "octavo.devices"
"""Entry point group in which other packages register devices: name -> ``module:Class``."""
AUTO = "auto"


def known_devices() -> dict[str, str]:
    """All devices by name, in the order in which ``auto`` tries them: other packages' devices first."""
    others = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {name: others[name] for name in sorted(others.keys() - REGISTRY)} | REGISTRY


def device_problem(name: str) -> str | None:
    """The problem with a device's name, or None. Does not import the device."""
    if name == AUTO or name in REGISTRY or name in (known := known_devices()):
        return None
    return f"unknown device {name!r}; choose from {AUTO}, {', '.join(known)}"


def create_device(name: str) -> Device:
    """Creates the named device; ``auto`` takes the first one available on this machine.

    Raises:
        ModelError: No such device exists or is available.
    """
    problem = device_problem(name)
    if problem is not None:
        raise ModelError(f"--device: {problem}")
    known = known_devices()
    for candidate in known if name == AUTO else [name]:
        try:
            device: type[Device] = resolve(known, candidate, "device")
        except ImportError as error:
            if name != AUTO:
                raise ModelError(f"--device: {name!r} cannot be loaded: {error}") from error
            logger.warning("skipping device %s: %s", candidate, error)
            continue
        reason = device.unavailable()
        if reason is None:
            return device()
        if name != AUTO:
            raise ModelError(f"--device {name}: {reason}")
        logger.debug("skipping device %s: %s", candidate, reason)
    raise AssertionError("there is always a CPU")


def survey() -> dict[str, str]:
    """All known devices, in the order in which ``auto`` tries them, and whether this machine can use them."""
    known = known_devices()
    found = {}
    for name in known:
        try:
            device: type[Device] = resolve(known, name, "device")
        except ImportError as error:
            found[name] = f"cannot be loaded: {error}"
            continue
        found[name] = device.unavailable() or "available"
    return found
