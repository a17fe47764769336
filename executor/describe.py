"""What ``octavo collect-env`` prints: what computes on this machine, as one JSON object."""

from __future__ import annotations

import json

import torch

from ops.cpu import build, library


def describe() -> dict[str, str]:
    """Torch, the CPU kernels and the devices; missing kernels are compiled."""
    kernels = library.chosen()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        compiler = f"none: {error}"
    return {
        "torch": torch.__version__,
        "torch built for": torch.version.cuda or torch.version.hip or "CPU",
        "torch threads": str(torch.get_num_threads()),
        "C++ compiler": compiler,
        "CPU kernels": "none: plain torch computes" if kernels is None else kernels.capability,
        "CPU kernels that would run": ", ".join(capability.name for capability in build.available()),
        "GPUs": ", ".join(devices) or "none",
    }


if __name__ == "__main__":
    print(json.dumps(describe()))
