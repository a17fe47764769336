"""Reads and decodes request bodies, checking each limit before the work that it limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, TypeVar, get_args

import msgspec
from starlette.requests import Request

from api.admission import MAX_JSON_VALUES, JsonMeter
from api.errors import KINDS, RequestError
from api.generation.serving import Serving
from api.http.body_budget import HeldBody
from api.http.errors import decode_error, malformed
from api.http.traffic import Traffic
from engine_core.launch import get_logger

T = TypeVar("T")

logger = get_logger()

UNREAD = frozenset(
    {
        "include_obfuscation",
        "max_tool_calls",
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "service_tier",
        "session_id",
        "store",
        "verbosity",
        "vllm_xargs",
    }
)
"""Known fields of OpenAI's and vLLM's requests that have no effect here."""
ROOM = 4096
"""JSON values allowed in addition to the token ids of a prompt."""
_STEPS_PER_VALUE = 4
_LARGE = 1 << 20
MAX_NAME = 64
MAX_NAMED = 10
"""Maximum number of unknown fields to list in an error."""


async def read_json(request: Request, decoder: msgspec.json.Decoder[T], max_size: int) -> T:
    """Reads and decodes a JSON body.

    Args:
        request: The request, with its body unread.
        decoder: Decoder for the endpoint's type.
        max_size: Maximum number of bytes.

    Raises:
        RequestError: 400 if it is not JSON of that type, 408 if it arrives too slowly, 413 if it is too large or too
            expensive to decode, 503 if there is no memory for it.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise malformed("Content-Type must be application/json")
    traffic: Traffic = request.app.state.traffic
    serving: Serving = request.app.state.serving
    meter = JsonMeter(max(MAX_JSON_VALUES, serving.max_model_len + ROOM))
    with traffic.bodies.open() as held:
        body = await _read(request, max_size, held, meter)
        held.complete()
        is_large = len(body) > _LARGE
        if is_large:
            await asyncio.sleep(0)  # decoding takes long: let others run first
        try:
            result = decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise decode_error(error) from None
        if is_large:
            await asyncio.sleep(0)
    request.state.json_weight = int(meter.weight)
    if serving.config.strict or logger.isEnabledFor(logging.DEBUG):
        _look_for_unknown_fields(body, decoder.type, refuse=serving.config.strict)
    return result


def _look_for_unknown_fields(body: bytearray, kind: Any, *, refuse: bool) -> None:
    """Rejects fields that ``kind`` does not have, or logs that they are ignored."""
    names = [shorten(name) for name in unknown_fields(msgspec.json.decode(body), kind)]
    if not names:
        return
    listed = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    if refuse:
        raise RequestError(f"unknown fields (this server was started with --strict): {listed}", names[0])
    logger.debug("unknown fields of a request are ignored: %s", listed)


def unknown_fields(value: Any, kind: Any) -> Iterable[str]:
    """Dotted names of the keys in decoded JSON that a struct, or a nested one, does not have."""
    if not isinstance(value, dict) or not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, inner in value.items():
        if key in fields:
            for alternative in (fields[key], *get_args(fields[key])):
                yield from (f"{key}.{name}" for name in unknown_fields(inner, alternative))
        elif key not in UNREAD:
            yield key


def shorten(name: str) -> str:
    """A client's field name, shortened for an error."""
    return name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."


def work_on(request: Request) -> int:
    """Approximate number of steps to walk the decoded body; see ``Host.apart``."""
    return _STEPS_PER_VALUE * int(request.state.json_weight)


async def _read(request: Request, max_size: int, held: HeldBody, meter: JsonMeter) -> bytearray:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_size):
        raise _too_large(max_size)
    body = bytearray()
    try:
        async for chunk in request.stream():
            if len(body) + len(chunk) > max_size:
                raise _too_large(max_size)
            meter.feed(chunk)
            body += chunk
            await held.grow(len(chunk))
    except BaseException:
        body.clear()  # a traceback may keep it alive
        raise
    return body


def _too_large(max_size: int) -> RequestError:
    return RequestError(
        f"the request body is larger than {max_size} bytes (--max-body-size)", status=413, kind=KINDS[413]
    )
