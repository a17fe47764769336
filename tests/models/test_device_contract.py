"""The contract of devices, kept by the CPU and by the example package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints

import pytest

import ops
from executor.config import DeviceConfig
from executor.device import base
from executor.device.base import Device, create_device
from tests.device_contract import (
    test_a_cache_is_zero_and_may_lie_in_given_memory,
    test_it_has_a_name_and_memory,
    test_tokens_depend_on_the_request_alone,
    test_uploads_come_back,
)
from tests.e2e.server import ROOT

__all__ = [
    "test_a_cache_is_zero_and_may_lie_in_given_memory",
    "test_it_has_a_name_and_memory",
    "test_tokens_depend_on_the_request_alone",
    "test_uploads_come_back",
]

TOY = EntryPoints([EntryPoint("toy", "octavo_toy_device:ToyDevice", base.ENTRY_POINTS)])


@pytest.fixture(params=["cpu", "toy"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    before = ops.op_set("cpu")
    monkeypatch.syspath_prepend(str(ROOT / "docs/examples/toy_device"))
    monkeypatch.setattr(base, "entry_points", lambda group: TOY)
    device = create_device(request.param)
    device.initialize(DeviceConfig(num_threads=1), 0)
    yield device
    ops.use("cpu", before)


def test_a_package_is_found_by_its_entry_point(device: Device) -> None:
    assert list(base.survey()) == ["toy", "cuda", "cpu"]
    assert base.survey()["toy"] == base.survey()["cpu"] == "available"
