"""What the endpoints of a server work with: its models by name, and what the process has once."""

from __future__ import annotations

from collections.abc import Sequence

from api.errors import RequestError
from api.generation.host import Host
from api.generation.served_model import ServedModel


class Serving:
    """Built once the engines are ready; endpoints get it and nothing else."""

    def __init__(self, host: Host, models: Sequence[ServedModel]) -> None:
        """Takes what is served.

        Args:
            host: What the models share.
            models: At least one; the first answers requests that name none.
        """
        self.host = host
        self.config = host.config
        self.models = tuple(models)
        self._by_name = {name: model for model in models for name in model.names}

    @property
    def default_model(self) -> ServedModel:
        """Answers requests that name no model."""
        return self.models[0]

    def find_model(self, name: str | None) -> ServedModel:
        """The model that a request is for.

        Args:
            name: As the request says; None: it says nothing.

        Raises:
            RequestError: 404, it is not served here.
        """
        if name is None:
            return self.default_model
        model = self._by_name.get(name)
        if model is None:
            raise RequestError(f"The model `{name}` does not exist.", "model", status=404, kind="NotFoundError")
        return model

    def check_key(self, key: str) -> None:
        """Refuses a request whose body was not read when too many of its key wait already.

        Of several models only the body says which it is for: then it is looked at later.

        Args:
            key: Short name of the key.

        Raises:
            EngineDeadError: The engine was given up.
            RequestError: 429.
        """
        if len(self.models) == 1:
            self.default_model.client.check_key(key)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence that any of the models takes."""
        return max(model.limits.max_model_len for model in self.models)

    @property
    def num_unfinished(self) -> int:
        """Engine requests that run or wait."""
        return sum(model.client.num_unfinished for model in self.models)

    @property
    def is_dead(self) -> bool:
        """An engine was given up."""
        return any(model.client.dead is not None for model in self.models)

    @property
    def is_ready(self) -> bool:
        """Whatever a request is for, it is computed at once."""
        return all(model.client.is_ready for model in self.models)
