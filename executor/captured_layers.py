"""The layers of a tower as one program: most of the work of an image is one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from executor.graphs import Program
from executor.input_batch import InputBatch
from executor.models.vision.layer_stack import LayerStack
from ops.dispatch import Spec, StepInput


class CapturedLayers:
    """Computes a stack of layers, with the same bits as if they were called.

    They are captured when they first run, and again if the memory for K and V has moved.
    """

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack
        self._program: Program | None = None
        self._captured_at: list[int] = []

    def __call__(self, hidden: Tensor, batches: Sequence[InputBatch]) -> list[Tensor]:
        """See ``LayerStack.forward``."""
        addresses = [cache.data_ptr() for each in self._stack.attention for cache in each.kv_cache]
        if self._program is None or self._captured_at != addresses:
            self._program = self._capture(hidden, len(batches))
            self._captured_at = addresses
        inputs = {f"attention.{kind}": batch.attention[0] for kind, batch in enumerate(batches)}
        return [
            each.clone()  # the program's memory is used again
            for each in self._program.replay({**inputs, "hidden": hidden, "positions": batches[0].positions})
        ]

    def _capture(self, example: Tensor, num_kinds: int) -> Program:
        program = Program(example.device.type, max_tokens=len(example))
        hidden = program.input("hidden", Spec("tokens", example.shape[1], example.dtype))
        positions = program.input("positions", Spec("tokens", 1, torch.int32))
        batches = [InputBatch.of_values(positions, [StepInput(f"attention.{kind}")]) for kind in range(num_kinds)]
        program.finish(*self._stack.compute(hidden, batches))
        return program


def capture_layers(model: nn.Module) -> None:
    """Makes programs of all stacks of layers in a model."""
    for module in model.modules():
        if isinstance(module, LayerStack):
            module.replay = CapturedLayers(module)
