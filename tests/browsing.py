"""Pages in headless Chromium, opened from disk without a network; skipped where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")


@contextmanager
def opened(page: str, path: Path) -> Iterator[Any]:
    """A browser that has opened a page, which is written there, from disk."""
    path.write_text(page, encoding="utf-8")
    with browser_without_network() as driver:
        driver.get(path.as_uri())
        yield driver


@contextmanager
def browser_without_network() -> Iterator[Any]:
    """A browser that reaches this machine alone."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("Chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-first-run",
        "--window-size=1280,1000",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def broken_pictures(browser: Any) -> int:
    """How many pictures of the page are not shown."""
    broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
    return int(browser.execute_script(broken))


def press(browser: Any, *keys: str) -> None:
    """Presses keys, one after the other."""
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def reach_toggle(browser: Any) -> tuple[Any, Any, Any]:
    """The button that shows attention, reached by Tab, and a picture with it and one without."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    seen, plain = (browser.find_element(By.CSS_SELECTOR, f".{name} img")
                   for name in ("seen", "plain"))  # fmt: skip
    button = browser.find_element(By.ID, "toggle")
    for _ in range(20):
        if browser.switch_to.active_element == button:
            break
        press(browser, Keys.TAB)
    return button, seen, plain


@contextmanager
def as_wide_as(browser: Any, width: int) -> Iterator[None]:
    """The page on a screen of that width, of a phone where it is narrow."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 1000}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def in_scheme(browser: Any, scheme: str) -> None:
    """Shows pages to somebody who prefers "light" or "dark"."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def broken_rules(browser: Any, scheme: str) -> list[tuple[str, str]]:
    """The rules of accessibility that a page breaks, with everything unfolded."""
    axe = pytest.importorskip("axe_core_python.selenium").Axe()
    in_scheme(browser, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    result = axe.run(browser)
    assert "color-contrast" in {each["id"] for each in result["passes"]}
    return [(each["id"], each["nodes"][0]["html"]) for each in result["violations"]]
