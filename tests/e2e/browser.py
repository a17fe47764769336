"""A page in a real browser, for tests.

What follows from a click or a key may follow a moment later: a dialog's event ``close``, a change of the address, what
storage answers, whatever another process sends. So a test never looks once at what it has brought about: it waits, with
``becomes``, ``wait`` and the methods below, all of which wait.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

__all__ = ["Browser", "By", "Keys", "WebElement", "browser_path"]

WAIT = 60.0  # only failures take that long; a busy machine makes a page ten times slower
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A browser without a screen has no mouse either, unless it is told otherwise.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)
UNTOUCHED = (ElementClickInterceptedException, ElementNotInteractableException, StaleElementReferenceException)
"""Errors that say that nothing was done yet: the element was replaced, or something is above it."""
PATIENT = """
    const later = setTimeout;
    globalThis.setTimeout = (run, delay, ...rest) => later(run, delay > 5000 ? 1e9 : delay, ...rest);
"""
"""A notice stays until the next one: how soon a test looks at it depends on the machine."""
IS_READY = """
    return document.getElementById("chat-view") === null || document.body.dataset.view !== undefined;
"""
"""Whether the modules of the chat's page have run. The browser's event `load` comes before."""


def browser_path() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("there is no chromium")


class Browser:
    """A page in a browser, with waiting built in."""

    def __init__(self, profile: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = browser_path()
        driver_path = shutil.which("chromedriver")
        if driver_path is None:
            pytest.skip("there is no chromedriver")
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
        self.driver.set_script_timeout(240)
        self._make_patient()

    def cpu_seconds(self) -> float:
        """What the page's main thread has computed so far. Unlike time, it does not depend on other processes."""
        metrics = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    def _make_patient(self) -> None:
        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PATIENT})

    def open(self, url: str) -> None:
        self.driver.get("about:blank")  # an address that differs in its hash only would not load the page again
        self.driver.get(url)
        self._wait_until_ready()

    def reload(self) -> None:
        self.driver.refresh()
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        self.wait(lambda: self.run(IS_READY), "the page's modules")

    def renew(self) -> None:
        """Goes on in a new tab: what a page keeps for its tab cannot be cleared from outside."""
        old = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        new = self.driver.current_window_handle
        self.driver.switch_to.window(old)
        self.driver.close()
        self.driver.switch_to.window(new)
        self._make_patient()

    def clear(self, *urls: str) -> None:
        """Forgets what pages of these servers have stored, and goes back to the usual size and colours."""
        for url in urls:
            command = {"origin": url, "storageTypes": "all"}
            self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", command)
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.prefer("light")
        self.driver.get_log("browser")

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def find(self, selector: str) -> WebElement:
        """The last such element that is shown."""
        shown: list[WebElement] = self.wait(
            lambda: [found for found in self.all(selector) if found.is_displayed()], selector
        )
        return shown[-1]

    def text(self, selector: str) -> str:
        """The text of the last such element that is shown."""
        return str(self._with(selector, lambda found: found.text))

    def attribute(self, selector: str, name: str) -> str | None:
        """An attribute of the last such element that is shown."""
        value: str | None = self._with(selector, lambda found: found.get_attribute(name))
        return value

    def click(self, selector: str) -> None:
        self._with(selector, lambda found: found.click())

    def fill(self, selector: str, *keys: str) -> None:
        """Types into the last such element that is shown."""
        self._with(selector, lambda found: found.send_keys(*keys))

    def _with(self, selector: str, use: Callable[[WebElement], Any]) -> Any:
        """Uses the last such element that is shown; another one if it was replaced in the meantime."""
        deadline = time.monotonic() + WAIT
        while True:
            try:
                return use(self.find(selector))
            except UNTOUCHED:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def texts(self, selector: str) -> list[str]:
        """The texts of all such elements, as they are now; for ``becomes``."""
        return [found.text for found in self.all(selector)]

    def focused(self, name: str = "id") -> str | None:
        """An attribute of what has the focus."""
        value: str | None = self.run("return document.activeElement.getAttribute(arguments[0])", name)
        return value

    def type(self, *keys: str) -> None:
        """Types into whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def module(self, name: str, body: str, *arguments: Any) -> Any:
        """Runs the body of a function of (module, ...arguments) with one of the page's modules."""
        script = """
            const [name, body, values, done] = arguments;
            const make = (node) => node;
            import(new URL(`web/${name}`, document.baseURI)).then(
              (module) => done({ value: RUN(module, values) }),
            ).catch((error) => done({ error: String(error) }));
        """.replace("RUN", f"((module, values) => {{ {body} }})")
        answer = self.driver.execute_async_script(script, name, body, list(arguments))
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def wait(self, condition: Callable[[], Any], what: object = "") -> Any:
        """Waits until a condition holds, and returns its value.

        Raises:
            AssertionError: It did not in time.
        """
        deadline = time.monotonic() + WAIT
        problem: Exception | None = None
        while time.monotonic() < deadline:
            try:
                if value := condition():
                    return value
            except Exception as error:  # an element may go away between two looks
                problem = error
            time.sleep(0.02)
        raise AssertionError(f"waited in vain: {what or condition}") from problem

    def becomes(self, look: Callable[[], Any], expected: Any) -> None:
        """Waits until what is seen equals a value.

        Raises:
            AssertionError: It did not in time; says what was seen last.
        """
        seen: list[Any] = [None]

        def is_there() -> bool:
            seen[0] = look()
            return bool(seen[0] == expected)

        try:
            self.wait(is_there)
        except AssertionError as error:
            assert seen[0] == expected
            raise AssertionError(f"saw {expected!r} too late") from error

    def gone(self, *selectors: str) -> None:
        """Waits until no such element is there, shown or not."""
        self.wait(lambda: not self.all(", ".join(selectors)), f"the end of {selectors}")

    def hidden(self, selector: str) -> None:
        """Waits until such an element is there and not shown."""
        self.wait(lambda: not self.all(selector)[0].is_displayed(), f"{selector} to be hidden")

    def errors(self) -> list[str]:
        """What the console complains about; refused requests are looked at elsewhere."""
        lines = [str(entry["message"]) for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [line for line in lines if "Failed to load resource" not in line]

    # -- the chat --------------------------------------------------------------------------------------------

    def send(self, text: str) -> None:
        field = self.find("#composer-input")
        field.click()
        field.send_keys(text, Keys.ENTER)

    def finish(self) -> None:
        """Waits for the end of the answer."""
        self.wait(lambda: self.all("#send")[0].is_displayed(), "the end of the answer")

    def ask(self, text: str) -> str:
        """Sends a message and returns the answer, as it is shown."""
        self.send(text)
        self.finish()
        return str(self.wait(lambda: [self.texts(".from-assistant .message-body")[-1]])[0])  # it may be empty

    def set(self, name: str, value: object) -> None:
        """Sets a field of the settings, whether they are shown or not."""
        script = """
            const field = document.getElementById(`setting-${arguments[0]}`);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input", { bubbles: true }));
        """
        self.run(script, name, str(value))
