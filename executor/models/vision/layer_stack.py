"""The layers of a tower, which are computed one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from executor.input_batch import InputBatch
from executor.layers.attention import Attention


class LayerStack(nn.Module):
    """Some layers, each of which takes hidden states and a batch."""

    replay: Callable[[Tensor, Sequence[InputBatch]], list[Tensor]] | None = None
    """What computes them instead, with the same bits."""

    def __init__(self, layers: nn.ModuleList, *, kinds: Sequence[int] = (), kept: Sequence[int] = (-1,)) -> None:
        """Takes the layers.

        Args:
            layers: They belong to the tower.
            kinds: For each layer, which of the batches it gets. Default: the first.
            kept: Layers after which hidden states are returned: 0 is before the first, -1 after the last.
        """
        super().__init__()
        self._layers = tuple(layers)  # not submodules
        self._kinds = tuple(kinds) or (0,) * len(layers)
        self._kept = [each % (len(layers) + 1) for each in kept]
        self.attention = [module for module in layers.modules() if isinstance(module, Attention)]

    def forward(self, hidden: Tensor, *batches: InputBatch) -> list[Tensor]:
        """Computes the layers.

        Args:
            hidden: [rows, width].
            batches: One for each kind of layers, all with the same positions.

        Returns:
            Hidden states [rows, width] of each of ``kept``.
        """
        return (self.compute if self.replay is None else self.replay)(hidden, batches)

    def compute(self, hidden: Any, batches: Sequence[InputBatch]) -> list[Any]:
        """The same, op by op, of tensors or of symbolic values."""
        states = [hidden]
        for layer, kind in zip(self._layers, self._kinds, strict=True):
            states.append(layer(states[-1], batches[kind]))
        return [states[index] for index in self._kept]
