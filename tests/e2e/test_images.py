"""A server with a model that sees, over every protocol, and images that no server should trust."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from tests import tiny
from tests.e2e.server import Server
from tests.vision_families import checkpoint

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' }}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA whose tokenizer knows ``<image>``."""
    token = tiny.tokenizer().get_vocab_size()
    folder = tiny.copy_of(checkpoint("llava", token), tmp_path_factory.mktemp("model") / "llava")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    assert tokenizer.token_to_id("<image>") == token
    tokenizer.save(str(folder / "tokenizer.json"))
    tiny.edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=TEMPLATE))
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server("--model", str(model), "--served-model-name", "llava", "--dtype", "float32") as running:
        yield running


def png(seed: int, size: tuple[int, int] = (50, 30)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data), "detail": "auto"}}


def ask(server: Server, content: Any, **fields: Any) -> httpx.Response:
    body = {"model": "llava", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return server.post("/v1/chat/completions", {**body, "ignore_eos": True, **fields})


def test_all_protocols_see_the_same(server: Server) -> None:
    text = "what?"
    (card,) = server.get("/v1/models").json()["data"]
    assert card["capabilities"] == {"vision": True}
    first = ask(server, [part(png(1)), {"type": "text", "text": text}])
    assert first.status_code == 200, first.text
    answer = first.json()["choices"][0]["message"]["content"]
    assert first.json()["usage"]["prompt_tokens"] > 16
    again = ask(server, [part(png(1)), {"type": "text", "text": text}])
    assert again.json()["choices"][0]["message"]["content"] == answer
    other = ask(server, [part(png(2)), {"type": "text", "text": text}])
    assert other.json()["choices"][0]["message"]["content"] != answer

    content = [{"type": "input_image", "image_url": url(png(1))}, {"type": "input_text", "text": text}]
    fields = {"model": "llava", "temperature": 0, "ignore_eos": True}
    response = server.post(
        "/v1/responses", {**fields, "max_output_tokens": 8, "input": [{"role": "user", "content": content}]}
    )
    assert response.json()["output"][0]["content"][0]["text"] == answer, response.text

    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png(1)).decode()}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": text}]
    messages = {"messages": [{"role": "user", "content": blocks}], "model": "llava"}
    response = server.post("/v1/messages", {**messages, "max_tokens": 8, "temperature": 0})
    assert answer.startswith(response.json()["content"][0]["text"]), response.text
    counted = server.post("/v1/messages/count_tokens", messages).json()["input_tokens"]
    assert counted == first.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([part(b"no image")], "messages[0].content[0].image_url.url: the image cannot be read: it is not an image"),
        ([part(png(1)[:300])], "it is damaged"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,$$"}}], "its base64 is invalid"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png,abc"}}], "must be a data URL in base64"),
        ([{"type": "image_url", "image_url": {"url": 7}}], "must be a URL"),
        ([{"type": "image_url", "image_url": {"url": url(b""), "detail": "x"}}], "detail must be one of"),
        ([part(png(1)), {"type": "text", "text": "and <image>"}], "2 placeholders for 1 images"),
        ("an <image> that is not there", "1 placeholders for 0 images"),
        ([part(png(1))] * 65, "at most 64 images"),
        ([part(png(1))] * 40, "maximum context length"),
    ],
)
def test_bad_images_are_errors_of_their_requests(server: Server, content: Any, message: str) -> None:
    reply = ask(server, content)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]
    assert json.loads(ask(server, "hello").text)["usage"]["completion_tokens"] == 8


def test_a_killed_engine_gets_the_image_again(server: Server) -> None:
    content = [part(png(3)), {"type": "text", "text": "what?"}]
    expected = ask(server, content).json()["choices"][0]["message"]["content"]
    server.child("worker").kill()
    assert ask(server, content).json()["choices"][0]["message"]["content"] == expected


def test_vectors_of_texts_and_images(tmp_path: Path) -> None:
    import transformers

    from tests.vision_families import CLIP

    text = {"vocab_size": tiny.VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40}
    config = transformers.CLIPConfig(text_config=text, vision_config=CLIP, projection_dim=24)
    network = transformers.CLIPModel(config)
    tiny.randomize(network)
    network.save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    processor = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with Server("--model", str(tmp_path), "--served-model-name", "clip") as server:

        def embed(**fields: Any) -> httpx.Response:
            return server.post("/v1/embeddings", {"model": "clip", **fields})

        def conversation(*parts: Any) -> list[Any]:
            return [{"role": "user", "content": list(parts)}]

        words, image = {"type": "text", "text": "a cat"}, part(png(1))
        (vector,) = embed(input="a cat").json()["data"]
        reply = embed(messages=[conversation(words), conversation(image), conversation(part(png(2)))])
        assert reply.status_code == 200, reply.text
        vectors = [each["embedding"] for each in reply.json()["data"]]
        assert vectors[0] == vector["embedding"] and len(vectors[1]) == 24 and vectors[1] != vectors[2]
        assert embed(messages=conversation(image)).json()["data"][0]["embedding"] == vectors[1]
        for fields in ({"images": [image["image_url"]["url"]]}, {"inputs": [{"content": [image]}]}):
            reply = server.post("/v2/embed", {"model": "clip", **fields})
            assert reply.json()["embeddings"]["float"] == [vectors[1]], reply.text
        reply = embed(messages=conversation(words, image))
        assert reply.status_code == 400 and "one text or one image at a time" in reply.text
