"""The upload page in a real browser."""

from __future__ import annotations

from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.servers.service import Service
from tests.servers.worker import until
from tests.uploads import IMAGE, PREFIX, record, state, upload_link, url_of

#: Keeps every value of the progress bar.
_WATCH_THE_BAR = """
window.seen = []
const bar = document.getElementById("bar")
new MutationObserver(() => seen.push(bar.value)).observe(bar, { attributes: true })
"""


def send(browser: Chrome, service: Service, file: Path) -> str:
    """Choose the file, click, and return the page's final message."""
    browser.get(service.url + url_of(service, upload_link(service)))
    browser.find_element(By.ID, "file").send_keys(str(file))
    browser.find_element(By.ID, "send").click()
    return said(browser)


def said(browser: Chrome) -> str:
    """Return the outcome."""
    outcome = browser.find_element(By.ID, "outcome")
    WebDriverWait(browser, 60).until(lambda _: outcome.text and "Uploading" not in outcome.text)
    return outcome.text


def test_page_uploads(service: Service, browser: Chrome, tmp_path: Path) -> None:
    """A user selects a file, clicks the button, sees the bar end, and the image is stored."""
    (file := tmp_path / "image.raw").write_bytes(IMAGE)
    assert "stored" in send(browser, service, file)
    assert browser.find_element(By.ID, "bar").get_attribute("value") == "1"
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE
    browser.refresh()
    assert "has been used" in said(browser)
    assert not browser.find_element(By.ID, "send").is_displayed()


def test_page_says_why(service: Service, browser: Chrome, tmp_path: Path) -> None:
    """A user whose file is refused reads the reason, and can choose another on the same page."""
    (file := tmp_path / "page.html").write_bytes(b"<html>" + bytes(1 << 20))
    assert "HTML" in send(browser, service, file) or "html" in said(browser)
    (file := tmp_path / "image.raw").write_bytes(IMAGE)
    browser.find_element(By.ID, "file").send_keys(str(file))
    browser.find_element(By.ID, "send").click()
    WebDriverWait(browser, 60).until(lambda _: "stored" in browser.find_element(By.ID, "outcome").text)
    assert (service.store / PREFIX / "7.raw").read_bytes() == IMAGE


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
