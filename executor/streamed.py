"""Checkpoints read through packages that stream files into memory (``--load-format``).

A package is an iterator of names and tensors. What is in the files is checked as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from executor.base import ModelError
from executor.checkpoint import SafetensorsCheckpoint, StoredTensor, check_dtype, mapped
from executor.supported import check_load_format
from executor.weights_mapper import WeightsMapper

Stream = Callable[[Path], Iterator[tuple[str, Tensor]]]
"""The tensors of a safetensors file, in any order. Each is used before the next is taken."""


def fastsafetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
    try:
        loader.add_filenames({0: [str(path)]})
        buffers = loader.copy_files_to_device()
        try:
            for name in loader.get_keys():
                yield name, buffers.get_tensor(name)
        finally:
            buffers.close()
    finally:
        loader.close()


def runai_streamer(path: Path) -> Iterator[tuple[str, Tensor]]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        yield from streamer.get_tensors()


STREAMS: dict[str, Stream] = {"fastsafetensors": fastsafetensors, "runai_streamer": runai_streamer}
"""By load format."""


class StreamedCheckpoint(SafetensorsCheckpoint):
    """A folder of safetensors files that a package reads."""

    def __init__(self, folder: Path, load_format: str) -> None:
        check_load_format(load_format)
        super().__init__(folder)
        self._stream = STREAMS[load_format]
        self._mapper = WeightsMapper()
        self._wanted: Collection[str] = ()
        self._arrived: dict[str, Tensor] = {}

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        self._mapper, self._wanted = mapper, wanted
        return super().tensors(wanted, mapper)

    def read_file(self, path: Path) -> list[StoredTensor]:
        return [replace(tensor, read=partial(self._read, tensor)) for tensor in super().read_file(path)]

    def _read(self, tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
        arrived = self._arrived.get(tensor.name)
        if arrived is None:  # compared before the files are streamed
            return tensor.read(dtype)
        check_dtype(arrived.dtype, dtype)
        return arrived

    def arrivals(self) -> Iterator[str]:
        """Streams the files. Yields the model's names of tensors that can be read until the next is taken.

        Raises:
            ModelError: The package failed.
        """
        for path in self.files:
            try:
                for name, tensor in self._stream(path):
                    if self.file_of.get(name, path.name) == path.name:
                        self._arrived = {name: tensor}
                        yield from (part for part, _ in self._mapper.parts(name, self._wanted))
            except ModelError:
                raise
            except Exception as error:  # packages have no common base of their errors
                raise _failure(path, error) from error
        self._arrived = {}


class TensorizerCheckpoint:
    """A folder with one file of CoreWeave's tensorizer, under Hugging Face's names."""

    def __init__(self, folder: Path) -> None:
        check_load_format("tensorizer")
        files = sorted(folder.glob("*.tensors"))
        if len(files) != 1:
            raise ModelError(f"{folder}: expected one *.tensors file, found {len(files)}")
        (self.path,) = files
        self._tensors = self._open(lambda name: True)
        self._mapper = WeightsMapper()
        self._wanted: Collection[str] = ()
        self._arrived: dict[str, Tensor] = {}

    def _open(self, is_wanted: Callable[[str], bool]) -> Any:
        from tensorizer import TensorDeserializer

        try:
            return TensorDeserializer(str(self.path), device="cpu", filter_func=is_wanted, lazy_load=True)
        except Exception as error:  # the package has no common base of its errors
            raise _failure(self.path, error) from error

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        self._mapper, self._wanted = mapper, wanted
        names = list(self._tensors.keys())
        share = self.path.stat().st_size // max(len(names), 1)  # the format tells sizes only while it is read
        found = [StoredTensor(name, self.origin(name), share, partial(self._read, name)) for name in names]
        return [part for tensor in found for part in mapped(tensor, mapper, wanted)]

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        arrived = self._arrived.get(name)
        if arrived is None:  # compared before the file is streamed
            arrived = self._open(lambda other: other == name)[name]
        check_dtype(arrived.dtype, dtype)
        return arrived.detach()

    def arrivals(self) -> Iterator[str]:
        """See ``StreamedCheckpoint.arrivals``."""
        try:
            for _, _, name, tensor in self._tensors.read_tensors():
                self._arrived = {name: tensor}
                yield from (part for part, _ in self._mapper.parts(name, self._wanted))
        except ModelError:
            raise
        except Exception as error:
            raise _failure(self.path, error) from error
        finally:
            self._arrived = {}
            self._tensors.close()

    def origin(self, name: str) -> str:
        return f"{self.path}: tensor {name!r}"


def _failure(path: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    return ModelError(f"{path}: cannot be read: {type(error).__name__}: {reason[:300]}")
