"""``ssvm serve`` as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from tusclient.client import TusClient

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import DRAFT
from ssvm_worker.wiring import assembly
from tests import images
from tests.cloudstack_commands import agent_settings, asker, vector
from tests.cloudstack_uploads import UUID, connect_agent, form, signed
from tests.servers.broker import Broker
from tests.servers.service import SECRET, Service, settings_of
from tests.servers.worker import until
from tests.unit.serve.test_serve import KEY, link, put_image
from tests.uploads import PREFIX, create, offset_of, patch, record, stored, upload_link, url_of
from tests.waiting import CLAIM_S, PATIENCE_S

pytestmark = pytest.mark.e2e


@dataclass
class ServeProcess:
    """A running service, and its parameters."""

    service: Service
    file: Path
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        """Start it, at its earlier address if it had one, and wait until it prints the address."""
        listen = self.service.url.removeprefix("http://") or "127.0.0.1:0"
        command = [sys.executable, "-m", "ssvm_worker", "serve", "--config", str(self.file), "--listen", listen]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = next(match for line in self.process.stderr if (match := re.search(r"listening on (\S+)", line)))
        self.service.url = found[1]

    def kill(self) -> None:
        """Send kill -9."""
        self.process.kill()
        self.process.wait()

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.service.url.rpartition(":")[2])


@pytest.fixture
def serve_process(broker: Broker, tmp_path: Path) -> Iterator[ServeProcess]:
    """Return a service with a directory store."""
    settings = settings_of(broker, tmp_path / "store")
    file = tmp_path / "worker.toml"
    file.write_text(
        f'state_dir = "{tmp_path}/state"\n[broker]\nurl = "{broker.url}"\nprefix = "{broker.prefix}"\n'
        f'[ledger]\nclaim_s = {CLAIM_S}\n[stores.primary]\nurl = "file://{tmp_path}/store"\n'
        f'[serve]\nkey = "k1"\ndrain_s = {PATIENCE_S / 2}\ncloudstack = true\n[serve.keys.k1]\nsecret = "{SECRET}"\n'
    )
    started = ServeProcess(Service(settings, "", tmp_path / "store"), file)
    started.start()
    yield started
    started.kill()


def test_sigterm(serve_process: ServeProcess) -> None:
    """After SIGTERM the service accepts no client, and finishes the current transfers."""
    service, data = serve_process.service, bytes(64 << 20)
    put_image(service, data, str(digest_of(data)))
    with socket.create_connection(serve_process.address) as peer:
        peer.sendall(f"GET {link(service)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = len(peer.recv(1 << 16))
        serve_process.process.send_signal(signal.SIGTERM)
        while _lets_in(serve_process.address):
            time.sleep(0.05)
        while got := len(peer.recv(1 << 20)):
            received += got
    assert received > len(data)
    assert serve_process.process.wait(PATIENCE_S) == 0


def _lets_in(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    return True


def test_upload_over_a_kill(serve_process: ServeProcess, tmp_path: Path) -> None:
    """A tus client whose server is killed resumes at the next one, from the stored bytes."""
    service, file = serve_process.service, tmp_path / "image.raw"
    image = images.mbr(32 << 20)[: 1 << 20] + os.urandom(31 << 20)  # zeros would be a hole, which a kill cuts off
    file.write_bytes(image)
    link = upload_link(service)
    client = TusClient(service.url + url_of(service, link))
    uploader = client.uploader(str(file), chunk_size=4 << 20)
    for _ in range(4):
        uploader.upload_chunk()
    draft = service.store / PREFIX / DRAFT
    until(lambda: json.loads(draft.read_text())["facts"]["settled"] > 8 << 20, "that is noted")
    serve_process.kill()
    serve_process.start()
    with assembly.open_ledger(service.settings) as ledger:
        until(lambda: ledger.get(link.job_id).state == "queued", "the claim of the dead has run out")
    uploader = client.uploader(str(file), chunk_size=4 << 20, url=uploader.url)
    assert uploader.offset > 8 << 20
    uploader.upload()
    assert (service.store / PREFIX / "7.raw").read_bytes() == image
    assert "7.raw" in stored(service)
    assert not [each for each in stored(service) if each.startswith(".")]


def test_upload_over_a_sigterm(serve_process: ServeProcess) -> None:
    """A service that ends normally keeps received bytes, and the next one resumes at once."""
    service, image = serve_process.service, images.mbr(32 << 20)[: 1 << 20] + os.urandom(31 << 20)
    link = upload_link(service)
    url = create(service, url_of(service, link), len(image))
    assert patch(service, url, 0, image[: 16 << 20]).status == 204
    serve_process.process.terminate()
    assert serve_process.process.wait(PATIENCE_S) == 0
    assert record(service, link).state == "queued"
    serve_process.start()
    assert offset_of(service, url) == 16 << 20
    assert patch(service, url, 16 << 20, image[16 << 20 :]).status == 204
    assert (service.store / PREFIX / "7.raw").read_bytes() == image


def test_page_over_a_kill(serve_process: ServeProcess, browser: Chrome, tmp_path: Path) -> None:
    """A user whose upload meets a crash of the service sees it resume and succeed."""
    service, file = serve_process.service, tmp_path / "image.raw"
    file.write_bytes(images.mbr(32 << 20)[: 1 << 20] + os.urandom(31 << 20))
    link = upload_link(service, max_rate=8 << 20)
    browser.get(service.url + url_of(service, link))
    browser.find_element(By.ID, "file").send_keys(str(file))
    browser.find_element(By.ID, "send").click()
    until(lambda: any(each.stat().st_size > 4 << 20 for each in service.store.rglob("*.part")), "some of it is there")
    serve_process.kill()
    outcome = browser.find_element(By.ID, "outcome")
    until(lambda: "Trying again" in outcome.text, "the page has noticed")
    serve_process.start()
    WebDriverWait(browser, 90).until(lambda _: "stored" in outcome.text)
    assert (service.store / PREFIX / "7.raw").read_bytes() == file.read_bytes()
    assert len(record(service, link).attempts) == 2


def test_without_settings(broker: Broker, tmp_path: Path) -> None:
    """On one machine no key or address is needed, and links use the service's own address."""
    (tmp_path / "store").mkdir()
    started = ServeProcess(
        Service(settings_of(broker, tmp_path / "store"), "", tmp_path / "store"), tmp_path / "w.toml"
    )
    started.file.write_text(
        f'state_dir = "{tmp_path}/state"\n[broker]\nurl = "{broker.url}"\nprefix = "{broker.prefix}"\n'
        f'[stores.primary]\nurl = "file://{tmp_path}/store"\n'
    )
    started.start()
    try:
        put_image(started.service)
        command = [sys.executable, "-m", "ssvm_worker", "link", "--config", str(started.file), KEY, "--for", "4h"]
        made = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert made.startswith(started.service.url)
        assert started.service.request("GET", made).status == 200
    finally:
        started.kill()
    assert (tmp_path / "state/link-key").stat().st_mode & 0o777 == 0o600


def begin_browser_upload(serving: ServeProcess) -> None:
    """Send the first half of a browser's upload, and kill the service."""
    service = serving.service
    body, kind = form(images.mbr(6 << 20))
    given = signed(service) | {"Content-Type": kind, "Host": service.url.partition("//")[2]}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    with socket.create_connection(serving.address) as peer:
        peer.sendall(f"POST /upload/{UUID} HTTP/1.1\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode())
        peer.sendall(body[: 3 << 20])
        until(lambda: any(".part" in name for name in stored(service)), "bytes are on the store")
        serving.kill()


def test_killed_browser_upload(serve_process: ServeProcess) -> None:
    """After kill -9 of the service, CloudStack learns that the upload was interrupted, and none of its bytes stays."""
    service = serve_process.service
    connect_agent(service)
    ask = asker(agent_settings(service.settings))
    command = vector("req-upload-status-template", entityUuid=UUID)
    begin_browser_upload(serve_process)
    assert ask(command).content["status"] == "IN_PROGRESS"
    serve_process.start()
    until(lambda: ask(command).content["status"] == "ERROR", "the upload is interrupted")
    until(lambda: stored(service) == [], "the service has removed the bytes")
    assert ask(command).content["status"] == "ERROR"
