"""Reads the header of a GGUF file: metadata, tokenizer arrays and the tensor table, but no weights.

The ``gguf`` package builds a numpy view per value and takes seconds for a vocabulary; this reader
makes one pass over the header and takes about 50 ms. The file is not trusted: every length, count and
offset is checked against the size of the file before anything is allocated, so a damaged or hostile
file causes a ``ModelFileError`` and nothing else.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from msgspec.structs import replace

from api.errors import ModelFileError
from api.model.gguf_choice import part_names
from engine_core.config import GGUFHeader, GGUFTensor
from engine_core.launch import open_regular

GGML_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Name, elements in a block and bytes of a block, by ggml type id.

``gguf.constants`` has the same table, but importing it costs a quarter of a second.
"""

SPLIT_COUNT: Final = "split.count"
SPLIT_NUMBER: Final = "split.no"
SPLIT_TENSORS: Final = "split.tensors.count"

MAX_HEADER_BYTES: Final = 1 << 30
MAX_ARRAY_ITEMS: Final = 1 << 23
MAX_NAME_BYTES: Final = (1 << 16) - 1
MAX_DIMS: Final = 4
DEFAULT_ALIGNMENT: Final = 32

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_FIXED_HEADER_BYTES: Final = 24
_MIN_METADATA_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF model.

    Attributes:
        path: The file, or the first of a split model.
        metadata: All keys, including the tokenizer's arrays, as plain Python values.
        tensors: The tensor table in file order, with absolute offsets.
        files: Names of all files of a split model; empty for a single file.
    """

    path: str
    metadata: dict[str, Any]
    tensors: list[GGUFTensor]
    files: list[str] = field(default_factory=list)

    def header(self) -> GGUFHeader:
        """The part that a worker needs: the tensor table and the metadata without the tokenizer."""
        metadata = {key: value for key, value in self.metadata.items() if not key.startswith("tokenizer.")}
        return GGUFHeader(metadata=metadata, tensors=self.tensors, files=self.files)


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads the header of a GGUF model (version 2 or 3, little endian).

    Args:
        path: The file, or any part of a split model (``model-00001-of-00003.gguf``).

    Raises:
        ModelFileError: A file cannot be read, is damaged, of an unsupported version, or a part of another model.
    """
    path = Path(path)
    names = part_names(path.name)
    first = _read_file(path.with_name(names[0]))
    count = first.metadata.get(SPLIT_COUNT, 0)
    if len(names) == 1 and count in (0, 1):
        return first
    if count != len(names):
        advice = f"; the names of its files must end in -00001-of-{count:05}.gguf" if type(count) is int else ""
        raise ModelFileError(first.path, f"{SPLIT_COUNT} is {count!r}, but the name says {len(names)}{advice}")
    tensors = list(first.tensors)
    seen = {tensor.name for tensor in tensors}
    for number, name in enumerate(names[1:], 1):
        part = _read_file(path.with_name(name))
        if part.metadata.get(SPLIT_NUMBER) != number or part.metadata.get(SPLIT_COUNT) != count:
            raise ModelFileError(part.path, f"is not part {number + 1} of {count}, according to its metadata")
        for tensor in part.tensors:
            if tensor.name in seen:
                raise ModelFileError(part.path, f"tensor {_quote(tensor.name)}: stored in more than one file")
            seen.add(tensor.name)
            tensors.append(replace(tensor, file=number))
    total = first.metadata.get(SPLIT_TENSORS, len(tensors))
    if total != len(tensors):
        raise ModelFileError(first.path, f"{SPLIT_TENSORS} is {total!r}, but its files have {len(tensors)}")
    return GGUFFile(first.path, first.metadata, tensors, names)


def _read_file(path: Path) -> GGUFFile:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < _FIXED_HEADER_BYTES:
                raise ModelFileError(path, f"not a GGUF file: only {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(str(path), data).read()
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror or error}") from error


class _Reader:
    """A cursor over the mapped file. ``_what`` names what is being read, for error messages."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._end = min(self._size, MAX_HEADER_BYTES)
        self._pos = 0
        self._what = "header"

    def read(self) -> GGUFFile:
        num_tensors, num_keys = self._fixed_header()
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            self._what = f"metadata key {index}"
            key = self._string(MAX_NAME_BYTES)
            if key in metadata:
                self._fail(f"duplicate {_quote(key)}")
            self._what = f"metadata key {_quote(key)}"
            metadata[key] = self._value()
        tensors = self._tensors(num_tensors, self._alignment(metadata))
        return GGUFFile(path=self._path, metadata=metadata, tensors=tensors)

    def _fixed_header(self) -> tuple[int, int]:
        magic = self._data[:4]
        if magic != b"GGUF":
            self._fail(f"not a GGUF file: starts with {magic!r}")
        self._pos = 4
        version = self._u32()
        # Read as little endian, a big-endian version below 65536 has a low half of zero.
        if version & 0xFFFF == 0 and version:
            self._fail("big-endian GGUF files are not supported; convert the file to little endian")
        if version not in (2, 3):
            self._fail(f"GGUF version {version} is not supported (2 and 3 are)")
        num_tensors, num_keys = self._u64(), self._u64()
        self._check_count("number of metadata keys", num_keys, _MIN_METADATA_BYTES)
        self._check_count("number of tensors", num_tensors, _MIN_TENSOR_BYTES)
        return num_tensors, num_keys

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 24 or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment!r}, not a power of two")
        return alignment

    # Scalars, strings and arrays

    def _value(self) -> Any:
        value_type = self._u32()
        if value_type == _STRING:
            return self._string(self._end)
        if value_type == _ARRAY:
            return self._array()
        code = _SCALARS.get(value_type)
        if code is None:
            self._fail(f"unknown value type {value_type}")
        return self._scalars(code, 1)[0]

    def _array(self) -> list[Any]:
        item_type, count = self._u32(), self._u64()
        if count > MAX_ARRAY_ITEMS:
            self._fail(f"array of {count} items (at most {MAX_ARRAY_ITEMS} are supported)")
        if item_type == _STRING:
            self._check_count("array length", count, 8)
            return self._strings(count)
        code = _SCALARS.get(item_type)
        if code is None:
            self._fail(
                "arrays of arrays are not supported" if item_type == _ARRAY else f"unknown item type {item_type}"
            )
        self._check_count("array length", count, struct.calcsize(code))
        return list(self._scalars(code, count))

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        stop = self._pos + struct.calcsize(layout)
        if stop > self._end:
            self._truncated()
        values = struct.unpack_from(layout, self._data, self._pos)
        self._pos = stop
        return values

    def _string(self, max_bytes: int) -> str:
        length = self._u64()
        stop = self._pos + length
        if length > max_bytes or stop > self._end:
            self._truncated(f"text of {length} bytes")
        raw = self._data[self._pos : stop]
        self._pos = stop
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail("text is not UTF-8")

    def _strings(self, count: int) -> list[str]:
        # The hot loop: a vocabulary and its merges are some 10^5 strings.
        data, end, pos = self._data, self._end, self._pos
        unpack: Callable[[mmap.mmap, int], tuple[int]] = _U64.unpack_from
        texts: list[str] = []
        append = texts.append
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(data, pos)[0]
                if pos > end:
                    self._truncated(f"text of {pos - start} bytes")
                append(data[start:pos].decode())
        except struct.error:
            self._truncated()
        except UnicodeDecodeError:
            self._fail(f"item {len(texts)} is not UTF-8")
        self._pos = pos
        return texts

    # Tensors

    def _tensors(self, count: int, alignment: int) -> list[GGUFTensor]:
        entries: list[tuple[str, tuple[int, ...], int, int]] = []
        names: set[str] = set()
        for index in range(count):
            self._what = f"tensor {index}"
            name = self._string(MAX_NAME_BYTES)
            if name in names:
                self._fail(f"duplicate {_quote(name)}")
            names.add(name)
            self._what = f"tensor {_quote(name)}"
            num_dims = self._u32()
            if not 1 <= num_dims <= MAX_DIMS:
                self._fail(f"{num_dims} dimensions")
            dims = tuple(self._scalars("Q", num_dims))
            entries.append((name, dims, self._u32(), self._u64()))
        data_start = self._pos + -self._pos % alignment
        tensors = [self._tensor(*entry, data_start, alignment) for entry in entries]
        self._check_overlaps(tensors)
        return tensors

    def _tensor(
        self, name: str, dims: tuple[int, ...], ggml_type: int, offset: int, data_start: int, alignment: int
    ) -> GGUFTensor:
        self._what = f"tensor {_quote(name)}"
        layout = GGML_TYPES.get(ggml_type)
        if layout is None:
            self._fail(f"unknown ggml type {ggml_type}")
        type_name, block_size, block_bytes = layout
        num_elements = 1
        for dim in dims:
            num_elements *= dim
        if num_elements == 0:
            self._fail(f"a dimension of {dims} is 0")
        # ggml lists the fastest-varying dimension first; blocks run along it.
        if dims[0] % block_size:
            self._fail(f"rows of {dims[0]} elements are not whole {type_name} blocks of {block_size}")
        num_bytes = num_elements // block_size * block_bytes
        if offset % alignment:
            self._fail(f"offset {offset} is not a multiple of the alignment {alignment}")
        start = data_start + offset
        if start + num_bytes > self._size:
            self._fail(f"lies at bytes {start} to {start + num_bytes}, but the file ends at {self._size}")
        return GGUFTensor(name=name, shape=dims[::-1], ggml_type=ggml_type, offset=start, num_bytes=num_bytes)

    def _check_overlaps(self, tensors: list[GGUFTensor]) -> None:
        by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
        for first, second in zip(by_offset, by_offset[1:], strict=False):
            if first.offset + first.num_bytes > second.offset:
                self._what = f"tensor {_quote(second.name)}"
                self._fail(f"overlaps tensor {_quote(first.name)}")

    # Integers and errors

    def _u32(self) -> int:
        if self._pos + 4 > self._end:
            self._truncated()
        value: int = _U32.unpack_from(self._data, self._pos)[0]
        self._pos += 4
        return value

    def _u64(self) -> int:
        if self._pos + 8 > self._end:
            self._truncated()
        value: int = _U64.unpack_from(self._data, self._pos)[0]
        self._pos += 8
        return value

    def _check_count(self, what: str, count: int, min_bytes: int) -> None:
        left = self._end - self._pos
        if count * min_bytes > left:
            self._fail(f"{what} is {count}, but only {left} bytes are left")

    def _truncated(self, what: str = "value") -> NoReturn:
        place = f"the file ends at byte {self._size}"
        if self._end < self._size:
            place = f"the maximum header size is {self._end} bytes"
        self._fail(f"{what} at byte {self._pos} is truncated or too long: {place}")

    def _fail(self, detail: str) -> NoReturn:
        raise ModelFileError(self._path, detail if self._what == "header" else f"{self._what}: {detail}")


def _quote(name: str) -> str:
    """A name from the file, quoted and shortened for a one-line message."""
    return repr(name if len(name) <= 100 else f"{name[:100]}...")
