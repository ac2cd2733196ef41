"""The upload page in a real browser."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from ssvm_worker.wiring import assembly
from tests.servers.browser import picture, resize
from tests.servers.service import Service
from tests.servers.worker import until
from tests.uploads import IMAGE, PREFIX, SHA256, record, state, upload_link, url_of

#: Keeps every value of the progress bar.
_WATCH_THE_BAR = """
window.seen = []
const bar = document.getElementById("bar")
new MutationObserver(() => seen.push(bar.value)).observe(bar, { attributes: true })
"""


def send(browser: Chrome, service: Service, file: Path) -> str:
    """Choose the file, click, and return the page's final message."""
    browser.get(service.url + url_of(service, upload_link(service)))
    return again(browser, file)


def said(browser: Chrome) -> str:
    """Return the outcome, as soon as the upload has ended."""
    outcome = browser.find_element(By.ID, "outcome")
    until(lambda: outcome.get_attribute("class") in ("done", "failed"), "the upload has ended")
    return outcome.text


def again(browser: Chrome, file: Path) -> str:
    """Choose another file on the same page, click, and return the page's final message."""
    browser.find_element(By.ID, "file").send_keys(str(file))
    browser.find_element(By.ID, "send").click()
    return said(browser)


def test_page_uploads(service: Service, browser: Chrome, tmp_path: Path) -> None:
    """A user selects a file, clicks the button, sees the bar end, and the image is stored."""
    (file := tmp_path / "image.raw").write_bytes(IMAGE)
    assert "stored" in send(browser, service, file)
    assert browser.find_element(By.ID, "bar").get_attribute("value") == "1"
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    browser.refresh()
    assert browser.find_element(By.TAG_NAME, "h1").text == "This link has been used"
    assert not browser.find_elements(By.TAG_NAME, "button")


def test_page_says_why(service: Service, browser: Chrome, tmp_path: Path) -> None:
    """A user whose file is refused reads a plain reason, and can choose another file on the same page."""
    files = {
        "page.html": b"<html>" + bytes(1 << 20),
        "wrong.raw": IMAGE[:-1] + b"x",
        "large.raw": bytes(9 << 20),
        "empty.raw": b"",
        "image.raw": IMAGE,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert "is not a disk image" in send(browser, service, tmp_path / "page.html")
    browser.find_element(By.TAG_NAME, "summary").click()
    assert "HTML" in browser.find_element(By.ID, "details").text
    link = upload_link(service, checksum=f"sha256:{SHA256}", max_bytes=8 << 20)
    browser.get(service.url + url_of(service, link))
    assert "is not the expected file" in again(browser, tmp_path / "wrong.raw")
    assert again(browser, tmp_path / "large.raw") == "This file has 9.0 MiB. The limit of this link is 8.0 MiB."
    assert "is empty" in again(browser, tmp_path / "empty.raw")
    assert "stored" in again(browser, tmp_path / "image.raw")
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE


#: Keeps all texts about the upload.
_WATCH_THE_TEXTS = """
window.texts = []
for (const id of ["figures", "outcome"]) {
  const it = document.getElementById(id)
  new MutationObserver(() => texts.push(it.textContent)).observe(it, { childList: true })
}
"""
#: Drops a file with the bytes on the page, as a person does with the mouse.
_DROP = """
const data = new DataTransfer(), bytes = new Uint8Array(arguments[0])
bytes.set(atob(arguments[1]).split("").map(each => each.charCodeAt(0)))
data.items.add(new File([bytes], "image.raw"))
for (const kind of ["dragover", "drop"]) {
  const event = new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true })
  document.querySelector("h1").dispatchEvent(event)
}
"""


def test_page_on_a_phone(service: Service, browser: Chrome) -> None:
    """A phone shows name, limit and expiry first, and then rate, percentage, remaining time and the check."""
    link = upload_link(service, name='Debian 13 "<b>"', max_bytes=1 << 30, max_rate=8 << 20)
    resize(browser, 390, dark=True)
    browser.get(service.url + url_of(service, link))
    colour = "return getComputedStyle(document.body).backgroundColor"
    dark = browser.execute_script(colour)
    picture(browser, "upload-dark.png")
    resize(browser, 390)
    until(lambda: browser.execute_script(colour) != dark, "the page has the colours of the browser")
    lines = browser.find_element(By.TAG_NAME, "main").text.splitlines()
    assert lines[0] == 'Upload Debian 13 "<b>"'
    assert lines[1:4] == ["Largest file", "1 GiB", "This link works until"]
    assert "min left)" in lines[4]
    picture(browser, "upload-1.png")
    browser.execute_script(_WATCH_THE_TEXTS)
    browser.execute_script(_DROP, 16 << 20, base64.b64encode(IMAGE[:512]).decode())
    browser.find_element(By.ID, "send").click()
    until(lambda: any("left" in each for each in texts(browser)), "the page has shown the remaining time")
    picture(browser, "upload-2.png")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert "stored" in said(browser)
    picture(browser, "upload-3.png")
    shown = r"\d+ %, [\d.]+ [KM]iB of 16.0 MiB, [\d.]+ [KM]iB/s, \d+ (s|min) left"
    assert any(re.fullmatch(shown, each) for each in texts(browser)), texts(browser)
    assert [each for each in texts(browser) if "%" not in each][:2] == ["Uploading…", "Checking the image…"]


def texts(browser: Chrome) -> list[str]:
    """Return all texts about the upload, in their order."""
    return list(browser.execute_script("return texts"))


def test_pages_of_dead_links(service: Service, browser: Chrome) -> None:
    """A person with a wrong, expired or revoked link sees a page, and a program gets plain text."""
    link = upload_link(service)
    good, expired = url_of(service, link), url_of(service, upload_link(service, -1))
    assembly.open_links(service.settings).revoke(link)
    resize(browser, 390)
    for path, status, title in (
        (good + "0", 403, "This link is not valid"),
        (expired, 410, "This link has expired or was revoked"),
        (good, 410, "This link has expired or was revoked"),
    ):
        browser.get(service.url + path)
        assert browser.find_element(By.TAG_NAME, "h1").text == title
        assert "Ask the person who sent it for a new one" in browser.find_element(By.TAG_NAME, "main").text
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        for accept, kind in (("text/html,*/*", "text/html"), ("*/*", "text/plain")):
            answer = service.request("GET", path, headers={"Accept": accept})
            assert (answer.status, answer.headers["Content-Type"].partition(";")[0]) == (status, kind)
    picture(browser, "upload-dead.png")


def test_page_is_accessible(service: Service, browser: Chrome) -> None:
    """Each control has a name, the outcome is announced, and the page has its language and title."""
    browser.get(service.url + url_of(service, upload_link(service)))
    names = [each.accessible_name for each in browser.find_elements(By.CSS_SELECTOR, "input, button, progress")]
    assert all(name or not shown for name, shown in zip(names, [True, True, False, False], strict=True))
    assert browser.find_element(By.ID, "outcome").aria_role == "status"
    assert browser.title
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"


def test_page_goes_on_after_a_reload(service: Service, browser: Chrome, tmp_path: Path) -> None:
    """After a reload, a user selects the same file again, and only the rest is sent."""
    (file := tmp_path / "image.raw").write_bytes(IMAGE)
    link = upload_link(service, max_rate=2 << 20)
    for begun in (False, True):
        browser.get(service.url + url_of(service, link))
        browser.find_element(By.ID, "file").send_keys(str(file))
        browser.execute_script(_WATCH_THE_BAR)
        browser.find_element(By.ID, "send").click()
        if not begun:
            until(lambda: state(service, link) == "running", "it has begun")
            browser.get("about:blank")
    WebDriverWait(browser, 60).until(lambda _: "stored" in browser.find_element(By.ID, "outcome").text)
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    assert len(record(service, link).attempts) == 1
    seen = browser.execute_script("return seen")
    assert any(0 < each < 1 for each in seen)
