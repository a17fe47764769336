"""``octavo quantize``: the GGUF files that it writes, and what it refuses."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFReader

import executor.compress
from api.commands import quantize
from api.commands.quantize import Settings, check, write_gguf
from api.config import make_config
from api.flags import ConfigError
from api.model.files import find_model
from tests import tiny


def tensors_of(file: Path) -> dict[str, tuple[GGMLQuantizationType, npt.NDArray[np.float32]]]:
    return {
        each.name: (each.tensor_type, gguf.dequantize(each.data, each.tensor_type)) for each in GGUFReader(file).tensors
    }


@pytest.mark.parametrize("scheme", ["Q4_0", "Q8_0", "MXFP4", "TQ1_0"])
def test_a_gguf_file(scheme: str, tmp_path: Path) -> None:
    source = Path(tiny.gguf_file(tiny.checkpoint("llama", hidden_size=64), GGMLQuantizationType.F16).path)
    target = tmp_path / "small.gguf"
    write_gguf(source, target, scheme)
    before, after = tensors_of(source), tensors_of(target)
    assert before.keys() == after.keys() and list(tmp_path.iterdir()) == [target]
    fields, new = GGUFReader(source).fields, GGUFReader(target).fields
    assert fields.keys() <= new.keys() | {"general.file_type"}
    assert fields["tokenizer.ggml.tokens"].contents() == new["tokenizer.ggml.tokens"].contents()
    assert new["general.file_type"].contents() == quantize.GGUF_TYPES[scheme]
    for name, (kind, values) in after.items():
        if values.ndim == 1:
            assert kind == before[name][0] and np.array_equal(values, before[name][1])
            continue
        assert kind.name == ("Q8_0" if name in quantize.TABLES or scheme == "TQ1_0" else scheme), name
        error = np.abs(values - before[name][1]).max()
        assert error <= np.abs(before[name][1]).max() / {"Q4_0": 7, "MXFP4": 3}.get(kind.name, 200)
    with pytest.raises(ConfigError, match=rf"is quantised already \({scheme}|Q8_0\); give an F16 or BF16 file"):
        write_gguf(target, tmp_path / "again.gguf", scheme)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "x", "scheme": "Q4_0"}, "--output of --scheme Q4_0 is a .gguf file"),
        ({"output": "x.gguf", "scheme": "W4A16"}, "--output of --scheme W4A16 is a folder"),
        ({"output": "x.gguf", "scheme": "Q4_0", "method": "gptq"}, "--method gptq does not write GGUF files"),
        ({"output": "x", "scheme": "W4A16", "method": "awq"}, "--method awq needs --calibration FILE"),
        ({"output": "x", "scheme": "W8A8"}, "--scheme W8A8 needs --calibration FILE"),
        ({"output": "x", "scheme": "FP8_DYNAMIC"}, "needs llmcompressor: pip install llmcompressor"),
        ({"output": ".", "scheme": "Q4_0"}, "--output . exists already"),
    ],
)
def test_refused(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(Settings(**settings))


def test_a_failure_of_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        sys.stdout.write("progress")
        raise ValueError("layer 3\nis too small")

    monkeypatch.setattr(executor.compress, "compress", fail)
    monkeypatch.setattr("sys.argv", ["compress", "model", "out", "W4A16", "awq", "512"])
    monkeypatch.setattr("sys.stdin", io.StringIO("[]"))
    code = executor.compress.main()
    out, shown = capfd.readouterr()
    assert (code, out) == (1, "ValueError: layer 3 is too small\n") and "progress" in shown and "Traceback" in shown

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], code, stdout=out)

    monkeypatch.setattr(subprocess, "run", run)
    files = find_model(make_config({"model": str(tiny.checkpoint("llama", hidden_size=64))})[0])
    with pytest.raises(ConfigError, match=r"--scheme W4A16 --method awq: llmcompressor failed: ValueError: layer 3 is"):
        quantize.compress(files, tmp_path / "out", Settings(output="out", scheme="W4A16", method="awq"))


@pytest.mark.parametrize("has_accelerator", [False, True])
def test_awq_pins_memory_only_for_an_accelerator(has_accelerator: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SimpleNamespace(pin_memory=print)
    monkeypatch.setitem(sys.modules, "llmcompressor.pipelines.cache", SimpleNamespace(IntermediatesCache=cache))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_accelerator)
    executor.compress.leave_memory_pageable()
    assert (cache.pin_memory is print) == has_accelerator
