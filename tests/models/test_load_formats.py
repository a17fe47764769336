"""Weights that other packages read, here stand-ins with the parts of their interfaces that are used."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from executor.supported import PACKAGES
from tests import tiny
from tests.models.harness import load, logits_of, random_tokens, refusal, weights_of

Tensors = dict[str, torch.Tensor]
NORM = "model.norm.weight"


class FastLoader:
    """fastsafetensors.SafeTensorsFileLoader"""

    def __init__(self, group: None, device: str, *, nogds: bool) -> None:
        assert device == "cpu" and nogds
        self.tensors: Tensors = {}

    def add_filenames(self, files: dict[int, list[str]]) -> None:
        self.tensors = {name: tensor for file in files[0] for name, tensor in load_file(file).items()}

    def copy_files_to_device(self) -> FastLoader:
        return self

    def get_keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def close(self) -> None:
        pass


class Streamer:
    """runai_model_streamer.SafetensorsStreamer"""

    def __enter__(self) -> Streamer:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stream_file(self, file: str) -> None:
        self.file = file

    def get_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from reversed(load_file(self.file).items())


class Deserializer:
    """tensorizer.TensorDeserializer"""

    def __init__(self, file: str, device: str, filter_func: Callable[[str], bool], lazy_load: bool) -> None:
        assert device == "cpu" and lazy_load
        self.tensors = {name: tensor for name, tensor in load_file(file).items() if filter_func(name)}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_tensors(self) -> Iterator[tuple[int, int, str, torch.Tensor]]:
        for name, tensor in self.tensors.items():
            yield 0, 0, name, torch.nn.Parameter(tensor, requires_grad=False)

    def close(self) -> None:
        pass


STAND_INS: dict[str, dict[str, Any]] = {
    "fastsafetensors": {"SafeTensorsFileLoader": FastLoader},
    "runai_streamer": {"SafetensorsStreamer": Streamer},
    "tensorizer": {"TensorDeserializer": Deserializer},
}


@pytest.fixture(params=STAND_INS)
def load_format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A format whose package is installed."""
    name: str = request.param
    install(monkeypatch, name, STAND_INS[name])
    return name


def install(monkeypatch: pytest.MonkeyPatch, load_format: str, content: dict[str, Any]) -> None:
    module = types.ModuleType(PACKAGES[load_format][0])
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def model(load_format: str, target: Path, change: Callable[[Tensors], None] = lambda _: None, **options: Any) -> Path:
    """A folder with weights in the format; the stand-in of tensorizer reads safetensors."""
    folder = tiny.copy_of(tiny.checkpoint("llama", **options), target)
    if load_format == "tensorizer" or not options.get("shard_size"):
        tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        change(tensors)
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        save_file(tensors, folder / ("model.tensors" if load_format == "tensorizer" else "model.safetensors"))
    return folder


@pytest.mark.parametrize("shard_size", [None, "100KB"])
def test_the_same_weights(load_format: str, tmp_path: Path, shard_size: str | None) -> None:
    expected = weights_of(load(tiny.checkpoint("llama")))
    found = weights_of(load(model(load_format, tmp_path / "model", shard_size=shard_size), load_format=load_format))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tied_table_stored_twice(load_format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def twice(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = model(load_format, tmp_path / "model", twice, tied=True)
    expected = logits_of(load(tiny.checkpoint("llama", tied=True)), random_tokens(10))
    caplog.clear()
    assert torch.equal(logits_of(load(folder, load_format=load_format), random_tokens(10)), expected)
    assert not caplog.text


def test_contents_are_checked(load_format: str, tmp_path: Path) -> None:
    missing = model(load_format, tmp_path / "missing", lambda tensors: tensors.__delitem__(NORM))
    assert f"tensor {NORM!r} is missing" in refusal(missing, load_format=load_format)
    typed = model(load_format, tmp_path / "typed", lambda tensors: tensors.update({NORM: torch.ones(64).int()}))
    assert "has type I32" in refusal(typed, load_format=load_format)


def test_a_package_that_fails(load_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError("the disk\nis on fire")

    folder = model(load_format, tmp_path / "model")
    install(monkeypatch, load_format, dict.fromkeys(STAND_INS[load_format], fail))
    assert refusal(folder, load_format=load_format).endswith("cannot be read: OSError: the disk is on fire")


def test_a_package_that_leaves_tensors_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Streamer):
        def get_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            return (pair for pair in super().get_tensors() if pair[0] != NORM)

    folder = model("runai_streamer", tmp_path / "model")
    install(monkeypatch, "runai_streamer", {"SafetensorsStreamer": Forgetful})
    assert refusal(folder, load_format="runai_streamer").endswith("was not read by the package of --load-format")


@pytest.mark.parametrize("load_format", PACKAGES)
def test_a_package_that_is_not_installed(load_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = PACKAGES[load_format]
    monkeypatch.setitem(sys.modules, module, None)
    expected = f"--load-format {load_format} needs its package: pip install {package}"
    folder = tiny.checkpoint("llama")
    assert refusal(folder, load_format=load_format) == expected


def test_tensorizer_needs_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorizer", STAND_INS["tensorizer"])
    assert "expected one *.tensors file, found 0" in refusal(tiny.checkpoint("llama"), load_format="tensorizer")
