"""``octavo collect-env``: environment information for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from api.config import ENVIRONMENT
from api.version import VERSION
from engine_core.launch import child_command, child_environment, numa_nodes, thread_places

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "llguidance",
    "msgspec",
    "numpy",
    "pyzmq",
    "starlette",
    "uvicorn",
    "uvloop",
    "triton",
)
INTERESTING_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "sve",
    "asimd",
)
VARIABLES = re.compile(r"(OCTAVO|VLLM|OMP|MKL|KMP|GOMP|CUDA|HF|TORCH)_\w+")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
TIMEOUT = 600
"""Seconds to wait for kernels to compile."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report. Returns the exit code."""
    argparse.ArgumentParser(
        prog="octavo collect-env",
        description="Print versions, hardware and settings of this machine for a bug report, without keys.",
    ).parse_args(argv)
    for title, lines in (
        ("Software", _software()),
        ("Hardware", _hardware()),
        ("Backend", _computing()),
        ("Packages", _packages()),
        ("Environment", _environment()),
    ):
        print(f"{title}:")
        for name, value in lines:
            print(f"  {name}: {value}")
    return 0


def _software() -> Iterator[tuple[str, str]]:
    yield "octavo", VERSION
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.platform()}, {' '.join(platform.libc_ver())}"


def _hardware() -> Iterator[tuple[str, str]]:
    info = _cpu_info()
    yield "CPU", info.get("model name") or platform.processor() or platform.machine()
    flags = info.get("flags", info.get("Features", "")).split()
    yield "CPU capabilities", ", ".join(flag for flag in INTERESTING_FLAGS if flag in flags) or "unknown"
    yield "CPUs", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable"
    yield "NUMA nodes", str(len(numa_nodes()) or 1)
    yield "threads", "a core for each, in the order of NUMA nodes" if thread_places() else "on any core"
    memory = _fields("/proc/meminfo")
    yield "memory", f"{memory.get('MemAvailable', '?')} of {memory.get('MemTotal', '?')} available"
    yield "memory limit", _read("/sys/fs/cgroup/memory.max") or "none"
    yield "CPU limit", _read("/sys/fs/cgroup/cpu.max") or "none"


def _cpu_info() -> dict[str, str]:
    return _fields("/proc/cpuinfo")


def _fields(path: str) -> dict[str, str]:
    """The first block of ``name: value`` lines of a file."""
    lines = _read(path).split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _computing() -> Iterator[tuple[str, str]]:
    """Asked from a separate process, since this one has no torch."""
    try:
        result = subprocess.run(
            child_command("executor.describe"),
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield "error", str(error)
        return
    if result.returncode:
        yield "error", (result.stderr.strip().splitlines() or ["no message"])[-1]
        return
    yield from json.loads(result.stdout.splitlines()[-1]).items()


def _packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name in ENVIRONMENT or VARIABLES.fullmatch(name):
            yield name, "(set)" if SECRET.search(name) else value
