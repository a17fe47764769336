"""What determines K and V besides tokens, as a digest: the model's files, the code and the configuration.

Equal digests mean equal bits, so a cache may be used by whoever has the digest of who filled it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

import ops
from executor.config import ExecutorConfig
from executor.device.base import Device
from executor.identity import code_digest, model_files
from executor.messages import KVCacheGroupSpec
from executor.parallel import ParallelState
from ops.cpu import library

_DIGESTS = "digests.json"
_CHUNK = 1 << 20


def state_of(path: Path) -> str:
    """Tells versions of a file apart without reading it."""
    state = path.stat()
    return f"{path.name} {state.st_size} {state.st_mtime_ns} {state.st_ino}"


class Digests:
    """SHA-256 of files, kept in a folder: a model is read for it once."""

    def __init__(self, folder: str) -> None:
        """``folder``: of ``--kv-cache-dir``, which belongs to the server's user alone."""
        self._path = Path(folder).expanduser() / _DIGESTS
        self._known: dict[str, str] = {}
        with suppress(OSError, msgspec.MsgspecError):
            self._known = msgspec.json.decode(self._path.read_bytes(), type=dict[str, str])

    def __call__(self, path: Path) -> str:
        """The digest of a file's content, in hexadecimal digits."""
        key = f"{path.resolve()} {state_of(path)}"
        if key not in self._known:
            self._known[key] = _digest(path)
            self._save()
        return self._known[key]

    def _save(self) -> None:
        draft = self._path.with_name(f".{_DIGESTS}.{os.getpid()}")
        with suppress(OSError):  # it will be computed again
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(self._known))
            draft.rename(self._path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def fingerprint(
    config: ExecutorConfig,
    parallel: ParallelState,
    device: Device,
    groups: tuple[KVCacheGroupSpec, ...],
    identify: Callable[[Path], str] = state_of,
) -> str:
    """The digest, in hexadecimal digits.

    Args:
        config: The worker's configuration.
        parallel: Its place among the ranks.
        device: Its device.
        groups: Its KV cache groups.
        identify: Identifies the content of one of the model's files.
    """
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else msgspec.msgpack.encode(part)
            digest.update(len(data).to_bytes(8, "little") + data)

    models = [config.model]
    if config.speculative is not None and config.speculative.draft is not None:
        models.append(config.speculative.draft)
    for model in models:
        add(*(identify(path) for path in model_files(model)))
        # Where the files are changes no bit.
        add(msgspec.structs.replace(model, model="", weights="", imatrix=""))
    add(
        config.device.attention_backend,
        config.device.matmul,
        config.lora,
        groups,
        dataclasses.replace(parallel, memory_fd=-1, rendezvous_fd=-1, store=None, interface=""),
    )
    add(device.name, ops.op_set(device.torch_device.type).name, str(torch.__version__), platform.machine())
    # Pixels of the images, which are known by the hashes of their files; models that are not built in.
    add(version("pillow"), version("transformers"))
    add(*map(str, _capabilities(device)))
    add(code_digest())
    return digest.hexdigest()


def kernels_of(device: Device) -> str:
    """What computes on a device, for people; ranks with the same compute the same bits."""
    names = [str(each) for each in _capabilities(device) if each is not None]
    return f"{' '.join(names) or device.name} kernels and torch {torch.__version__}"


def _capabilities(device: Device) -> tuple[object, ...]:
    """What chooses among kernels that may round differently."""
    if device.torch_device.type != "cpu":
        return (torch.cuda.get_device_capability(),) if device.torch_device.type == "cuda" else ()
    kernels = library.chosen()
    return torch.backends.cpu.get_cpu_capability(), None if kernels is None else kernels.capability
