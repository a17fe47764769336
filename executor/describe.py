"""Describes this machine's compute environment as one JSON object, for ``octavo collect-env``."""

from __future__ import annotations

import json
import os

import torch

from executor.device.base import survey
from executor.parallel import split_cores
from executor.parallel.cores import format_cores, numa_nodes
from ops.cpu import build, library


def describe() -> dict[str, str]:
    """Torch, the CPU kernels and the devices. Compiles the kernels if needed."""
    kernels = library.chosen()
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        compiler = f"none: {error}"
    usable = os.sched_getaffinity(0)
    nodes = {
        f"NUMA node {node}": f"cores {format_cores(cores)}, usable {format_cores(cores & usable) or 'none'}"
        for node, cores in numa_nodes().items()
    }
    ranks = " | ".join(map(format_cores, split_cores(2, usable)))
    return {
        "torch": torch.__version__,
        "torch built for": torch.version.cuda or torch.version.hip or "CPU",
        "torch threads": str(torch.get_num_threads()),
        **nodes,
        "cores of workers with --tensor-parallel-size 2": ranks,
        "C++ compiler": compiler,
        "CPU kernels": "none: plain torch is used" if kernels is None else kernels.capability,
        "CPU kernels supported here": ", ".join(capability.name for capability in build.available()),
        "GPUs": ", ".join(cards) or "none",
        **{f"--device {name}": state for name, state in survey().items()},
    }


if __name__ == "__main__":
    print(json.dumps(describe()))
