#!/usr/bin/env python3
"""Loads quantised checkpoints written by the packages that people quantise with.

The packages are installed into an environment below --folder, which is kept. A script in ``scripts/quantizers`` writes
a tiny random model in each scheme there, and beside it the same model with the weights that the package itself makes
of it. Octavo's logits of both must agree. Where both round activations to 8 bits, they must do so equally well.

    .venv/bin/python scripts/check_quantized.py                       # all
    .venv/bin/python scripts/check_quantized.py bitsandbytes gptqmodel
    .venv/bin/python scripts/check_quantized.py --schemes W4A16 FP8_BLOCK

Exit status: 0 if all that could be written agree. Packages are those for CPUs, with the torch of this interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = ROOT / "scripts" / "quantizers" / "write.py"
REQUIREMENTS = ("llmcompressor==0.14.0.1", "bitsandbytes==0.50.2", "auto-round==0.16.1", "nvidia-modelopt==0.47.0")
UNBUILT = ("gptqmodel==7.6.0", "--no-build-isolation")
"""Comes as sources, which are built with the environment's own torch, without CUDA."""
WRITERS = ("llmcompressor", "bitsandbytes", "auto_round", "modelopt", "gptqmodel")
TOLERANCE = 1e-3
"""Of logits, in standard deviations."""
ROUNDED_TOLERANCE = 1.2
"""How far activations in 8 bits may move logits, in units of how far those of the package do.

The two cannot be equal: the package divides the range of a row by 255, Octavo the largest number by 127, as vLLM does.
"""


@dataclass(frozen=True)
class Result:
    """What came of one scheme."""

    line: str
    is_good: bool


def install(folder: Path) -> Path:
    """Makes the environment, if it is not there. Returns its interpreter."""
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists():
        return python
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    constraint = folder / "constraint.txt"
    pinned = f"torch=={torch.__version__.split('+')[0]}"  # or else pip takes a build for CUDA
    constraint.write_text(f"{pinned}\n")
    variables = {**os.environ, "PIP_CONSTRAINT": str(constraint), "BUILD_CUDA_EXT": "0"}
    for arguments in (*([each] for each in (pinned, *REQUIREMENTS)), ["setuptools", "wheel"], UNBUILT):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True, env=variables)
    done.touch()
    return python


def written(python: Path, writer: str, folder: Path, schemes: list[str]) -> dict[str, str]:
    """Has a package write its schemes. Returns their names, each with the reason why it could not be written, or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"{writer}.json"
    report.unlink(missing_ok=True)
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), str(SCRIPT), writer, str(folder), *schemes]
    result = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=900, check=False
    )
    if not report.exists():
        raise SystemExit(f"{writer} wrote nothing:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    reasons: dict[str, str] = json.loads(report.read_text())
    return reasons


def drift(found: Tensor, expected: Tensor) -> float:
    """Differences of logits, in standard deviations."""
    return float((found - expected).std() / expected.std())


def check(name: str, folder: Path) -> Result:
    """Compares the logits of one scheme."""
    from executor.base import ModelError
    from executor.quantization.packed import describe
    from tests.models.harness import load, logits_of

    expected = load_file(folder / "logits.safetensors")
    tokens = expected["tokens"].tolist()
    weights = load_file(folder / "plain" / "model.safetensors").values()
    is_rounded = all(torch.equal(each, each.bfloat16().float()) for each in weights)
    dtype = "bfloat16" if is_rounded else "float32"  # in which the package dequantises
    try:
        loaded = load(folder / "quantized", quantized_activations="float", dtype=dtype)
        plain = logits_of(load(folder / "plain", dtype=dtype), tokens)
        found = drift(logits_of(loaded, tokens), plain)
        is_good, shown = found <= TOLERANCE, f"differs by {found:.1e} ({dtype})"
        if "logits" in expected:
            rounded = drift(logits_of(load(folder / "quantized", dtype=dtype), tokens), plain)
            theirs = drift(expected["logits"], plain)
            is_good &= TOLERANCE < rounded < ROUNDED_TOLERANCE * theirs
            shown += f"; with rounded activations by {rounded:.3f}, the package by {theirs:.3f}"
    except ModelError as error:
        return Result(f"{name:18} REFUSED: {str(error).replace(str(folder), '')}", False)
    formats = (describe(loaded.model) or "not quantised").split(", with")[0]
    return Result(f"{name:18} {'passed' if is_good else 'FAILED'}: {formats}: {shown}", is_good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writers", nargs="*", metavar="PACKAGE", help=f"default: all of {', '.join(WRITERS)}")
    parser.add_argument("--schemes", nargs="+", default=[], metavar="SCHEME", help="default: all that are known")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-quantizers")
    arguments = parser.parse_args()
    if unknown := set(arguments.writers) - set(WRITERS):
        parser.error(f"unknown packages: {', '.join(sorted(unknown))}; choose from {', '.join(WRITERS)}")
    python = install(arguments.folder.absolute())
    is_good = True
    for writer in arguments.writers or WRITERS:
        print(writer, flush=True)
        target = arguments.folder.absolute() / "models"
        for scheme, reason in written(python, writer, target, arguments.schemes).items():
            result = Result(f"{scheme:18} not written: {reason}", True) if reason else check(scheme, target / scheme)
            is_good &= result.is_good
            print(f"  {result.line}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
