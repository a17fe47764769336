"""Measures how large the inputs of a model's linear layers are on a text, for ``octavo imatrix``.

Runs as a process of its own, on transformers' implementation of the model: ``python -m executor.imatrix MODEL OUT
DTYPE``, with a JSON list of lists of token ids on the standard input. transformers reads GGUF files, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


def measure(model: nn.Module, pieces: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The mean square of each input of each linear layer, float32 [in_features], by the layer's name.

    Of experts, whose weights transformers has in one, it is that of what all of a layer's experts are given.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            squares = given[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        layer.register_forward_pre_hook(add)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) or name.endswith(".experts") and not isinstance(layer, nn.ModuleList):
            watch(name, layer)
    for piece in tqdm(pieces, desc="Measuring", unit=" texts"):
        model(torch.tensor([piece]))
    count = sum(map(len, pieces))
    return {name: total / count for name, total in sums.items()}


def load(path: Path, dtype: str) -> nn.Module:
    """The model in torch's ``dtype``."""
    from transformers import AutoModelForCausalLM

    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **where)
    return model.eval()


def main() -> None:
    model, out, dtype = sys.argv[1:]
    pieces = json.load(sys.stdin)
    with torch.no_grad():
        save_file(measure(load(Path(model), dtype), pieces), out)


if __name__ == "__main__":
    main()
