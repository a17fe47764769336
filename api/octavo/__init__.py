"""``import octavo``: the public names of ``api`` under the name that the package is installed by.

This folder is the top-level package ``octavo`` of the wheel (see ``pyproject.toml``). Many projects have an ``api`` of
their own, so the one that lies beside this package is loaded, whatever the module search path says.
"""

import importlib.machinery
import importlib.util
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from api import LLM, BeamSearchParams, LoRARequest, PoolingParams, SamplingParams, StructuredOutputsParams

__all__ = ["LLM", "BeamSearchParams", "LoRARequest", "PoolingParams", "SamplingParams", "StructuredOutputsParams"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(sys.modules["api"], name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load_api() -> None:
    """Loads the package ``api`` that this one belongs to.

    Raises:
        ImportError: The program has loaded another package of that name.
    """
    inside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = os.path.join(inside, "api")  # in a wheel; in the source tree this folder lies in api/ itself
    if not os.path.isdir(folder):
        folder, inside = inside, os.path.dirname(inside)
    loaded = sys.modules.get("api")
    if loaded is not None:
        file = getattr(loaded, "__file__", None) or "?"
        if os.path.realpath(os.path.dirname(file)) != os.path.realpath(folder):
            raise ImportError(
                f"octavo consists of the package api in {folder}, but this program has imported {file} as api"
            )
        return
    spec = importlib.machinery.PathFinder.find_spec("api", [inside])
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is missing: reinstall octavo")
    module = sys.modules["api"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_load_api()
