"""From the bytes of a request to a typed body, with every limit checked before the work."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.requests import Request

from api.errors import RequestError
from api.openai.errors import KINDS, decode_error, malformed

T = TypeVar("T")


async def read_json(request: Request, decoder: msgspec.json.Decoder[T], max_size: int) -> T:
    """Reads and decodes a JSON body.

    Args:
        request: Its body was not read yet.
        decoder: Of the type that the endpoint takes.
        max_size: Most bytes that are read.

    Raises:
        RequestError: 400 if it is no JSON of that type, 413 if it is too large.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise malformed("Unsupported media type: only application/json is allowed as Content-Type")
    body = await _read(request, max_size)
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise decode_error(error) from None


async def _read(request: Request, max_size: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_size):
        raise _too_large(max_size)
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > max_size:
            raise _too_large(max_size)
        body += chunk
    return bytes(body)


def _too_large(max_size: int) -> RequestError:
    return RequestError(
        f"the request body is larger than {max_size} bytes (--max-body-size)", status=413, kind=KINDS[413]
    )
