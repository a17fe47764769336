"""Weights that the free memory cannot hold lie in files, and are the same."""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from executor import spilled
from executor.base import ModelError
from executor.config import ModelConfig
from executor.loader import LoadedModel, load_model
from executor.parallel import ParallelState
from ops.cpu import memory
from tests import tiny
from tests.models.harness import CPU, logits_of, random_tokens
from tests.ops.cpu import NEEDS_KERNELS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the files lie."""
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(spilled, "SAMPLE_BYTES", 1 << 20)
    yield tmp_path / "weights"
    memory.weights.spill(None)


def loaded_with(free_bytes: int, kind: str = "qwen3_moe") -> LoadedModel:
    config = ModelConfig(model=str(tiny.checkpoint(kind)), quantization="int8")
    return load_model(config, ParallelState(), CPU, None, lambda *_: None, 1 << 30, None, 0, free_bytes)


@NEEDS_KERNELS
def test_a_model_that_memory_cannot_hold(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    token_ids = random_tokens(30)
    with caplog.at_level(logging.WARNING):
        expected = logits_of(loaded_with(1 << 40), token_ids)
        assert not caplog.records and not folder.exists()
        found = loaded_with(1000)
    (record,) = caplog.records
    assert "GiB of memory are free, so they lie in a file at" in record.getMessage()
    assert "GB/s (measured)" in record.getMessage() and str(folder) in record.getMessage()
    assert torch.equal(logits_of(found, token_ids), expected)
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    assert mappings and all("s" in fields[1] and "(deleted)" in fields for fields in mappings)
    assert not list(folder.iterdir())  # nothing remains if the process is killed


def test_a_disk_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(100, 99, 1))
    with pytest.raises(ModelError, match=r"GiB of the disk at .*; choose a smaller model .* or set OCTAVO_CACHE_DIR"):
        loaded_with(1000)


def test_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=f"{tmp_path}/file/weights cannot be used instead: Not a directory"):
        loaded_with(1000)
