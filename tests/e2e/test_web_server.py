"""The web page in a real browser, against the real server."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.browser import Browser, Keys
from tests.e2e.server import Server

KEY = "zwölf keys"
MODEL = "demo"
DEVICE = {"step_us": 8000, "token_us": 5, "num_blocks": 512, "eos_token_id": 2}


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    device = ("--distributed-executor-backend", "simulated", "--simulated-device", json.dumps(DEVICE))
    with Server("--model", str(demo_model), "--served-model-name", MODEL, "--api-key", KEY, *device) as running:
        assert httpx.get(running.url).status_code == 200, "the page has no route"
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
    page.find("#key-input").send_keys(KEY)
    if keep:
        page.click("#key-always")
    page.click("#key-dialog [type=submit]")
    page.wait(lambda: page.all("#model option")[0].text == MODEL)


def test_the_key_is_asked_for(page: Browser, server: Server) -> None:
    assert page.text("#key-note") == "This server requires an API key."
    page.type("wrong", Keys.ENTER)
    page.wait(lambda: page.text("#key-note") == "The server rejected this key.")
    give_key(page)
    page.driver.refresh()
    page.wait(lambda: page.all("#model option")[0].text == MODEL)
    assert KEY not in page.run("return JSON.stringify(localStorage)")
    page.click("#forget-key")
    page.set("max_completion_tokens", 4)
    page.send("hi")
    give_key(page, keep=True)
    page.finish()
    assert page.text(".stats").startswith("4 tokens")
    assert KEY in page.run("return JSON.stringify(localStorage)")
    page.open(f"{server.url}/docs")
    assert page.text("#post-v1-chat-completions h2 code") == "/v1/chat/completions"


def test_no_key_no_answer(page: Browser) -> None:
    page.find("#key-input")
    page.type(Keys.ESCAPE)
    assert "key" in page.text("#connection p")


def test_answers_stream_and_stop_and_stay(page: Browser, server: Server) -> None:
    give_key(page)
    page.set("extra", '{"ignore_eos": true}')
    page.send("Tell me a long story")
    lengths = set()
    for _ in range(20):
        lengths.add(len(page.text(".from-assistant .message-body")))
        time.sleep(0.05)
    assert len(lengths) > 5
    assert "tokens/s" in page.text(".message-foot .stats")
    page.click("#stop")
    page.wait(lambda: server.metric("vllm:num_requests_running") == 0)
    assert "stopped" in page.text(".stats")
    shown = page.text(".from-assistant .message-body")
    page.driver.refresh()
    page.wait(lambda: len(page.all(".message")) == 2)
    assert page.text(".from-assistant .message-body") == shown
    page.set("max_completion_tokens", 20)
    page.ask("Another one")
    assert page.text(".stats").startswith("20 tokens · ") and "stopped at the length limit" in page.text(".stats")
    begun = page.text(".from-assistant .message-body")
    page.click('[aria-label="Continue answer"]')
    page.wait(lambda: page.text(".stats").startswith("40 tokens · "))
    assert page.text(".from-assistant .message-body").startswith(begun.rstrip())


def test_a_refused_request(page: Browser) -> None:
    give_key(page)
    page.set("extra", '{"temperature": -1}')
    page.send("hi")
    assert "emperature" in page.text(".error-box p")


def test_dashboard(page: Browser, server: Server) -> None:
    give_key(page)
    page.set("extra", '{"ignore_eos": true, "max_tokens": 3000}')
    page.send("Tell me a long story")
    page.find(".from-assistant")
    page.run("document.querySelector('[data-view-link=dashboard]').click()")
    page.wait(lambda: page.text("[data-tile=running] .tile-value") == "1")
    assert page.text("[data-tile=waiting] .tile-value") == "0"
    rate = page.wait(lambda: float(page.text("[data-tile=output] .tile-value")))
    assert 20 < rate < 300
    page.wait(lambda: page.text("[data-tile=kvUsage] .tile-value") not in ("–", "0\u00a0%", "0 %"))
    labels = page.wait(lambda: [plot.get_attribute("aria-label") for plot in page.all(".plot")])
    assert [label.partition(":")[0] for label in labels][:2] == ["Throughput", "Requests"]
    page.wait(lambda: re.search(r"Time between tokens: median \d+(\.\d+)?\u00a0ms", " ".join(labels_of(page))))
    page.wait(lambda: page.run("return document.querySelector('.plot path').getAttribute('d').length") > 20)
    page.click(".views a:first-child")
    page.click("#stop")
    page.wait(lambda: server.metric("vllm:num_requests_running") == 0)


def labels_of(page: Browser) -> list[str]:
    return [plot.get_attribute("aria-label") or "" for plot in page.all(".plot")]


def test_docs(page: Browser, server: Server) -> None:
    page.open(f"{server.url}/docs")
    page.find("#key-input").send_keys(KEY, Keys.ENTER)
    document = httpx.get(f"{server.url}/openapi.json", headers={b"Authorization": f"Bearer {KEY}".encode()}).json()
    page.wait(lambda: page.all(".operation"))
    shown = {(found.text.split("\n")[0], found.text.split("\n")[1]) for found in page.all(".contents a")}
    assert shown == {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    example = page.all("#post-v1-chat-completions .code-block pre")[0].text
    assert example.startswith(f"curl {server.url}/v1/chat/completions") and '"messages"' in example
    assert "Authorization: Bearer" in example
    page.all("#post-v1-chat-completions details.field summary")[0].click()
    assert "role" in page.text("#post-v1-chat-completions details.field[open] .fields")


def test_every_endpoint_can_be_tried(page: Browser, server: Server) -> None:
    """As the page offers it, each request is a good one."""
    page.open(f"{server.url}/docs")
    page.find("#key-input").send_keys(KEY, Keys.ENTER)
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
    assert '"choices"' in page.text("#post-v1-chat-completions .try-output")
    model = httpx.get(f"{server.url}/v1/models", headers={b"Authorization": f"Bearer {KEY}".encode()}).json()["data"][0]
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
