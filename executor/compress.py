"""Quantises a model with llmcompressor, for ``octavo quantize``.

Runs as a process of its own: ``python -m executor.compress MODEL OUT SCHEME METHOD WINDOW``, with the token ids of
the calibration text on the standard input, as a JSON list of lists. Needs the packages llmcompressor and datasets. The
standard output is the reason of a failure, in one line, or empty: whatever the packages print goes to the other stream.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from typing import Any

GROUP_SIZES = (128, 64, 32)


def scheme_for(network: Any, name: str) -> Any:
    """A scheme of compressed-tensors by its name; its groups are small enough for all layers of a model."""
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    layers = [each for each in network.modules() if isinstance(each, torch.nn.Linear)]
    if scheme.weights.group_size in GROUP_SIZES:
        sizes = [size for size in GROUP_SIZES if all(layer.in_features % size == 0 for layer in layers)]
        scheme.weights.group_size = sizes[0] if sizes else GROUP_SIZES[-1]
    return scheme


def modifiers(scheme: Any, method: str) -> list[Any]:
    """What llmcompressor is to do."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    settings: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**settings)]
    rounding = QuantizationModifier(**settings)
    if method == "rtn":
        return [rounding]
    # It weighs columns by their size within the group of a scale, and refuses to where the group is a whole matrix.
    return [AWQModifier(duo_scaling=scheme.weights.strategy != "tensor"), rounding]


def leave_memory_pageable() -> None:
    """Keeps AWQ from pinning the activations that it holds, where no accelerator would read them.

    llmcompressor pins them in any case, and has no setting for it; without an accelerator torch cannot pin memory.
    Pinned memory makes copies to a device faster, and changes no number.
    """
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *arguments, **options: None


def compress(model: str, out: str, scheme: str, method: str, window: int, pieces: list[list[int]]) -> None:
    """Writes the quantised model and its tokenizer to a new folder."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if network.dtype == torch.float32:
        network = network.to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text: dict[str, Any] = {}
    if pieces:
        rows = {"input_ids": pieces, "attention_mask": [[1] * len(piece) for piece in pieces]}
        text = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(pieces),
            "max_seq_length": window,
        }
    leave_memory_pageable()
    oneshot(model=network, processor=tokenizer, recipe=modifiers(scheme_for(network, scheme), method), **text)
    network.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def main() -> int:
    """Returns the exit code."""
    model, out, scheme, method, window = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            compress(model, out, scheme, method, int(window), json.load(sys.stdin))
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            return 0
    sys.stdout.write(f"{reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
