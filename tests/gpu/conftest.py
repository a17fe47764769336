"""The device of these tests: a GPU if there is one, otherwise one without hardware, whose kernels are interpreted."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch

import ops
from executor.device.base import Device
from executor.device.cuda import CudaDevice
from ops.dispatch import OpSet


def has_gpu() -> bool:
    """Whether kernels run on a card."""
    return CudaDevice.unavailable() is None and os.environ.get("TRITON_INTERPRET") != "1"


@pytest.fixture(scope="session", autouse=True)
def names_the_device() -> None:
    """With ``OCTAVO_NEEDS_GPU=1`` a machine without one fails."""
    if os.environ.get("OCTAVO_NEEDS_GPU") == "1" and not has_gpu():
        pytest.exit(f"there is no GPU: {CudaDevice.unavailable() or 'kernels are interpreted'}", returncode=1)


@pytest.fixture
def device() -> Iterator[Device]:
    """Initialised by the worker that gets it."""
    before = ops.op_set("cpu")
    if has_gpu():
        yield CudaDevice()
        torch.cuda.set_sync_debug_mode("default")
    else:
        from tests.fake_cuda import FakeCuda

        fake = FakeCuda(by_itself=False)
        yield fake
        fake.close()
    ops.use("cpu", before)


@pytest.fixture
def references() -> Iterator[None]:
    """The CPU computes with the references."""
    before = ops.op_set("cpu")
    ops.use("cpu", OpSet())
    yield
    ops.use("cpu", before)
