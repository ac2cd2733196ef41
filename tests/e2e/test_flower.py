"""The real Flower with the project's pages, a real worker and a real browser: an administrator retries and cancels."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests import images
from tests.servers.broker import StoppableBroker
from tests.servers.browser import picture
from tests.servers.flower import Flower, shown
from tests.servers.http import HttpServer
from tests.servers.worker import ROOT, Site, until
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.e2e
DISK = images.mbr(1 << 20)
IMAGES = itertools.count(201)


@pytest.fixture(scope="module")
def site(session_broker: StoppableBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Return a shared site with one worker: each test submits its own jobs and leaves none running."""
    site = Site(session_broker.with_prefix("flower:"), tmp_path_factory.mktemp("flower"))
    site.start()
    yield site
    site.close()


def download(site: Site, url: str) -> str:
    """Submit a download of a new image, and return the job's id."""
    return site.submit("download", url=url, account="2", id=str(next(IMAGES)), format="raw")


@pytest.fixture
def failed(site: Site, flower: Flower, http_server: HttpServer) -> Iterator[str]:
    """Return the id of a job that failed because its server lacked the image; the server has it now."""
    job_id = download(site, http_server.serve("image", DISK, status=404))
    until(lambda: site.ledger.get(job_id).state == "failed", "the job has failed")
    http_server.serve("image", DISK)
    yield job_id
    if site.ledger.get(job_id).state == "failed":  # its button would be the first that the next test finds
        assert flower.act("retry", job_id) == 200
        assert site.wait(job_id).state == "succeeded"


def test_retry_on_the_task_page(site: Site, flower: Flower, failed: str, browser: webdriver.Chrome) -> None:
    """A failed job succeeds after a click on Retry, and its record names the user."""
    until(lambda: flower.ask("GET", f"/task/{failed}")[0] == 200, "Flower knows the task")
    flower.open(browser, f"/task/{failed}")
    button = shown(browser, "#task-page .ssvm-retry")
    picture(browser, "flower-task.png", "PICTURES")
    button.click()
    until(lambda: site.ledger.get(failed).state == "succeeded", "the job has succeeded")
    assert [each.by for each in site.ledger.get(failed).attempts] == ["", "admin (flower)"]


@pytest.mark.parametrize("page", ["/tasks", "/jobs"])
def test_retry_on_a_list(site: Site, flower: Flower, failed: str, browser: webdriver.Chrome, page: str) -> None:
    """Flower's list of tasks and the page Jobs have the Retry button too."""
    until(lambda: flower.ask("GET", f"/task/{failed}")[0] == 200, "Flower knows the task")
    flower.open(browser, page)
    button = shown(browser, ".ssvm-retry")
    button.click()
    until(lambda: site.ledger.get(failed).state == "succeeded", "the job has succeeded")


def test_cancel_on_the_page_of_jobs(
    site: Site, flower: Flower, http_server: HttpServer, browser: webdriver.Chrome
) -> None:
    """A click on Cancel ends a running job's transfer, and none of its files is left."""
    before = site.files()
    job_id = download(site, http_server.serve("image", DISK, stall_after=100_000))
    assert http_server.stalled.wait(PATIENCE_S)
    flower.open(browser, "/jobs")
    shown(browser, ".ssvm-cancel").click()
    browser.switch_to.alert.accept()
    until(lambda: site.ledger.get(job_id).state == "cancelled", "the job is cancelled")
    assert site.ledger.get(job_id).cancelled_by == "admin (flower)"
    assert site.files() == before


def test_who_only_looks(flower: Flower, failed: str, browser: webdriver.Chrome) -> None:
    """A reader sees the jobs and no buttons, and a POST is refused."""
    flower.open(browser, "/jobs", login="guest")
    shown(browser, "#ssvm-rows tr")
    assert not browser.find_elements(By.CSS_SELECTOR, ".ssvm-retry, .ssvm-cancel")
    assert flower.act("retry", failed, login="guest") == 403
    for how in ("apply", "async-apply"):
        assert flower.ask("POST", f"/api/task/{how}/ssvm.retry", login="guest")[0] == 403


def test_refused(site: Site, flower: Flower, failed: str) -> None:
    """A repeated click, a succeeded or unknown job, another site's page and a stranger change nothing."""
    assert flower.act("retry", failed, login="") == 401
    assert flower.act("retry", failed, **{"Sec-Fetch-Site": "cross-site"}) == 403
    assert flower.act("retry", failed, Origin="http://evil.example") == 403
    assert flower.act("retry", "nobody") == 404
    assert site.ledger.get(failed).state == "failed"
    assert flower.act("retry", failed) == 200
    assert flower.act("retry", failed) == 409
    until(lambda: site.ledger.get(failed).state == "succeeded", "the job has succeeded")
    assert flower.act("retry", failed) == 409
    assert flower.act("cancel", failed) == 409


@pytest.mark.parametrize("how", ["apply", "async-apply"])
def test_for_scripts(site: Site, flower: Flower, failed: str, how: str) -> None:
    """Flower's own API retries too: POST /api/task/apply/ssvm.retry."""
    body = json.dumps({"args": [failed]}).encode()
    request: Any = urllib.request.Request(f"{flower.url}/api/task/{how}/ssvm.retry", data=body, method="POST")
    request.add_header("Authorization", "Basic " + base64.b64encode(b"admin:secret").decode())
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        assert answer.status == 200
    until(lambda: site.ledger.get(failed).state == "succeeded", "the job has succeeded")


@pytest.fixture
def two(site: Site, flower: Flower, http_server: HttpServer) -> tuple[str, str]:
    """Return the ids of a job that runs until it is cancelled, and of one that waits for its slot."""
    running = download(site, http_server.serve("slow", DISK, stall_after=1 << 16))
    site.until(lambda: bool(http_server.requests), "the job reads")
    return running, download(site, http_server.serve("image", DISK))


def test_terminate_for_scripts(site: Site, flower: Flower, two: tuple[str, str]) -> None:
    """Flower's terminate cancels the named job, and no other job loses an attempt."""
    status, text = flower.ask("POST", f"/api/task/revoke/{two[0]}?terminate=true")
    assert (status, json.loads(text)["job_id"]) == (200, two[0])
    assert site.wait(two[0]).cancelled_by == "admin (flower)"
    done = site.wait(two[1])
    assert (done.state, len(done.attempts)) == ("succeeded", 1)
    assert flower.ask("POST", f"/api/task/revoke/{two[0]}")[0] == 409
    assert flower.ask("POST", f"/api/task/revoke/{two[1]}", login="guest")[0] == 403


def test_terminate_by_celery(site: Site, two: tuple[str, str]) -> None:
    """``celery control revoke`` and ``terminate`` cancel the named job, and no other loses an attempt."""
    environ = {**os.environ, "SSVM_CONFIG": str(site.file)}
    command = [sys.executable, "-P", "-m", "tasks", "control"]
    subprocess.run([*command, "pool_grow", "1"], env=environ, cwd=ROOT, capture_output=True)
    subprocess.run([*command, "revoke", two[0]], env=environ, cwd=ROOT, capture_output=True)
    assert site.wait(two[0]).cancelled_by == "celery control"
    done = site.wait(two[1])
    assert (done.state, len(done.attempts)) == ("succeeded", 1)
    assert len(site.workers[0].children()) == 1


@pytest.mark.parametrize(
    "path", ["task/abort/ID", "task/timeout/ssvm.download", "task/rate-limit/ssvm.download", "worker/pool/grow/W",
             "worker/pool/shrink/W", "worker/pool/autoscale/W", "worker/pool/restart/W", "worker/queue/add-consumer/W",
             "worker/queue/cancel-consumer/W"],
)  # fmt: skip
def test_refused_commands(flower: Flower, path: str) -> None:
    """Commands that contradict a worker's settings are refused, with the alternative."""
    status, text = flower.ask("POST", f"/api/{path}")
    assert status == 409
    assert "is refused. " in json.loads(text)["message"]


def test_buttons_on_a_running_task(site: Site, flower: Flower, two: tuple[str, str], browser: webdriver.Chrome) -> None:
    """A running task's page has Cancel and no Terminate, and the click cancels the job."""

    def see() -> bool:
        flower.open(browser, f"/task/{two[0]}")
        return bool(browser.find_elements(By.ID, "task-terminate"))

    until(see, "Flower knows that the task has started")
    button = shown(browser, ".detail-actions .ssvm-cancel")
    assert not browser.find_element(By.ID, "task-terminate").is_displayed()
    button.click()
    browser.switch_to.alert.accept()
    assert site.wait(two[0]).cancelled_by == "admin (flower)"
    assert len(site.wait(two[1]).attempts) == 1


def test_page_of_a_worker(site: Site, flower: Flower, browser: webdriver.Chrome) -> None:
    """A worker's page shows no control that the server refuses."""
    name = json.loads(flower.ask("GET", "/api/workers?refresh=1")[1])
    flower.open(browser, f"/worker/{next(iter(name))}")
    shown(browser, "#worker-group")
    controls = "#worker-pool-grow, #worker-pool-autoscale, #worker-pool-restart, #worker-add-consumer"
    found = browser.find_elements(By.CSS_SELECTOR, f"{controls}, [id^='task-rate-limit'], [id^='task-timeout']")
    assert len(found) > 4
    for tab in ("pool", "queues", "limits"):
        shown(browser, f"#worker-tab-{tab}").click()
        assert not any(each.is_displayed() for each in found), tab
