"""Finds one model among the GGUF files of a repository or folder. A model may be split into several files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
LABEL = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4\w*|BF16|FP?16|FP?32))$", re.IGNORECASE)
"""The quantisation at the end of a file's name, such as Q4_K_M."""
NO_MODEL = re.compile(r"mmproj|imatrix|^mtp-", re.IGNORECASE)
"""Files beside a model: vision encoders, statistics of its quantisation, layers that predict further tokens."""
PREFERRED = "Q4_K_M"
"""The quantisation that llama.cpp and Ollama take if none is named."""


class ChoiceError(ValueError):
    """No model, or more than one, fits; the message says what there is."""


def group_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models among some files: the name without part number and ending -> its files, in order."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() != ".gguf" or NO_MODEL.search(path.name):
            continue
        match = PART.fullmatch(name)
        models.setdefault(match["stem"] if match else name[: -len(".gguf")], []).append(name)
    return models


def choose_gguf(names: Iterable[str], wanted: str | None) -> list[str]:
    """The files of the wanted model.

    Args:
        names: Paths of all files.
        wanted: A quantisation (``Q4_K_M``, in either case), a file's path or its name. None: the only model, or else
            the one in ``PREFERRED``.

    Raises:
        ChoiceError: None or several fit, or parts are missing.
    """
    models = group_parts(names)
    if not models:
        raise ChoiceError("no GGUF files")
    fitting = [model for model in models if wanted is None or _is_file(wanted, model, models[model])]
    if wanted is None and len(models) > 1:
        fitting = _with_label(models, PREFERRED)
    elif wanted is not None and not fitting:
        fitting = _with_label(models, wanted)
    if len(fitting) != 1:
        problem = "choose one of its GGUF files" if wanted is None else f"no GGUF file for {wanted!r}"
        if len(fitting) > 1:
            models = {model: models[model] for model in fitting}
            problem = f"several GGUF files for {wanted or PREFERRED!r}"
        raise ChoiceError(f"{problem}; it has {describe(models)}")
    (model,) = fitting
    return _complete(model, models[model])


def describe(models: dict[str, list[str]]) -> str:
    """What there is to choose from: quantisations where they are enough, otherwise files."""
    labels = {label for model in models if (label := label_of(model))}
    shown = sorted(labels) if len(labels) == len(models) else sorted(files[0] for files in models.values())
    return ", ".join(shown[:40]) + (f" and {len(shown) - 40} more" if len(shown) > 40 else "")


def label_of(model: str) -> str | None:
    """The quantisation that a model's name ends with, in upper case."""
    match = LABEL.search(PurePosixPath(model).name)
    return match[1].upper() if match else None


def _is_file(wanted: str, model: str, files: list[str]) -> bool:
    name = PurePosixPath(model).name
    return wanted in (model, name, *files, *(PurePosixPath(file).name for file in files))


def _with_label(models: Iterable[str], wanted: str) -> list[str]:
    upper = wanted.upper()
    for fits in (
        lambda model: label_of(model) == upper,
        lambda model: (label_of(model) or "").removeprefix("UD-") == upper,
        lambda model: re.search(rf"[-._]{re.escape(upper)}$", model.upper()),
    ):
        found = [model for model in models if fits(model)]
        if found:
            return found
    return []


def _complete(model: str, files: list[str]) -> list[str]:
    match = PART.fullmatch(files[0])
    if match is None:
        return files[:1]
    wanted = part_names(files[0])
    missing = sorted(set(wanted) - set(files))
    if missing:
        raise ChoiceError(f"{PurePosixPath(model).name} is incomplete: {missing[0]} is missing")
    return wanted


def part_names(name: str) -> list[str]:
    """The names of all parts of a split model, given one of them; just the name if it is no part."""
    match = PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [name]
    return [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]
