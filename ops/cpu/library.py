"""Python binding of the compiled kernels: the structs and functions of ``csrc/octavo.h``.

``chosen()`` is the best library that compiles and runs here, or the one that the environment names.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, ClassVar

import torch

from ops.cpu import build
from ops.metadata import INT4_CACHE

logger = logging.getLogger(__name__)

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""``OctavoType``."""
INT8 = 3
"""Stands for 8-bit integers in ``measure_peak``."""
ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "relu": 5, "relu2": 6, "sigmoid": 11}
"""``OctavoActivation``: functions without a parameter."""
IDENTITY, SCALE, SOFTCAP, CLIP, SWIGLU_OAI = 0, 7, 8, 9, 10
"""The others."""
FORMATS = {
    "Q4_0": 0,
    "Q4_1": 1,
    "Q5_0": 2,
    "Q5_1": 3,
    "Q8_0": 4,
    "Q2_K": 5,
    "Q3_K": 6,
    "Q4_K": 7,
    "Q5_K": 8,
    "Q6_K": 9,
    "IQ4_NL": 10,
    "IQ4_XS": 11,
    "int4": 12,
    "int8": 13,
    "fp8_e4m3": 14,
    "nf4": 15,
    "fp4": 16,
    "mxfp4": 17,
    "nvfp4": 18,
    "MXFP4": 19,
}
"""``OctavoFormat``."""
SHIFTS = {"none": 0, "zeros": 1, "minimums": 2}
"""``OctavoShift``."""
SCALE_TYPES = {**TYPES, torch.float8_e4m3fn: 3, torch.float8_e8m0fnu: 4}
"""``OctavoScaleType``."""
ROW_SCALES = {"none": 0, "factor": 1, "divisor": 2}
"""``OctavoRowScale``."""
ROUNDINGS = {"float": 0, "int8": 1, "int8_per_token": 2}
"""``OctavoRounding``."""
CACHES = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3, INT4_CACHE: 4}
"""``OctavoCache``: caches in codes."""
PLAIN_CACHE = 0
"""One in the type of the activations."""
NO_NORM, RMS_NORM, LAYER_NORM = range(3)
"""``OctavoNormKind``."""
ROWS = {"tokens": 0, "samples": 1}
IDS = {"input_ids": 0, "positions": 1, "token_types": 2}
"""``OctavoIds``."""
EPILOGUE_STORE, EPILOGUE_RESIDUAL, EPILOGUE_GATED, EPILOGUE_LOGITS = range(4)
(
    OP_EMBEDDING,
    OP_LINEAR,
    OP_RMS_NORM,
    OP_LAYER_NORM,
    OP_ROTARY,
    OP_ATTENTION,
    OP_ACT_AND_MUL,
    OP_ACTIVATION,
    OP_ADD,
    OP_GATHER_ROWS,
    OP_MULTIPLY,
    OP_SHORT_CONV,
    OP_ROUTE,
    OP_EXPERTS,
    OP_HEADS_LINEAR,
    OP_LATENT_ATTENTION,
    OP_GATED_DELTA,
    OP_MAMBA,
) = range(18)

SCORES = {"softmax": 0, "sigmoid": 1, "sparsemixer": 2}
"""``OctavoScores``."""
WORKSPACE_BYTES = 64 << 20
"""Of the rows of experts between their products; see ``experts.cpp``."""
MAX_HEAD_DIM = 512
MAX_LATENT_DIM = 1024
MAX_STATE_DIM = 256
"""Rows of a state of Mamba-2."""
TOKENS_MULTIPLE = 32
"""A KV block holds a multiple of this many tokens."""
HEAD_MULTIPLE = 32
"""Heads in the KV cache are padded to a multiple of this size."""


class Matrix(ctypes.Structure):
    """Rows ``stride`` elements apart."""

    _fields_ = (("data", c_void_p), ("stride", c_int64))


class QuantizedEncoding(ctypes.Structure):
    _fields_ = (
        ("format", c_int32),
        ("group_size", c_int32),
        ("scale_type", c_int32),
        ("shift", c_int32),
        ("row_scale", c_int32),
    )


class Segment(ctypes.Structure):
    """Consecutive rows of a quantised weight."""

    _fields_ = (("data", c_void_p), ("rows", c_int32), ("encoding", QuantizedEncoding))


class Weight(ctypes.Structure):
    """Also of a quantised weight, which has segments."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int32),
        ("columns", c_int32),
        ("paired", c_int32),
        ("num_segments", c_int32),
        ("segments", c_void_p),
        ("rounding", c_int32),
    )


class Group(ctypes.Structure):
    """The requests of a step, as one KV cache group sees them."""

    _fields_ = (
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("num_reqs", c_int32),
        ("block_size", c_int32),
        ("num_replayed", c_void_p),
        ("num_drafts", c_void_p),
    )


class Ranks(ctypes.Structure):
    """One of the ranks that compute a program together."""

    _fields_ = (("rank", c_int32), ("size", c_int32), ("place", c_void_p))


class AdapterRows(ctypes.Structure):
    """Which rows of a product use which adapter."""

    _fields_ = (
        ("rows", c_void_p),
        ("adapters", c_void_p),
        ("starts", c_void_p),
        ("of_row", c_void_p),
        ("num_adapters", c_int64),
    )


class Step(ctypes.Structure):
    """The step descriptor: inputs that change with every step."""

    _fields_ = (
        ("num_tokens", c_int32),
        ("num_samples", c_int32),
        ("input_ids", c_void_p),
        ("positions", c_void_p),
        ("token_types", c_void_p),
        ("logits_rows", c_void_p),
        ("groups", ctypes.POINTER(Group)),
        ("adapters", AdapterRows * len(ROWS)),
        ("ranks", ctypes.POINTER(Ranks)),
    )


class Node(ctypes.Structure):
    _fields_ = (("op", c_int32), ("meets", c_int32), ("args", c_void_p))


class EmbeddingArgs(ctypes.Structure):
    _fields_ = (
        ("weight", Weight),
        ("plain", Matrix),
        ("out", Matrix),
        ("type", c_int32),
        ("ids", c_int32),
        ("first", c_int32),
    )


class RmsNorm(ctypes.Structure):
    """An RMS norm; see ``ops.rms_norm``."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("offset", c_float), ("rounds_first", c_int32))


class LinearArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("rms_norm", RmsNorm),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("weight", Weight),
        ("bias", c_void_p),
        ("out", Matrix),
        ("residual", Matrix),
        ("type", c_int32),
        ("epilogue", c_int32),
        ("activation", c_int32),
        ("parameter", c_float),
        ("limit", c_float),
        ("rows", c_int32),
        ("norm", c_int32),
        ("norm_eps", c_float),
        ("gather", c_int32),
        ("adapters", c_void_p),
        ("adapted", c_void_p),
        ("listed", c_void_p),
        ("num_listed", c_int64),
    )


class AdapterHalf(ctypes.Structure):
    """Where the part of B for 16 columns of a result is, and which rows of A it is multiplied with."""

    _fields_ = (("offset", c_int64), ("first", c_int32), ("count", c_int32))


class Adapter(ctypes.Structure):
    """One adapter's part of a linear layer."""

    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("halves", c_void_p),
        ("factors", c_void_p),
        ("magnitude", c_void_p),
        ("bias", c_void_p),
        ("weight", c_void_p),
        ("rank", c_int32),
        ("num_halves", c_int32),
    )


class NormArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("out", Matrix),
        ("residual", Matrix),
        ("rms_norm", RmsNorm),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("groups", c_int32),
        ("size", c_int32),
        ("weight_stride", c_int32),
        ("type", c_int32),
        ("rows", c_int32),
    )


class Heads(ctypes.Structure):
    """Transforms applied to each head of q or k before use."""

    _fields_ = (
        ("norm", RmsNorm),
        ("has_norm", c_int32),
        ("rotary_dim", c_int32),
        ("cos_sin", c_void_p),
        ("interleaved", c_int32),
    )


class RotaryArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("out", Matrix),
        ("heads", Heads),
        ("positions", c_void_p),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("type", c_int32),
    )


class AttentionArgs(ctypes.Structure):
    _fields_: ClassVar[tuple[tuple[str, Any], ...]] = (
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("out", Matrix),
        ("q_heads", Heads),
        ("k_heads", Heads),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("slopes", c_void_p),
        ("sinks", c_void_p),
        ("biases", c_void_p),
        ("scale", c_float),
        ("k_scale", c_float),
        ("v_scale", c_float),
        ("softcap", c_float),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("v_head_dim", c_int32),
        ("window", c_int32),
        ("chunked", c_int32),
        ("causal", c_int32),
        ("group", c_int32),
        ("type", c_int32),
        ("cache", c_int32),
        ("bias_reach", c_int32),
    )


class PointwiseArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("y", Matrix),
        ("out", Matrix),
        ("width", c_int32),
        ("activation", c_int32),
        ("parameter", c_float),
        ("limit", c_float),
        ("type", c_int32),
        ("rows", c_int32),
    )


class ShortConvArgs(ctypes.Structure):
    _fields_ = (
        ("gate_in", Matrix),
        ("gate_out", Matrix),
        ("x", Matrix),
        ("out", Matrix),
        ("cache", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("width", c_int32),
        ("length", c_int32),
        ("group", c_int32),
        ("type", c_int32),
    )


class RouteArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("out", Matrix),
        ("bias", c_void_p),
        ("factors", c_void_p),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("scores", c_int32),
        ("normalize", c_int32),
        ("factor", c_float),
        ("jitter", c_float),
        ("num_groups", c_int32),
        ("top_groups", c_int32),
        ("group_best", c_int32),
        ("rows", c_int32),
    )


class ExpertsArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("routed", Matrix),
        ("shared", Matrix),
        ("shared_gate", Matrix),
        ("out", Matrix),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("gate_up_biases", c_void_p),
        ("down_biases", c_void_p),
        ("gate_up_adapters", c_void_p),
        ("down_adapters", c_void_p),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("activation", c_int32),
        ("parameter", c_float),
        ("limit", c_float),
        ("scales_input", c_int32),
        ("gated", c_int32),
        ("type", c_int32),
        ("first_inner", c_int32),
        ("inner", c_void_p),
    )


class GatedDeltaArgs(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("beta", Matrix),
        ("steps", Matrix),
        ("out", Matrix),
        ("cache", c_void_p),
        ("conv_weight", c_void_p),
        ("decay", c_void_p),
        ("step_bias", c_void_p),
        ("num_heads", c_int32),
        ("num_key_heads", c_int32),
        ("key_dim", c_int32),
        ("value_dim", c_int32),
        ("conv_length", c_int32),
        ("tiled", c_int32),
        ("max_drafts", c_int32),
        ("group", c_int32),
        ("type", c_int32),
    )


class MambaArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("steps", Matrix),
        ("gate", Matrix),
        ("out", Matrix),
        ("cache", c_void_p),
        ("conv_weight", c_void_p),
        ("conv_bias", c_void_p),
        ("decay", c_void_p),
        ("skip", c_void_p),
        ("step_bias", c_void_p),
        ("least_step", c_float),
        ("most_step", c_float),
        ("num_heads", c_int32),
        ("num_groups", c_int32),
        ("state_dim", c_int32),
        ("head_dim", c_int32),
        ("conv_length", c_int32),
        ("max_drafts", c_int32),
        ("group", c_int32),
        ("type", c_int32),
    )


class HeadsLinearArgs(ctypes.Structure):
    _fields_ = (
        ("x", Matrix),
        ("out", Matrix),
        ("weights", c_void_p),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("type", c_int32),
    )


class LatentAttentionArgs(AttentionArgs):
    _fields_ = (
        ("q_rope", Matrix),
        ("k_rope", Matrix),
        ("rope", Heads),
        ("q_rope_dim", c_int32),
    )


STRUCTS: dict[int, type[ctypes.Structure]] = {
    OP_EMBEDDING: EmbeddingArgs,
    OP_LINEAR: LinearArgs,
    OP_RMS_NORM: NormArgs,
    OP_LAYER_NORM: NormArgs,
    OP_ROTARY: RotaryArgs,
    OP_ATTENTION: AttentionArgs,
    OP_ACT_AND_MUL: PointwiseArgs,
    OP_ACTIVATION: PointwiseArgs,
    OP_ADD: PointwiseArgs,
    OP_MULTIPLY: PointwiseArgs,
    OP_GATHER_ROWS: PointwiseArgs,
    OP_SHORT_CONV: ShortConvArgs,
    OP_ROUTE: RouteArgs,
    OP_EXPERTS: ExpertsArgs,
    OP_GATED_DELTA: GatedDeltaArgs,
    OP_HEADS_LINEAR: HeadsLinearArgs,
    OP_MAMBA: MambaArgs,
    OP_LATENT_ATTENTION: LatentAttentionArgs,
}
_OTHER_STRUCTS = {-1: Step, -2: Group, -3: Node, -4: Adapter, -5: Ranks}


class Library:
    """The kernels of one capability."""

    def __init__(self, capability: build.Capability) -> None:
        """Compiles and loads the library.

        Raises:
            build.BuildError: The library cannot be compiled, loaded or used here.
        """
        self.capability = capability.name
        try:
            # torch is loaded already, so both use the same OpenMP runtime and the same threads.
            self.dll = dll = ctypes.CDLL(str(build.build(capability)))
        except OSError as error:
            raise build.BuildError(str(error)) from error
        self.run = dll.octavo_run
        self.run.argtypes = (c_void_p, c_int32, c_void_p, c_int32)
        self.run.restype = c_int32
        self.meeting_bytes = dll.octavo_meeting_bytes
        self.meeting_bytes.argtypes = (c_int32,)
        self.meeting_bytes.restype = c_int64
        self.meet = dll.octavo_meet
        self.meet.argtypes = (c_void_p,)
        self.meet.restype = c_int32
        self.leave = dll.octavo_leave
        self.leave.argtypes = (c_void_p,)
        self.leave.restype = None
        self.packed_size = dll.octavo_packed_size
        self.packed_size.argtypes = (c_int32, c_int32, c_int32)
        self.packed_size.restype = c_int64
        self.pack = dll.octavo_pack
        self.pack.argtypes = (c_void_p, c_int64, c_void_p, c_int32, c_int32, c_int32, c_int32)
        self.pack.restype = None
        self.unpack = dll.octavo_unpack
        self.unpack.argtypes = (c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32)
        self.unpack.restype = None
        self.quantized_size = dll.octavo_quantized_size
        self.quantized_size.argtypes = (c_void_p, c_int32, c_int32, c_int32)
        self.quantized_size.restype = c_int64
        self.pack_quantized = dll.octavo_pack_quantized
        self.pack_quantized.argtypes = (c_void_p, c_void_p, c_int64, c_void_p, c_int32, c_int32, c_int32)
        self.pack_quantized.restype = None
        self.quantize_groups = dll.octavo_quantize_groups
        self.quantize_groups.argtypes = (
            c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_int32
        )  # fmt: skip
        self.quantize_groups.restype = None
        self.profile = dll.octavo_profile
        self.profile.argtypes = (c_void_p, c_int32)
        self.profile.restype = None
        self.measure_bandwidth = dll.octavo_measure_bandwidth
        self.measure_bandwidth.argtypes = (c_void_p, c_int64, c_int32)
        self.measure_bandwidth.restype = ctypes.c_double
        self.measure_peak = dll.octavo_measure_peak
        self.measure_peak.argtypes = (c_int32, c_int32)
        self.measure_peak.restype = ctypes.c_double
        dll.octavo_sizeof.restype = c_int64
        for op, struct in (STRUCTS | _OTHER_STRUCTS).items():
            assert dll.octavo_sizeof(op) == ctypes.sizeof(struct), f"{struct.__name__} differs from octavo.h"
        if dll.octavo_initialize():
            raise build.BuildError(f"the operating system does not grant {capability.name}")


@cache
def load(capability: str) -> Library:
    """The library of a capability.

    Raises:
        build.BuildError: It cannot be compiled or does not run here.
    """
    if capability not in build.ALL:
        known = ", ".join(build.ALL)
        raise build.BuildError(f"unknown capability {capability!r}; choose from {known}, {build.REFERENCE}")
    if not build.runs_here(build.ALL[capability]):
        raise build.BuildError(f"this CPU does not support {capability}")
    return Library(build.ALL[capability])


@cache
def chosen() -> Library | None:
    """The library that suits this machine; None if there is none, with the reason logged."""
    wanted = build.configured()
    if wanted == build.REFERENCE:
        return None
    try:
        if wanted is not None:
            return load(wanted)
        for capability in build.available():
            try:
                return load(capability.name)
            except build.BuildError as error:
                reason = error
        raise reason
    except build.BuildError as error:
        line, *output = str(error).split("\n", 1)
        logger.warning(
            "no CPU kernels: falling back to plain torch, which is much slower: %s",
            line,
            extra={"details": output[0]} if output else None,
        )
        return None
