"""The pages of jobs in the real Flower and a real browser: what they show of twenty jobs, and at which widths."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from ssvm_worker.errors import ChecksumMismatch, SourceUnavailable, StoreFull, UnsafeImage, WorkerError
from ssvm_worker.ledger.ledger import Ledger
from ssvm_worker.ledger.record import NewJob
from tests.servers.broker import StoppableBroker
from tests.servers.browser import picture, resize
from tests.servers.flower import Flower, shown
from tests.servers.worker import Site, until

pytestmark = pytest.mark.e2e
HOSTILE = """"><img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'{{ 7*7 }}"""
WIDTHS = (390, 1280, 1920)


def put(ledger: Ledger, job_id: str, zone: str = "zone1", job: str = "download", **request: Any) -> None:
    """Submit a job without a message, so that no worker runs it."""
    lane = job if job in ("download", "upload", "backup") else "maintenance"
    given = {"account": "2", "id": "201", "stores": ["primary", "archive"], **request, "job_id": job_id}
    if job == "download":
        given = {"url": f"https://images.example/{job_id}.qcow2?signature=s3cret"} | given
    ledger.submit(NewJob(job_id, job=job, zone=zone, lane=lane, request=given, account=str(given["account"])))


def end(ledger: Ledger, job_id: str, error: WorkerError | None = None, **result: Any) -> None:
    """Let a worker run the job to its end."""
    claim = ledger.claim(job_id, "worker-1@store-host")
    assert claim
    ledger.beat(claim, {"stage": "download", "bytes": 700 << 20, "total": 700 << 20, "rate": 64 << 20})
    if error:
        ledger.finish(claim, "failed", error=error.as_dict(), result=result or None)
    else:
        ledger.finish(claim, "succeeded", result={"key": f"template/tmpl/2/{job_id}", "size": 700 << 20} | result)


def fill(ledger: Ledger) -> None:
    """Put twenty jobs in all states into the ledger."""
    digests = ("ab" * 32, "cd" * 32)
    for number in range(7):
        put(ledger, f"tmpl-{201 + number}", id=str(201 + number), name=f"Debian {number + 8}")
        end(ledger, f"tmpl-{201 + number}", stores=["primary"])
    put(ledger, "backup-vm-7", job="backup", vcenter="vc1", vm="vm-7", volume="77", id="9", account="3")
    owed = {"archive": StoreFull("No space is left", "archive", "Free space").as_dict() | {"copy_job": "copy-9"}}
    end(ledger, "backup-vm-7", stores=["primary"], owed=owed)
    for name, error in (
        ("sum", ChecksumMismatch(f"The digest is {digests[0]}, expected {digests[1]}", "download", "Check the URL")),
        ("full", StoreFull("No space for 700 MiB", "primary:template/tmpl/2/31", "Free space, then retry")),
        ("away", SourceUnavailable("The server does not answer", "https://images.example/iso", "Check the server")),
        ("unsafe", UnsafeImage("The image names another file", "images.example", "Do not use the image")),
    ):  # fmt: skip
        put(ledger, f"failed-{name}", account="5", id=f"3{len(name)}")
        end(ledger, f"failed-{name}", error)
    for number in range(2):
        put(ledger, f"stopped-{number}", account="4")
        ledger.cancel(f"stopped-{number}", "admin (flower)")
    for number, stage in enumerate(("download", "verify")):
        put(ledger, f"big-{number}", id=f"40{number}", name="Windows Server 2025")
        claim = ledger.claim(f"big-{number}", "worker-1@store-host")
        assert claim
        ledger.beat(claim, {"stage": stage, "bytes": 43 << 30, "total": 100 << 30, "rate": 90 << 20})
    for number in range(4):
        put(ledger, f"waits-{number}", zone="zone1" if number % 2 else "zone9", id=f"50{number}")


@pytest.fixture(scope="module")
def site(session_broker: StoppableBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Return a site with twenty jobs and no worker. Claims last for the whole test."""
    changes = {"ledger": {"claim_s": 3000}}
    site = Site(session_broker.with_prefix("pages:"), tmp_path_factory.mktemp("pages"), changes)
    fill(site.ledger)  # before Flower starts, so that it has seen no event of these jobs
    yield site
    site.close()


def test_pictures(flower: Flower, browser: webdriver.Chrome) -> None:
    """The pictures of the documentation show twenty jobs in all states, a failed one, and a phone."""
    for path, name, width, height in (
        ("/jobs", "flower-jobs.png", 1280, 1750),
        ("/jobs/failed-full", "flower-job.png", 1280, 1350),
        ("/jobs?state=failed", "flower-phone.png", 390, 1100),
    ):
        resize(browser, width, height=height)
        flower.open(browser, path)
        shown(browser, ".ssvm-retry")
        picture(browser, name, "PICTURES")
    assert "All 20" in flower.ask("GET", "/jobs")[1]


@pytest.fixture(scope="module")
def hostile(site: Site) -> None:
    """Put two jobs with hostile text in all their fields into the ledger."""
    put(site.ledger, "hostile", zone="zone2", account=HOSTILE, id=HOSTILE, name=HOSTILE)
    error = ChecksumMismatch(HOSTILE, HOSTILE, HOSTILE)
    end(site.ledger, "hostile", error, note=HOSTILE, owed={HOSTILE: {"what": HOSTILE, "copy_job": HOSTILE}})
    put(site.ledger, "stopped-by-hostile", account=HOSTILE)
    site.ledger.cancel("stopped-by-hostile", f"{HOSTILE} (flower)")


_CUT = """return [...document.querySelectorAll("main button, main td, main dd, main a, main input")].filter((each) => {
    const box = each.getBoundingClientRect();
    return box.width && (box.left < 0 || box.right > window.innerWidth + 0.5) && !each.closest(".table-responsive");
}).map((each) => each.outerHTML.slice(0, 90))"""


@pytest.mark.usefixtures("hostile")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("path", ["/jobs", "/jobs/failed-sum", "/jobs/hostile"])
def test_nothing_is_cut_off(flower: Flower, browser: webdriver.Chrome, path: str, dark: bool) -> None:
    """Each element of the pages is within windows of all widths, in both colours, and no hostile text runs."""
    colours = "dark" if dark else "light"
    resize(browser, WIDTHS[0], dark)
    flower.open(browser, path)
    for width in WIDTHS:
        resize(browser, width, dark)
        until(lambda wide=width: browser.execute_script("return window.innerWidth") == wide, "the window has its width")
        shown(browser, ".ssvm-retry")
        picture(browser, f"{path.strip('/').replace('/', '-')}-{width}-{colours}.png")
        assert browser.execute_script(_CUT) == []
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.documentElement.dataset.bsTheme") == colours
        assert browser.execute_script("return window.hurt") is None


@pytest.mark.usefixtures("hostile")
def test_hostile_text(flower: Flower, browser: webdriver.Chrome) -> None:
    """Text of requests, errors and user names is shown unchanged, and never becomes markup."""
    for path in (
        "/jobs",
        "/jobs/hostile",
        "/jobs/stopped-by-hostile",
        f"/jobs?q={quote(HOSTILE)}",
        f"/jobs/{quote(HOSTILE, '')}",
    ):
        flower.open(browser, path)
        text = shown(browser, "main").text + str(browser.execute_script("return document.forms[0]?.q?.value || ''"))
        assert HOSTILE in text, path
        assert not browser.find_elements(By.CSS_SELECTOR, "main img, main script"), path
        assert browser.execute_script("return window.hurt") is None


def test_first_page(flower: Flower, browser: webdriver.Chrome) -> None:
    """Flower's first page is the list of jobs, and each page links to it."""
    flower.open(browser, "/")
    assert browser.current_url.endswith("/jobs")
    for path in ("/workers", "/tasks", "/broker", "/jobs/big-0", "/no-such-page"):
        flower.open(browser, path)
        links = browser.find_elements(By.CSS_SELECTOR, ".app-nav a[href='/jobs']")
        assert [each.text for each in links] == ["Jobs"], path


@pytest.mark.parametrize("job_id", ["tmpl-201", "backup-vm-7", "failed-sum", "stopped-0", "big-0", "waits-0"])
def test_each_job_has_a_page(flower: Flower, job_id: str) -> None:
    """A job of any state has a page with its request, and without the secrets of its URL."""
    status, text = flower.ask("GET", f"/jobs/{job_id}")
    assert (status, "s3cret" in text) == (200, False)
    assert job_id in text
    assert "Request" in text


def test_what_a_page_shows(flower: Flower) -> None:
    """The page shows the error with its remedy, the attempts, the missing stores, and why a job waits."""
    failed = flower.ask("GET", "/jobs/failed-full")[1]
    for part in ("StoreFull: No space for 700 MiB", "Free space, then retry", "worker-1@store-host", "700 MiB"):
        assert part in failed
    assert "no worker of zone zone9 is up" in flower.ask("GET", "/jobs/waits-0")[1]
    assert "/jobs/copy-9" in flower.ask("GET", "/jobs/backup-vm-7")[1]
    assert flower.ask("GET", "/jobs/big-0")[1].count("43 %") == 1
    status, text = flower.ask("GET", "/jobs/unknown")
    assert (status, "There is no such job" in text) == (404, True)


def test_filters_in_the_url(flower: Flower, browser: webdriver.Chrome) -> None:
    """A filter that a user sets is in the URL, and the URL alone shows the same jobs."""
    flower.open(browser, "/jobs")
    shown(browser, "input[name=error]").send_keys("StoreFull\n")
    until(lambda: "error=StoreFull" in browser.current_url, "the filter is in the URL")
    assert [row.get_attribute("id") for row in rows(browser)] == ["job-failed-full"]
    flower.open(browser, "/jobs?state=queued&zone=zone9&sort=id")
    assert [row.get_attribute("id") for row in rows(browser)] == ["job-waits-0", "job-waits-2"]
    flower.open(browser, "/jobs?q=no-such-text")
    assert "No job matches these filters" in rows(browser)[0].text


def rows(browser: webdriver.Chrome) -> list[Any]:
    """Return the rows of the list."""
    shown(browser, "#ssvm-rows tr")
    return browser.find_elements(By.CSS_SELECTOR, "#ssvm-rows tr")


def test_update_in_place(flower: Flower, site: Site, browser: webdriver.Chrome) -> None:
    """An update keeps rows, open texts and selections, and shows the new state."""
    flower.open(browser, "/jobs?q=in-place")
    put(site.ledger, "in-place")
    shown(browser, "#job-in-place")
    browser.execute_script("document.getElementById('job-in-place').mark = 1")
    shown(browser, "#job-in-place input").click()
    end(site.ledger, "in-place", StoreFull("Full", "primary", "Free space"))
    button = shown(browser, "#job-in-place .ssvm-retry")
    assert browser.execute_script("return document.getElementById('job-in-place').mark") == 1
    assert shown(browser, "#job-in-place input").is_selected()
    shown(browser, "#job-in-place summary").click()
    updated = shown(browser, "#ssvm-updated").text
    until(lambda: shown(browser, "#ssvm-updated").text != updated, "the page is updated again")
    assert "Free space" in shown(browser, "#job-in-place details").text
    button.click()  # the same element as before the updates
    until(lambda: site.ledger.get("in-place").state == "queued", "the job is queued again")


def test_refused_click(flower: Flower, site: Site, browser: webdriver.Chrome) -> None:
    """A refusal stays on the page as a sentence, also after updates."""
    put(site.ledger, "refused")
    site.ledger.cancel("refused", "me")
    flower.open(browser, "/jobs/refused")
    button = shown(browser, ".ssvm-retry")
    browser.execute_script(
        "window.fetch = ((real) => (...all) => all[1]?.method ? real(...all) : new Promise(() => {}))(fetch)"
    )
    site.ledger.retry("refused", "another")
    button.click()
    assert (
        "The state of the job is queued; only failed and cancelled jobs are retried"
        in shown(browser, ".ssvm-toast").text
    )


def test_many_at_once(flower: Flower, site: Site, browser: webdriver.Chrome) -> None:
    """A user cancels all selected jobs after a question, and retries those that match."""
    for number in range(3):
        put(site.ledger, f"many-{number}", account="many")
    flower.open(browser, "/jobs?account=many")
    shown(browser, "#ssvm-all").click()
    shown(browser, "[data-ssvm-bulk=cancel]").click()
    browser.switch_to.alert.dismiss()
    assert site.ledger.get("many-0").state == "queued"
    shown(browser, "[data-ssvm-bulk=cancel]").click()
    browser.switch_to.alert.accept()
    until(lambda: site.ledger.get("many-0").state == "cancelled", "the jobs are cancelled")
    body = json.dumps({"query": "?account=many&state=cancelled"}).encode()
    status, text = flower.ask("POST", "/ssvm/retry", body=body)
    assert (status, json.loads(text)) == (200, {"done": 3, "refused": [], "has_more": False})
    assert flower.ask("POST", "/ssvm/cancel", body=body, login="guest")[0] == 403
    status, text = flower.ask("POST", "/ssvm/retry", body=json.dumps({"ids": ["many-0", "unknown"]}).encode())
    assert [each["job_id"] for each in json.loads(text)["refused"]] == ["many-0", "unknown"]


def test_below_a_prefix(stoppable_broker: StoppableBroker, tmp_path: Path, browser: webdriver.Chrome) -> None:
    """Below a URL prefix, the pages work without jobs, with a job, and without the broker."""
    site = Site(stoppable_broker.with_prefix("prefixed:"), tmp_path)
    flower = Flower(site, "/admin")
    try:
        flower.open(browser, "/")
        assert browser.current_url == f"{flower.url}/jobs"
        text = shown(browser, "main").text
        for empty in ("There are no jobs yet", "No zone has jobs", "No worker is known"):
            assert empty in text
        put(site.ledger, "prefixed")
        site.ledger.cancel("prefixed", "me")
        shown(browser, "#job-prefixed a").click()
        shown(browser, ".ssvm-retry").click()
        until(lambda: site.ledger.get("prefixed").state == "queued", "the job is queued again")
        flower.open(browser, "/workers")
        shown(browser, ".app-nav a[href='/admin/jobs']").click()
        until(lambda: browser.current_url == f"{flower.url}/jobs", "the link leads to the list")
        style = "return getComputedStyle(document.querySelector('.ssvm-filters')).display"
        assert browser.execute_script(style) == "grid"
        stoppable_broker.stop()
        until(lambda: "Not up to date: The broker" in shown(browser, "#ssvm-updated").text, "the page says so")
        assert shown(browser, "#job-prefixed").text
        flower.open(browser, "/jobs/prefixed")
        assert "The broker" in shown(browser, "#ssvm-message").text
        picture(browser, "no-broker.png")
    finally:
        flower.close()
        site.close()


def test_flower_does_not_answer(flower: Flower, site: Site, browser: webdriver.Chrome) -> None:
    """While Flower hangs, the page says since when its figures are old, and a click says why it does nothing."""
    put(site.ledger, "silent")
    flower.open(browser, "/jobs?q=silent")
    button = shown(browser, "#job-silent .ssvm-cancel")
    # The page waits for many seconds. This test does not.
    browser.execute_script("window.real = AbortSignal.timeout; AbortSignal.timeout = () => real.call(AbortSignal, 500)")
    flower.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: "Flower does not answer" in shown(browser, "#ssvm-updated").text, "the page says so")
        assert "Updated " in shown(browser, "#ssvm-updated").text
        button.click()
        browser.switch_to.alert.accept()
        assert "Flower does not answer" in shown(browser, ".ssvm-toast").text
    finally:
        flower.process.send_signal(signal.SIGCONT)
    browser.execute_script("AbortSignal.timeout = real")
    until(lambda: "answer" not in shown(browser, "#ssvm-updated").text, "the page is up to date again")
