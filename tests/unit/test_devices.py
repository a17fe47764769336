"""Devices by name: ours and those of other packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

import ops
from executor.base import ModelError
from executor.config import DeviceConfig
from executor.device import base
from executor.device.base import create_device, device_problem, known_devices
from executor.device.cpu import CpuDevice
from executor.parallel import ParallelState
from executor.stages import StageRoom, connect
from ops.dispatch import Spec
from tests.ops.cpu import using


class OtherDevice(CpuDevice):
    """What a package brings: here CPU tensors that are computed by the references."""

    name = "other"
    kernels = "reference"
    is_there = True

    @classmethod
    def unavailable(cls) -> str | None:
        return None if cls.is_there else "no card"


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> type[OtherDevice]:
    """Registers it, beside one whose package is broken."""
    points = EntryPoints(
        [
            EntryPoint("broken", "no_such_package:Device", base.ENTRY_POINTS),
            EntryPoint("cpu", "no_such_package:Device", base.ENTRY_POINTS),  # ours cannot be replaced
            EntryPoint("other", f"{__name__}:OtherDevice", base.ENTRY_POINTS),
        ]
    )
    monkeypatch.setattr(base, "entry_points", lambda group: points.select(group=group))
    monkeypatch.setattr(OtherDevice, "is_there", True)
    return OtherDevice


def test_auto_takes_the_best_device_that_is_there(
    other: type[OtherDevice], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(known_devices()) == ["broken", "other", "cuda", "cpu"]
    monkeypatch.setattr(base.logger, "propagate", True)
    assert type(create_device("auto")) is OtherDevice
    assert "skipping device broken: No module named 'no_such_package'" in caplog.text
    monkeypatch.setattr(other, "is_there", False)
    assert type(create_device("auto")) is type(create_device("cpu")) is CpuDevice
    with pytest.raises(ModelError, match="^--device other: no card$"):
        create_device("other")


def test_a_device_that_nobody_knows_is_named(other: type[OtherDevice]) -> None:
    for name in ("auto", "cpu", "other"):
        assert device_problem(name) is None
    problem = "unknown device 'tpu'; choose from auto, broken, other, cuda, cpu"
    assert device_problem("tpu") == problem
    with pytest.raises(ModelError, match=f"^--device: {problem}$"):
        create_device("tpu")
    with pytest.raises(ModelError, match="^--device: 'broken' cannot be loaded: No module named 'no_such_package'$"):
        create_device("broken")


def test_ranks_of_a_device_that_cannot_meet_are_refused() -> None:
    assert CpuDevice().communicator(ParallelState(rank=1)).size == 1
    with pytest.raises(ModelError, match="^--tensor-parallel-size 2: ranks "):
        CpuDevice().communicator(ParallelState(tp_size=2))
    place = ParallelState(pp_size=3)
    with pytest.raises(ModelError, match="^--pipeline-parallel-size 3: stages are processes, which --distributed-"):
        connect(place, {}, Spec("tokens", 64, torch.float32), StageRoom(4, 16, 16), ops.SingleRank())


def test_a_device_chooses_its_op_set(other: type[OtherDevice]) -> None:
    with using(ops.op_set("cpu")):
        other().initialize(DeviceConfig(), 0)
        assert ops.op_set("cpu").name == "reference"
