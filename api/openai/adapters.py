"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api.errors import RequestError
from api.generation.serving import Serving
from api.http.body import read_json


class LoadLoRAAdapterRequest(msgspec.Struct, kw_only=True):
    """An adapter to load."""

    lora_name: str
    """The name that requests give as their model."""
    lora_path: str
    """Folder with adapter_config.json and adapter_model.safetensors, or a GGUF file, within ``--allowed-lora-path``."""
    lora_scale: float = 1.0
    """Factor of what the adapter adds."""
    load_inplace: bool = False
    """Whether it takes the place of an adapter of the same name."""


class UnloadLoRAAdapterRequest(msgspec.Struct, kw_only=True):
    """An adapter to unload."""

    lora_name: str
    """Its name."""
    lora_int_id: int | None = None
    """For compatibility with vLLM; the name suffices."""


LOAD_DECODER = msgspec.json.Decoder(LoadLoRAAdapterRequest)
UNLOAD_DECODER = msgspec.json.Decoder(UnloadLoRAAdapterRequest)


async def load_lora_adapter(request: Request) -> Response:
    """Loads an adapter from the allowed folder."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, LOAD_DECODER, serving.config.max_body_size)
    assert serving.adapters is not None and serving.config.allowed_lora_path is not None
    path = allowed_path(serving.config.allowed_lora_path, body.lora_path)
    await serving.adapters.load(body.lora_name, path, scale=body.lora_scale, replaces=body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """Forgets an adapter; requests that have begun finish with it."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, UNLOAD_DECODER, serving.config.max_body_size)
    assert serving.adapters is not None
    await serving.adapters.unload(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def allowed_path(root: str, given: str) -> Path:
    """The path of an adapter, links resolved.

    Args:
        root: The allowed folder.
        given: The client's path, absolute or relative to the folder.

    Raises:
        RequestError: 403: the path leads out of the folder.
    """
    if not given or "\0" in given or len(given) > os.pathconf("/", "PC_PATH_MAX"):
        raise RequestError("lora_path is not a path", "lora_path")
    folder = os.path.realpath(os.path.expanduser(root))
    path = os.path.realpath(os.path.join(folder, given))
    if not path.startswith(os.path.join(folder, "")):
        raise RequestError(
            "lora_path leads out of the folder that --allowed-lora-path names",
            "lora_path",
            status=403,
            kind="PermissionDeniedError",
        )
    return Path(path)
