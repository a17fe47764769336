"""Step metadata that attention reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass
class AttentionMetadata:
    """Where each request's tokens lie in the step and in the KV cache, one object per KV cache group and step.

    Rows are requests; tokens of a request are consecutive in the step and end at its last position.
    """

    query_start_loc: Tensor
    """int32 [num_reqs + 1]: first token of each request in the step."""
    seq_lens: Tensor
    """int32 [num_reqs]: length of each request's context, this step's tokens included."""
    block_table: Tensor
    """int32 [num_reqs, max_blocks]: KV blocks of each request in order; entries past the context are undefined."""
    slot_mapping: Tensor
    """int64 [num_tokens]: where each token's K and V go, ``block * block_size + offset``."""
    block_size: int
    num_replayed: Tensor | None = field(default=None, kw_only=True)
    """int32 [num_reqs]: tokens before those of the step that were drafts, so that states leave them out, but keep their
    inputs; None: 0 of each. Layers without states computed them for good."""
    num_drafts: Tensor | None = field(default=None, kw_only=True)
    """int32 [num_reqs]: the last ones of each request's tokens, which states must leave out; None: 0 of each."""

    @property
    def num_reqs(self) -> int:
        return int(self.seq_lens.shape[0])


@dataclass(frozen=True)
class AdapterRows:
    """Which rows of a matrix product use which adapter, sorted by adapter. Rows without an adapter are left out."""

    rows: Tensor
    """int64 [num_rows]."""
    adapters: Tensor
    """int32 [num_adapters]: the adapters that have rows, ascending; numbers from 1 on."""
    starts: Tensor
    """int32 [num_adapters + 1]: the rows of ``adapters[i]`` are ``rows[starts[i]:starts[i + 1]]``."""
    of_row: Tensor
    """int32 [all rows]: the adapter of each; 0: none."""


KVLayout = Literal["plain", "tiled", "heads"]
"""Layout of K and V in the cache: [num_blocks, block_size, heads, head_dim], the tiles of the CPU kernels, or that of
the GPU kernels, [num_blocks, heads, block_size, head_dim]."""


@dataclass(frozen=True)
class AttentionShape:
    """The constants of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    v_head_dim: int = 0
    """Size of a V head; 0: same as ``head_dim``."""
    sliding_window: int | None = None
    """A token attends to this many tokens, itself included; if not causal, to as many that follow it, too."""
    is_chunked: bool = False
    """Windows do not move with the token: it attends to those of its chunk, from a multiple of ``sliding_window`` on
    (Llama 4)."""
    causal: bool = True
    is_cached: bool = True
    """False: K and V are needed in the step that computes them only, so each step computes whole sequences."""
    logit_softcap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    """Per head, what is subtracted from the scaled score of each earlier token, times its distance (ALiBi)."""
    has_sinks: bool = False
    """Each head has a learned score that takes part in the softmax without a value."""
    has_biases: bool = False
    """Scores have learned biases by distance."""
    k_scale: float = 1.0
    """The cache holds K divided by this number, and V by the next: those of checkpoints for 8-bit floats."""
    v_scale: float = 1.0
    kind: str = "kv"
    """What the layer caches: K and V (``kv``). Backends that cache something else define their own kind."""
    conv_length: int = 0
    """Tokens that the convolution before a recurrence looks at."""
    has_tiled_heads: bool = False
    """Heads of q and k have every ``num_kv_heads``-th value head, not consecutive ones; of the gated delta rule."""
    step_limits: tuple[float, float] = (0.0, float("inf"))
    """Bounds of the steps of Mamba-2."""
    max_drafts: int = 0
    """Drafts whose inputs a state has room for: it leaves them out until they are accepted."""
    rotates_pairs: bool = False
    """Latent attention rotates pairs of neighbouring columns, not of the two halves."""

    @property
    def v_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def out_width(self) -> int:
        return self.num_heads * self.v_dim


KV_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""Dtypes of KV caches in 8 bits, and the largest number of each."""
INT4_CACHE = torch.uint8
"""Stands for caches with K as in int8, and V in 4 bits: torch has no such dtype."""
SCALE_BYTES = 2
"""Bytes after the codes of an int8 head: its scale in bfloat16, which has the range of all types of activations. The
largest code is 127 with a scale of 8 bits, too."""
V_GROUP = 32
"""Columns of V in 4 bits that share a scale and a minimum, both in bfloat16."""
MIN_INT4_HEAD = 128
"""Numbers of a head from which on V may have 4 bits."""


def cache_name(dtype: torch.dtype) -> str:
    """What the cache of a dtype is called."""
    return "int4" if dtype == INT4_CACHE else str(dtype).removeprefix("torch.")


def stored_size(dim: int, dtype: torch.dtype, *, is_value: bool = False) -> int:
    """Elements that the cache of a dtype has for a head of ``dim`` numbers of K, or of V."""
    if dtype == INT4_CACHE and is_value:
        return -(-dim // V_GROUP) * (V_GROUP // 2 + 2 * SCALE_BYTES)
    return dim + SCALE_BYTES if dtype in (torch.int8, INT4_CACHE) else dim


def unsupported_cache(shape: AttentionShape, dtype: torch.dtype) -> str | None:
    """The reason why a cache of a dtype is refused for a layer, or None."""
    if dtype == INT4_CACHE and shape.kind != "kv":
        return "--kv-cache-dtype: latents have no cache in int4; use auto"
    if dtype == INT4_CACHE and min(shape.head_dim, shape.v_dim) < MIN_INT4_HEAD:
        return (
            f"--kv-cache-dtype int4: heads of {min(shape.head_dim, shape.v_dim)} numbers lose too much in 4 bits, "
            f"which suit heads of {MIN_INT4_HEAD} and more; use int8"
        )
    return None


@dataclass(frozen=True)
class Routing:
    """How a router chooses the experts of a token; see ``ops.route``."""

    top_k: int
    """Experts of a token."""
    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    """What turns logits into scores. sparsemixer: Phi-3.5-MoE's (Liu et al., arXiv:2409.12136)."""
    normalize: bool = False
    """The weights of a token are divided by their sum."""
    factor: float = 1.0
    """Of the weights."""
    num_groups: int = 1
    """Groups of equal size that the experts form: consecutive ones."""
    top_groups: int = 1
    """Groups from which experts are chosen: those with the largest sums of their best experts."""
    group_best: int = 2
    """How many of a group's best experts count for it: 2, or 1 (DeepSeek-V2)."""
    jitter: float = 0.0
    """sparsemixer ignores experts that are relatively further than twice this below the best."""
