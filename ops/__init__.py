"""Tensor functions: one name per op, one implementation per op set.

Activations are ``[rows, width]``, with heads side by side in the columns. Each op's docstring gives shapes and dtypes.
Ranks communicate through a ``Communicator`` that the caller passes in. Modules, configuration and request ids do not
belong here.
"""

from ops.adapters import Adapter, AdapterTable, ExpertAdapters, PackedAdapter, TableAdapter
from ops.collective import Communicator, NotConnected, PeerLostError, SingleRank, Transport
from ops.dispatch import OpSet, op_set, use
from ops.metadata import (
    INT4_CACHE,
    KV_CODES,
    AdapterRows,
    AttentionMetadata,
    AttentionShape,
    KVLayout,
    Routing,
    cache_name,
    stored_size,
    unsupported_cache,
)
from ops.packed import (
    ExpertWeights,
    GatedActivation,
    PackedWeight,
    QuantizedActivations,
    QuantizedWeight,
    SwiGLUOAI,
    Weight,
)
from ops.reference.adapters import adapted_embedding, adapted_linear, adapted_logits, pack_adapter
from ops.reference.attention import paged_attention
from ops.reference.basic import (
    act_and_mul,
    activation,
    add,
    clip,
    concat,
    embedding,
    gather_rows,
    linear,
    logits,
    multiply,
    pack_linear,
    scale,
    select_columns,
    softcap,
    unpack_linear,
)
from ops.reference.collective import all_gather, all_reduce, keep_rows, select_rows, shard_ids
from ops.reference.delta import gated_delta
from ops.reference.experts import experts, route
from ops.reference.gguf_blocks import BLOCK_VALUES
from ops.reference.latent import heads_linear, latent_attention
from ops.reference.mamba import mamba
from ops.reference.norm import layer_norm, rms_norm
from ops.reference.quantize import quantize_groups
from ops.reference.quantized import (
    block_types,
    decode,
    dequantized,
    join_rows,
    pack_blocks,
    pack_floats,
    pack_groups,
    pack_segment,
)
from ops.reference.recurrence import state_size
from ops.reference.rotary import rotary_embedding
from ops.reference.sampling import sample, weight_sum
from ops.reference.short_conv import short_conv
from ops.reference.small_floats import float_values

__all__ = [
    "BLOCK_VALUES",
    "INT4_CACHE",
    "KV_CODES",
    "Adapter",
    "AdapterRows",
    "AdapterTable",
    "AttentionMetadata",
    "AttentionShape",
    "Communicator",
    "ExpertAdapters",
    "ExpertWeights",
    "GatedActivation",
    "KVLayout",
    "NotConnected",
    "OpSet",
    "PackedAdapter",
    "PackedWeight",
    "PeerLostError",
    "QuantizedActivations",
    "QuantizedWeight",
    "Routing",
    "SingleRank",
    "SwiGLUOAI",
    "TableAdapter",
    "Transport",
    "Weight",
    "act_and_mul",
    "activation",
    "adapted_embedding",
    "adapted_linear",
    "adapted_logits",
    "add",
    "all_gather",
    "all_reduce",
    "block_types",
    "cache_name",
    "clip",
    "concat",
    "decode",
    "dequantized",
    "embedding",
    "experts",
    "float_values",
    "gated_delta",
    "gather_rows",
    "heads_linear",
    "join_rows",
    "keep_rows",
    "latent_attention",
    "layer_norm",
    "linear",
    "logits",
    "mamba",
    "multiply",
    "op_set",
    "pack_adapter",
    "pack_blocks",
    "pack_floats",
    "pack_groups",
    "pack_linear",
    "pack_segment",
    "paged_attention",
    "quantize_groups",
    "rms_norm",
    "rotary_embedding",
    "route",
    "sample",
    "scale",
    "select_columns",
    "select_rows",
    "shard_ids",
    "short_conv",
    "softcap",
    "state_size",
    "stored_size",
    "unpack_linear",
    "unsupported_cache",
    "use",
    "weight_sum",
]
