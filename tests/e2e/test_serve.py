"""``ssvm serve`` as a process."""

from __future__ import annotations

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
from urllib.parse import urlsplit

import pytest
from tusclient.client import TusClient

from ssvm_worker import assembly
from ssvm_worker.digest import digest_of
from tests import images
from tests.servers.broker import Broker
from tests.servers.service import SECRET, Service, settings_of
from tests.servers.worker import until
from tests.test_serve import link, put_image
from tests.test_serve_upload import PREFIX, stored, upload_link, url_of

pytestmark = pytest.mark.e2e


@dataclass
class ServeProcess:
    """One that listens, and what it was told."""

    service: Service
    file: Path
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        """Start it, and wait until it says where it listens."""
        command = [sys.executable, "-m", "ssvm_worker", "serve", "--config", str(self.file), "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = next(match for line in self.process.stderr if (match := re.search(r"listening on (\S+)", line)))
        self.service.url = found[1]

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.service.url.rpartition(":")[2])


@pytest.fixture
def serve_process(broker: Broker, tmp_path: Path) -> Iterator[ServeProcess]:
    """One over a directory store."""
    settings = settings_of(broker, tmp_path / "store")
    file = tmp_path / "worker.toml"
    file.write_text(
        f'state_dir = "{tmp_path}/state"\n[broker]\nurl = "{broker.url}"\nprefix = "{broker.prefix}"\n'
        f'[ledger]\nclaim_s = 2\n[stores.primary]\nurl = "file://{tmp_path}/store"\n'
        f'[serve]\nkey = "k1"\n[serve.keys.k1]\nsecret = "{SECRET}"\n'
    )
    started = ServeProcess(Service(settings, "", tmp_path / "store"), file)
    started.start()
    yield started
    started.process.kill()
    started.process.wait()


def test_sigterm(serve_process: ServeProcess) -> None:
    """At SIGTERM nobody new is let in, and who is being served gets all bytes before it ends."""
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
    assert serve_process.process.wait(60) == 0


def _lets_in(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    return True


def test_upload_over_a_kill(serve_process: ServeProcess, tmp_path: Path) -> None:
    """A tus client whose server is killed in the middle goes on with the next one, from what has been stored."""
    service, file = serve_process.service, tmp_path / "image.raw"
    image = images.mbr(32 << 20)[: 1 << 20] + os.urandom(31 << 20)  # zeros would be a hole, which a kill cuts off
    file.write_bytes(image)
    link = upload_link(service)
    client = TusClient(service.url + url_of(service, link))
    uploader = client.uploader(str(file), chunk_size=4 << 20)
    for _ in range(4):
        uploader.upload_chunk()
    serve_process.process.kill()
    serve_process.process.wait()
    path = urlsplit(uploader.url)
    serve_process.start()
    with assembly.open_ledger(service.settings) as ledger:
        until(lambda: ledger.get(link.job_id).state == "queued", "the claim of the dead has run out")
    uploader = client.uploader(str(file), chunk_size=4 << 20, url=f"{service.url}{path.path}?{path.query}")
    assert uploader.offset > 8 << 20
    uploader.upload()
    assert (service.store / PREFIX / "7.raw").read_bytes() == image
    assert "7.raw" in stored(service)
    assert not [each for each in stored(service) if each.startswith(".")]
