"""Kernels at the sizes of real models, on a card: against the references, and bit by bit against themselves.

Without a card they are interpreted at small sizes, so that nothing is new to a card but its instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from executor.config import DeviceConfig
from executor.device.cuda import CudaDevice
from ops.dispatch import Op
from ops.metadata import AttentionMetadata, AttentionShape
from tests.gpu.conftest import has_gpu
from tests.ops.cpu import using
from tests.ops.test_cpu_sampling import random_arguments

attention: Any = pytest.importorskip("ops.triton.attention")
attention_tiles: Any = pytest.importorskip("ops.triton.attention_tiles")
gemm: Any = pytest.importorskip("ops.triton.gemm")
op_set: Any = pytest.importorskip("ops.triton.op_set")
quantized: Any = pytest.importorskip("ops.triton.quantized")

REAL = has_gpu()
BFLOAT16 = torch.bfloat16
HIDDEN, INNER = (4096, 12288) if REAL else (64, 96)
HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if REAL else (4, 2, 16)
VOCAB = 151936 if REAL else 300
TOKENS = 300 if REAL else 11
REPEATS = 10_000 if REAL else 2
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def place() -> Iterator[torch.device]:
    """Where kernels run."""
    before = ops.op_set("cpu")
    if REAL:
        device = CudaDevice()
        device.initialize(DeviceConfig(), 0)
        yield device.torch_device
    else:
        import tests.triton_interpreter  # noqa: F401  # amends the interpreter

        yield torch.device("cpu")
    ops.use("cpu", before)


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what is small be cut into several parts."""
    if not REAL:
        monkeypatch.setattr(gemm, "MIN_SEGMENT", 32)
        monkeypatch.setattr(attention_tiles, "PART", 64)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(count: int, most: int) -> Tensor:
    return torch.randint(0, most, (count,), generator=torch.Generator().manual_seed(1))


def filtered(kind: str) -> tuple[Any, ...]:
    return tuple(random_arguments(kind, 64 if REAL else 4, VOCAB, seed=5))


X = randn(TOKENS, HIDDEN)
CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], float]] = {
    "add": (lambda: (X, randn(TOKENS, HIDDEN, seed=1)), 0),
    "multiply": (lambda: (X, randn(TOKENS, HIDDEN, seed=1)), 0),
    "scale": (lambda: (X, 0.7), 0),
    "clip": (lambda: (X, 1.5), 0),
    "softcap": (lambda: (X, 30.0), 2),
    "act_and_mul": (lambda: (randn(TOKENS, 2 * INNER), "silu"), 2),
    "activation": (lambda: (X, "gelu"), 2),
    "rms_norm": (lambda: (X, randn(HIDDEN, seed=1), 1e-6), 2),
    "layer_norm": (lambda: (X, randn(HIDDEN, seed=1), randn(HIDDEN, seed=2), 1e-6), 4),
    "rotary_embedding": (
        lambda: (randn(TOKENS, HEADS * HEAD_DIM), torch.arange(TOKENS), randn(TOKENS, HEAD_DIM).float(), HEAD_DIM),
        2,
    ),
    "gather_rows": (lambda: (X, ids(7, TOKENS)), 0),
    "select_columns": (lambda: (X, ids(HIDDEN, HIDDEN)), 0),
    "embedding": (lambda: (ids(TOKENS, VOCAB).int(), randn(VOCAB, HIDDEN, seed=1)), 0),
    "linear": (lambda: (X, randn(INNER, HIDDEN, seed=1), randn(INNER, seed=2)), 4),
    "logits": (lambda: (X[:8], randn(VOCAB, HIDDEN, seed=1)), 4),
    "weight_sum": (lambda: (4 * randn(8, VOCAB, dtype=torch.float32),), 0),
    "sample": (lambda: filtered("flat"), 0),
}
"""Arguments of ops, and by how many units in the last place results may differ from the references. 0: not at all."""


@pytest.mark.parametrize("name", CALLS)
def test_ops_are_their_references(name: str, place: torch.device) -> None:
    arguments, ulps = CALLS[name]
    given = arguments()
    reference: Op[Any, Any] = getattr(ops, name)
    with using(ops.OpSet()):
        expected = reference.reference(*given)
    on_device = [each.to(place) if isinstance(each, Tensor) else each for each in given]
    found = op_set.IMPLEMENTATIONS[name](*on_device).cpu()
    assert found.dtype == expected.dtype
    if not ulps:
        assert torch.equal(found, expected)
        return
    unit = torch.finfo(BFLOAT16).eps  # sums in float32 are compared with rounded ones
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=ulps * unit, atol=ulps * unit * largest / 16)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("what", ["plain", "gated", "quantised"])
def test_rows_have_the_same_bits_in_tiles_of_any_size(what: str, place: torch.device) -> None:
    """Each size of tiles has an instruction of its own, which must add up in the same order."""
    n, k = (HIDDEN, INNER) if REAL else (64, 96)
    counts = (1, 2, 8, 9, 16, 17, 33, 65, 129, 257) if REAL else (1, 9, 17)
    x = randn(counts[-1], k).to(place)
    if what == "quantised":
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
        scales = randn(n, k // 32, seed=3, dtype=torch.float16)
        with using("triton"):
            packed = ops.pack_groups(codes, scales, bits=4, dtype=BFLOAT16, activations="float")
        segments = tuple(replace(each, data=each.data.to(place)) for each in packed.segments)
        multiply = partial(quantized.matmul, weight=replace(packed, segments=segments))
    else:
        epilogue = gemm.Epilogue(activation="silu", is_gated=True) if what == "gated" else gemm.PLAIN
        multiply = partial(gemm.matmul, weight=randn(n, k, seed=1).to(place), epilogue=epilogue)
    together = multiply(x)
    for count in counts:
        assert torch.equal(multiply(x[:count]), together[:count]), count
        assert torch.equal(multiply(x[-count:]), together[-count:]), count


class Request:
    """One request whose prompt is computed in any pieces."""

    def __init__(self, length: int, place: torch.device) -> None:
        self.shape = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
        self.length, self.place = length, place
        widths = (self.shape.q_width, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        self.data = [randn(length, width, seed=seed).to(place) for seed, width in enumerate(widths)]
        blocks = -(-length // BLOCK_SIZE)
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(4)).int().view(1, -1).to(place)
        size = (blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.cache = tuple(torch.full(size, torch.nan, dtype=BFLOAT16, device=place) for _ in range(2))

    def attend(self, begin: int, end: int) -> Tensor:
        """Attention of some tokens, whose K and V are written."""
        starts, lengths = (torch.tensor(each, dtype=torch.int32).to(self.place) for each in ([0, end - begin], [end]))
        positions = torch.arange(begin, end).to(self.place)
        slots = self.table[0][positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        meta = AttentionMetadata(starts, lengths, self.table, slots, BLOCK_SIZE)
        q, k, v = (each[begin:end] for each in self.data)
        found: Tensor = attention.paged_attention(q, k, v, self.cache, meta, self.shape)
        return found

    def exact(self) -> Tensor:
        """In float64."""
        group = HEADS // KV_HEADS
        q, k, v = (each.cpu().double().unflatten(1, (-1, HEAD_DIM)).transpose(0, 1) for each in self.data)
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * self.shape.scale
        hidden = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        result: Tensor = (weights @ v.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)
        return result


@pytest.mark.usefixtures("short_parts")
def test_attention_has_the_same_bits_in_pieces_of_any_size(place: torch.device) -> None:
    """Prompts and decoding use other tiles, and on some cards other instructions."""
    length = 1500 if REAL else 140
    whole = Request(length, place)
    expected = whole.attend(0, length)
    torch.testing.assert_close(expected.cpu().double(), whole.exact(), rtol=2**-7, atol=2**-6)
    pieces = Request(length, place)
    ends = [0, 1, 7, 40, 41, 300, 813, 1400, *range(1401, 1501)] if REAL else [0, 1, 40, 138, 139, 140]
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        assert torch.equal(pieces.attend(begin, end), expected[begin:end]), (begin, end)


@pytest.mark.usefixtures("short_parts")
def test_programs_that_meet_add_up_in_order(place: torch.device) -> None:
    """The last of several programs adds what the others left in memory: whatever their order, the bits are the same."""
    x, weight = randn(8, INNER).to(place), randn(HIDDEN, INNER, seed=1).to(place)
    assert gemm.num_segments(HIDDEN, INNER) > 1
    request = Request(BLOCK_SIZE * (100 if REAL else 3), place)
    last = request.length - 1
    request.attend(0, last)
    expected = gemm.matmul(x, weight), request.attend(last, request.length)
    wrong = torch.zeros((), dtype=torch.int64, device=place)
    for _ in range(REPEATS):
        found = gemm.matmul(x, weight), request.attend(last, request.length)
        for one, other in zip(found, expected, strict=True):
            wrong += (one.view(torch.int16) != other.view(torch.int16)).sum()
    assert int(wrong) == 0


@pytest.mark.skipif(REAL, reason="without a card")
def test_the_benchmark_is_rehearsed(capsys: pytest.CaptureFixture[str]) -> None:
    import bench_gpu

    rows = bench_gpu.rehearse(bench_gpu.arguments([]))
    kinds = {key for row in rows for key in row}
    assert {"tb_per_s", "us", "capture_mib", "floor_ms", "idle_us", "python_us", "tokens_per_s", "peak_gib"} <= kinds
    assert {row["how"] for row in rows if "how" in row} == {"graphs", "eager"}
    assert "does not fit" not in capsys.readouterr().out
