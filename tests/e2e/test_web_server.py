"""The web page in a real browser, against the real server."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.browser import Browser, Keys
from tests.e2e.server import Server

KEY = "zwölf keys"
HEADERS = {b"Authorization": f"Bearer {KEY}".encode()}
MODEL = "demo"
DEVICE = {"step_us": 8000, "token_us": 5, "num_blocks": 512, "eos_token_id": 2}


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    device = ("--distributed-executor-backend", "simulated", "--simulated-device", json.dumps(DEVICE))
    with Server("--model", str(demo_model), "--served-model-name", MODEL, "--api-key", KEY, *device) as running:
        assert running.get("").status_code == 200, "the page has no route"
        yield running


@pytest.fixture
def page(browser_process: Browser, server: Server) -> Iterator[Browser]:
    """The chat page of the real server, fresh: without a key."""
    browser_process.renew()
    browser_process.clear(server.url)
    browser_process.open(server.url)
    yield browser_process
    assert browser_process.errors() == []


def give_key(page: Browser, *, keep: bool = False) -> None:
    page.fill("#key-input", KEY)
    if keep:
        page.click("#key-always")
    page.click("#key-dialog [type=submit]")
    page.gone("#key-dialog")
    has_model(page)


def has_model(page: Browser) -> None:
    """Waits for the list of models."""
    page.becomes(lambda: page.all("#model option")[0].text, MODEL)


def test_the_key_is_asked_for(page: Browser, server: Server) -> None:
    page.becomes(lambda: page.text("#key-note"), "This server requires an API key.")
    page.fill("#key-input", "wrong", Keys.ENTER)
    page.becomes(lambda: page.text("#key-note"), "The server rejected this key.")
    give_key(page)
    page.reload()
    has_model(page)
    assert KEY not in page.run("return JSON.stringify(localStorage)")
    page.click("#forget-key")
    page.set("max_completion_tokens", 4)
    page.send("hi")
    give_key(page, keep=True)
    page.finish()
    page.wait(lambda: page.text(".stats").startswith("4 tokens"))
    assert KEY in page.run("return JSON.stringify(localStorage)")
    page.open(f"{server.url}/docs")
    page.becomes(lambda: page.text("#post-v1-chat-completions h2 code"), "/v1/chat/completions")


def test_no_key_no_answer(page: Browser) -> None:
    page.find("#key-input")
    page.type(Keys.ESCAPE)
    page.wait(lambda: "key" in page.text("#connection p"))


def test_answers_stream_and_stop_and_stay(page: Browser, server: Server) -> None:
    give_key(page)
    page.set("extra", '{"ignore_eos": true}')
    page.send("Tell me a long story")
    texts: dict[str, None] = {}
    page.wait(lambda: (texts.setdefault(page.text(".from-assistant .message-body")), len(texts) > 5)[1], "growth")
    page.wait(lambda: "tokens/s" in page.text(".message-foot .stats"))
    page.click("#stop")
    page.becomes(lambda: server.metric("vllm:num_requests_running"), 0)
    page.wait(lambda: "stopped" in page.text(".stats"))
    shown = page.text(".from-assistant .message-body")
    page.reload()
    page.becomes(lambda: len(page.all(".message")), 2)
    page.becomes(lambda: page.text(".from-assistant .message-body"), shown)
    has_model(page)
    page.set("max_completion_tokens", 20)
    page.ask("Another one")
    page.wait(lambda: re.match("20 tokens · .*stopped at the length limit", page.text(".stats")))
    begun = page.text(".from-assistant .message-body")
    page.click('[aria-label="Continue answer"]')
    page.wait(lambda: page.text(".stats").startswith("40 tokens · "))
    page.wait(lambda: page.text(".from-assistant .message-body").startswith(begun.rstrip()))


def test_a_refused_request(page: Browser) -> None:
    give_key(page)
    page.set("extra", '{"temperature": -1}')
    page.send("hi")
    page.wait(lambda: "emperature" in page.text(".error-box p"))


def test_dashboard(page: Browser, server: Server) -> None:
    give_key(page)
    page.set("extra", '{"ignore_eos": true}')
    page.send("Tell me a long story")
    page.find(".from-assistant")
    page.run("document.querySelector('[data-view-link=dashboard]').click()")
    page.becomes(lambda: page.text("[data-tile=running] .tile-value"), "1")
    page.becomes(lambda: page.text("[data-tile=waiting] .tile-value"), "0")
    page.wait(lambda: 20 < float(page.text("[data-tile=output] .tile-value")) < 300, "about 125 tokens/s")
    page.wait(lambda: page.text("[data-tile=kvUsage] .tile-value") not in ("–", "0\u00a0%", "0 %"))
    page.becomes(lambda: [label.partition(":")[0] for label in labels_of(page)][:2], ["Throughput", "Requests"])
    page.wait(lambda: re.search(r"Time between tokens: median \d+(\.\d+)?\u00a0ms", " ".join(labels_of(page))))
    page.wait(lambda: page.run("return document.querySelector('.plot path').getAttribute('d').length") > 20)
    page.click(".views a:first-child")
    page.click("#stop")
    page.becomes(lambda: server.metric("vllm:num_requests_running"), 0)


def labels_of(page: Browser) -> list[str]:
    return [plot.get_attribute("aria-label") or "" for plot in page.all(".plot")]


def test_docs(page: Browser, server: Server) -> None:
    page.open(f"{server.url}/docs")
    page.fill("#key-input", KEY, Keys.ENTER)
    document = server.get("/openapi.json", headers=HEADERS).json()
    page.wait(lambda: page.all(".operation"))
    operations = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    page.becomes(lambda: {tuple(text.split("\n")[:2]) for text in page.texts(".contents a")}, operations)
    example = page.all("#post-v1-chat-completions .code-block pre")[0].text
    assert example.startswith(f"curl {server.url}/v1/chat/completions") and '"messages"' in example
    assert "Authorization: Bearer" in example
    page.all("#post-v1-chat-completions details.field summary")[0].click()
    page.wait(lambda: "role" in page.text("#post-v1-chat-completions details.field[open] .fields"))


def test_every_endpoint_can_be_tried(page: Browser, server: Server) -> None:
    """As the page offers it, each request is a good one."""
    page.open(f"{server.url}/docs")
    page.fill("#key-input", KEY, Keys.ENTER)
    page.wait(lambda: page.all(".operation"))
    assert len(page.all(".operation > .try-it")) == len(page.all(".operation"))
    page.run("for (const node of document.querySelectorAll('.try-it')) node.open = true")
    names = page.run(
        """
        const nodes = [...document.querySelectorAll(".operation")].filter((node) => !node.querySelector("input"));
        return nodes.map((node) => {
          node.querySelector(".try-it button[type=submit]").click();
          return node.id;
        });
        """
    )
    assert len(names) > 10
    status = "return document.querySelector(`#${arguments[0]} .try-status`).textContent"
    page.wait(lambda: all(re.match(r"\d+ [^,]*, [^,]*(?<!so far)$", page.run(status, name)) for name in names))
    answers = {name: page.run(status, name) for name in names}
    assert answers.pop("post-classify").startswith("400 ")  # the demo model has no classes
    assert not {name: answer for name, answer in answers.items() if not answer.startswith("200 OK, ")}
    page.wait(lambda: '"choices"' in page.text("#post-v1-chat-completions .try-output"))
    model = server.get("/v1/models", headers=HEADERS).json()["data"][0]
    field = page.find("#get-v1-models-model input")
    field.send_keys(model["id"], Keys.ENTER)
    page.wait(lambda: page.run(status, "get-v1-models-model").startswith("200 OK, "))
    area = page.find("#post-v1-chat-completions textarea")
    page.run("arguments[0].value = '{'", area)
    page.run("arguments[0].closest('form').requestSubmit()", area)
    assert page.run("return arguments[0].validationMessage", area).startswith("This is not valid JSON")
    if (folder := os.environ.get("OCTAVO_SCREENSHOTS")) is not None:
        page.run("document.getElementById('post-v1-chat-completions').scrollIntoView()")
        page.driver.save_screenshot(f"{folder}/docs.png")
