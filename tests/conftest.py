"""Settings of all tests."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.turns import Turns

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub
os.environ.setdefault(
    "TRITON_INTERPRET", "1"
)  # read when triton is imported; without a GPU its kernels are interpreted

# The same examples in every run, however slow the machine: a change fails for what it does. Others are tried by hand:
# pytest --hypothesis-profile explore
SLOW = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, database=None, deadline=None, suppress_health_check=SLOW)
settings.register_profile("explore", deadline=None, suppress_health_check=SLOW, max_examples=1000)
settings.load_profile("same")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # A shell starts what is in its background like that, and children inherit it: no Ctrl-C would reach them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--octavo-device", default="cpu", help="the device that tests/device_contract.py is about")


turns = Turns()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout, which must not count the waiting
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with turns.take(alone=item.get_closest_marker("alone") is not None):
        _seed()
        return (yield)


def _seed() -> None:
    """A test gets the same numbers whichever tests its process has run before."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(0)  # torch.manual_seed imports a compiler


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, object, object]:
    """What one process tells another is UTF-8; hostile texts are not."""
    return _encodable((yield))


def _encodable(value: object) -> object:
    """The same value, with escapes for lone surrogates."""
    if isinstance(value, dict):
        return {key: _encodable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def pytest_unconfigure() -> None:
    turns.close()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with traces and prompts that is not part of this repository."""
    folder = os.environ.get("OCTAVO_TEST_DATA")
    if not folder:
        pytest.skip("OCTAVO_TEST_DATA does not name the folder with test data")
    return Path(folder)
