"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from api.generation.adapters import number_of
from api.generation.served_model import ServedModel
from api.generation.serving import Serving
from api.openai.protocol import ModelCapabilities, ModelCard, ModelList, ModelPermission


async def list_models(request: Request) -> Response:
    """All served model names."""
    serving: Serving = request.app.state.serving
    cards = ModelList(data=[_card(model, name) for model in serving.all_models for name in model.names])
    return Response(msgspec.json.encode(cards), media_type="application/json")


async def retrieve_model(request: Request) -> Response:
    """One served model."""
    serving: Serving = request.app.state.serving
    name = request.path_params["model"]
    model = serving.find_model(name)
    return Response(msgspec.json.encode(_card(model, name)), media_type="application/json")


def _card(model: ServedModel, name: str) -> ModelCard:
    number = number_of(model)
    return ModelCard(
        id=name,
        created=model.created,
        root=model.root,
        parent=model.parent,
        lora_id=UNSET if number is None else number,
        max_model_len=model.limits.max_model_len,
        capabilities=ModelCapabilities(vision=model.images is not None and model.images.most > 0),
        permission=[ModelPermission(id=f"modelperm-{name}", created=model.created)],
    )
