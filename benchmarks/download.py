"""Download with SHA-256 and inspection, against clients that check nothing (curl) or the checksum only (aria2)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trustme

from ssvm_worker.units import MiB, human_size
from tests.neighbours import free_port

from .contest import OURS, Contender, Row, contest, left_out

_NGINX = """
{user}
daemon off;
worker_processes auto;
pid {root}/nginx.pid;
error_log {root}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    {temporary}
    server {{
        listen 127.0.0.1:{plain};
        listen 127.0.0.1:{secure} ssl;
        ssl_certificate {root}/chain.pem;
        ssl_certificate_key {root}/key.pem;
        root {root}/www;
    }}
}}
"""
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True)
class Site:
    """A file behind nginx, and where the downloads go."""

    root: Path
    plain: str
    secure: str
    digest: str

    @property
    def ca(self) -> Path:
        """The certificate to trust."""
        return self.root / "ca.pem"


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Plain HTTP against curl and aria2, then TLS against curl."""
    if not (nginx := found("nginx")):
        return [left_out("download", "nginx is not installed")]
    (scratch / "www").mkdir()
    digest = write_random(scratch / "www/image.raw", size)
    with serving(nginx, scratch, "image.raw", digest) as site:
        plain = [ours(site, site.plain), *curl(site, site.plain, 1.0), *_aria2(site)]
        secure = [ours(site, site.secure), *curl(site, site.secure, 0.8)]
        rows = contest("download, HTTP", plain, size, runs)
        rows += contest("download, TLS", secure, size, runs)
    rows.append(_floor(size))
    return rows + [left_out("download", f"{each} is not installed") for each in ("curl", "aria2c") if not found(each)]


def _floor(size: int) -> Row:
    """What no download that verifies can beat on one stream: the hash alone, of bytes that are in the cache."""
    piece, seen, started = os.urandom(MiB), hashlib.sha256(), time.perf_counter()
    for _ in range(size // MiB):
        seen.update(piece)
    spent = time.perf_counter() - started
    return Row(f"SHA-256 alone, {human_size(size)}", f"{spent:.2f} s", "", "", "", "")


def found(program: str) -> str | None:
    """Where a program is; Debian keeps servers where not every PATH looks."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def write_random(path: Path, size: int) -> str:
    """A file of bytes that nothing can compress; returns their SHA-256 in hex."""
    generator, seen = random.Random(1), hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, MiB):
            piece = generator.randbytes(min(MiB, size - start))
            seen.update(piece)
            file.write(piece)
    return seen.hexdigest()


@contextlib.contextmanager
def serving(nginx: str, root: Path, file: str, digest: str) -> Iterator[Site]:
    """nginx with what is below *root*/www, of which *file* is to be fetched, and room for what is."""
    for name in ("out", "store"):
        (root / name).mkdir()
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(root / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(root / "key.pem"))
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(str(root / "chain.pem"), append=True)
    plain, secure = free_port(), free_port()
    config = root / "nginx.conf"
    temporary = " ".join(f"{each}_temp_path {root}/{each};" for each in _TEMPORARY)
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(_NGINX.format(root=root, plain=plain, secure=secure, temporary=temporary, user=user))
    (root / "worker.toml").write_text(
        f'[stores.primary]\nurl = "file://{root}/store"\n'
        f'[download]\nallow_networks = ["127.0.0.0/8"]\nca_file = "{root}/ca.pem"\n'
    )
    process = subprocess.Popen([nginx, "-e", f"{root}/error.log", "-c", str(config)])
    try:
        _await_port(plain)
        yield Site(root, f"http://127.0.0.1:{plain}/{file}", f"https://127.0.0.1:{secure}/{file}", f"sha256:{digest}")
    finally:
        process.terminate()
        process.wait()


def _await_port(port: int) -> None:
    until = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def ours(site: Site, url: str) -> Contender:
    """A job in the foreground, into a directory."""
    fields = {"url": url, "checksum": site.digest, "account": "a", "id": "image", "format": "auto"}
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "download", "--json", *options]
    made = taker(site.root / "store/template/tmpl/a/image", "image.raw")
    return Contender(OURS, command, made, {"SSVM_CONFIG": str(site.root / "worker.toml")})


def taker(directory: Path, name: str) -> Callable[[], int]:
    """Tells how long the file is and removes all that lies beside it."""

    def take() -> int:
        size = (directory / name).stat().st_size
        for each in directory.iterdir():
            each.unlink()
        return size

    return take


def curl(site: Site, url: str, target: float) -> Sequence[Contender]:
    """One connection, nothing verified."""
    if not (program := found("curl")):
        return []
    command = [program, "-sS", "--fail", "--cacert", str(site.ca), "-o", str(site.root / "out/image.raw"), url]
    return [Contender("curl -o", command, taker(site.root / "out", "image.raw"), target=target)]


def _aria2(site: Site) -> Sequence[Contender]:
    if not (aria2 := found("aria2c")):
        return []
    # To write zeros first, its default, would only cost it time here.
    options = ["-q", "-x4", "-s4", "--file-allocation=none", "--no-conf", f"--checksum={_aria2_digest(site)}"]
    command = [aria2, *options, f"--dir={site.root}/out", "--out=image.raw", site.plain]
    return [Contender("aria2c -x4 --checksum", command, taker(site.root / "out", "image.raw"), target=2.5)]


def _aria2_digest(site: Site) -> str:
    return site.digest.replace("sha256:", "sha-256=")
