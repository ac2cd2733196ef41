"""A silent peer blocks no job: at each point of each conversation, the stall limit or a cancel ends the wait.

A row is one network operation of a job, with a real server. A proxy before the server forwards a conversation up to a
point, for each point, and then nothing more. All connections stay open.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ssvm_worker.errors import Cancelled, Retryable, WorkerError
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.net.http import HttpOptions
from ssvm_worker.sources import find_source
from ssvm_worker.sources.options import HttpSettings, SourceOptions
from ssvm_worker.stores.http_put import PutSink
from ssvm_worker.stores.s3.client import S3Settings
from ssvm_worker.stores.s3.store import S3Store, s3_destination
from ssvm_worker.streaming.interfaces import Check, Owner, Sink
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.vmware.export import DiskSource, ExportLink
from ssvm_worker.vmware.trust import Address
from ssvm_worker.vmware.upload import HostSink
from tests.servers.ftp import FtpServer
from tests.servers.http import HttpServer
from tests.servers.hush import Hush
from tests.servers.s3 import S3Server
from tests.servers.sftp import SftpServer
from tests.waiting import PATIENCE_S

DATA = random.Random(13).randbytes(200_000)
#: More than all buffers between a client and a server can hold.
BULK = random.Random(14).randbytes(1 << 20) * 24
#: A little more than two parts.
PARTS = BULK[: 11 << 20]
#: Bytes into a turn at which a peer becomes silent: before it, within its first line or packet, and far within a body.
SIZES = (0, 1, 30_000)
LOOPBACK = AddressRule(("127.0.0.0/8",))
NEVER_S = 1e6


@dataclass(frozen=True)
class Limits:
    """The limits that end a wait."""

    check: Check
    stall_s: float

    def http(self, ca_file: str | None = None) -> HttpSettings:
        """Return the limits for sources."""
        return HttpSettings(LOOPBACK, connect_timeout_s=self.stall_s, stall_s=self.stall_s, ca_file=ca_file)

    def put(self, ca_file: str | None = None) -> HttpOptions:
        """Return the limits for destinations."""
        return HttpOptions(LOOPBACK, connect_timeout_s=self.stall_s, stall_s=self.stall_s, ca_file=ca_file)


#: Runs one operation through a network, within limits; returns whether it was complete.
Act = Callable[[Limits], bool]


def _get(url: str, access: SourceOptions) -> bool:
    return b"".join(find_source([url], access, None).open()) == DATA


@contextmanager
def http(hush: Hush, tmp_path: Path, tls: bool = False) -> Iterator[Act]:
    """Download over HTTP."""
    server = HttpServer(tls=tls)
    server.serve("image", DATA)
    url = f"{'https' if tls else 'http'}://127.0.0.1:{hush.before(server.port)}/image"
    ca_file = server.ca_file(tmp_path) if tls else None
    yield lambda limits: _get(url, SourceOptions(limits.http(ca_file), check=limits.check))
    server.close()


@contextmanager
def ftp(hush: Hush, tmp_path: Path) -> Iterator[Act]:
    """Download over FTP, with its data connection."""
    server = FtpServer()
    server.reached_by = hush.before
    server.serve("image", DATA)
    url = f"ftp://127.0.0.1:{hush.before(server.port)}/image"
    yield lambda limits: _get(url, SourceOptions(limits.http(), check=limits.check))
    server.close()


@contextmanager
def sftp(hush: Hush, tmp_path: Path) -> Iterator[Act]:
    """Download over SSH."""
    server = SftpServer(tmp_path)
    server.serve("image", DATA)
    port, keys = hush.before(server.port), server.known_hosts
    keys.write_text(keys.read_text().replace(f":{server.port} ", f":{port} "))

    def act(limits: Limits) -> bool:
        access = SourceOptions(
            limits.http(), check=limits.check, username="joe", password="secret", known_hosts=str(keys)
        )
        return _get(f"sftp://127.0.0.1:{port}/image", access)

    yield act
    server.close()


@contextmanager
def put(hush: Hush, tmp_path: Path, tls: bool = False) -> Iterator[Act]:
    """Upload by one PUT."""
    server = HttpServer(tls=tls)
    server.take("image")
    url = f"{'https' if tls else 'http'}://127.0.0.1:{hush.before(server.port)}/image"
    ca_file = server.ca_file(tmp_path) if tls else None

    def act(limits: Limits) -> bool:
        with PutSink(url, len(BULK), limits.put(ca_file), check=limits.check) as sink:
            for start in range(0, len(BULK), 1 << 20):
                sink.write(BULK[start : start + (1 << 20)])
            return sink.commit().size == len(BULK)

    yield act
    server.close()


@contextmanager
def nfc(hush: Hush, tmp_path: Path, upload: bool = False) -> Iterator[Act]:
    """Read a disk from a host, or send one to it."""
    server = HttpServer(tls=True)
    server.serve("image", DATA)
    server.take("image")
    url = f"https://127.0.0.1:{hush.before(server.port)}/image"
    ca_file = Path(server.ca_file(tmp_path))

    def act(limits: Limits) -> bool:
        stall_s = limits.stall_s
        address = Address("127.0.0.1", "u", "p", ca_file=ca_file, timeout_s=stall_s, stream_timeout_s=stall_s)
        link = ExportLink(url, "", address, "")
        if not upload:
            return b"".join(DiskSource(link, limits.check).open()) == DATA
        with HostSink(link, len(BULK), limits.check, create=True) as sink:
            for start in range(0, len(BULK), 1 << 20):
                sink.write(BULK[start : start + (1 << 20)])
            return sink.commit().size == len(BULK)

    yield act
    server.close()


@dataclass(frozen=True)
class Bucket:
    """A bucket with the objects ``image`` and ``large``, and a server whose features this process knows."""

    name: str
    settings: S3Settings


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server, s3_bucket: str) -> Bucket:
    """Return one bucket for all rows."""
    settings = S3Settings(s3_server.endpoint, access_key=s3_server.access_key, secret_key=s3_server.secret_key, tries=1)
    store = S3Store("s3", s3_bucket, "", settings)
    put_bytes(store, "image", DATA, Owner())
    put_bytes(store, "large", PARTS, Owner())
    return Bucket(s3_bucket, settings)


@contextmanager
def s3(hush: Hush, tmp_path: Path, bucket: Bucket, act: Callable[[Bucket, str, Check], bool]) -> Iterator[Act]:
    """Return one operation of an S3 store, with its own key; the network is the server's HTTP proxy."""
    port = hush.before(urlsplit(bucket.settings.endpoint or "").port or 0)

    def within(limits: Limits) -> bool:
        waits = dict.fromkeys(("connect_timeout_s", "stall_s", "commit_s"), limits.stall_s)
        # One part at a time, so the conversation has the same turns each time.
        settings = replace(bucket.settings, proxy=f"http://127.0.0.1:{port}", parallel=1, late_s=0.1, **waits)
        return act(replace(bucket, settings=settings), f"{uuid.uuid4()}/object", limits.check)

    yield within


def _store(bucket: Bucket, check: Check) -> S3Store:
    return S3Store("s3", bucket.name, "", bucket.settings, check)


def _read(bucket: Bucket, key: str, check: Check) -> bool:
    return b"".join(_store(bucket, check).reader("image").open()) == DATA


def _list(bucket: Bucket, key: str, check: Check) -> bool:
    store = _store(bucket, check)
    return [each.key for each in store.list(key)] == [] and store.stat("image").size == len(DATA)


def _probe(bucket: Bucket, key: str, check: Check) -> bool:
    return _store(bucket, check).examine().sha256


def _write(bucket: Bucket, key: str, check: Check) -> bool:
    return put_bytes(_store(bucket, check), key, DATA, Owner()).size == len(DATA)


def _send_parts(sink: Sink) -> bool:
    with sink:
        for start in range(0, len(PARTS), 1 << 20):
            sink.write(PARTS[start : start + (1 << 20)])
        return sink.commit().size == len(PARTS)


def _write_parts(bucket: Bucket, key: str, check: Check) -> bool:
    return _send_parts(_store(bucket, check).writer(key, owner=Owner()))


def _upload(bucket: Bucket, key: str, check: Check) -> bool:
    url = f"s3://{bucket.name}/{key}"
    return _send_parts(s3_destination(url, bucket.settings, len(PARTS), Owner(), check))


def _copy(bucket: Bucket, key: str, check: Check) -> bool:
    """Copy ``large`` to ``KEY/large``."""
    here = _store(bucket, check)
    there = S3Store("copy", bucket.name, key, bucket.settings, check)
    return _send_parts(there.writer("large", owner=Owner(), copy_from=here))


ROWS = {
    "http source": http,
    "https source": partial(http, tls=True),
    "ftp source": ftp,
    "sftp source": sftp,
    "http put": put,
    "https put": partial(put, tls=True),
    "nfc export": nfc,
    "nfc import": partial(nfc, upload=True),
    "s3 read": partial(s3, act=_read),
    "s3 list": partial(s3, act=_list),
    "s3 probe": partial(s3, act=_probe),
    "s3 write": partial(s3, act=_write),
    "s3 write of parts": partial(s3, act=_write_parts),
    "s3 upload": partial(s3, act=_upload),
    "s3 copy": partial(s3, act=_copy),
}


class Stage:
    """One row, up to one point of its conversation."""

    def __init__(self, row: Callable[..., Any], folder: Path, turn: int | None = None, size: int = 0) -> None:
        self._row, self._folder = row, folder
        self._hush = Hush(turn, size)
        folder.mkdir()

    def run(self, stall_s: float) -> bool | WorkerError:
        """Return the row's outcome; cancel when the peer is silent, if the stall limit is infinite."""

        def check() -> None:
            if stall_s == NEVER_S and self._hush.silent.is_set():
                raise Cancelled("user")

        with ExitStack() as stack:
            stack.callback(self._hush.close)
            act = stack.enter_context(self._row(self._hush, self._folder))
            try:
                return act(Limits(check, stall_s))
            except WorkerError as error:
                return error

    @property
    def turns(self) -> int:
        """Return the number of turns of the conversation."""
        return self._hush.turns

    def end(self) -> None:
        """End its connections and their waits."""
        self._hush.close()


def outcomes(name: str, folder: Path, stall_s: float, request: pytest.FixtureRequest) -> list[bool | WorkerError]:
    """Return the row's outcome at each point of its conversation, and fail if any still waits after PATIENCE_S."""
    row: Callable[..., Any] = ROWS[name]
    if name.startswith("s3"):
        row = partial(row, bucket=request.getfixturevalue("bucket"))
    whole = Stage(row, folder / "whole")
    assert whole.run(NEVER_S / 2) is True
    points = [(turn, size) for turn in range(whole.turns) for size in SIZES]
    if name.startswith("s3"):  # each client costs a tenth of a second: far within a request, and early in an answer
        points = [(turn, SIZES[1] if turn % 2 else SIZES[2]) for turn in range(whole.turns)] + [(0, 0)]
    stages = [Stage(row, folder / f"{turn}-{size}", turn, size) for turn, size in points]
    with ThreadPoolExecutor(12) as threads:
        running = [threads.submit(stage.run, stall_s) for stage in stages]
        try:
            return [each.result(PATIENCE_S) for each in running]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for stage in stages:
                stage.end()


@pytest.mark.parametrize("row", ROWS)
def test_stall(tmp_path: Path, row: str, request: pytest.FixtureRequest) -> None:
    """Wherever a peer becomes silent, the stall limit raises a temporary error, unless all bytes had arrived."""
    found = outcomes(row, tmp_path, 1.0, request)
    assert [each for each in found if each is not True and not isinstance(each, Retryable)] == []
    assert any(isinstance(each, Retryable) for each in found)


@pytest.mark.parametrize("row", ROWS)
def test_cancel(tmp_path: Path, row: str, request: pytest.FixtureRequest) -> None:
    """Wherever a peer becomes silent, a cancel ends the wait long before a stall limit."""
    found = outcomes(row, tmp_path, NEVER_S, request)
    assert [each for each in found if each is not True and not isinstance(each, Cancelled)] == []
    assert any(isinstance(each, Cancelled) for each in found)
