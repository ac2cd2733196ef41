"""`ssvm list` and `ssvm cleanup` of stores with many artifacts: time per artifact and peak memory."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest
from ssvm_worker.demo.s3 import S3Server
from ssvm_worker.units import MiB
from tests.servers.broker import StoppableBroker
from tests.servers.versity import VersityS3

from .contest import OF_BOUND, Broken, Cost, Row, run
from .stored import AnyS3

#: Accounts that own the artifacts.
_ACCOUNTS = 20
#: One in this many artifacts has no manifest.
_INCOMPLETE = 100
_MAX_RSS = 128 * MiB
#: The target of a list of many artifacts, in seconds.
_MANY, _LIST_S = 100_000, 15.0
_BODY = b"an image"
#: Threads that fill a server.
_WRITERS = 4
Put = Callable[[str, bytes], Any]


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Measure stores of *size* artifacts. Each artifact has an image, a properties file and a manifest."""
    rows = []
    with _broker() as broker:
        for name, make in (("directory", _directory), ("versitygw", _versitygw), ("SeaweedFS", _seaweedfs)):
            with make(scratch, size) as settings:
                config = scratch / f"{name}.toml"
                config.write_text(f'{settings}[broker]\nurl = "{broker}"\n')
                for command in ("list", "cleanup"):
                    # A second clean-up would find nothing, so clean-up runs once.
                    costs = [_run(command, config) for _ in range(runs if command == "list" else 1)]
                    target_s = _LIST_S if command == "list" and size == _MANY else None
                    rows.append(_row(f"{command}, {name}, {size:,} artifacts", size, costs, target_s))
                    print(f"  {rows[-1].bench}: {rows[-1].ours}", file=sys.stderr, flush=True)
    return rows


def _run(command: str, config: Path) -> Cost:
    more = ["--older-than", "1s"] if command == "cleanup" else []
    return run([sys.executable, "-m", "ssvm_worker", command, "--json", "--config", str(config), *more])


def _row(name: str, size: int, costs: list[Cost], target_s: float | None) -> Row:
    wall, cpu, served = (statistics.median(getattr(each, what) for each in costs) for what in ("wall", "cpu", "served"))
    cost = Cost(wall, cpu, max(each.rss for each in costs))
    bound = served / len(os.sched_getaffinity(0))
    target, ok = "≤ 128 MiB", "yes"
    if target_s is not None:
        target = f"≤ {target_s:.0f} s, {target}"
        if wall > target_s:
            target += f", bound {bound:.1f} s" if bound > target_s else ""
            ok = "of bound" if bound > target_s and bound >= OF_BOUND * wall else "**no**"
    ok = ok if cost.rss <= _MAX_RSS else "**no**"
    server = f"server: {served:.1f} s CPU" if served else ""
    return Row(name, str(cost), server, f"{wall / size * 1e6:.0f} µs each", target, ok)


def _fill(size: int, put: Put, begin: int | None = None) -> None:
    """Store *size* artifacts, or each of them whose number is *begin* modulo _WRITERS."""
    for number in range(size) if begin is None else range(begin, size, _WRITERS):
        artifact = Artifact("template", f"account{number % _ACCOUNTS}", f"t{number:06}")
        name = f"{artifact.id}.raw"
        manifest = Manifest(artifact, f"job-{number}", (Entry(name, len(_BODY), str(digest_of(_BODY))),))
        put(artifact.key(name), _BODY)
        put(artifact.key("template.properties"), b"id=1\n")
        if number % _INCOMPLETE:
            put(artifact.key("manifest.json"), manifest.to_json())


@contextmanager
def _directory(scratch: Path, size: int) -> Iterator[str]:
    root = scratch / "store"
    _fill_directory(root, size)
    try:
        yield f'[stores.primary]\nurl = "file://{root}"\n'
    finally:
        shutil.rmtree(root)


def _fill_directory(root: Path, size: int) -> None:
    def put(key: str, data: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (modified, modified))

    modified = time.time() - 86400
    _fill(size, put)


@contextmanager
def _versitygw(scratch: Path, size: int) -> Iterator[str]:
    """Run versitygw over a directory. It serves the files of that directory as objects."""
    (scratch / "versitygw").mkdir()
    with VersityS3(scratch / "versitygw") as server:
        bucket = server.make_bucket()
        _fill_directory(server.root / bucket, size)
        yield _settings(server, bucket)


@contextmanager
def _seaweedfs(scratch: Path, size: int) -> Iterator[str]:
    (scratch / "weed").mkdir()
    with S3Server(scratch / "weed") as server:
        bucket = server.make_bucket()
        with ThreadPoolExecutor(_WRITERS) as writers:
            list(writers.map(lambda number: _fill(size, _Filer(server, bucket).put, number), range(_WRITERS)))
        time.sleep(2)  # so that all objects are older than a second by the server's clock
        yield _settings(server, bucket)


def _settings(server: AnyS3, bucket: str) -> str:
    keys = f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
    return f'[stores.primary]\nurl = "s3://{bucket}"\nendpoint = "{server.endpoint}"\n{keys}'


class _Filer:
    """Client of SeaweedFS's own HTTP interface, in which storing an object takes a third of the time of S3."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        assert server._process
        port = next(each for each in server._process.args if str(each).startswith("-filer.port="))  # type: ignore[union-attr]
        self._connection = HTTPConnection("127.0.0.1", int(str(port).partition("=")[2]), timeout=60)
        self._path = f"/buckets/{bucket}"

    def put(self, key: str, data: bytes) -> None:
        """Store an object."""
        self._connection.request("PUT", f"{self._path}/{key}", data)
        answer = self._connection.getresponse()
        answer.read()
        if answer.status not in (200, 201):
            raise Broken(f"SeaweedFS answers {answer.status}")


@contextmanager
def _broker() -> Iterator[str]:
    directory = Path(tempfile.mkdtemp(prefix="ssvm-bench-"))  # a socket has a short path
    broker = StoppableBroker(directory)
    broker.start()
    try:
        yield broker.url
    finally:
        broker.stop()
        shutil.rmtree(directory, ignore_errors=True)
