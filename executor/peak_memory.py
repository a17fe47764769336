"""Measures the memory of tensors while code runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts the memory of the tensors that this thread creates while the mode is active.

    It sees what torch allocates, on any device, but not what kernels allocate without torch. Views of older tensors
    take no memory.

    Attributes:
        num_bytes: Bytes of those tensors that are still alive.
        peak_bytes: Largest value of ``num_bytes`` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.finalize[..., Any]] = {}
        """By address of the storage: called when it is freed."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            self._note(value, is_new=False)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            self._note(value, is_new=True)
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for storage in self._storages.values():
            storage.detach()
        self._storages.clear()

    def _note(self, value: object, *, is_new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        address = storage._cdata
        if address not in self._storages:
            size = storage.nbytes() if is_new else 0
            self.num_bytes += size
            self._storages[address] = weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        del self._storages[address]
        self.num_bytes -= size
