"""Octavo: LLM inference and serving. Public names are imported lazily."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys

TYPE_CHECKING = False  # not from typing: any import here could resolve to a module in the user's folder
if TYPE_CHECKING:
    from api.generation.beam_search import BeamSearchParams
    from api.llm import LLM
    from api.params.lora import LoRARequest
    from api.params.pooling import PoolingParams
    from api.params.sampling import SamplingParams
    from api.params.structured import StructuredOutputsParams

__all__ = ["LLM", "BeamSearchParams", "LoRARequest", "PoolingParams", "SamplingParams", "StructuredOutputsParams"]

_HOMES = {
    "LLM": "api.llm",
    "BeamSearchParams": "api.generation.beam_search",
    "LoRARequest": "api.params.lora",
    "PoolingParams": "api.params.pooling",
    "SamplingParams": "api.params.sampling",
    "StructuredOutputsParams": "api.params.structured",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load_siblings() -> None:
    """Imports the sibling packages from our own parent folder, even if the user's project has an ``executor/``."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in ("executor", "engine_core"):
        if name in sys.modules:
            continue
        spec = importlib.machinery.PathFinder.find_spec(name, [root])
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is missing in {root}: reinstall octavo")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_load_siblings()
