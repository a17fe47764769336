"""Attention by libraries: what they are asked to compute, and that their packages take such calls."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ops
from executor.attention.base import AttentionGroup, HostRows, choose_backends
from ops import AttentionMetadata, AttentionShape
from ops.reference.attention import attend

pytest.importorskip("triton", reason="Triton is not installed")

from executor.attention.libraries import FlashAttention, FlashInferAttention, LibraryAttention, SdpaAttention
from ops.triton.attention import paged_attention
from tests import triton_interpreter  # noqa: F401  # amends the interpreter

SHAPE = AttentionShape(4, 2, 64, 0.125)
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
"""Of the packages' functions: name, arguments."""


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    before = ops.op_set("cpu")
    ops.use("cpu", "triton")
    CALLS.clear()
    yield
    ops.use("cpu", before)


def _paged(
    q: Tensor, keys: Tensor, values: Tensor, starts: list[int], lengths: list[int], table: Tensor, shape: AttentionShape
) -> Tensor:
    """Attention as the packages define it: keys and values [blocks, block_size, heads, dim]."""
    results = []
    for row, length in enumerate(lengths):
        k, v = (cache[table[row].long()].flatten(0, 1)[:length] for cache in (keys, values))
        results.append(attend(q[starts[row] : starts[row + 1]], k, v, shape))
    return torch.cat(results)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    CALLS.append(("flash_attn_varlen_func", (q, k, v), given))
    starts, ends = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"]
    lengths = ends.diff().tolist()
    assert given["max_seqlen_q"] == max(np.diff(starts)) and given["max_seqlen_k"] == max(lengths)
    left, right = given["window_size"]
    assert right == (0 if given["causal"] and left >= 0 else left)
    shape = AttentionShape(
        q.shape[1],
        k.shape[2],
        q.shape[2],
        given["softmax_scale"],
        sliding_window=None if left < 0 else left + 1,
        causal=given["causal"],
        logit_softcap=given["softcap"] or None,
    )
    return _paged(q, k, v, starts, lengths, given["block_table"].clamp(min=0), shape)


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        CALLS.append(("__init__", (float_workspace_buffer, kv_layout), {}))
        assert kv_layout == "HND"

    def plan(self, **given: Any) -> None:
        CALLS.append(("plan", (), given))
        self.given = given

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        CALLS.append(("run", (q, paged_kv_cache), {"out": out}))
        given = self.given
        first = given["paged_kv_indptr"]
        counts = first.diff().tolist()
        size = given["page_size"]
        lengths = [
            (count - 1) * size + last
            for count, last in zip(counts, given["paged_kv_last_page_len"].tolist(), strict=True)
        ]
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, part in enumerate(given["paged_kv_indices"].split(counts)):
            table[row, : len(part)] = part
        window = given["window_left"]
        shape = AttentionShape(
            given["num_qo_heads"],
            given["num_kv_heads"],
            given["head_dim_qk"],
            given["sm_scale"],
            sliding_window=None if window < 0 else window + 1,
            causal=given["causal"],
            logit_softcap=given["logits_soft_cap"] or None,
        )
        keys, values = (cache.transpose(1, 2) for cache in paged_kv_cache)
        out.copy_(_paged(q, keys, values, given["qo_indptr"].tolist(), lengths, table, shape))
        return out


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins, which note their calls."""
    for module, member in (
        ("flash_attn", flash_attn_varlen_func),
        ("flashinfer", BatchPrefillWithPagedKVCacheWrapper),
    ):
        stand_in = ModuleType(module)
        stand_in.__spec__ = importlib.util.spec_from_loader(module, None)
        setattr(stand_in, member.__name__, member)
        monkeypatch.setitem(sys.modules, module, stand_in)


def computed(backend: LibraryAttention, shape: AttentionShape) -> None:
    """Compares a step of prompts and decoding with the reference."""
    dtype, size = torch.bfloat16, backend.block_size
    assert backend.supports(shape, dtype) is None
    chosen: Any = backend
    group = AttentionGroup(chosen, shape, dtype, size, (0,))
    counts, lengths = np.array([1, 5, 1, 9], np.int32), np.array([size + 3, 5, 2, size + 9], np.int32)
    table = np.array([[4, 1, -1], [3, -1, -1], [0, -1, -1], [5, 2, -1]], np.int32)
    starts = np.append(0, np.cumsum(counts)).astype(np.int32)
    cache = [torch.randn(each).to(dtype) for each in backend.kv_shape(6, size, shape, dtype)]
    begins, ends, blocks = (torch.from_numpy(each) for each in (starts, lengths, table))
    columns = AttentionMetadata(begins, ends, blocks, torch.zeros(16, dtype=torch.int64), size)
    meta = group.plan(columns, HostRows(counts, lengths, table))
    q = torch.randn(16, shape.q_width).to(dtype)
    found = paged_attention(q, None, None, (cache[0], cache[1]), meta, shape)
    keys, values = (each.transpose(1, 2) for each in cache)
    expected = _paged(
        q.unflatten(1, (4, -1)),
        keys,
        values,
        starts.tolist(),
        lengths.tolist(),
        columns.block_table.clamp(min=0),
        shape,
    )
    torch.testing.assert_close(found, expected.flatten(1), rtol=2**-6, atol=2**-6)


KINDS: list[tuple[type[LibraryAttention], dict[str, Any]]] = [
    (SdpaAttention, {}),
    (SdpaAttention, {"sliding_window": 7}),
    (SdpaAttention, {"causal": False}),
    (FlashAttention, {"sliding_window": 7}),
    (FlashAttention, {"logit_softcap": 20.0}),
    (FlashInferAttention, {}),
    (FlashInferAttention, {"sliding_window": 7, "logit_softcap": 20.0}),
]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("backend", "fields"), KINDS, ids=str)
def test_libraries_compute_the_attention_of_a_step(backend: type[LibraryAttention], fields: dict[str, Any]) -> None:
    computed(backend(), replace(SHAPE, **fields))


def test_what_libraries_lack_is_refused() -> None:
    shapes = [replace(SHAPE, has_sinks=True)]

    def message(name: str) -> str:
        with pytest.raises(ValueError) as raised:
            choose_backends("cpu", shapes, torch.bfloat16, name)
        return str(raised.value)

    assert "sinks" in message("sdpa")
    assert "the package flashinfer is not installed" in message("flashinfer")
    assert message("aiter").startswith("--attention-backend aiter: aiter is not supported")
    assert "choose from" in message("xformers")
    with pytest.raises(ValueError, match="--kv-cache-dtype: sdpa reads"):
        SdpaAttention().kv_shape(1, 32, SHAPE, torch.int8)
    ops.use("cpu", "reference")
    assert "does not run Triton's kernels" in message("sdpa")


# ---------------------------------------------------------------------------------------------------------
# the packages themselves, where they are installed: their sources are read, as they cannot be imported without a GPU

SOURCES = {
    "flash_attn_varlen_func": ("flash_attn", "flash_attn_interface.py", ""),
    "__init__": ("flashinfer", "prefill.py", "BatchPrefillWithPagedKVCacheWrapper"),
    "plan": ("flashinfer", "prefill.py", "BatchPrefillWithPagedKVCacheWrapper"),
    "run": ("flashinfer", "prefill.py", "BatchPrefillWithPagedKVCacheWrapper"),
}


def signature(file: Path, of_class: str, name: str) -> inspect.Signature:
    """That of a function in a source file; the last one of overloads."""
    body = ast.parse(file.read_text()).body
    if of_class:
        body = next(each for each in body if isinstance(each, ast.ClassDef) and each.name == of_class).body
    found = [each for each in body if isinstance(each, ast.FunctionDef) and each.name == name][-1]
    for part in ast.walk(found.args):
        if isinstance(part, ast.arg):
            part.annotation = None
    found.args.defaults = [ast.Constant(None) for _ in found.args.defaults]
    found.args.kw_defaults = [None if each is None else ast.Constant(None) for each in found.args.kw_defaults]
    found.body, found.decorator_list, found.returns = [ast.Pass()], [], None
    space: dict[str, Callable[..., None]] = {}
    exec(compile(ast.fix_missing_locations(ast.Module([found], [])), str(file), "exec"), space)
    return inspect.signature(space[name])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", [FlashAttention, FlashInferAttention])
def test_packages_take_our_calls(backend: type[LibraryAttention], monkeypatch: pytest.MonkeyPatch) -> None:
    computed(backend(), SHAPE)
    calls = list(CALLS)
    assert calls
    with monkeypatch.context() as without:
        without.delitem(sys.modules, backend.package)
        spec = importlib.util.find_spec(backend.package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{backend.package} is not installed")
    for name, args, kwargs in calls:
        package, file, of_class = SOURCES[name]
        assert package == backend.package
        own = (None,) if of_class else ()
        signature(Path(spec.origin).parent / file, of_class, name).bind(*own, *args, **kwargs)
