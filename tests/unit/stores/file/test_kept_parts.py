"""A part of an earlier attempt survives errors before its bytes are used, and an abort waits for no thread."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ssvm_worker.errors import Cancelled, SourceUnavailable, StoreFull, StoreUnavailable
from ssvm_worker.grain_store.sink import GrainSink
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.file.part_file import FileSink
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.file.tree import translated
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.disk_buffer import DiskBuffer
from ssvm_worker.streaming.interfaces import LeavingAborts, Owner, Sink, Store
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from tests import images
from tests.attempts import attempt
from tests.contracts.store import BIG, CHUNK, ME, fill
from tests.neighbours import open_handles
from tests.servers.http import Behaviour, HttpServer
from tests.waiting import PATIENCE_S

NEXT = Owner(ME.job_id, 2)
LAST = Owner(ME.job_id, 3)
IMAGE = images.mbr(6 << 20)


class Hiccup(FileStore):
    """A directory whose free space cannot be read for a moment."""

    error: Exception | None = None

    def _check_room(self, location: str, size: int) -> None:
        if self.error:
            raise self.error
        super()._check_room(location, size)


def left_by(store: Store, owner: Owner) -> None:
    """Make an attempt that breaks off in the middle."""
    with store.writer("a/object", owner=owner) as sink:
        fill(sink, BIG[: 3 * CHUNK]).suspend()


def kept(store: Store) -> int:
    """Return the bytes of the part that the next attempt would find."""
    with store.writer("a/object", owner=LAST, resume=True) as sink:
        offset = sink.offset
        sink.suspend()
    return offset


PASSING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN)


@pytest.mark.parametrize("number", PASSING, ids=lambda value: errno.errorcode[value])
def test_passing_error(tmp_path: Path, number: int) -> None:
    """A temporary error during a resumption deletes none of the part's bytes."""
    store = Hiccup("primary", tmp_path)
    left_by(store, ME)
    store.error = translated(OSError(number, os.strerror(number)), "primary:a/object")
    with pytest.raises(StoreUnavailable):
        store.writer("a/object", owner=NEXT, resume=True)
    store.error = None
    assert kept(store) == 3 * CHUNK


def test_cancelled_before_it_begins(tmp_path: Path) -> None:
    """A shutdown at that moment deletes none either."""
    store = Hiccup("primary", tmp_path)
    left_by(store, ME)
    store.error = Cancelled("shutdown")
    with pytest.raises(Cancelled):
        store.writer("a/object", owner=NEXT, resume=True)
    store.error = None
    assert kept(store) == 3 * CHUNK


def test_full(tmp_path: Path) -> None:
    """A part that cannot become an object on a full store is deleted."""
    store = FileStore("primary", tmp_path)
    left_by(store, ME)
    with pytest.raises(StoreFull):
        store.writer("a/object", 1 << 60, owner=NEXT, resume=True)
    assert list(store.leftovers()) == []


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "fresh"])
def test_out_of_handles(tmp_path: Path, resume: bool) -> None:
    """If an open fails without handles, none leaks, a resumed part stays, and a new part is deleted."""
    store, failed = FileStore("primary", tmp_path), 0
    for spare in range(10):
        left_by(store, ME)
        before = open_handles(tmp_path)
        with handles_left(spare):
            sink = opened(store, resume)
        failed += sink is None
        if sink:
            sink.suspend()
        assert open_handles(tmp_path) == before
        sizes = [each.size for each in store.leftovers()]
        assert sizes == [3 * CHUNK] if resume else sum(sizes) in (0, 3 * CHUNK)
        store.sweep(0)
    assert 3 <= failed < 10


def opened(store: FileStore, resume: bool) -> Sink | None:
    """Return the sink of the next attempt, or None after a temporary error."""
    try:
        return store.writer("a/object", owner=NEXT, resume=resume)
    except StoreUnavailable:
        return None


@contextlib.contextmanager
def handles_left(count: int) -> Iterator[None]:
    """Let the process open only so many more files: a real limit of the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    held = []
    while (descriptor := os.open("/dev/null", os.O_RDONLY)) <= highest:  # until no number below the highest is free
        held.append(descriptor)
    os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in held:
            os.close(each)


# Jobs


class Refusing(MemoryStore):
    """A second store at which a worker that shuts down notices it."""

    def writer(self, *_: object, **__: object) -> object:  # type: ignore[override]
        raise Cancelled("shutdown")


def no_draft(store: FileStore) -> None:
    """Make the journal of the download unwritable from now on."""

    def writer(key: str, *args: object, **given: object) -> object:
        if key.endswith("draft.json"):
            raise StoreUnavailable("No", key)
        return FileStore.writer(store, key, *args, **given)  # type: ignore[arg-type]

    store.writer = writer  # type: ignore[assignment]


def hiccup(store: Hiccup) -> None:
    """Make its free space unreadable from now on."""
    store.error = StoreUnavailable("EIO", "primary")


@pytest.mark.parametrize("fault", ["statvfs", "the other store", "the draft"])
def test_download(http_server: HttpServer, tmp_path: Path, fault: str) -> None:
    """A second attempt that fails before its first new byte keeps the first one's bytes for the third."""
    store: FileStore = Hiccup("primary", tmp_path)
    asked = parse_request(
        download.Request,
        {"url": http_server.url("image"), "account": "2", "id": "7", "stores": ["primary", "second"]},
        "download",
    )

    def run(second: MemoryStore, token: int) -> dict[str, object]:
        keep: Callable[[BaseException], bool] = lambda _: True  # noqa: E731
        trying: Attempt = attempt(store, second, token=token, will_resume=keep)
        return download.run(asked, trying)

    http_server.serve("image", IMAGE, cut_after=2 << 20, then=Behaviour(status=503))
    with pytest.raises(SourceUnavailable):
        run(MemoryStore("second"), 1)
    http_server.serve("image", IMAGE)
    if fault == "statvfs":
        hiccup(store)  # type: ignore[arg-type]
    elif fault == "the draft":
        (part,) = tmp_path.rglob("*.part")
        os.truncate(part, 1 << 20)  # so that the draft must be written first
        no_draft(store)
    with pytest.raises((StoreUnavailable, Cancelled)):
        run(Refusing("second") if fault == "the other store" else MemoryStore("second"), 2)

    store = FileStore("primary", tmp_path)
    assert run(MemoryStore("second"), 3)["resumptions"] == 1
    assert read_bytes(store, "template/tmpl/2/7/7.raw") == IMAGE


# Aborts


def test_abort_beside_a_hanging_call(tmp_path: Path) -> None:
    """An abort deletes the part of a hanging call, and no other file gets its handle meanwhile."""
    store, inside, go_on = FileStore("primary", tmp_path), threading.Event(), threading.Event()
    sink = store.writer("a/object", owner=ME)
    sink.write(BIG[:CHUNK])

    def hang() -> tuple[int, int]:
        with sink._file.use() as handle:
            inside.set()
            assert go_on.wait(PATIENCE_S)
            return os.fstat(handle).st_ino, handle

    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(hang)
        assert inside.wait(PATIENCE_S)
        sink.abort()
        assert list(tmp_path.iterdir()) == []
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        go_on.set()
        inode, handle = hanging.result()
        assert (inode, handle in others) == (sink._identity[1], False)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)
        for each in others:
            os.close(each)
    assert sink.sync() == 0


def test_settle_holds_up_nobody(tmp_path: Path) -> None:
    """A suspend during another call keeps the bytes, and a later flush reports all of them."""
    sink = FileStore("primary", tmp_path).writer("a/object", owner=ME)
    fill(sink, BIG)
    with sink._file.use():
        sink.suspend()
    assert sink.sync() == len(BIG)


class Unclean(LeavingAborts):
    """A sink whose abort fails."""

    key = "a/object"

    def abort(self) -> None:
        raise StoreUnavailable("The store is away")


def test_first_error_is_raised() -> None:
    """A failing abort never replaces the error of the block, and is raised if there is none."""
    with pytest.raises(ZeroDivisionError), Unclean():
        _ = 1 / 0
    with pytest.raises(StoreUnavailable), Unclean():
        pass


@pytest.mark.parametrize("sink", [FileSink, GrainSink, DiskBuffer], ids=lambda each: each.__name__)
def test_all_sinks_are_left_so(sink: type[object]) -> None:
    """Every sink ends in that way."""
    assert sink.__exit__ is LeavingAborts.__exit__  # type: ignore[attr-defined]


def test_root_gone_at_the_abort(tmp_path: Path) -> None:
    """A root that disappears during a write does not hide the write's error."""
    store = FileStore("primary", tmp_path / "root")
    (tmp_path / "root").mkdir()
    put_bytes(store, "b", b"1", ME)
    sink = store.writer("a/object", owner=ME)
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    with pytest.raises(ZeroDivisionError), sink:
        _ = 1 / 0
