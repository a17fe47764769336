"""The seam of draft heads: small modules that predict further tokens from the hidden states of their model.

Row p of a head takes token p + 1 and the model's hidden states at p, and predicts token p + 2. Its K and V are at
position p of a cache of its own. For the tokens after that, the head goes on from its own hidden states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from executor.input_batch import InputBatch, ModelOutput
from executor.layers.attention import Attention
from executor.layers.context import ModelContext
from executor.models.base import Model
from executor.models.decoder import CausalDecoder


class DraftHead(Model):
    """A head; ``InputBatch.hidden`` is what ``combine_hidden_states`` returned, or its own hidden states."""

    aux_layers: Sequence[int] = ()
    """The layers of the model whose hidden states it reads; see ``Model.set_aux_hidden_state_layers``."""

    def __init__(self, context: ModelContext, target: CausalDecoder) -> None:
        """Creates the head.

        Args:
            context: The head's construction context.
            target: The model that it belongs to, whose embedding and output layer it may use.
        """
        super().__init__()
        self._target = (target,)  # not a submodule: its weights are loaded already
        self.num_features = context.config.hidden_size
        """Columns of ``InputBatch.hidden``."""

    @property
    def target(self) -> CausalDecoder:
        """The model that the head belongs to."""
        return self._target[0]

    def combine_hidden_states(self, hidden_states: Sequence[Tensor], batch: InputBatch) -> Tensor:
        """What the head goes on from, [num_tokens, num_features]. Called outside of programs.

        Args:
            hidden_states: Of the model, [num_tokens, hidden_size] each: the last ones, then those of ``aux_layers``.
            batch: The tokens.
        """
        return hidden_states[0]

    def target_ids(self, token_ids: Tensor) -> Tensor:
        """The model's numbers of the head's tokens, int64 [n]."""
        return token_ids

    def forward(self, batch: InputBatch, hidden: Tensor | None = None) -> ModelOutput:
        assert hidden is not None
        return ModelOutput(self.predict(batch, hidden))

    @abstractmethod
    def predict(self, batch: InputBatch, previous: Tensor) -> Tensor:
        """The hidden states from which the head goes on, [num_tokens, num_features].

        Args:
            batch: The tokens.
            previous: [num_tokens, num_features]: where it was before.
        """

    def attention_layers(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]
