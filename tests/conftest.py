"""Settings of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis  # noqa: F401  # its pytest plugin would import it when tests are over, where its warnings are errors
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # read when triton is imported; without a GPU its kernels are interpreted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--octavo-device", default="cpu", help="the device that tests/device_contract.py is about")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with traces and prompts that is not part of this repository."""
    folder = os.environ.get("OCTAVO_TEST_DATA")
    if not folder:
        pytest.skip("OCTAVO_TEST_DATA does not name the folder with test data")
    return Path(folder)
