"""Weights on disk: the interface between checkpoints and the loader, and checkpoints in safetensors format.

Files are memory-mapped: a tensor is a view of the file, and its bytes are read when it is copied.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from executor.base import ModelError
from executor.files import open_regular, read_json, why
from executor.hf_config import shorten
from executor.weights_mapper import Cut, WeightsMapper, whole


class Prefetch(Protocol):
    """Reads a tensor's bytes from the disk, so that ``StoredTensor.read`` does not wait for them."""

    def __call__(self, first: int = 0, end: int = 1, of: int = 1) -> None:
        """Reads those of the rows ``first`` to ``end`` of as many as the tensor has.

        Raises:
            ModelError: They cannot be read.
        """


def _nothing(first: int = 0, end: int = 1, of: int = 1) -> None:
    """The bytes have been read with those of another tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that has not been read yet."""

    name: str
    """The tensor's name in the model; before ``WeightsMapper``, in the checkpoint."""
    origin: str
    """The file and the tensor's name in it, for error messages."""
    num_bytes: int
    read: Callable[[torch.dtype], Tensor]
    """Returns the tensor for a parameter of the given dtype.

    If that is one of ``FLOATS``, the tensor may be stored as any of them, and is returned in its stored dtype if
    converting would cost a copy. Any other dtype must match the stored one, since quantised codes cannot be rounded.
    Raises ValueError if it does not.
    """
    prefetch: Prefetch = _nothing


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Floating-point dtypes in which weights, scales and biases may be stored."""
EXPONENTS = torch.float8_e8m0fnu
"""Powers of 2 in a byte: scales, which may also be stored as these bytes, and are numbers of float32."""


def mapped(tensor: StoredTensor, mapper: WeightsMapper, wanted: Collection[str]) -> list[StoredTensor]:
    """A tensor with the model's name and layout; several if it holds those of all experts."""

    def reader(name: str, cut: Cut) -> Callable[[torch.dtype], Tensor]:
        transforms = mapper.transforms_of(name)
        if cut is whole and not transforms:
            return tensor.read

        def read(dtype: torch.dtype) -> Tensor:
            result = cut(tensor.read(dtype))
            for transform in transforms:
                result = transform(result)
            return result

        return read

    parts = mapper.parts(tensor.name, wanted)

    def prefetch(first: int = 0, end: int = 1, of: int = 1) -> None:
        if len(parts) > 1 or any(mapper.transforms_of(name) for name, _ in parts):
            return tensor.prefetch()  # rows are elsewhere
        return tensor.prefetch(first, end, of)

    first, *others = [
        replace(tensor, name=name, num_bytes=tensor.num_bytes // len(parts), read=reader(name, cut), prefetch=prefetch)
        for name, cut in parts
    ]
    return [first, *(replace(each, prefetch=_nothing) for each in others)]


class Checkpoint(Protocol):
    """Weights in some format."""

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        """The tensors of the checkpoint in file order, under the model's names. May leave out those that are ignored.

        Args:
            wanted: The names that the model needs.
            mapper: For formats with Hugging Face's names and layouts.
        """

    def origin(self, name: str) -> str:
        """How an error message refers to a missing tensor."""


class MappedFile:
    """A file mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Maps a file.

        Raises:
            ModelError: It cannot be read.
        """
        self.path = path
        try:
            with open_regular(path) as file:
                # Writable (copy on write), since torch.frombuffer warns about read-only buffers.
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._descriptor = os.dup(file.fileno())
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ModelError(f"{path}: cannot be read: {why(error)}") from error
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self.data)

    def prefetch(self, offset: int, num_bytes: int, first: int = 0, end: int = 1, of: int = 1) -> None:
        """Reads some rows of a range into the system's page cache, of which the mapping is a view; see ``Prefetch``.

        Raises:
            ModelError: It cannot be read.
        """
        unused = memoryview(bytearray(min(num_bytes, READ_BYTES)))
        offset, stop = offset + num_bytes * first // max(of, 1), offset - (-num_bytes * end // max(of, 1))
        try:
            while offset < stop:
                count = os.preadv(self._descriptor, [unused[: stop - offset]], offset)
                if not count:
                    raise OSError(errno.EIO, "it has become shorter")
                offset += count
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {why(error)}") from error


READ_BYTES = 1 << 20
"""Bytes per read: few enough for the CPU's cache."""


# ---------------------------------------------------------------------------------------------------------
# safetensors

DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F4": torch.float4_e2m1fn_x2,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "U8": torch.uint8,
}
"""Dtypes of the format."""
PAIRED = ("F4",)
"""Dtypes for which one torch element holds two numbers."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000
"""Larger headers are rejected, as in the safetensors library."""


class Entry(msgspec.Struct):
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    @property
    def elements(self) -> list[int]:
        """The tensor's shape in torch."""
        if self.dtype not in PAIRED or not self.shape:
            return self.shape
        *outer, last = self.shape
        return [*outer, last // 2]  # an odd row would not be byte-aligned; the check of ``num_bytes`` then fails

    @property
    def num_bytes(self) -> int:
        return math.prod(self.elements) * DTYPES[self.dtype].itemsize


class SafetensorsCheckpoint:
    """A folder with one safetensors file, or several and an index.

    With an index, each tensor that it lists is read from the file that it names; copies elsewhere are ignored. A tensor
    that it does not list is used only if the model needs it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "model.safetensors.index.json"
        self.stored_name: Callable[[str], str] = str
        if self.index.is_file():
            self.file_of = _read_index(self.index)
            self.files = [folder / name for name in sorted(set(self.file_of.values()))]
        else:
            self.file_of = {}
            self.files = _find_files(folder)

    def tensors(self, wanted: Collection[str], mapper: WeightsMapper) -> list[StoredTensor]:
        stored: dict[str, StoredTensor] = {}
        for path in self.files:
            for tensor in self.read_file(path):
                if not self._counts(tensor.name, path, wanted, mapper):
                    continue
                if tensor.name in stored:
                    raise ModelError(f"{tensor.origin}: stored in more than one file")
                stored[tensor.name] = tensor
        self.stored_name = partial(mapper.stored_name, examples=stored)
        for name in self.file_of:
            if name not in stored:
                raise ModelError(f"{self._place(name)} is missing, although {self.index.name} lists it")
        return [part for tensor in stored.values() for part in mapped(tensor, mapper, wanted)]

    def read_file(self, path: Path) -> list[StoredTensor]:
        """The tensors of one file."""
        return read_safetensors(path)

    def _counts(self, name: str, path: Path, wanted: Collection[str], mapper: WeightsMapper) -> bool:
        if not self.file_of:
            return True
        listed = self.file_of.get(name)
        return any(part in wanted for part, _ in mapper.parts(name, wanted)) if listed is None else listed == path.name

    def origin(self, name: str) -> str:
        return self._place(self.stored_name(name))

    def _place(self, name: str) -> str:
        if name in self.file_of:
            return f"{self.folder / self.file_of[name]}: tensor {name!r}"
        return f"{self.index if self.file_of or len(self.files) != 1 else self.files[0]}: tensor {name!r}"


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = read_json(path)
        file_of = msgspec.convert(index["weight_map"], dict[str, str])
    except (OSError, KeyError, TypeError, ValueError, msgspec.MsgspecError) as error:
        reason = why(error) if isinstance(error, OSError) else error
        raise ModelError(f"{path}: not an index of safetensors files: {reason}") from error
    for name, file in file_of.items():
        # A file in the folder (or a link, as in the hub's cache), never a path that leads elsewhere.
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise ModelError(
                f"{path}: tensor {shorten(name)!r} is in {shorten(file)!r}, not a safetensors file beside it"
            )
    return file_of


def _find_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    # Mistral's folders hold the weights a second time, in Mistral's own format.
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if files:
        return files
    other = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = (
        f" (found {', '.join(other[:3])}, which may run code when loaded: save the model again with transformers' "
        "save_pretrained, or serve a GGUF version)"
    )
    raise ModelError(f"{folder}: no *.safetensors file{hint if other else ''}")


def read_safetensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file, after checking that its header describes it byte by byte.

    Raises:
        ModelError: The file is truncated or corrupt.
    """
    file = MappedFile(path)
    return parse_safetensors(path, file.data, file.prefetch)


def parse_safetensors(
    path: Path, mapped: mmap.mmap | bytearray, prefetch: Callable[[int, int], None] = lambda offset, num_bytes: None
) -> list[StoredTensor]:
    """The tensors of a file's content. Raises as ``read_safetensors`` does.

    Args:
        path: The file, for messages.
        mapped: The content; tensors are views of it.
        prefetch: Takes the offset and the size of bytes that will be read.
    """
    if len(mapped) < 8:
        raise ModelError(f"{path}: truncated: {len(mapped)} bytes are too few for a safetensors file")
    header_size = int.from_bytes(mapped[:8], "little")
    if header_size > MAX_HEADER:
        raise ModelError(f"{path}: not a safetensors file")
    start = 8 + header_size
    if len(mapped) < start:
        raise ModelError(f"{path}: truncated: the file ends within its header")
    try:
        header: dict[str, Any] = msgspec.json.decode(mapped[8:start], type=dict[str, Any])
        header.pop("__metadata__", None)
        entries = msgspec.convert(header, dict[str, Entry])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ModelError(f"{path}: corrupt header: {error}") from error
    end = 0
    stored = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        origin = f"{path}: tensor {name!r}"
        if entry.dtype not in DTYPES:
            raise ModelError(f"{origin} has an unknown type ({entry.dtype})")
        begin, previous, end = entry.data_offsets[0], end, entry.data_offsets[1]
        if begin != previous or min(entry.shape, default=0) < 0 or end - begin != entry.num_bytes:
            raise ModelError(f"{origin}: corrupt header: shape {entry.shape} does not fit bytes {begin} to {end}")
        if start + end > len(mapped):
            missing = start + end - len(mapped)
            raise ModelError(f"{origin}: truncated: the file ends {missing} bytes before the tensor does")
        read = _reader(mapped, start + begin, entry)
        stored.append(StoredTensor(name, origin, end - begin, read, partial(prefetch, start + begin, end - begin)))
    if start + end != len(mapped):
        raise ModelError(f"{path}: corrupt: {len(mapped) - start - end} bytes follow the last tensor")
    return stored


def check_dtype(stored: torch.dtype, wanted: torch.dtype) -> None:
    """Checks that a tensor can fill a parameter; see ``StoredTensor.read``.

    Raises:
        ValueError: It cannot; the message continues the tensor's origin.
    """
    fitting = FLOATS if wanted in FLOATS else (wanted, torch.uint8) if wanted == EXPONENTS else (wanted,)
    if stored not in fitting and (stored, wanted) != (EXPONENTS, torch.float32):
        raise ValueError(f"has type {NAMES[stored]}; supported: {', '.join(NAMES[each] for each in fitting)}")


def _reader(mapped: mmap.mmap | bytearray, offset: int, entry: Entry) -> Callable[[torch.dtype], Tensor]:
    def read(dtype: torch.dtype) -> Tensor:
        stored = DTYPES[entry.dtype]
        check_dtype(stored, dtype)
        count = math.prod(entry.elements)
        if not count:
            return torch.empty(entry.elements, dtype=stored)
        flat = torch.frombuffer(mapped, dtype=stored, count=count, offset=offset)
        return flat.view(entry.elements)

    return read
