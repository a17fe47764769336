"""Low-rank adapters in memory: PEFT's files, and the layers that they change."""

from executor.adapters.loaded import LoadedAdapters, check_adapters

__all__ = ["LoadedAdapters", "check_adapters"]
