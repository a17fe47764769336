"""A page in a real browser, for tests."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")

from selenium import webdriver
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
        self.driver.set_script_timeout(60)

    def open(self, url: str) -> None:
        self.driver.get("about:blank")  # an address that differs in its hash only would not load the page again
        self.driver.get(url)

    def renew(self) -> None:
        """Goes on in a new tab: what a page keeps for its tab cannot be cleared from outside."""
        old = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        new = self.driver.current_window_handle
        self.driver.switch_to.window(old)
        self.driver.close()
        self.driver.switch_to.window(new)

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
        return self.find(selector).text

    def click(self, selector: str) -> None:
        self.find(selector).click()

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
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # an element may go away between two looks
                if value := condition():
                    return value
            time.sleep(0.05)
        raise AssertionError(f"waited in vain: {what or condition}")

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
        return self.all(".from-assistant .message-body")[-1].text

    def set(self, name: str, value: object) -> None:
        """Sets a field of the settings, whether they are shown or not."""
        script = """
            const field = document.getElementById(`setting-${arguments[0]}`);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input", { bubbles: true }));
        """
        self.run(script, name, str(value))
