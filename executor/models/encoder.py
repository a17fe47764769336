"""Encoders: every token attends to all others, nothing is cached, and the hidden states are pooled."""

from __future__ import annotations

from torch import Tensor

from executor.hf_config import HFConfig
from executor.input_batch import InputBatch, ModelOutput
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.pooler_head import PoolingHead
from executor.models.base import Model
from executor.models.decoder import Decoder, DecoderParts, Norms

POST_NORMS = Norms(after_attention="attention_norm", after_mlp="mlp_norm")
"""Norms of ``PostNormDecoderLayer``."""
MLM_HEADS = [
    *(r"^cls\.", r"^lm_head\.", r"^head\.", r"^pooler\.", r"^decoder\.", r"^vocab_", r"\.position_ids$"),
    r"^(model\.)?linear\.",
]
"""Names of tensors that the hidden states do not need, unless the model has them: those that predict masked tokens,
poolers, and ColBERT's layer (``executor/dense.py``)."""


class Encoder(Model):
    """An encoder, assembled from the parts of a decoder."""

    keeps_float32 = True
    pooling_type = "MEAN"

    def __init__(self, context: ModelContext, parts: DecoderParts, head: PoolingHead | None) -> None:
        """Creates the model.

        Args:
            context: The model's construction context.
            parts: Its attention layers must be bidirectional.
            head: The classifier; None: there is none.
        """
        super().__init__()
        self.model = Decoder(context, parts, prefix="model")
        if head is not None:
            self.head = head
        types = parts.token_types
        self.num_token_types = 0 if types is None else int(types.weight.shape[0])

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        config = super().configure(config)
        return config.replaced(tie_word_embeddings=False)  # there are no logits

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        return ModelOutput(self.model(batch, hidden))

    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        return hidden

    def attention_layers(self) -> list[Attention]:
        return [module for module in self.model.modules() if isinstance(module, Attention)]
