"""A model whose layers attend in different ways: some cache K and V, others one tensor that is both (as MLA does)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from executor.attention import base
from executor.attention.base import AttentionStep, KVCache
from executor.base import ModelError
from executor.input_batch import InputBatch
from executor.layers.attention import Attention, form_groups
from executor.layers.context import ModelContext
from executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from executor.layers.self_attention import SelfAttention
from executor.loader import LoadedModel
from executor.models.decoder import CausalDecoder, DecoderParts
from ops import AttentionMetadata, AttentionShape
from ops.dispatch import Spec, op
from ops.reference.attention import attend
from tests.models.harness import Chunk, Runner, logits_of, random_model, random_tokens

HEADS, LATENT, VALUE = 4, 24, 16


@op(lambda q, latent, cache, meta, shape: Spec(q.spec.rows, shape.out_width, q.spec.dtype))
def toy_attention(q: Tensor, latent: Tensor, cache: Tensor, meta: AttentionMetadata, shape: AttentionShape) -> Tensor:
    """Writes the latents, then attends: each is a key of all heads, and its first columns are the value."""
    cache.view(-1, shape.head_dim)[meta.slot_mapping] = latent.to(cache.dtype)
    out = torch.empty(len(q), shape.num_heads, shape.v_dim)
    starts = meta.query_start_loc.tolist()
    for row, length in enumerate(meta.seq_lens.tolist()):
        blocks = meta.block_table[row, : -(-length // meta.block_size)]
        keys = cache[blocks].flatten(0, 1)[:length].to(q.dtype).unsqueeze(1)
        queries = q[starts[row] : starts[row + 1]].view(-1, shape.num_heads, shape.head_dim)
        out[starts[row] : starts[row + 1]] = attend(queries, keys, keys[..., : shape.v_dim], shape)
    return out.flatten(1)


class LatentBackend:
    name = "toy"
    block_size = 16
    block_size_multiple = 16
    kv_layout = "latents"
    needs_rows = False

    def __init__(self) -> None:
        self.planned: list[AttentionStep] = []

    def supports(self, shape: AttentionShape, dtype: torch.dtype) -> str | None:
        return None if shape.kind == "toy" else f"layers of kind {shape.kind!r} are not supported"

    def kv_shape(
        self, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], ...]:
        return ((num_blocks, block_size, shape.head_dim),)

    def plan(self, step: AttentionStep) -> AttentionMetadata:
        self.planned.append(step)
        return step.columns

    def run(
        self, inputs: tuple[Tensor, ...], kv_cache: KVCache, shape: AttentionShape, meta: AttentionMetadata
    ) -> Tensor:
        q, latent = inputs
        (cache,) = kv_cache
        return toy_attention(q, latent, cache, meta, shape)


class LatentAttention(nn.Module):
    """Either kind of cache: with ``kind`` "kv" K and V are the latent and a part of it."""

    def __init__(self, context: ModelContext, kind: str, prefix: str) -> None:
        super().__init__()
        hidden = context.config.hidden_size
        self.kind = kind
        self.q_proj = ColumnParallelLinear(context, hidden, HEADS * LATENT, prefix=f"{prefix}.q_proj")
        self.kv_proj = ReplicatedLinear(context, hidden, LATENT, prefix=f"{prefix}.kv_proj")
        shape = AttentionShape(HEADS, 1, LATENT, scale=0.2, v_head_dim=VALUE, kind=kind)
        self.attn = Attention(context, shape)
        self.o_proj = RowParallelLinear(context, HEADS * VALUE, hidden, prefix=f"{prefix}.o_proj")

    def forward(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        q, latent = self.q_proj(hidden, batch), self.kv_proj(hidden, batch)
        if self.kind == "toy":
            out = self.attn(q, latent, batch=batch)
        else:
            value, _ = latent.split([VALUE, LATENT - VALUE], dim=-1)
            out = self.attn(q, latent, value, batch=batch)
        result: Tensor = self.o_proj(out, batch)
        return result


@pytest.fixture(autouse=True)
def _latent_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.REGISTRY, "toy", f"{__name__}:LatentBackend")
    monkeypatch.setitem(base.PREFERENCE, "cpu", [*base.PREFERENCE["cpu"], "toy"])


def model_of(kind: str) -> LoadedModel:
    def attention(context: ModelContext, index: int, prefix: str) -> nn.Module:
        return LatentAttention(context, kind, prefix) if index % 2 else SelfAttention(context, None, prefix=prefix)

    loaded, _ = random_model(
        lambda context: CausalDecoder(context, DecoderParts(lambda index, prefix: attention(context, index, prefix)))
    )
    return loaded


def test_each_layer_has_the_backend_of_its_kind() -> None:
    runner = Runner(model_of("toy"))
    usual, latents = runner.groups
    assert (usual.layers, latents.layers) == ((0, 2), (1, 3))
    assert usual.backend.name != latents.backend.name == "toy"
    layers = runner.model.attention_layers()
    assert [len(layer.kv_cache) for layer in layers] == [2, 1, 2, 1]
    assert latents.spec.bytes_per_block == 2 * runner.block_size * LATENT * 4
    assert latents.spec.layout == "latents"
    runner.step([Chunk(0, random_tokens(3))])
    assert isinstance(latents.backend, LatentBackend)
    (step,) = latents.backend.planned
    assert step.group.shape.head_dim == LATENT
    assert step.columns.seq_lens.tolist() == [3]


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
def test_a_cache_of_one_tensor(is_captured: bool) -> None:
    token_ids = random_tokens(50)
    expected = logits_of(model_of("kv"), token_ids)
    runner = Runner(model_of("toy"), captured=is_captured)
    parts = [runner.step([Chunk(0, token_ids[start : start + 17])]) for start in range(0, 50, 17)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=2e-5)


def test_groups_cache_in_types_of_their_own() -> None:
    layers = model_of("toy").model.attention_layers()
    layers[3].kv_dtype = torch.bfloat16
    groups = form_groups(layers, block_size=None)
    assert [(group.layers, group.spec.dtype) for group in groups] == [
        ((0, 2), "float32"),
        ((1,), "float32"),
        ((3,), "bfloat16"),
    ]
    assert [group.block_size for group in groups] == [32, 16, 16]
    assert groups[1].spec.bytes_per_block == 2 * groups[2].spec.bytes_per_block
    assert [layer.group for layer in layers] == [0, 1, 0, 2]
    with pytest.raises(ModelError, match="--block-size 24 is not supported by the"):
        form_groups(layers, block_size=24)


def test_a_kind_that_no_backend_has_is_refused() -> None:
    with pytest.raises(ModelError, match="no attention backend supports this model: .*reference: layers of kind"):
        model_of("recurrent")
