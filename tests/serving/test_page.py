"""The page, in a real Chromium: at a desk and on a phone, light and dark, by keyboard alone.

TSQP_SHM_SCREENSHOTS names a folder for pictures of it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import demo_server

pytestmark = pytest.mark.serving
webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

SIZES = {"desk": (1200, 800), "phone": (390, 780)}
QUESTION = "What is the capital of France?"
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Page:
    """The server's page in a browser window.

    Attributes:
        driver: of the browser.
    """

    def __init__(self, url: str, size: str, *, is_dark: bool, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for argument in (*QUIET, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(url)

    def find(self, name: str):
        return self.driver.find_element(By.ID, name)

    def type(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def until(self, holds: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, self.find("log").text
            time.sleep(0.05)

    def until_answered(self) -> None:
        self.until(lambda: self.find("send").is_displayed())

    def answers(self) -> list[str]:
        return [each.text for each in self.driver.find_elements(By.CSS_SELECTOR, "article.assistant")]

    def save(self, name: str) -> None:
        folder = os.environ.get("TSQP_SHM_SCREENSHOTS")
        if folder is not None:
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture
def open_page(tmp_path) -> Iterator[Callable[..., Page]]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed")
    pages: list[Page] = []

    def opened(url: str, size: str = "desk", *, is_dark: bool = False) -> Page:
        pages.append(Page(url, size, is_dark=is_dark, profile=tmp_path / f"profile{len(pages)}"))
        return pages[-1]

    yield opened
    for page in pages:
        page.driver.quit()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_a_conversation_by_keyboard_alone(server, open_page, size, is_dark):
    page = open_page(server.url, size, is_dark=is_dark)
    page.until(lambda: "tee-only" in page.find("protects").text)
    page.type(QUESTION, Keys.ENTER)
    page.until(lambda: page.answers() and page.answers()[0])
    page.type(Keys.ESCAPE)
    page.until_answered()
    page.type("And of", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "Spain?", Keys.ENTER)
    page.until(lambda: len(page.answers()) == 2 and page.answers()[1])
    page.type(Keys.ESCAPE)
    page.until_answered()
    page.save(f"serve-{size}-{'dark' if is_dark else 'light'}")
    # Nothing hangs over the window's edge, and what can be pressed is as large as a thumb.
    width = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    assert page.find("send").size["height"] >= 40
    assert page.driver.switch_to.active_element == page.find("prompt")
    # Nothing came from elsewhere, and nothing was wrong.
    sources = page.driver.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert sources and all(source.startswith((server.url, "data:")) for source in sources)
    assert not page.driver.get_log("browser")


def test_focus_goes_through_every_control(server, open_page):
    page = open_page(server.url)
    seen = set()
    for _ in range(8):
        seen.add(page.driver.switch_to.active_element.get_attribute("id"))
        page.type(Keys.TAB)
    assert {"prompt", "send", "new", "log"} <= seen


def test_reading_on_is_not_disturbed_while_an_answer_grows(server, open_page):
    page = open_page(server.url, "phone")
    page.type("Tell a long story.", Keys.ENTER)
    log = page.find("log")
    tall = "return arguments[0].scrollHeight > arguments[0].clientHeight + 200"
    page.until(lambda: page.driver.execute_script(tall, log))
    at_end = "return arguments[0].scrollHeight - arguments[0].scrollTop - arguments[0].clientHeight"
    assert page.driver.execute_script(at_end, log) < 80
    page.driver.execute_script("arguments[0].scrollTop = 20", log)
    height = page.driver.execute_script("return arguments[0].scrollHeight", log)
    page.until(lambda: page.driver.execute_script("return arguments[0].scrollHeight", log) > height)
    assert page.driver.execute_script("return arguments[0].scrollTop", log) == 20
    page.type(Keys.ESCAPE)


def test_an_error_says_what_to_do(demo_model, open_page):
    with demo_server(demo_model, "--mode", "tee-only", "--max-model-len", 64, "--api-key", "open-sesame") as server:
        page = open_page(server.url)
        page.until(lambda: page.find("key-form").is_displayed())
        page.type("wrong", Keys.ENTER)
        page.until(lambda: page.find("key-form").is_displayed())
        page.type("open-sesame", Keys.ENTER)
        page.until(lambda: "tee-only" in page.find("protects").text)
        page.type("word " * 100, Keys.ENTER)
        page.until(lambda: page.find("trouble").is_displayed())
        assert "begin a new one" in page.find("trouble").text
        # It can be asked again, as it was typed.
        assert page.find("prompt").get_attribute("value").startswith("word word")
        page.save("serve-error")
        server.stop()
        page.until(lambda: "cannot be reached" in page.find("state").text)


def test_both_processes_are_shown_with_mode_and_pads(demo_model, open_page):
    with demo_server(demo_model, "--mode", "blinded", "--device", "cpu") as server:
        page = open_page(server.url)
        page.until(lambda: "gpu answers" in " ".join(page.find("state").text.split()))
        page.until(lambda: "one-time pads" in page.find("protects").text)
        assert "pads" in page.find("state").text
        page.type(QUESTION, Keys.ENTER)
        page.until(lambda: page.answers() and page.answers()[0])
        page.save("serve-blinded")
