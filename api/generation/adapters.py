"""The LoRA adapters of a served model, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from api.errors import EngineDeadError, ModelFileError, RequestError, asleep
from api.generation.served_model import ServedModel
from api.lora_modules import lora_modules
from api.model.adapter_files import locate_adapter
from api.params import lora
from engine_core.hashing import AdapterFileError, adapter_hash
from engine_core.launch import get_logger
from engine_core.messages import EXIT_MODEL, EnsureAdapter, ForgetAdapter, LoRARequest

logger = get_logger()

MAX_NAME = 256
"""Characters of an adapter's name."""
MAX_SCALE = 1e4
MAX_ADAPTERS = 10_000
"""Names that a server keeps."""


class Adapters:
    """Loads and unloads adapters while requests run. Requests keep the adapter that its name stood for."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._views: dict[str, ServedModel] = {}
        self._offline: dict[str, tuple[int, str, float]] = {}
        """Ids, paths and scales of adapters that offline requests have named, by name."""
        self._last_id = 0
        self._lock = asyncio.Lock()
        """Changes take turns."""

    @property
    def models(self) -> list[ServedModel]:
        """The model with each of its adapters."""
        return list(self._views.values())

    def find(self, name: str) -> ServedModel | None:
        """The model with the named adapter."""
        return self._views.get(name)

    async def load(
        self, name: str, path: Path, *, scale: float = 1.0, replaces: bool = False, shown_path: str | None = None
    ) -> None:
        """Loads an adapter, or tries it if there is no room in memory.

        Args:
            name: The name that clients use as ``model``.
            path: A folder with PEFT's files, or a GGUF file.
            scale: Factor of what it adds.
            replaces: Requests from now on use it in place of an earlier one of that name.
            shown_path: The path in the list of models. Default: ``path``.

        Raises:
            RequestError: 400: the name is taken, or the adapter does not fit the model. 404: there is no such folder.
                503: the engine sleeps.
            EngineDeadError: The engine died before it answered.
        """
        async with self._lock:
            self._check_name(name, replaces=replaces)
            if self._model.client.sleeper.is_sleeping:  # it would answer when it wakes up
                raise asleep()
            if not abs(scale) <= MAX_SCALE:  # nor NaN
                raise RequestError(f"lora_scale must be between {-MAX_SCALE:g} and {MAX_SCALE:g}", "lora_scale")
            try:
                content_hash = await asyncio.to_thread(adapter_hash, path, scale)
            except AdapterFileError as error:
                raise RequestError(str(error), "lora_path", status=404, kind="NotFoundError") from None
            self._last_id += 1
            adapter = LoRARequest(name, self._last_id, str(path), content_hash, scale)
            answer = await self._model.client.call(lambda call_id: EnsureAdapter(call_id, adapter))
            if answer["error"]:
                raise RequestError(str(answer["error"]), "lora_path")
            before = self._views.get(name)
            self._views[name] = self._model.with_adapter(adapter, shown_path or str(path))
            if before is not None:
                self._forget(before)
            logger.info("adapter %s: %s", name, path)

    def _check_name(self, name: str, *, replaces: bool) -> None:
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise RequestError(f"lora_name must have 1 to {MAX_NAME} printable characters", "lora_name")
        if name in self._model.names:
            raise RequestError(f"lora_name: {name!r} is the name of the model", "lora_name")
        if name in self._views and not replaces:
            raise RequestError(
                f"The lora adapter {name!r} has already been loaded; set load_inplace to replace it", "lora_name"
            )
        if name not in self._views and len(self._views) >= MAX_ADAPTERS:
            raise RequestError(f"there are {MAX_ADAPTERS} adapters already; unload some", "lora_name")

    async def unload(self, name: str) -> None:
        """Forgets an adapter. Requests that have it already go on.

        Raises:
            RequestError: 404: there is none of that name.
        """
        async with self._lock:
            view = self._views.pop(name, None)
            if view is None:
                raise RequestError(
                    f"The lora adapter {name!r} cannot be found.", "lora_name", status=404, kind="NotFoundError"
                )
            self._forget(view)

    def _forget(self, view: ServedModel) -> None:
        """Frees the memory of an adapter unless another name stands for the same."""
        assert view.adapter is not None
        key = view.adapter.content_hash
        if all(other.adapter is None or other.adapter.content_hash != key for other in self._views.values()):
            self._model.client.tell(ForgetAdapter(key))

    async def _locate(self, path: str) -> Path:
        """The local files of an adapter that the operator names.

        Raises:
            RequestError: They cannot be downloaded.
        """
        try:
            return await asyncio.to_thread(locate_adapter, path, self._model.config)
        except ModelFileError as error:
            raise RequestError(str(error), "lora_path") from None

    async def view(self, wanted: lora.LoRARequest | None) -> ServedModel:
        """The model with the adapter of an offline request, loaded when it is first used.

        Raises:
            RequestError: It cannot be loaded, or there can be no adapters.
            EngineDeadError: The engine died before it answered.
        """
        if wanted is None:
            return self._model
        key = (wanted.lora_int_id, wanted.lora_path, wanted.lora_scale)
        if self._offline.get(wanted.lora_name) != key:
            path = await self._locate(wanted.lora_path)
            await self.load(wanted.lora_name, path, scale=wanted.lora_scale, replaces=True)
            self._offline[wanted.lora_name] = key
        return self._views[wanted.lora_name]

    async def load_all(self, entries: Sequence[str]) -> None:
        """Loads the adapters that ``--lora-modules`` names.

        Raises:
            EngineDeadError: One cannot be loaded.
        """
        for module in lora_modules(entries):
            try:
                path = await self._locate(module.path)
                await self.load(module.name, path, scale=module.scale, shown_path=module.path)
            except RequestError as error:
                raise EngineDeadError(f"--lora-modules {module.name}={module.path}: {error}", EXIT_MODEL) from None
