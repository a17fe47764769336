"""Packs weights while the rest of the model is still being loaded.

A layer is packed as soon as the last of its tensors is there, by the thread that loaded it. So little memory holds
weights in both forms at once, and packing overlaps with reading.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar
from zlib import crc32

import torch
from torch import nn

from executor.base import ModelError
from executor.layers.parameter import HUGE, WeightParameter, Weights, named_weights
from ops.cpu.memory import Recycler

T = TypeVar("T")

MAX_THREADS = 8
MAX_AHEAD = 32
"""Items that may wait for a thread."""
LARGE = 1 / 32
"""Share of the model from which a layer counts as large."""


class Packing:
    """Counts the tensors of each layer that are not loaded yet. Thread-safe."""

    def __init__(self, model: nn.Module) -> None:
        self._lock = threading.Lock()
        self._layer_of: dict[WeightParameter, nn.Module] = {}
        self._missing: dict[nn.Module, int] = {}
        self._names: dict[nn.Module, str] = {}
        self._bytes: dict[nn.Module, int] = {}
        inner: set[nn.Module] = set()
        for name, module in model.named_modules():  # outer modules first
            if not isinstance(module, Weights) or module in inner:
                continue
            inner.update(module.modules())
            self._missing[module] = self._bytes[module] = 0
            self._names[module] = name.removesuffix(".weights")
            for parameter in module.parameters():
                assert isinstance(parameter, WeightParameter)
                self._layer_of[parameter] = module
                self._missing[module] += len(parameter.parts)
                self._bytes[module] += parameter.nbytes
        self._total = sum(parameter.nbytes for parameter in model.parameters())
        self._recycler = Recycler()
        self._unstaged = {
            parameter
            for parameter in self._layer_of
            if parameter.device.type == "cpu" and parameter.nbytes >= HUGE and not self.is_large(parameter)
        }

    def is_large(self, parameter: WeightParameter) -> bool:
        """Whether the parameter belongs to a large layer.

        These come first: late ones would exist in both forms while all others are in memory.
        """
        layer = self._layer_of.get(parameter)
        return layer is not None and self._bytes[layer] > LARGE * self._total

    def stage(self, parameter: WeightParameter) -> None:
        """Before something is loaded into a parameter: gives it the memory of one that is packed."""
        with self._lock:
            if parameter in self._unstaged:
                self._unstaged.remove(parameter)
                memory = self._recycler.take(parameter.nbytes)
                parameter.data = memory.view(parameter.dtype).view(parameter.shape)

    def loaded(self, parameter: WeightParameter, num_tensors: int = 1) -> None:
        """Takes note of loaded tensors, and packs their layer if they were its last.

        Raises:
            ModelError: The layer's tensors do not fit together.
        """
        layer = self._layer_of.get(parameter)
        if layer is None:
            return
        with self._lock:
            self._missing[layer] -= num_tensors
            if self._missing[layer]:
                return
            self._layer_of = {other: module for other, module in self._layer_of.items() if module is not layer}
            del self._missing[layer]
        self._pack(layer)

    def finish(self) -> None:
        """Packs layers without parameters."""
        for layer, missing in self._missing.items():
            assert not missing, "a tensor was not loaded"
            self._pack(layer)

    def _pack(self, layer: nn.Module) -> None:
        try:
            for module in layer.modules():
                if isinstance(module, Weights):
                    module.pack()
        except ValueError as error:
            raise ModelError(f"{self._names[layer]}: {error}") from error


def in_threads(work: Callable[[T], int], items: Iterable[T]) -> Iterator[int]:
    """The results of ``work`` in order, computed in as many threads as there are usable cores.

    The calling thread takes items only a little ahead of them. After the first exception, no further work begins.
    """
    num_threads = torch.get_num_threads()
    size = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    results: deque[Future[int]] = deque()
    # Each thread would start a team of its own for a large copy, and the teams would wait for each other's cores.
    with ThreadPoolExecutor(size, "load", torch.set_num_threads, (1,)) as threads:
        try:
            for item in items:
                results.append(threads.submit(work, item))
                while results and (results[0].done() or len(results) > MAX_AHEAD):
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(num_threads)


_NORM = re.compile(r"norm\.weight$")


def fill_with_random_numbers(model: nn.Module) -> None:
    """Fills in small weights, the same in every run; norms are 1, codes of quantised weights arbitrary bytes.

    For benchmarks: a short pattern is repeated, in parallel for all parameters.
    """
    packing = Packing(model)
    parameters: dict[str, list[WeightParameter]] = {}
    for name, parameter in named_weights(model):
        assert isinstance(parameter, WeightParameter), name
        parameters.setdefault(name, []).append(parameter)

    def fill(name: str) -> int:
        for parameter in parameters.pop(name):
            if not parameter.is_optional:
                packing.stage(parameter)
                _fill(parameter, name)
            packing.loaded(parameter, len(parameter.parts))
        return 0

    names = sorted(parameters, key=lambda name: not packing.is_large(parameters[name][0]))
    for _ in in_threads(fill, names):
        pass
    packing.finish()


def _fill(parameter: WeightParameter, name: str) -> None:
    if _NORM.search(name):
        parameter.data.fill_(1)
    else:
        parameter.fill_randomly(torch.Generator().manual_seed(crc32(name.encode())))
