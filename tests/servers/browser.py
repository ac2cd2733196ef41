"""A headless Chromium, for pages that need JavaScript."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from tests.neighbours import missing


@pytest.fixture(scope="session")
def running_browser() -> Iterator[webdriver.Chrome]:
    """Return the browser of the session. Its start takes seconds."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing("chromium", "install Debian's chromium and chromium-driver")
    options = Options()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    found = webdriver.Chrome(options, Service(driver))
    yield found
    found.quit()


@pytest.fixture
def browser(running_browser: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """Return the browser without cookies and pages of an earlier test."""
    yield running_browser
    running_browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    running_browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    running_browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"})
    running_browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
    running_browser.get("about:blank")


def resize(browser: webdriver.Chrome, width: int, dark: bool = False, height: int = 900) -> None:
    """Set the size and the colours of the page."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    colours = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": colours})


def picture(browser: webdriver.Chrome, name: str, wanted: str = "SCREENSHOTS") -> None:
    """Save a picture in the directory that the variable names. `make pictures` sets PICTURES for those of docs/."""
    if directory := os.environ.get(wanted):
        browser.save_screenshot(str(Path(directory) / name))
