"""POST /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.admission import pieces
from api.engine.queue_bound import NOBODY
from api.errors import RequestError
from api.generation.serving import Serving
from api.http.body import read_json
from api.media.reader import Picture
from api.model.tokenizer import Tokenizer
from api.openai.images import place_images, read_images
from api.openai.prompts import render_messages
from api.openai.protocol import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from api.openai.tools import check_tools

TOKENIZE_DECODER = msgspec.json.Decoder(TokenizeRequest)
DEFAULT_CLASS = "PreTrainedTokenizerFast"
"""The class that transformers uses for tokenizers whose files name none."""
DETOKENIZE_DECODER = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or a conversation of any length."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, TOKENIZE_DECODER, serving.config.max_body_size)
    model = serving.find_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("exactly one of prompt and messages is required", "prompt")
    pictures: list[Picture] = []
    if body.messages is not None:
        if body.tools is not None:
            check_tools(body.tools)
        body, pictures = await read_images(model, body, NOBODY)
        text = await render_messages(model, body, body.messages or (), body.tools)
    else:
        text = body.prompt or ""
    add_special_tokens = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    tokens = await model.tokenize(text, add_special_tokens=add_special_tokens, any_length=True)
    if body.messages is not None:
        tokens, _ = place_images(model, tokens, pictures)
    answer = TokenizeResponse(count=len(tokens), max_model_len=model.limits.max_model_len, tokens=tokens)
    if body.return_token_strs:
        answer.token_strs = await model.host.apart(len(tokens), _spell, model.tokenizer, tokens)
    return Response(await model.host.apart(len(tokens), _encode, answer), media_type="application/json")


def _encode(answer: TokenizeResponse) -> bytes:
    """The answer as JSON, with its lists encoded in pieces, so that others do not wait."""
    ids, strings = answer.tokens, answer.token_strs
    parts = [b'{"count":%d,"max_model_len":%d,"tokens":' % (answer.count, answer.max_model_len), *_encode_list(ids)]
    parts += [b',"token_strs":', *(_encode_list(strings) if strings is not None else [b"null"]), b"}"]
    return b"".join(parts)


def _encode_list(values: Sequence[int | str]) -> list[bytes]:
    encoded = [msgspec.json.encode(piece)[1:-1] for piece in pieces(values)]
    return [b"[", b",".join(encoded), b"]"]


def _spell(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.id_to_token(token_id) or "" for token_id in token_ids]


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's configuration and the chat template in use."""
    serving: Serving = request.app.state.serving
    model = serving.default_model
    tokenizer, template = model.tokenizer, model.chat_template
    info = {
        "tokenizer_class": DEFAULT_CLASS,
        **tokenizer.special_tokens_map,
        **tokenizer.config,
        "chat_template": None if template is None else template.source,
    }
    return JSONResponse(info)  # msgspec does not support integers as large as in some of these files


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    serving: Serving = request.app.state.serving
    body = await read_json(request, DETOKENIZE_DECODER, serving.config.max_body_size)
    model = serving.find_model(body.model)
    text = ""
    if body.tokens:
        text = await model.detokenize(body.tokens, skip_special_tokens=False, field="tokens")
    return Response(msgspec.json.encode(DetokenizeResponse(prompt=text)), media_type="application/json")
