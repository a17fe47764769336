"""Lowers each op to a kernel instruction: one function per op, taking the op's arguments.

The same functions serve eager calls, where the arguments are tensors, and captured programs, where the step's arguments
are ``Ref``s and ``StepInput``s. They return None for arguments that the kernels do not support (other dtypes, another
backend's layout), which fall back to the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ops.adapters import AdapterTable, ExpertAdapters
from ops.cpu import library as lib
from ops.cpu.library import ACTIVATIONS, ROWS, TYPES, Heads, Matrix, RmsNorm, Weight
from ops.cpu.ranks import SharedRank
from ops.dispatch import Ref
from ops.metadata import AttentionShape, KVLayout, Routing, cache_name, stored_size, unsupported_cache
from ops.packed import Encoding, ExpertWeights, GatedActivation, PackedWeight, QuantizedWeight, SwiGLUOAI
from ops.packed import Weight as AnyWeight

_INT32_MAX = 2**31 - 1


@dataclass
class Instruction:
    """One call of a kernel, without the addresses of its matrices."""

    op: int
    matrices: dict[str, Any]
    """Matrix fields of the op's struct: tensors or ``Ref``s."""
    fields: dict[str, Any]
    """The other fields."""
    width: int
    """Columns of the result."""
    dtype: torch.dtype
    work: int
    """Approximate operations per row: small ops are not worth a second thread."""
    step: dict[str, Any] = field(default_factory=dict)
    """Fields it reads from the step descriptor: ``input_ids``, ``positions``, ``token_types``,
    ``logits_rows``, ``group``, ``adapters``."""
    keep: tuple[Any, ...] = ()
    """Owners of the memory that addresses in ``fields`` point to."""
    num_ops: int = 1
    """Recorded ops that it covers."""
    workspace: int = 0
    """Bytes for each token that threads share while it runs, about; small ones do not count."""
    ranks: SharedRank | None = None
    """This rank of those that make the result together, and then meet. None: each makes its own."""
    column: int = 0
    """The first column of the result that this rank makes."""
    inside: SharedRank | None = None
    """This rank of those that meet while the instruction runs."""

    def workspace_of(self, tokens: int) -> int:
        """Bytes in a step of so many tokens, which is computed in pieces if it needs more than a piece has."""
        return min(self.workspace * tokens, max(self.workspace, lib.WORKSPACE_BYTES))

    def struct(self, matrices: dict[str, Matrix]) -> ctypes.Structure:
        """The arguments, from the places of whole matrices, the result included."""
        if self.column:
            for name in ("out", "residual"):
                if name in matrices:
                    matrices[name].data = (matrices[name].data or 0) + self.column * self.dtype.itemsize
        return lib.STRUCTS[self.op](**self.fields, **matrices)


def is_matrix(x: Any) -> bool:
    """Whether the kernels can read and write it: a supported dtype, each row contiguous."""
    if x.dtype not in TYPES:
        return False
    if type(x) is Ref:
        return not x.spec.is_transposed
    return bool(x.dim() == 2 and x.stride(1) == 1 and not x.requires_grad)


def _width(x: Any) -> int:
    return x.width if type(x) is Ref else x.shape[1]


def _rows(x: Any) -> int:
    return ROWS[x.spec.rows] if type(x) is Ref else ROWS["tokens"]


def _is_vector(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.dim() == 1 and tensor.is_contiguous()


def encoding_struct(encoding: Encoding) -> lib.QuantizedEncoding:
    return lib.QuantizedEncoding(
        lib.FORMATS[encoding.format],
        encoding.group_size,
        0 if encoding.scale_dtype is None else lib.SCALE_TYPES[encoding.scale_dtype],
        lib.SHIFTS[encoding.shift],
        lib.ROW_SCALES[encoding.row_scale],
    )


def weight_struct(weight: PackedWeight | QuantizedWeight) -> tuple[Weight, Any]:
    """The struct, and what must live as long as it."""
    if isinstance(weight, PackedWeight):
        return Weight(weight.data.data_ptr(), *weight.shape, int(weight.paired)), weight
    segments = (lib.Segment * len(weight.segments))(
        *(lib.Segment(each.data.data_ptr(), each.rows, encoding_struct(each.encoding)) for each in weight.segments)
    )
    rounding = lib.ROUNDINGS[weight.activations]
    struct = Weight(
        None, *weight.shape, int(weight.paired), len(segments), ctypes.addressof(segments), rounding=rounding
    )
    return struct, (weight, segments)


def packed_weight(weight: AnyWeight) -> PackedWeight | QuantizedWeight | None:
    """The weight, if the kernels can read it."""
    if isinstance(weight, QuantizedWeight):
        return weight if all(segment.is_packed for segment in weight.segments) else None
    return weight if isinstance(weight, PackedWeight) else None


def embedding(ids: Any, weight: AnyWeight) -> Instruction | None:
    rows, columns = weight.shape
    if weight.dtype not in TYPES:
        return None
    fields: dict[str, Any] = {"type": TYPES[weight.dtype]}
    keep: Any = weight
    packed = packed_weight(weight)
    if packed is not None:
        fields["weight"], keep = weight_struct(packed)
    elif isinstance(weight, Tensor) and weight.stride(1) == 1:
        fields["weight"] = Weight(None, rows, columns, 0)
        fields["plain"] = Matrix(weight.data_ptr(), weight.stride(0))
    else:
        return None
    return Instruction(
        lib.OP_EMBEDDING, {}, fields, columns, weight.dtype, work=columns, step={"input_ids": ids}, keep=(keep,)
    )


def linear(x: Any, weight: AnyWeight, bias: Tensor | None = None) -> Instruction | None:
    packed = packed_weight(weight)
    if packed is None or x.dtype != packed.dtype or not is_matrix(x):
        return None
    if bias is not None and not _is_vector(bias, x.dtype):
        return None
    struct, keep = weight_struct(packed)
    fields = {
        "weight": struct,
        "bias": None if bias is None else bias.data_ptr(),
        "type": TYPES[x.dtype],
        "epilogue": lib.EPILOGUE_STORE,
        "activation": lib.IDENTITY,
        "rows": _rows(x),
    }
    rows, columns = weight.shape
    return Instruction(lib.OP_LINEAR, {"x": x}, fields, rows, x.dtype, work=rows * columns, keep=(keep, bias))


def adapted_linear(
    x: Any, weight: AnyWeight, bias: Tensor | None, table: AdapterTable, rows: Any
) -> Instruction | None:
    return _adapted(linear(x, weight, bias), table, rows)


def adapted_logits(
    x: Any, weight: AnyWeight, bias: Tensor | None, table: AdapterTable, rows: Any
) -> Instruction | None:
    return _adapted(logits(x, weight, bias), table, rows)


def _adapted(product: Instruction | None, table: AdapterTable, rows: Any) -> Instruction | None:
    """A product of rows that may have adapters."""
    if product is not None:
        product.fields["adapters"] = table.addresses.data_ptr()
        product.step["adapters"] = rows
        product.keep += (table,)
    return product


def logits(x: Any, weight: AnyWeight, bias: Tensor | None = None) -> Instruction | None:
    result = linear(x, weight, bias)
    if result is not None:
        result.fields["epilogue"] = lib.EPILOGUE_LOGITS
        result.dtype = torch.float32
    return result


def rms_norm(
    x: Any,
    weight: Tensor | None,
    eps: float,
    *,
    size: int | None = None,
    offset: float = 0.0,
    round_first: bool = True,
) -> Instruction | None:
    width = _width(x)
    size = size or (width if weight is None else len(weight))
    if not is_matrix(x) or width % size:
        return None
    if weight is not None and (len(weight) not in (size, width) or not _is_vector(weight, x.dtype)):
        return None
    stride = 0 if weight is None or len(weight) == size else size
    norm = RmsNorm(None if weight is None else weight.data_ptr(), eps, offset, int(round_first))
    fields = {
        "rms_norm": norm,
        "groups": width // size,
        "size": size,
        "weight_stride": stride,
        "type": TYPES[x.dtype],
        "rows": _rows(x),
    }
    return Instruction(lib.OP_RMS_NORM, {"x": x}, fields, width, x.dtype, work=width, keep=(weight,))


def layer_norm(
    x: Any, weight: Tensor | None, bias: Tensor | None, eps: float, size: int | None = None
) -> Instruction | None:
    width = _width(x)
    size = width if size is None else size
    vectors = [vector for vector in (weight, bias) if vector is not None]
    lengths = {len(vector) for vector in vectors} or {size}
    if not is_matrix(x) or width % size or not all(_is_vector(vector, x.dtype) for vector in vectors):
        return None
    if len(lengths) > 1 or not lengths <= {size, width}:
        return None
    fields = {
        "weight": None if weight is None else weight.data_ptr(),
        "bias": None if bias is None else bias.data_ptr(),
        "eps": eps,
        "groups": width // size,
        "size": size,
        "weight_stride": size if lengths == {width} else 0,
        "type": TYPES[x.dtype],
        "rows": _rows(x),
    }
    return Instruction(lib.OP_LAYER_NORM, {"x": x}, fields, width, x.dtype, work=width, keep=(weight, bias))


def rotary_embedding(
    x: Any, positions: Any, cos_sin: Tensor, head_dim: int, interleaved: bool = False
) -> Instruction | None:
    rotary_dim = cos_sin.shape[1]
    if positions.spec.is_transposed if type(positions) is Ref else positions.dim() != 1:
        return None  # several axes
    if not is_matrix(x) or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        return None
    if head_dim > lib.MAX_HEAD_DIM or rotary_dim > head_dim or rotary_dim % 2 or _width(x) % head_dim:
        return None
    heads = Heads(rotary_dim=rotary_dim, cos_sin=cos_sin.data_ptr(), interleaved=int(interleaved))
    fields = {
        "heads": heads,
        "num_heads": _width(x) // head_dim,
        "head_dim": head_dim,
        "type": TYPES[x.dtype],
    }
    return Instruction(
        lib.OP_ROTARY,
        {"x": x},
        fields,
        _width(x),
        x.dtype,
        work=2 * _width(x),
        step={"positions": positions},
        keep=(cos_sin,),
    )


def paged_attention(
    q: Any,
    k: Any | None,
    v: Any | None,
    kv_cache: tuple[Tensor, Tensor],
    meta: Any,
    shape: AttentionShape,
    layout: KVLayout = "plain",
    sinks: Tensor | None = None,
    biases: Tensor | None = None,
) -> Instruction | None:
    keys, values = kv_cache
    if layout != "tiled":
        return None
    matrices = {name: x for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    if keys.dtype not in (q.dtype, *lib.CACHES) or not all(map(is_matrix, matrices.values())):
        return None
    slopes = None if shape.alibi_slopes is None else torch.tensor(shape.alibi_slopes, dtype=torch.float32)
    scores = None if sinks is None else sinks.to(torch.float32)
    fields = {
        "k_cache": keys.data_ptr(),
        "v_cache": values.data_ptr(),
        "slopes": None if slopes is None else slopes.data_ptr(),
        "sinks": None if scores is None else scores.data_ptr(),
        "biases": None if biases is None else biases.data_ptr(),
        "bias_reach": 0 if biases is None else biases.shape[1] // 2,
        "scale": shape.scale,
        "k_scale": shape.k_scale,
        "v_scale": shape.v_scale,
        "softcap": shape.logit_softcap or 0.0,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "v_head_dim": shape.v_dim,
        "window": shape.sliding_window or 0,
        "chunked": int(shape.is_chunked),
        "causal": int(shape.causal),
        "type": TYPES[q.dtype],
        "cache": lib.CACHES.get(keys.dtype, lib.PLAIN_CACHE),
    }
    return Instruction(
        lib.OP_ATTENTION,
        matrices,
        fields,
        shape.out_width,
        q.dtype,
        work=_INT32_MAX,
        step={"group": meta},
        keep=(keys, values, slopes, scores, biases),
    )


def gated_delta(
    qkv: Any,
    beta: Any,
    step: Any,
    conv_weight: Tensor,
    decay: Tensor,
    step_bias: Tensor,
    cache: Tensor,
    meta: Any,
    shape: AttentionShape,
) -> Instruction | None:
    matrices = {"qkv": qkv, "beta": beta, "steps": step}
    if not all(is_matrix(each) and each.dtype == conv_weight.dtype for each in matrices.values()):
        return None
    if not conv_weight.is_contiguous() or not all(_is_vector(each, torch.float32) for each in (decay, step_bias)):
        return None
    fields = {
        "cache": cache.data_ptr(),
        "conv_weight": conv_weight.data_ptr(),
        "decay": decay.data_ptr(),
        "step_bias": step_bias.data_ptr(),
        "num_heads": shape.num_heads,
        "num_key_heads": shape.num_kv_heads,
        "key_dim": shape.head_dim,
        "value_dim": shape.v_dim,
        "conv_length": shape.conv_length,
        "max_drafts": shape.max_drafts,
        "tiled": int(shape.has_tiled_heads),
        "type": TYPES[qkv.dtype],
    }
    return Instruction(
        lib.OP_GATED_DELTA,
        matrices,
        fields,
        shape.out_width,
        qkv.dtype,
        work=shape.num_heads * shape.head_dim * shape.v_dim * 4,
        step={"group": meta},
        keep=(cache, conv_weight, decay, step_bias),
    )


def mamba(
    x: Any,
    step: Any,
    gate: Any | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    decay: Tensor,
    skip: Tensor,
    step_bias: Tensor,
    cache: Tensor,
    meta: Any,
    shape: AttentionShape,
) -> Instruction | None:
    matrices = {"x": x, "steps": step} | ({} if gate is None else {"gate": gate})
    if not all(is_matrix(each) and each.dtype == x.dtype for each in matrices.values()):
        return None
    vectors = [decay, skip, step_bias] + ([] if conv_bias is None else [conv_bias])
    if not all(_is_vector(each, torch.float32) for each in vectors) or shape.head_dim > lib.MAX_STATE_DIM:
        return None
    if conv_weight.dtype != torch.float32 or not conv_weight.is_contiguous():
        return None
    least, most = shape.step_limits
    fields = {
        "cache": cache.data_ptr(),
        "conv_weight": conv_weight.data_ptr(),
        "conv_bias": None if conv_bias is None else conv_bias.data_ptr(),
        "decay": decay.data_ptr(),
        "skip": skip.data_ptr(),
        "step_bias": step_bias.data_ptr(),
        "least_step": least,
        "most_step": most,
        "num_heads": shape.num_heads,
        "num_groups": shape.num_kv_heads,
        "state_dim": shape.head_dim,
        "head_dim": shape.v_dim,
        "conv_length": shape.conv_length,
        "max_drafts": shape.max_drafts,
        "type": TYPES[x.dtype],
    }
    return Instruction(
        lib.OP_MAMBA,
        matrices,
        fields,
        shape.out_width,
        x.dtype,
        work=shape.out_width * shape.head_dim * 3,
        step={"group": meta},
        keep=(cache, conv_weight, conv_bias, decay, skip, step_bias),
        workspace=(_width(x) + shape.num_heads) * x.dtype.itemsize,
    )


def heads_linear(x: Any, weights: Sequence[AnyWeight], head_dim: int) -> Instruction | None:
    packed = _experts(weights, x.dtype)
    if packed is None or not is_matrix(x):
        return None
    rows, columns = weights[0].shape
    fields = {
        "weights": ctypes.addressof(packed[0]),
        "num_heads": len(weights),
        "head_dim": head_dim,
        "type": TYPES[x.dtype],
    }
    work = len(weights) * rows * columns
    return Instruction(
        lib.OP_HEADS_LINEAR, {"x": x}, fields, len(weights) * rows, x.dtype, work=work, keep=(packed, weights)
    )


def latent_attention(
    q: Any,
    q_rope: Any,
    latents: Any,
    k_rope: Any,
    positions: Any,
    cos_sin: Tensor,
    kv_cache: tuple[Tensor],
    meta: Any,
    shape: AttentionShape,
    layout: KVLayout = "plain",
) -> Instruction | None:
    (cache,) = kv_cache
    matrices = {"q": q, "q_rope": q_rope, "k": latents, "k_rope": k_rope}
    if layout != "tiled" or not all(is_matrix(x) and x.dtype == cache.dtype for x in matrices.values()):
        return None
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        return None
    rotary_dim, pairs = cos_sin.shape[1], int(shape.rotates_pairs)
    fields = {
        "k_cache": cache.data_ptr(),
        "scale": shape.scale,
        "k_scale": 1.0,
        "v_scale": 1.0,
        "softcap": shape.logit_softcap or 0.0,
        "num_heads": shape.num_heads,
        "num_kv_heads": 1,
        "head_dim": shape.head_dim,
        "v_head_dim": shape.v_dim,
        "window": 0,
        "causal": 1,
        "type": TYPES[q.dtype],
        "rope": Heads(rotary_dim=rotary_dim, cos_sin=cos_sin.data_ptr(), interleaved=pairs),
        "q_rope_dim": _width(q_rope) // shape.num_heads,
    }
    return Instruction(
        lib.OP_LATENT_ATTENTION,
        matrices,
        fields,
        shape.num_heads * shape.v_dim,
        q.dtype,
        work=_INT32_MAX,
        step={"group": meta, "positions": positions},
        keep=(cache, cos_sin),
    )


def unsupported_latents(shape: AttentionShape, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot run a layer with latents, or None."""
    if dtype not in TYPES:
        return f"unsupported dtype {dtype}; the kernels take {', '.join(str(known) for known in TYPES)}"
    if shape.head_dim > lib.MAX_LATENT_DIM:
        return f"latents and their rotated columns are more than {lib.MAX_LATENT_DIM}"
    return None


def latent_shapes(
    num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
) -> tuple[tuple[int, ...], ...]:
    """Shape of the cache of latents, as the kernels lay it out; see ``csrc/latent_cache.h``.

    Raises:
        ValueError: The kernels have no cache of this dtype, or none with such blocks.
    """
    if dtype in lib.CACHES:
        raise ValueError(f"--kv-cache-dtype: latents have no cache in {cache_name(dtype)} yet; use auto")
    keys, _ = kv_shapes(num_blocks, block_size, shape, dtype)
    return (keys,)


def unsupported_attention(shape: AttentionShape, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot run such a layer, or None."""
    if dtype not in TYPES:
        return f"unsupported dtype {dtype}; the kernels take {', '.join(str(known) for known in TYPES)}"
    if max(shape.head_dim, shape.v_dim) > lib.MAX_HEAD_DIM:
        return f"heads are larger than {lib.MAX_HEAD_DIM} columns"
    if shape.alibi_slopes is not None and not shape.causal:
        return "ALiBi is supported in causal attention only"
    return None


def kv_shapes(
    num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
) -> tuple[tuple[int, ...], ...]:
    """Shapes of K and V in a cache of this dtype, as the kernels lay them out; see ``csrc/kv_cache.h``.

    Raises:
        ValueError: The kernels have no cache of this dtype for such heads, or none with such blocks.
    """
    refused = unsupported_cache(shape, dtype)
    if refused:
        raise ValueError(refused)
    if block_size % lib.TOKENS_MULTIPLE:
        raise ValueError(f"the block size must be a multiple of {lib.TOKENS_MULTIPLE}, not {block_size}")
    units = block_size // lib.TOKENS_MULTIPLE
    key_dim, value_dim = (-(-dim // lib.HEAD_MULTIPLE) * lib.HEAD_MULTIPLE for dim in (shape.head_dim, shape.v_dim))
    sizes = stored_size(key_dim, dtype), stored_size(value_dim, dtype, is_value=True)
    return tuple((num_blocks, shape.num_kv_heads, units, lib.TOKENS_MULTIPLE * size) for size in sizes)


def short_conv(
    gate_in: Any, gate_out: Any, x: Any, weight: Tensor, bias: Tensor | None, cache: Tensor, meta: Any
) -> Instruction | None:
    matrices = {"gate_in": gate_in, "gate_out": gate_out, "x": x}
    if not all(is_matrix(matrix) and matrix.dtype == cache.dtype for matrix in matrices.values()):
        return None
    if weight.dtype != x.dtype or not weight.is_contiguous() or (bias is not None and not _is_vector(bias, x.dtype)):
        return None
    length, width = weight.shape
    fields = {
        "cache": cache.data_ptr(),
        "weight": weight.data_ptr(),
        "bias": None if bias is None else bias.data_ptr(),
        "width": width,
        "length": length,
        "type": TYPES[x.dtype],
    }
    return Instruction(
        lib.OP_SHORT_CONV,
        matrices,
        fields,
        width,
        x.dtype,
        work=(length + 2) * width,
        step={"group": meta},
        keep=(cache, weight, bias),
    )


def act_and_mul(x: Any, activation: GatedActivation) -> Instruction | None:
    result = _pointwise(lib.OP_ACT_AND_MUL, x, _width(x) // 2)
    if result is not None:
        result.fields |= _gate(activation)
    return result


def activation(x: Any, kind: str) -> Instruction | None:
    return _pointwise(lib.OP_ACTIVATION, x, _width(x), ACTIVATIONS[kind])


def scale(x: Any, factor: float) -> Instruction | None:
    return _pointwise(lib.OP_ACTIVATION, x, _width(x), lib.SCALE, factor)


def softcap(x: Any, cap: float) -> Instruction | None:
    return _pointwise(lib.OP_ACTIVATION, x, _width(x), lib.SOFTCAP, cap)


def clip(x: Any, limit: float) -> Instruction | None:
    return _pointwise(lib.OP_ACTIVATION, x, _width(x), lib.CLIP, limit)


def add(x: Any, y: Any) -> Instruction | None:
    if y.dtype != x.dtype or not is_matrix(y) or _width(x) != _width(y):
        return None
    result = _pointwise(lib.OP_ADD, x, _width(x))
    if result is not None:
        result.matrices["y"] = y
    return result


def multiply(x: Any, y: Any) -> Instruction | None:
    result = add(x, y)
    if result is not None:
        result.op = lib.OP_MULTIPLY
    return result


def all_gather(x: Any, ranks: Any, widths: tuple[int, ...]) -> Instruction | None:
    result = _pointwise(lib.OP_ACTIVATION, x, _width(x)) if isinstance(ranks, SharedRank) else None
    if result is not None:
        result.ranks, result.column, result.width = ranks, sum(widths[: ranks.rank]), sum(widths)
    return result


def gather_rows(x: Any, rows: Any) -> Instruction | None:
    result = _pointwise(lib.OP_GATHER_ROWS, x, _width(x))
    if result is not None:
        result.step["logits_rows"] = rows
    return result


def _pointwise(
    op: int, x: Any, width: int, activation: int = lib.IDENTITY, parameter: float = 0.0
) -> Instruction | None:
    if not is_matrix(x):
        return None
    fields = {
        "width": width,
        "activation": activation,
        "parameter": parameter,
        "type": TYPES[x.dtype],
        "rows": _rows(x),
    }
    return Instruction(op, {"x": x}, fields, width, x.dtype, work=width)


def _gate(activation: GatedActivation | Literal["relu2"]) -> dict[str, Any]:
    """Fields of a gated activation."""
    if isinstance(activation, SwiGLUOAI):
        return {"activation": lib.SWIGLU_OAI, "parameter": activation.alpha, "limit": activation.limit}
    return {"activation": ACTIVATIONS[activation], "parameter": 0.0, "limit": 0.0}


def route(x: Any, routing: Routing, bias: Tensor | None = None, factors: Tensor | None = None) -> Instruction | None:
    if not is_matrix(x) or x.dtype != torch.float32:
        return None
    if not all(vector is None or _is_vector(vector, torch.float32) for vector in (bias, factors)):
        return None
    width = _width(x)
    fields = {
        "bias": None if bias is None else bias.data_ptr(),
        "factors": None if factors is None else factors.data_ptr(),
        "num_experts": width,
        "top_k": routing.top_k,
        "scores": lib.SCORES[routing.scores],
        "normalize": int(routing.normalize),
        "factor": routing.factor,
        "jitter": routing.jitter,
        "num_groups": routing.num_groups,
        "top_groups": routing.top_groups,
        "group_best": routing.group_best,
        "rows": _rows(x),
    }
    work = width * (routing.top_k + 8)
    return Instruction(lib.OP_ROUTE, {"x": x}, fields, width, torch.float32, work=work, keep=(bias, factors))


def experts(
    x: Any,
    routed: Any,
    weights: ExpertWeights,
    shared: Any | None = None,
    shared_gate: Any | None = None,
    adapters: ExpertAdapters | None = None,
    rows: Any | None = None,
) -> Instruction | None:
    matrices = {"x": x, "routed": routed}
    if shared is not None:
        matrices["shared"] = shared
    if shared_gate is not None:
        matrices["shared_gate"] = shared_gate
    types = {"x": x.dtype, "routed": torch.float32, "shared": x.dtype, "shared_gate": torch.float32}
    if not all(is_matrix(each) and each.dtype == types[name] for name, each in matrices.items()):
        return None
    gate_up, down = _experts(weights.gate_up, x.dtype), _experts(weights.down, x.dtype)
    biases = (weights.gate_up_bias, weights.down_bias)
    vectors = [each for some in biases for each in some or ()]
    if gate_up is None or down is None or weights.has_orders or not all(_is_vector(each, x.dtype) for each in vectors):
        return None
    addresses = [some and (ctypes.c_void_p * len(some))(*(each.data_ptr() for each in some)) for some in biases]
    fields = {
        "gate_up": ctypes.addressof(gate_up[0]),
        "down": ctypes.addressof(down[0]),
        "gate_up_biases": addresses[0] and ctypes.addressof(addresses[0]),
        "down_biases": addresses[1] and ctypes.addressof(addresses[1]),
        "num_experts": len(weights.down),
        "top_k": weights.top_k,
        **_gate(weights.activation),
        "scales_input": int(weights.scales_input),
        "gated": int(weights.is_gated),
        "type": TYPES[x.dtype],
    }
    tables = [] if adapters is None else [_addresses(adapters.gate_up), _addresses(adapters.down)]
    names = ("gate_up_adapters", "down_adapters")
    fields |= {name: ctypes.addressof(table) for name, table in zip(names, tables, strict=False)}
    ranks = weights.communicator
    if ranks is not None:
        if not isinstance(ranks, SharedRank) or (weights.is_gated and not gate_up[0][0].paired):
            return None
        fields |= {"inner": ranks.workspace.data_ptr(), "first_inner": sum(weights.inner_widths[: ranks.rank])}
    hidden, inner = weights.down[0].shape
    work = 3 * hidden * inner * weights.top_k
    keep = (gate_up, down, biases, addresses, adapters, tables)
    # Both inputs, staged as up to 32 bits, what gates and ups yield, and the results.
    workspace = weights.top_k * (8 * hidden + inner * (4 + 2 * x.dtype.itemsize))
    return Instruction(
        lib.OP_EXPERTS,
        matrices,
        fields,
        hidden,
        x.dtype,
        work=work,
        step={} if adapters is None else {"adapters": rows},
        keep=keep,
        workspace=workspace,
        inside=ranks,
    )


def _addresses(tables: Sequence[AdapterTable]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tables))(*(table.addresses.data_ptr() for table in tables))


def _experts(weights: Sequence[AnyWeight], dtype: torch.dtype) -> tuple[Any, Any] | None:
    """An array of the structs, and what must live as long as it; None: the kernels cannot read the weights together."""
    structs, keep, forms = [], [], set()
    for weight in weights:
        packed = packed_weight(weight)
        if packed is None or packed.dtype != dtype:
            return None
        struct, owner = weight_struct(packed)
        structs.append(struct)
        keep.append(owner)
        segments = tuple(each.rows for each in weight.segments) if isinstance(weight, QuantizedWeight) else ()
        forms.add((packed.shape, packed.paired, struct.rounding, segments))
    return ((Weight * len(structs))(*structs), keep) if len(forms) == 1 else None


BY_NAME = {
    function.__name__: function
    for function in (
        embedding,
        linear,
        logits,
        adapted_linear,
        adapted_logits,
        rms_norm,
        layer_norm,
        rotary_embedding,
        paged_attention,
        gated_delta,
        mamba,
        heads_linear,
        latent_attention,
        short_conv,
        route,
        experts,
        act_and_mul,
        activation,
        scale,
        softcap,
        clip,
        add,
        multiply,
        gather_rows,
        all_gather,
    )
}
"""By op name."""
