"""The attention of one layer, and its place among the KV caches."""

from __future__ import annotations

from torch import Tensor, nn

from executor.attention.base import AttentionBackend, KVCache
from executor.input_batch import InputBatch
from executor.layers.context import ModelContext
from ops import AttentionShape


class Attention(nn.Module):
    """Attends through a backend to a paged KV cache.

    The loader assigns ``backend``, the model ``group`` (``assign_groups``), the runner ``kv_cache``.
    """

    backend: AttentionBackend
    kv_cache: KVCache

    def __init__(
        self,
        context: ModelContext,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
    ) -> None:
        """Creates the layer.

        Args:
            context: What the model is built from.
            num_heads: Of all ranks together; likewise ``num_kv_heads``.
            num_kv_heads: Each serves ``num_heads / num_kv_heads`` query heads.
            head_dim: Size of a head.
            scale: Factor of the scores. Default: ``head_dim ** -0.5``.
            sliding_window: A token sees itself and this many minus one before it.
            logit_softcap: Scores are squeezed into plus and minus this.
        """
        super().__init__()
        # A window that no sequence outgrows hides nothing, and full attention shares more of its cache.
        if sliding_window is not None and sliding_window >= context.max_model_len:
            sliding_window = None
        tp_size = context.parallel.tp_size
        self.shape = AttentionShape(
            num_heads=num_heads // tp_size,
            num_kv_heads=max(1, num_kv_heads // tp_size),
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            sliding_window=sliding_window,
            logit_softcap=logit_softcap,
        )
        self.group = 0
        """KV cache group: layers of one group share block tables."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: InputBatch) -> Tensor:
        """Heads lie side by side in the columns: [num_tokens, num_heads * head_dim]."""
        return self.backend.run(q, k, v, self.kv_cache, self.shape, batch.attention[self.group])


def assign_groups(layers: list[Attention]) -> None:
    """Numbers the KV cache groups: layers that see equally far back can share block tables."""
    windows: list[int | None] = []
    for layer in layers:
        window = layer.shape.sliding_window
        if window not in windows:
            windows.append(window)
        layer.group = windows.index(window)
