"""Quantised weights: packing, and products with them.

The numbers of a row come in groups of 16 or more columns: ``scale * (code - offset) + minimum``, in float32. There are
two ways to multiply, and a weight says which (``QuantizedWeight.activations``):

``float``: the weight's numbers are rounded to the dtype of the activations; everything else is as if the weight had
never been quantised.

``int8``: activations are rounded to int8 as well, 32 columns at a time, as llama.cpp does: for a row's 32 numbers x,
``d = max|x| / 127`` and ``q = x * (127 / max|x|)``, rounded to the nearest, ties to even. Sums of products of integers
are exact, so the result depends only on the order in which groups are added: block after block, first
``acc = fma(isum, scale * d, acc)`` for its one or two groups, then ``acc = fma(qsum * d, minimum, acc)`` for those with
minimums, where ``isum`` is the sum of ``(code - offset) * q`` and ``qsum`` that of ``q``. All kernels return the same
bits.

``int8_per_token``: activations are rounded alike, but with one scale for a whole row. The weights are in int8 with one
scale for each row as well: the result is ``isum * (scale * d)``, where ``isum`` is the sum over all columns as float32.

``fp8_per_token``: activations are rounded to FP8 (E4M3) with one scale for a whole row, ``d = max|x| / 448``. The
weights are in FP8 as well, and their scales belong to rows or to multiples of 128 columns. How sums are rounded is the
kernel's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dispatch import Spec, op, op_set
from ops.packed import Encoding, QuantizedActivations, QuantizedWeight, RowScale, RowSource, Segment, Shift
from ops.reference.gguf_blocks import BLOCK_FORMATS, Codes, decode_blocks
from ops.reference.small_floats import (
    E2M1_OFFSET,
    FLOAT_FORMATS,
    e2m1_codes,
    halved_power,
    values_of,
)

BLOCK = 32
"""Activations are quantised in blocks of so many columns."""
FP8 = "fp8_per_token"
FP8_COLUMNS = 128
"""Groups of weights in FP8 that are multiplied with activations in FP8 have a multiple of so many columns."""
SMALLEST = 2.0**-100
"""Blocks of activations below this count as zeros, since the reciprocal of their scale would not be finite."""
CODE_BITS = {4: "int4", 8: "int8"}
MIDDLES = {"int4": 8, "int8": 128}
"""What a code without a zero point counts from."""
MAX_COLUMNS_PER_TOKEN = 1 << 17
"""With more columns, the sum of a row's products might not fit 32 bits."""


# ---------------------------------------------------------------------------------------------------------
# packing


@op(lambda rows, encoding, columns, paired=False: Spec("", 0, torch.uint8))
def pack_segment(rows: Tensor | RowSource, encoding: Encoding, columns: int, paired: bool = False) -> Segment:
    """Converts quantised rows to the layout that this device's kernels read. The reference keeps them as they are.

    Args:
        rows: uint8 [rows, bytes of a row]: blocks of GGUF; or of groups one byte for each code, then the scales, then
            zeros or minimums, then the row's own scale. Or what makes them, some at a time.
        encoding: What the bytes are.
        columns: Numbers of a row.
        paired: As of ``pack_linear``.
    """
    if isinstance(rows, RowSource):
        rows = rows.make(0, rows.rows)
    return Segment(rows, len(rows), encoding)


def pack_blocks(
    segments: Sequence[tuple[Tensor, str]],
    *,
    dtype: torch.dtype,
    activations: QuantizedActivations,
    paired: bool = False,
) -> QuantizedWeight:
    """A weight of blocks as GGUF files have them.

    Args:
        segments: Consecutive rows of the weight, uint8 [rows, bytes of a row], with their type as GGUF names it. They
            are copied on devices with kernels.
        dtype: Of the activations.
        activations: What the weight is multiplied with.
        paired: ``act_and_mul`` follows, so its two factors may be computed side by side. One segment only.

    Raises:
        ValueError: A type is unknown, a row is no whole number of blocks, rows differ in length, or activations would
            be rounded per token.
    """
    if activations not in ("float", "int8"):
        raise ValueError(f"blocks are multiplied with activations in float or int8, not {activations}")
    widths = set()
    for rows, name in segments:
        if name not in BLOCK_FORMATS:
            raise ValueError(f"unknown type {name!r} of blocks; choose from {', '.join(BLOCK_FORMATS)}")
        kind = BLOCK_FORMATS[name]
        if rows.shape[1] % kind.num_bytes:
            raise ValueError(f"rows of {rows.shape[1]} bytes are not whole blocks of {name}")
        widths.add(rows.shape[1] // kind.num_bytes * kind.columns)
    if len(widths) != 1:
        raise ValueError(f"the rows of a weight have equal lengths, not {sorted(widths)}")
    (columns,) = widths
    if len(segments) > 1 or segments[0][0].shape[0] % 2:
        paired = False
    packed = tuple(pack_segment(rows, Encoding(name), columns, paired) for rows, name in segments)
    return QuantizedWeight(packed, (sum(each.rows for each in packed), columns), paired, dtype, activations)


def pack_groups(
    codes: Tensor | Sequence[Tensor],
    scales: Tensor,
    zeros: Tensor | None = None,
    minimums: Tensor | None = None,
    *,
    bits: int,
    dtype: torch.dtype,
    activations: QuantizedActivations,
    paired: bool = False,
) -> QuantizedWeight:
    """A weight of integer codes with a scale for each group of columns.

    Their numbers are ``scale * (code - zero)``, or ``scale * code + minimum``.

    Args:
        codes: uint8, or int8 for codes that count from 0, [rows, columns]. Several: the rows of one after the other.
        scales: float16, bfloat16 or float32 [rows, groups]. A group is a multiple of 32 columns, or a whole row.
        zeros: [rows, groups], as codes; None: 8 or 128 for uint8, 0 for int8.
        minimums: [rows, groups] in the dtype of the scales, instead of zeros, for codes in uint8.
        bits: 4 or 8.
        dtype: Of the activations.
        activations: What the weight is multiplied with; per token only if there are 8 bits, one scale for a row, and
            neither zeros nor minimums.
        paired: As of ``pack_blocks``.

    Raises:
        ValueError: The groups have another size, there are other bits, int8 codes have minimums, or activations cannot
            be rounded per token.
    """
    if bits not in CODE_BITS:
        raise ValueError(f"codes have 4 or 8 bits, not {bits}")
    parts = [codes] if isinstance(codes, Tensor) else codes
    if minimums is not None and parts[0].dtype != torch.uint8:
        raise ValueError(f"codes with minimums are uint8, not {parts[0].dtype}")
    columns, groups = parts[0].shape[1], scales.shape[1]
    group_size = columns if groups == 1 else columns // groups
    if groups > 1 and (columns % groups or group_size % BLOCK):
        raise ValueError(f"{groups} groups of {columns} columns: a group is a multiple of {BLOCK} columns, or a row")
    name = CODE_BITS[bits]
    fields = [scales.contiguous().view(torch.uint8)]
    if zeros is not None:
        fields.append(_unsigned(zeros, MIDDLES[name]))
    elif minimums is not None:
        fields.append(minimums.to(scales.dtype).contiguous().view(torch.uint8))
    shift: Shift = "zeros" if zeros is not None else "none" if minimums is None else "minimums"
    encoding = Encoding(name, group_size, scales.dtype, shift)
    if activations == "int8_per_token" and (bits != 8 or groups > 1 or shift != "none"):
        raise ValueError("int8_per_token needs 8 bits, one scale for each row, and neither zeros nor minimums")
    if activations == "int8_per_token" and columns > MAX_COLUMNS_PER_TOKEN:
        raise ValueError(f"int8_per_token supports {MAX_COLUMNS_PER_TOKEN} columns, not {columns}")
    parts = [_unsigned(each, MIDDLES[name]) for each in parts]
    return _packed(parts, fields, encoding, columns, paired, dtype, activations)


def pack_floats(
    codes: Tensor | Sequence[Tensor],
    scales: Tensor,
    row_scales: Tensor | None = None,
    *,
    format: str,
    group_size: int | None = None,
    divides: bool = False,
    dtype: torch.dtype,
    activations: QuantizedActivations = "float",
    paired: bool = False,
) -> QuantizedWeight:
    """A weight of codes of floating-point numbers with a scale for each group of columns.

    Their numbers are ``scale * value``, in float32. The last group of a row may be shorter than the others.

    Args:
        codes: uint8 or float8_e4m3fn [rows, columns], one byte for each, also of 4 bits. Several: the rows of one after
            the other.
        scales: [rows, groups]: float16, bfloat16 or float32; of mxfp4 uint8 or float8_e8m0fnu, each standing for
            ``2**(scale - 127)``; of nvfp4 float8_e4m3fn, times or divided by ``row_scales``.
        row_scales: float32 [rows], of nvfp4 alone.
        format: ``fp8_e4m3``, ``nf4``, ``fp4`` (both as of bitsandbytes), ``mxfp4`` or ``nvfp4``.
        group_size: Columns of a group: a multiple of 32, or None for whole rows. 32 for mxfp4 and 16 for nvfp4.
        divides: ``row_scales`` divide the scales instead of multiplying them.
        dtype: Of the activations.
        activations: What the weight is multiplied with: ``float``; of mxfp4 and nvfp4 also ``int8``, and of fp8_e4m3
            ``fp8_per_token``.
        paired: As of ``pack_blocks``.

    Raises:
        ValueError: The format is unknown, or does not have such groups, scales or activations.
    """
    if format not in FLOAT_FORMATS:
        raise ValueError(f"unknown format {format!r} of numbers; choose from {', '.join(FLOAT_FORMATS)}")
    kind = FLOAT_FORMATS[format]
    parts = [codes] if isinstance(codes, Tensor) else codes
    num_rows, columns = sum(map(len, parts)), parts[0].shape[1]
    size = kind.group_size or group_size or columns
    if size != columns and size % (kind.group_size or BLOCK):
        raise ValueError(f"groups of {size} columns: a group of {format} is a multiple of {BLOCK} columns, or a row")
    if tuple(scales.shape) != (num_rows, -(-columns // size)):
        raise ValueError(
            f"{num_rows} rows of {columns} columns in groups of {size} have scales "
            f"[{num_rows}, {-(-columns // size)}], not {list(scales.shape)}"
        )
    if (format == "nvfp4") != (row_scales is not None):
        raise ValueError(f"scales of rows belong to nvfp4 alone, and to each weight in it; this one is {format}")
    has_fp8 = format == "fp8_e4m3" and (size == columns or size % FP8_COLUMNS == 0)
    if activations != "float" and not (kind.is_integer if activations == "int8" else has_fp8 and activations == FP8):
        raise ValueError(f"{format} is not multiplied with activations in {activations}")
    if kind.scale_dtype is not None:
        scales = scales.view(kind.scale_dtype)
    fields = [scales.contiguous().view(torch.uint8)]
    if row_scales is not None:
        fields.append(row_scales.float().reshape(-1, 1).contiguous().view(torch.uint8))
    row_scale: RowScale = "none" if row_scales is None else "divisor" if divides else "factor"
    encoding = Encoding(format, size, scales.dtype, row_scale=row_scale)
    return _packed([each.view(torch.uint8) for each in parts], fields, encoding, columns, paired, dtype, activations)


def _packed(
    codes: Sequence[Tensor],
    fields: Sequence[Tensor],
    encoding: Encoding,
    columns: int,
    paired: bool,
    dtype: torch.dtype,
    activations: QuantizedActivations,
) -> QuantizedWeight:
    """A weight of one segment, whose rows are made of codes and the fields of groups."""
    num_rows = len(fields[0])
    paired = paired and num_rows % 2 == 0

    def make(first: int, end: int) -> Tensor:
        chosen, start = [], 0
        for part in codes:
            chosen.append(part[max(0, first - start) : max(0, end - start)])
            start += len(part)
        return torch.cat([torch.cat(chosen), *(field[first:end] for field in fields)], dim=1)

    segment = pack_segment(RowSource(fields[0].device, num_rows, make), encoding, columns, paired)
    return QuantizedWeight((segment,), (num_rows, columns), paired, dtype, activations)


def join_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several weights, one after the other, without copying them. None is paired unless it is the only one.

    Raises:
        ValueError: They differ in columns or in what they are multiplied with, or are paired.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    kinds = {(each.shape[1], each.dtype, each.activations, each.paired) for each in weights}
    if kinds != {(first.shape[1], first.dtype, first.activations, False)}:
        raise ValueError(f"weights that differ in columns or activations, or are paired, cannot be joined: {kinds}")
    segments = tuple(segment for each in weights for segment in each.segments)
    shape = (sum(each.shape[0] for each in weights), first.shape[1])
    return QuantizedWeight(segments, shape, False, first.dtype, first.activations)


def _unsigned(codes: Tensor, middle: int) -> Tensor:
    # Sums of uint8 wrap around.
    return codes.contiguous().view(torch.uint8) + middle if codes.dtype == torch.int8 else codes.to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------
# the numbers


def decode(rows: Tensor, encoding: Encoding, columns: int) -> Codes:
    """The codes, scales and minimums of rows as ``pack_segment`` takes them."""
    if encoding.format in BLOCK_FORMATS:
        return decode_blocks(rows, encoding.format)
    assert encoding.scale_dtype is not None
    groups = -(-columns // encoding.group_size)
    end = columns + groups * encoding.scale_dtype.itemsize
    codes, packed_scales, rest = rows[:, :columns], rows[:, columns:end].contiguous(), rows[:, end:].contiguous()
    if encoding.scale_dtype == torch.float8_e8m0fnu:
        return Codes(e2m1_codes(codes), halved_power(packed_scales), E2M1_OFFSET, group_size=encoding.group_size)
    scales = packed_scales.view(encoding.scale_dtype).float()
    if encoding.row_scale != "none":
        own = rest.view(torch.float32)
        scales = (scales * own if encoding.row_scale == "factor" else scales / own) * 0.5
        return Codes(e2m1_codes(codes), scales, E2M1_OFFSET, group_size=encoding.group_size)
    if encoding.format in FLOAT_FORMATS:
        return Codes(values_of(codes, encoding.format), scales, group_size=encoding.group_size)
    if encoding.shift == "zeros":
        return Codes(codes, scales, zeros=rest.float())
    minimums = rest.view(encoding.scale_dtype).float() if encoding.shift == "minimums" else None
    return Codes(codes, scales, 0 if minimums is not None else MIDDLES[encoding.format], minimums=minimums)


def numbers(found: Codes) -> Tensor:
    """float32 [rows, columns]."""
    columns = found.codes.shape[1]
    group_size = found.group_size or -(-columns // found.scales.shape[1])

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(group_size, dim=1)[:, :columns]

    offsets = found.offset if found.zeros is None else spread(found.zeros)
    result = spread(found.scales) * (found.codes.float() - offsets)
    return result if found.minimums is None else result + spread(found.minimums)


def dequantized(weight: QuantizedWeight) -> Tensor:
    """The weight's numbers, float32 [out_features, in_features]."""
    return torch.cat([numbers(_decoded(segment, weight.shape[1])) for segment in weight.segments])


def _decoded(segment: Segment, columns: int) -> Codes:
    assert not segment.is_packed, "a packed weight needs the kernels of its device"
    return decode(segment.data, segment.encoding, columns)


# ---------------------------------------------------------------------------------------------------------
# products


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of ``x``."""
    if weight.activations == "float":
        return F.linear(x, dequantized(weight).to(x.dtype), bias)
    return logits(x, weight, bias).to(x.dtype)


def logits(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in float32."""
    if weight.activations == "float":
        return F.linear(x, dequantized(weight).to(x.dtype), bias).float()
    columns = weight.shape[1]
    if weight.activations == FP8:
        rounded = _rounded_to_fp8(x)
        parts = [rounded @ numbers(_decoded(segment, columns)).double().T for segment in weight.segments]
        parts = [part.float() for part in parts]
    elif weight.activations == "int8_per_token":
        codes, scales = quantize(x, columns)
        parts = [_product_per_token(codes, scales, _decoded(segment, columns)) for segment in weight.segments]
    else:
        codes, scales = quantize(x)
        parts = [_product(codes, scales, _decoded(segment, columns)) for segment in weight.segments]
    result = torch.cat(parts, dim=1)
    return result if bias is None else result + bias.float()


def embedding(ids: Tensor, weight: QuantizedWeight) -> Tensor:
    """Rows of the table in the dtype of the activations."""
    result = torch.empty((len(ids), weight.shape[1]), dtype=weight.dtype, device=ids.device)
    first = 0
    for segment in weight.segments:
        is_here = (ids >= first) & (ids < first + segment.rows)
        assert not segment.is_packed, "a packed weight needs the kernels of its device"
        rows = segment.data[(ids[is_here] - first).long()]
        result[is_here] = numbers(decode(rows, segment.encoding, weight.shape[1])).to(weight.dtype)
        first += segment.rows
    return result


def quantize(x: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Activations in int8: codes int32 [rows, blocks, block], zero-padded, and scales float32 [rows, blocks].

    A block that is not finite has the scale NaN.
    """
    blocks = F.pad(x.float(), (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    largest = blocks.abs().amax(dim=-1)
    is_finite = largest < torch.inf
    is_zero = largest < SMALLEST
    inverse = torch.full_like(largest, 127.0) / largest
    codes = torch.where((is_finite & ~is_zero)[..., None], (blocks * inverse[..., None]).round(), 0.0)
    scales = torch.where(is_zero, 0.0, largest / torch.full_like(largest, 127.0))
    return codes.to(torch.int32), torch.where(is_finite, scales, torch.nan)


def _rounded_to_fp8(x: Tensor) -> Tensor:
    """Activations rounded to FP8 with a scale for each row, as float64; NaN if a number of the row is not finite."""
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    most = torch.full_like(largest, torch.finfo(torch.float8_e4m3fn).max)
    is_zero = largest < SMALLEST
    codes = torch.where(is_zero, 0.0, x.float() * (most / largest)).clamp(-most, most).to(torch.float8_e4m3fn)
    scales = torch.where(largest < torch.inf, torch.where(is_zero, 0.0, largest / most), torch.nan)
    return codes.double() * scales.double()


def _product(codes: Tensor, scales: Tensor, weight: Codes) -> Tensor:
    """float32 [rows of x, rows of the weight]."""
    num_blocks = codes.shape[1]
    columns = weight.codes.shape[1]
    group_size = weight.group_size or -(-columns // weight.scales.shape[1])
    part = 16 if group_size == 16 else BLOCK
    offset = weight.offset if weight.zeros is None else 0
    factors = F.pad(weight.codes.double() - offset, (0, num_blocks * BLOCK - columns))
    minimums = weight.minimums if weight.zeros is None else -(weight.scales * weight.zeros)
    result = torch.zeros((len(codes), len(factors)), device=codes.device)
    for block in range(num_blocks):
        x = codes[:, block].double()
        columns_before = block * BLOCK
        starts = range(0, BLOCK, part)
        last = weight.scales.shape[1] - 1
        groups = [min((columns_before + start) // group_size, last) for start in starts]
        for start, group in zip(starts, groups, strict=True):
            w = factors[:, columns_before + start : columns_before + start + part]
            sums = (x[:, start : start + part] @ w.T).float()  # exact in both types
            result = fma(sums, weight.scales[:, group] * scales[:, block, None], result)
        for start, group in zip(starts, groups, strict=True):
            if minimums is not None:
                totals = x[:, start : start + part].sum(dim=1).float() * scales[:, block]
                result = fma(totals[:, None], minimums[:, group].expand_as(result), result)
    return result


def _product_per_token(codes: Tensor, scales: Tensor, weight: Codes) -> Tensor:
    """float32 [rows of x, rows of the weight]."""
    sums = (codes[:, 0].double() @ (weight.codes.double() - weight.offset).T).float()  # exact in float64
    return sums * (weight.scales[:, 0] * scales)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` in float32, rounded once.

    The product is exact in float64. Its sum with ``c`` is rounded to odd there, so that rounding it again to float32
    equals rounding once (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, wide = a.double() * b.double(), c.double()
    total = product + wide
    rest = total - product
    error = (product - (total - rest)) + (wide - rest)
    bits = total.view(torch.int64)
    is_rounded = (error != 0) & (bits & 1 == 0) & total.isfinite()
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(is_rounded, bits + step, bits).view(torch.float64).float()


def block_types(device_type: str) -> frozenset[str]:
    """The types of GGUF blocks that the ops of a device can multiply."""
    return op_set(device_type).block_types or frozenset(BLOCK_FORMATS)
