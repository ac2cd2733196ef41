"""Eight connections to a TLS server that limits each to 20 MB/s, compared with aria2 (with checksum) and curl."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import trustme

from ssvm_worker.units import MiB, human_size

from .contest import Broken, Contender, Row, contest, left_out
from .download import Site, curl, found, ours, taker, write_random

_RATE = 20_000_000
_CONNECTIONS = 8
_MAX_MEMORY = 128 * MiB
_ROOT = Path(__file__).parents[1]


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Measure the wall time, then the memory of the same transfer."""
    with _serving(scratch, size) as site:
        contenders = [ours(site, site.secure), *_aria2(site), *curl(site, site.secure, 6.0)]
        rows = contest(f"{_CONNECTIONS} connections, TLS, 20 MB/s each", contenders, size, runs)
        rows.append(_memory(site, size))
    return rows + [
        left_out("connections", f"{each} is not installed") for each in ("curl", "aria2c") if not found(each)
    ]


@contextlib.contextmanager
def _serving(root: Path, size: int) -> Iterator[Site]:
    for name in ("out", "store"):
        (root / name).mkdir()
    digest = write_random(root / "image.raw", size)
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(root / "ca.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(root / "server.pem"))
    (root / "worker.toml").write_text(
        f'[stores.primary]\nurl = "file://{root}/store"\n'
        f'[download]\nallow_networks = ["127.0.0.0/8"]\nca_file = "{root}/ca.pem"\nconnections = {_CONNECTIONS}\n'
    )
    pem = str(root / "server.pem")
    command = [sys.executable, "-m", "benchmarks.limited", str(root / "image.raw"), pem, pem, str(_RATE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as server:
        assert server.stdin
        assert server.stdout
        try:
            url = f"https://127.0.0.1:{int(server.stdout.readline())}/image.raw"
            yield Site(root, "", url, f"sha256:{digest}")
        finally:
            server.stdin.close()
            server.wait()


def _aria2(site: Site) -> Sequence[Contender]:
    if not (aria2 := found("aria2c")):
        return []
    digest = site.digest.replace("sha256:", "sha-256=")
    options = ["-q", "-x8", "-s8", "-k1M", "--file-allocation=none", "--no-conf", f"--ca-certificate={site.ca}"]
    command = [aria2, *options, f"--checksum={digest}", f"--dir={site.root}/out", "--out=image.raw", site.secure]
    return [Contender("aria2c -x8 --checksum", command, taker(site.root / "out", "image.raw"))]


def _memory(site: Site, size: int) -> Row:
    request = {"url": site.secure, "account": "a", "id": "memory", "format": "raw", "checksum": site.digest}
    command = [sys.executable, "-m", "benchmarks.transfer", str(site.root / "worker.toml"), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT)
    if done.returncode:
        raise Broken(done.stderr[-3000:])
    cost = json.loads(done.stdout)
    above = cost["peak"] - cost["idle"]
    ok = "yes" if above <= _MAX_MEMORY else "**no**"
    what = f"memory, {_CONNECTIONS} connections, {human_size(size)}"
    return Row(what, f"{human_size(above)} above {human_size(cost['idle'])} idle", "", "", "≤ 128 MiB", ok)
