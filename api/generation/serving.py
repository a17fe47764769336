"""What the endpoints of a server use: its models by name, and the resources that they share."""

from __future__ import annotations

from collections.abc import Sequence

from api.errors import RequestError
from api.generation.adapters import Adapters
from api.generation.host import Host
from api.generation.served_model import ServedModel
from api.params.lora import AdapterFields, LoRAScale


class Serving:
    """The models of a server. Created once the engines are ready; endpoints receive only this."""

    def __init__(self, host: Host, models: Sequence[ServedModel], adapters: Adapters | None = None) -> None:
        """Registers the models by their names.

        Args:
            host: Resources that the models share.
            models: At least one; the first handles requests that name none.
            adapters: Those of the first model, if it can have any.
        """
        self.host = host
        self.config = host.config
        self.models = tuple(models)
        self.adapters = adapters
        self._by_name = {name: model for model in models for name in model.names}

    @property
    def default_model(self) -> ServedModel:
        """The model that handles requests that name none."""
        return self.models[0]

    def find_model(self, name: str | None) -> ServedModel:
        """The model that a request is for.

        Args:
            name: The request's ``model``; None: not given.

        Raises:
            RequestError: 404: the model is not served here.
        """
        if name is None:
            return self.default_model
        model = self._by_name.get(name)
        if model is None and self.adapters is not None:
            model = self.adapters.find(name)
        if model is None:
            raise RequestError(f"The model `{name}` does not exist.", "model", status=404, kind="NotFoundError")
        return model

    async def choose_model(self, name: str | None, fields: AdapterFields) -> ServedModel:
        """The model that a request is for, with its adapter at the scale that the request gives it.

        Args:
            name: The request's ``model``; None: not given.
            fields: The request.

        Raises:
            RequestError: As ``find_model``; 400, 429 or 503: the adapter cannot have this scale.
            EngineDeadError: The engine died before it answered.
        """
        model = self.find_model(name)
        scale = fields.lora_scale
        if fields.lora is not None:
            if scale is not None:
                raise RequestError("lora says the scale already; omit lora_scale", "lora_scale")
            model, scale = self._listed(model, fields.lora)
            if model.adapter is None:
                return model
        if scale is None:
            return model
        if model.adapter is None or self.adapters is None:
            raise RequestError(
                f"lora_scale needs an adapter as model, and {model.name!r} is none; /v1/models lists them", "lora_scale"
            )
        return await self.adapters.scaled(model, scale, "lora_scale" if fields.lora is None else "lora")

    def with_task(self, model: ServedModel, task: str | None) -> ServedModel:
        """The model with the adapter of a task.

        Raises:
            RequestError: 400: it has none for this task.
        """
        if not task:
            return model
        view = self.adapters.find(task) if self.adapters is not None and task in model.tasks else None
        if view is None or model.adapter is not None:
            known = f"choose from {', '.join(model.tasks)}" if model.tasks else "the model has none"
            raise RequestError(f"task {task[:100]!r} is unknown; {known}", "task")
        return view

    def _listed(self, model: ServedModel, entries: Sequence[LoRAScale]) -> tuple[ServedModel, float]:
        """The model with the adapter that a list of scales turns on, and its scale."""
        views = [None if self.adapters is None else self.adapters.find_number(each.id) for each in entries]
        for view, entry in zip(views, entries, strict=True):
            if view is None or (entry.scale and model not in (view, self.default_model)):
                raise RequestError(f"lora: {model.name!r} has no adapter {entry.id}; /v1/models lists them", "lora")
        chosen = [(view, each.scale) for view, each in zip(views, entries, strict=True) if view and each.scale]
        if len(chosen) > 1:
            raise RequestError("lora: a request has one adapter; set the scales of the others to 0", "lora")
        return chosen[0] if chosen else (model, 0.0)

    @property
    def all_models(self) -> list[ServedModel]:
        """The models, each followed by those with its adapters."""
        return [*self.models, *(() if self.adapters is None else self.adapters.models)]

    def check_key(self, key: str) -> None:
        """Rejects a request before its body is read when too many of its key are waiting.

        With several models, only the body tells which one the request is for; it is then checked later.

        Args:
            key: Short name of the key.

        Raises:
            EngineDeadError: The engine died and is not restarted.
            RequestError: 429.
        """
        if len(self.models) == 1:
            self.default_model.client.check_key(key)

    @property
    def max_model_len(self) -> int:
        """Maximum sequence length of any of the models, in tokens."""
        return max(model.limits.max_model_len for model in self.models)

    @property
    def num_unfinished(self) -> int:
        """Number of engine requests that run or wait."""
        return sum(model.client.num_unfinished for model in self.models)

    @property
    def is_dead(self) -> bool:
        """Whether an engine is dead for good."""
        return any(model.client.dead is not None for model in self.models)

    @property
    def is_sleeping(self) -> bool:
        """Whether any engine sleeps."""
        return any(model.client.sleeper.is_sleeping for model in self.models)

    @property
    def is_ready(self) -> bool:
        """Whether all engines run new requests without a pause."""
        return all(model.client.is_ready for model in self.models)
