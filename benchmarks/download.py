"""Download with SHA-256 and inspection, compared with curl (no checks) and aria2 (checksum only)."""

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
from urllib.parse import urlsplit

import trustme

from ssvm_worker.units import MiB
from tests.neighbours import free_port

from .contest import OURS, Contender, Parts, Row, contest, left_out
from .parts import hash_s, receive_s, start_s, write_s
from .workers import own_sides, warm_worker

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
    """A file behind nginx, and the directory of the downloads."""

    root: Path
    plain: str
    secure: str
    digest: str

    @property
    def ca(self) -> Path:
        """Return the path of the trusted certificate."""
        return self.root / "ca.pem"

    @property
    def config(self) -> Path:
        """Return the path of the settings."""
        return self.root / "worker.toml"

    @property
    def urls(self) -> tuple[str, str]:
        """Return the URLs of the file over HTTP and over TLS."""
        return self.plain, self.secure


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Compare plain HTTP with curl and aria2, then TLS with curl."""
    if not (nginx := found("nginx")):
        return [left_out("download", "nginx is not installed")]
    (scratch / "www").mkdir()
    digest = write_random(scratch / "www/image.raw", size)
    with serving(nginx, scratch, "image.raw", digest) as site, warm_worker(site.config) as worker:
        plain, secure = (own_sides(site.config, worker, "download", *job(site, url)) for url in site.urls)
        plain_parts, secure_parts = _parts(site, size)
        program = _bare_program(scratch)
        sides = [*plain, *curl(site, site.plain, 1.0, 1.1), *_aria2(site), *_bare(program, site, site.plain)]
        rows = contest("download, HTTP", sides, size, runs, parts=plain_parts)
        sides = [*secure, *curl(site, site.secure, 0.8, 0.9), *_bare(program, site, site.secure)]
        rows += contest("download, TLS", sides, size, runs, parts=secure_parts)
    missing = [each for each in ("curl", "aria2c") if not found(each)]
    missing += [] if program else ["cc, or a header of OpenSSL,"]
    return rows + [left_out("download", f"{each} is not installed") for each in missing]


def _parts(site: Site, size: int) -> Iterator[Parts | None]:
    """Measure the parts of a download over HTTP, then over TLS, without the server. Yield None without curl."""
    own = {"SHA-256": hash_s(size), "write": write_s(site.root / "out", size)}
    program = found("curl")
    for url in site.urls:
        start = start_s("requests", "pydantic", tls=url == site.secure)
        yield Parts({**own, "receive": receive_s(program, url, site.ca)}, start) if program else None


def tls_s(root: Path, size: int) -> float:
    """Return the CPU seconds of curl to receive *size* bytes over TLS. Files below *root* are removed afterwards."""
    nginx, program = found("nginx"), found("curl")
    if not nginx or not program:
        return 0.0
    (root / "www").mkdir(parents=True)
    digest = write_random(root / "www/image.raw", size)
    with serving(nginx, root, "image.raw", digest) as site:
        seconds = receive_s(program, site.secure, site.ca)
    shutil.rmtree(root)
    return seconds


def found(program: str) -> str | None:
    """Return the path of a program. Debian installs servers in /usr/sbin, which is not on every PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def write_random(path: Path, size: int) -> str:
    """Write a file of random bytes and return their SHA-256 in hex."""
    generator, hasher = random.Random(1), hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, size, MiB):
            piece = generator.randbytes(min(MiB, size - start))
            hasher.update(piece)
            file.write(piece)
    return hasher.hexdigest()


@contextlib.contextmanager
def serving(nginx: str, root: Path, file: str, digest: str) -> Iterator[Site]:
    """Run nginx for the files below *root*/www, and yield a Site for *file*. Create directories for the downloads."""
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
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def job(site: Site, url: str) -> tuple[dict[str, str], Callable[[], int]]:
    """Return the fields of a job that stores into a directory, and a function that takes its image."""
    fields = {"url": url, "checksum": site.digest, "account": "a", "id": "image", "format": "auto"}
    return fields, taker(site.root / "store/template/tmpl/a/image", "image.raw")


def ours(site: Site, url: str) -> Contender:
    """Return that job in the foreground."""
    fields, made = job(site, url)
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "download", "--json", *options]
    return Contender(OURS, command, made, {"SSVM_CONFIG": str(site.config)})


def taker(directory: Path, name: str) -> Callable[[], int]:
    """Return a function that returns the size of a file and empties its directory."""

    def take() -> int:
        size = (directory / name).stat().st_size
        for each in directory.iterdir():
            each.unlink()
        return size

    return take


def curl(site: Site, url: str, target: float, warm_target: float | None = None) -> Sequence[Contender]:
    """Return curl with one connection and no verification, if it is installed."""
    if not (program := found("curl")):
        return []
    command = [program, "-sS", "--fail", "--cacert", str(site.ca), "-o", str(site.root / "out/image.raw"), url]
    return [Contender("curl -o", command, taker(site.root / "out", "image.raw"), {}, target, warm_target)]


def _bare_program(directory: Path) -> Path | None:
    """Build bare.c below a directory and return the program. Return None without a compiler or OpenSSL's headers."""
    program, source = directory / "bare", Path(__file__).with_name("bare.c")
    if not (compiler := found("cc")):
        return None
    command = [compiler, "-O2", "-o", str(program), str(source), "-lssl", "-lcrypto", "-lpthread"]
    return program if subprocess.run(command, capture_output=True, check=False).returncode == 0 else None


def _bare(program: Path | None, site: Site, url: str) -> Sequence[Contender]:
    """Return the program that only receives, hashes and writes. There is no target."""
    if not program:
        return []
    parts = urlsplit(url)
    authority = [str(site.ca)] if parts.scheme == "https" else []
    command = [str(program), str(parts.port), parts.path, str(site.root / "out/image.raw"), *authority]
    return [Contender("bare C program", command, taker(site.root / "out", "image.raw"), {}, None, None, is_bare=True)]


def _aria2(site: Site) -> Sequence[Contender]:
    if not (aria2 := found("aria2c")):
        return []
    digest = site.digest.replace("sha256:", "sha-256=")
    # By default aria2 first writes zeros, which would only slow it down here.
    options = ["-q", "-x4", "-s4", "--file-allocation=none", "--no-conf", f"--checksum={digest}"]
    command = [aria2, *options, f"--dir={site.root}/out", "--out=image.raw", site.plain]
    return [Contender("aria2c -x4 --checksum", command, taker(site.root / "out", "image.raw"), {}, 2.4, 2.8)]
