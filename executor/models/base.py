"""The model seam."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from executor.base import ModelError
from executor.checkpoint import Checkpoint
from executor.hf_config import HFConfig
from executor.input_batch import InputBatch, ModelOutput
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.layers.pooler_head import PoolingHead
from executor.layers.rotary import RotaryEmbedding
from executor.weights_mapper import WeightsMapper

__all__ = ["Model", "ModelContext", "WeightsMapper"]


class Model(nn.Module, ABC):
    """A language model. Its forward pass uses only ops, ``+`` and ``split``, so that it can be captured."""

    tied_modules: Mapping[str, str] = {}
    """Modules tied to another one by the configuration, whose tensors a checkpoint may hold nevertheless."""
    mapper: WeightsMapper = WeightsMapper()
    """Names and layouts in checkpoints that differ from the model's."""
    attribute_map: ClassVar[Mapping[str, str]] = {}
    """The family's own names of fields in config.json: ``{"hidden_size": "n_embd"}``."""
    config_defaults: ClassVar[Mapping[str, Any]] = {}
    """Fields that config.json may leave out, under their common names."""
    hidden_size: int | None = None
    """Columns of the hidden states that ``forward`` returns. None: ``hidden_size`` of the configuration."""
    keeps_float32: ClassVar[bool] = False
    """Whether ``--dtype auto`` keeps the type of a checkpoint in float32."""
    pooling_type: ClassVar[str] = "LAST"
    """How vectors are pooled, unless the files say so."""
    num_token_types: int = 0
    """Types of tokens; 0: ``InputBatch.token_types`` is not needed."""
    ignored: Sequence[str] = ()
    """Names of tensors that a model with this configuration does not need, beside those that ``mapper`` ignores."""
    attention_of_stages: Sequence[Attention] = ()
    """The attention layers of all pipeline stages, in order; empty: there is one. KV cache groups are those of all
    stages, since plans name blocks by group."""
    names_of_stages: Collection[str] = ()
    """Names of tensors that other pipeline stages have, or ranks that have other experts."""
    can_be_captured: ClassVar[bool] = True
    """False: the forward pass is more than ops, and runs eagerly in each step."""

    @property
    def pooling_head(self) -> PoolingHead | None:
        """The classifier of pooled states: the submodule ``head``, if there is one."""
        head = self._modules.get("head")
        return head if isinstance(head, PoolingHead) else None

    @classmethod
    def configure(cls, config: HFConfig) -> HFConfig:
        """The configuration as the model reads it."""
        return config.for_model(cls.attribute_map, cls.config_defaults)

    @abstractmethod
    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        """Computes the hidden states of a step's tokens.

        Args:
            batch: The tokens. Their K and V are written to the caches of the attention layers.
            hidden: [num_tokens, hidden_size] of the previous pipeline stage; None on the first.
        """

    def embed(self, batch: InputBatch) -> Tensor:
        """[num_tokens, hidden_size]: the input of the first layer, of a model that takes images."""
        raise NotImplementedError("the model takes no images")

    @abstractmethod
    def compute_logits(self, hidden: Tensor, batch: InputBatch) -> Tensor:
        """``hidden`` [num_samples, hidden_size], of ``batch.logits_rows`` -> float32 [num_samples, vocab_size].

        A model that does not generate returns it as it is.
        """

    @abstractmethod
    def attention_layers(self) -> list[Attention]:
        """The attention layers, in order."""

    def set_aux_hidden_state_layers(self, layers: Sequence[int]) -> None:
        """Lets ``forward`` return hidden states between layers, too.

        Args:
            layers: After how many layers each; 0: the embeddings.

        Raises:
            ModelError: The model has no such layers.
        """
        raise ModelError(f"--speculative-config: {type(self).__name__} shows no hidden states of its layers; omit it")

    def layer_bytes(self) -> tuple[list[int], int]:
        """Bytes of the weights of each layer, and of what follows the last one, of a model that can be cut into stages.

        Raises:
            ModelError: It cannot.
        """
        raise ModelError(
            f"--pipeline-parallel-size: workers cannot share the layers of {type(self).__name__} yet; use 1"
        )

    def keep_layers(self, first: int, end: int) -> None:
        """Keeps consecutive layers, and what belongs before the first and after the last one, if they are among
        them."""
        raise NotImplementedError("the model cannot be cut")

    def stored_as(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the names and layouts of this model's tensors."""
        return checkpoint

    def loaded(self) -> None:
        """Called once, when the weights are loaded and packed.

        Raises:
            ModelError: The model cannot run.
        """

    def reserve_positions(self, num_positions: int) -> None:
        """Builds the tables with a row per position, before the first forward pass.

        Args:
            num_positions: Longest sequence served, known once the KV cache is sized.
        """
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                module.reserve(num_positions)

    def position_bytes(self) -> int:
        """Bytes that ``reserve_positions`` takes per position."""
        return sum(module.position_bytes for module in self.modules() if isinstance(module, RotaryEmbedding))
