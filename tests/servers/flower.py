"""The real Flower with the project's pages, for tests with a browser."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.neighbours import free_port
from tests.servers.worker import ROOT, Site, until
from tests.waiting import PATIENCE_S

LOGINS = {"admin": "secret", "guest": "look"}


class Flower:
    """Flower as config/flower starts it, below the path *prefix*."""

    def __init__(self, site: Site, prefix: str = "") -> None:
        self._address = f"127.0.0.1:{free_port()}{prefix}"
        self.url = f"http://{self._address}"
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SSVM_", "FLOWER_"))}
        environ |= {
            "SSVM_CONFIG": str(site.file),
            "FLOWER_BASIC_AUTH": ",".join(f"{name}:{word}" for name, word in LOGINS.items()),
            "FLOWER_READERS": "guest",
        }
        port = self._address.removeprefix("127.0.0.1:").removesuffix(prefix)
        options = [f"--conf={ROOT / 'config/flower/flowerconfig.py'}", f"--port={port}"]
        options += [f"--url-prefix={prefix}"] if prefix else []
        command = [sys.executable, "-P", "-m", "tasks", "flower", *options]
        self.log = site.directory / f"flower{port}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environ, cwd=ROOT, stdout=log, stderr=log)
        until(
            lambda: self.ask("GET", "/healthcheck")[0] == 200 or self.process.poll() is not None,
            "Flower answers",
        )
        assert self.process.poll() is None, self.log.read_text()

    def ask(
        self, method: str, path: str, login: str = "admin", body: bytes | None = None, **headers: str
    ) -> tuple[int, str]:
        """Return status and text."""
        word = base64.b64encode(f"{login}:{LOGINS.get(login, '')}".encode()).decode()
        request = urllib.request.Request(self.url + path, body, method=method, headers=headers)
        if login:
            request.add_header("Authorization", f"Basic {word}")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def close(self) -> None:
        """Kill the process. While the broker is away, Flower would not end after SIGTERM."""
        self.process.kill()
        self.process.wait()

    def act(self, verb: str, job_id: str, **how: str) -> int:
        """Return the status of a click."""
        return self.ask("POST", f"/ssvm/{verb}/{job_id}", **how)[0]

    def open(self, browser: webdriver.Chrome, path: str, login: str = "admin") -> None:
        """Open a page as a logged-in user."""
        browser.get(f"http://{login}:{LOGINS[login]}@{self._address}/workers")
        browser.get(self.url + path)


@pytest.fixture(scope="module")
def flower(site: Site) -> Iterator[Flower]:
    """Return a running Flower for the site that all tests of the module share."""
    found = Flower(site)
    yield found
    found.close()


def shown(browser: webdriver.Chrome, selector: str) -> WebElement:
    """Return the first such element, as soon as it exists."""
    found: list[WebElement] = []

    def look() -> bool:
        try:
            found[:] = [browser.find_element(By.CSS_SELECTOR, selector)]
        except (NoSuchElementException, StaleElementReferenceException):
            return False
        return found[0].is_displayed()

    until(look, f"{selector} is shown")
    return found[0]
