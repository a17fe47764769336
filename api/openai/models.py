"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.generation.serving import Serving
from api.openai.protocol import ModelCard, ModelList, ModelPermission


async def list_models(request: Request) -> Response:
    """All names under which the model is served."""
    serving: Serving = request.app.state.serving
    cards = ModelList(data=[_card(serving, name) for name in serving.model_names])
    return Response(msgspec.json.encode(cards), media_type="application/json")


async def retrieve_model(request: Request) -> Response:
    """One of them."""
    serving: Serving = request.app.state.serving
    name = request.path_params["model"]
    serving.check_model(name)
    return Response(msgspec.json.encode(_card(serving, name)), media_type="application/json")


def _card(serving: Serving, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=serving.created,
        root=serving.model_name,
        max_model_len=serving.limits.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{name}", created=serving.created)],
    )
