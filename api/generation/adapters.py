"""The LoRA adapters of a served model, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from api.errors import KINDS, EngineDeadError, ModelFileError, RequestError, asleep
from api.generation.served_model import ServedModel
from api.lora_modules import lora_modules
from api.model.adapter_files import locate_adapter
from api.params import lora
from api.params.lora import MAX_SCALE
from engine_core.hashing import AdapterFileError, adapter_hash, rescaled
from engine_core.launch import get_logger
from engine_core.messages import EXIT_MODEL, EnsureAdapter, ForgetAdapter, LoRARequest

logger = get_logger()

MAX_NAME = 256
"""Characters of an adapter's name."""
MAX_ADAPTERS = 10_000
"""Names that a server keeps."""
MAX_SCALES = 8
"""Scales that requests may give an adapter at about the same time, beside its own. Each takes a place in memory and is
read from the files, which others wait for."""
IDLE = 60.0
"""Seconds without a request after which a scale makes room for another."""


@dataclass
class _Scaled:
    """A scale that requests have given an adapter."""

    view: ServedModel
    error: str
    """Why the adapter cannot have it; empty: it can."""
    used: float
    """When a request last had it, or when it failed, by the clock of the event loop."""

    @property
    def is_stale(self) -> bool:
        return _now() - self.used >= IDLE


def _now() -> float:
    return asyncio.get_running_loop().time()


def number_of(view: ServedModel) -> int | None:
    """The number of a model's adapter, from 0 on in the order in which names were first loaded; None: it has none."""
    return None if view.adapter is None else view.adapter.lora_id - 1


def _checked(scale: float, field: str) -> float:
    """A scale as a float. Raises RequestError if it is out of range."""
    if not abs(scale) <= MAX_SCALE:  # nor NaN
        raise RequestError(f"{field}: a scale must be between {-MAX_SCALE:g} and {MAX_SCALE:g}", field)
    return float(scale)


class Adapters:
    """Loads and unloads adapters while requests run. Requests keep the adapter that its name stood for."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._views: dict[str, ServedModel] = {}
        self._scales: dict[str, dict[float, _Scaled]] = {}
        """Scales that requests have given these, by name."""
        self._offline: dict[str, tuple[int, str]] = {}
        """Ids and paths of adapters that offline requests have named, by name."""
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

    def find_number(self, number: int) -> ServedModel | None:
        """The model with the adapter of a number; see ``number_of``."""
        return next((view for view in self._views.values() if number_of(view) == number), None)

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
            scale = _checked(scale, "lora_scale")
            try:
                content_hash = await asyncio.to_thread(adapter_hash, path, scale)
            except AdapterFileError as error:
                raise RequestError(str(error), "lora_path", status=404, kind="NotFoundError") from None
            before = self._views.get(name)
            own_id = self._last_id + 1 if before is None or before.adapter is None else before.adapter.lora_id
            adapter = LoRARequest(name, own_id, str(path), content_hash, scale)
            answer = await self._model.client.call(lambda call_id: EnsureAdapter(call_id, adapter))
            if answer["error"]:
                raise RequestError(str(answer["error"]), "lora_path")
            self._last_id = max(self._last_id, own_id)
            scales = self._scales.pop(name, {})
            self._views[name] = self._model.with_adapter(adapter, shown_path or str(path))
            if before is not None:
                self._forget(before, scales)
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
            self._forget(view, self._scales.pop(name, {}))

    def _forget(self, view: ServedModel | None, scales: Mapping[float, _Scaled]) -> None:
        """Frees the memory of an adapter and of its scales unless another name or scale stands for the same."""
        gone = [each.view for each in scales.values() if not each.error]
        left = [*self._views.values(), *(each.view for kept in self._scales.values() for each in kept.values())]
        needed = {each.adapter.content_hash for each in left if each.adapter is not None}
        for each in [*gone, *(() if view is None else (view,))]:
            if each.adapter is not None and each.adapter.content_hash not in needed:
                self._model.client.tell(ForgetAdapter(each.adapter.content_hash))

    # -- scales of requests --------------------------------------------------------------------------------

    async def scaled(
        self, view: ServedModel, scale: float, field: str = "lora_scale", *, is_bounded: bool = True
    ) -> ServedModel:
        """The model with an adapter at the scale that a request gives it. It is loaded when it is first wanted.

        Args:
            view: The model with the adapter.
            scale: Factor of what it adds; 0: the model without it, which takes no place.
            field: The request's name of the scale, for errors.
            is_bounded: The adapter has at most ``MAX_SCALES``: a client could have others wait for files without end.

        Raises:
            RequestError: 400: the adapter cannot have this scale. 404: it has just been unloaded or replaced. 429: it
                has too many scales now. 503: the engine sleeps.
            EngineDeadError: The engine died before it answered.
        """
        assert view.adapter is not None
        scale, name = _checked(scale, field), view.adapter.name
        if scale == view.adapter.scale:
            return view
        if scale == 0:
            return view.rescaled(None)
        known = self._known(name, scale) if self._views.get(name) is view else None
        if known is None:
            async with self._lock:
                if self._views.get(name) is not view:
                    raise RequestError(f"The model `{name}` has changed.", "model", status=404, kind="NotFoundError")
                known = self._known(name, scale) or await self._rescale(view, scale, field, is_bounded=is_bounded)
        if known.error:
            raise RequestError(f"{field}: {known.error}", field)
        known.used = _now()
        return known.view

    def _known(self, name: str, scale: float) -> _Scaled | None:
        """A scale that the adapter has, or cannot have. What failed is tried again after a while."""
        known = self._scales.get(name, {}).get(scale)
        return None if known is None or (known.error and known.is_stale) else known

    async def _rescale(self, view: ServedModel, scale: float, field: str, *, is_bounded: bool) -> _Scaled:
        """Loads an adapter with another scale; the one unused for longest makes room."""
        if self._model.client.sleeper.is_sleeping:  # it would answer when it wakes up
            raise asleep()
        assert view.adapter is not None
        name = view.adapter.name
        scales = self._scales.setdefault(name, {})
        scales.pop(scale, None)
        if len(scales) >= MAX_SCALES:
            oldest = min(scales, key=lambda each: scales[each].used)
            if is_bounded and not scales[oldest].is_stale:
                raise RequestError(
                    f"{field}: requests give {name!r} {MAX_SCALES} other scales already "
                    f"({', '.join(f'{each}' for each in sorted(scales))}); use one of them, or retry in a minute",
                    field,
                    status=429,
                    kind=KINDS[429],
                    headers={"Retry-After": str(int(IDLE))},
                )
            self._forget(None, {oldest: scales.pop(oldest)})
        adapter = replace(view.adapter, content_hash=rescaled(view.adapter.content_hash, scale), scale=scale)
        answer = await self._model.client.call(lambda call_id: EnsureAdapter(call_id, adapter))
        scales[scale] = _Scaled(view.rescaled(adapter), str(answer["error"]), _now())
        return scales[scale]

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
        key = (wanted.lora_int_id, wanted.lora_path)
        if self._offline.get(wanted.lora_name) != key:
            path = await self._locate(wanted.lora_path)
            await self.load(wanted.lora_name, path, scale=wanted.lora_scale, replaces=True)
            self._offline[wanted.lora_name] = key
        return await self.scaled(self._views[wanted.lora_name], wanted.lora_scale, is_bounded=False)

    async def load_all(self, entries: Sequence[str]) -> None:
        """Loads the adapters that ``--lora-modules`` names, and those of tasks that the checkpoint holds.

        Raises:
            EngineDeadError: One cannot be loaded.
        """
        for name, folder in self._model.tasks.items():
            try:
                await self.load(name, folder)
            except RequestError as error:
                raise EngineDeadError(f"task {name}: {error}", EXIT_MODEL) from None
        for module in lora_modules(entries):
            try:
                path = await self._locate(module.path)
                await self.load(module.name, path, scale=module.scale, shown_path=module.path)
            except RequestError as error:
                raise EngineDeadError(f"--lora-modules {module.name}={module.path}: {error}", EXIT_MODEL) from None
