"""The file store follows the store contract; this module tests features of a file system."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import (
    Cancelled,
    ObjectNotFound,
    SourceUnavailable,
    StoreDenied,
    StoreFull,
    StoreUnavailable,
    WorkerError,
)
from ssvm_worker.stores.file.part_file import PartName, job_in_name
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.file.tree import translated
from ssvm_worker.streaming.interfaces import CHUNK, Owner
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from ssvm_worker.units import human_size
from tests.contracts.resumable_store import ResumableStoreContract
from tests.contracts.store import BIG, ME, fill, get, keys, put
from tests.neighbours import open_handles
from tests.privileges import unprivileged


class TestFileStore(ResumableStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> FileStore:
        return FileStore("local", tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore("local", tmp_path)


def names(root: Path) -> list[str]:
    """Return every path below the root, including hidden ones."""
    return sorted(str(each.relative_to(root)) for each in root.rglob("*"))


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Set a real limit of the kernel: a write beyond it fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Parts


def test_part_is_hidden_beside_the_object(store: FileStore, tmp_path: Path) -> None:
    """Uncommitted bytes are in the final directory under a hidden name with job and token."""
    with store.writer("a/b/object", owner=Owner("job-1", 7)) as sink:
        fill(sink, b"bytes")
        assert names(tmp_path) == ["a", "a/b", "a/b/.object.job-1.7.part"]
        sink.commit()
    assert names(tmp_path) == ["a", "a/b", "a/b/object"]


SILLY = ".nfs0123456789abcdef00000001"


def test_silly_renames(store: FileStore, tmp_path: Path) -> None:
    """An NFS client's copy of a removed file is no object, and is swept when it is old enough."""
    put_bytes(store, "a/object", b"1", ME)
    for name in (SILLY, f"{SILLY}x", ".nfsroot"):
        (tmp_path / "a" / name).write_bytes(b"12")
        os.utime(tmp_path / "a" / name, (0, 0))
    assert list(keys(store)) == ["a/object"]
    assert [(each.key, each.size) for each in store.leftovers()] == [(f"a/{SILLY}", 2)]
    assert store.sweep(60) == 0
    assert store.sweep(0) == 1
    assert names(tmp_path / "a") == [f"{SILLY}x", ".nfsroot", "object"]


def test_size_is_read_again(store: FileStore, tmp_path: Path) -> None:
    """An object whose stored size differs from the written size is an error."""
    with store.writer("a/object", owner=ME) as sink:
        fill(sink, b"bytes")
        sink._rename = lambda _: _rename_and_cut(tmp_path)  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable, match="has 3 bytes of the 5"):
            sink.commit()


def _rename_and_cut(root: Path) -> None:
    [part] = (root / "a").iterdir()
    os.truncate(part, 3)
    part.rename(root / "a/object")


def test_abort_removes_empty_directories(store: FileStore, tmp_path: Path) -> None:
    """An abort deletes all empty directories up to the root, but none with another object."""
    put_bytes(store, "a/kept", b"1", ME)
    store.writer("a/b/c/object", owner=ME).abort()
    assert names(tmp_path) == ["a", "a/kept"]


def test_delete_removes_empty_directories(store: FileStore, tmp_path: Path) -> None:
    """The deletion of the last object deletes the empty directories above it."""
    put_bytes(store, "a/b/object", b"1", ME)
    store.delete("a/b/object")
    assert names(tmp_path) == []


def test_sweep_removes_empty_directories(store: FileStore, tmp_path: Path) -> None:
    """The sweep of a part leaves no empty directories."""
    with store.writer("a/b/object", owner=ME) as sink:
        fill(sink, b"1").suspend()
    assert (store.sweep(0), names(tmp_path)) == (1, [])


def test_modes(store: FileStore, tmp_path: Path) -> None:
    """The group may read, and all others may not."""
    put_bytes(store, "a/object", b"1", ME)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "a/object").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("job_id", "plain"),
    [
        pytest.param("7b4f8d52-28d2-4e0c-95a1-5d1c9a0e6f10", True, id="UUID"),
        pytest.param("../../etc/passwd", False, id="path trick"),
        pytest.param("job.1", False, id="a dot would split the name"),
        pytest.param("", False, id="empty"),
        pytest.param("j" * 500, False, id="500 characters"),
    ],
)
def test_job_id_in_a_part_name(job_id: str, plain: bool) -> None:
    """A job id with special characters gets a plain unique part name that is found again."""
    job = job_in_name(job_id)
    assert (job == job_id) is plain
    assert len(job) <= 40
    assert PartName.parse(str(PartName("disk.qcow2", job, 3))) == PartName("disk.qcow2", job, 3)


def test_similar_job_ids_stay_apart() -> None:
    """Two job ids that differ only in unsafe characters do not share a part."""
    assert job_in_name("job/1") != job_in_name("job.1")


# Foreign files


@pytest.mark.parametrize("name", [".nfs000123", ".object.part", ".snapshot", "with blank", "object~"])
def test_foreign_files_are_neither_listed_nor_swept(store: FileStore, tmp_path: Path, name: str) -> None:
    """A file that can be neither a key nor a part is foreign, and is neither listed nor swept."""
    (tmp_path / name).write_bytes(b"not ours")
    assert (keys(store), store.sweep(0)) == ([], 0)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", [".snapshot", "lost+found"])
def test_foreign_directories_are_not_entered(store: FileStore, tmp_path: Path, name: str) -> None:
    """The listing skips a file server's snapshots and mkfs's lost+found."""
    (tmp_path / name / "a").mkdir(parents=True)
    (tmp_path / name / "a" / "object").write_bytes(b"not ours")
    assert keys(store) == []


def test_link_to_a_directory_is_refused(store: FileStore, tmp_path: Path) -> None:
    """A symbolic link instead of a directory is never followed, even if it points into the root."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real/object").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("real")
    for door in (store.stat, lambda key: get(store, key)):
        with pytest.raises(ObjectNotFound, match="link/object"):
            door("link/object")
    for door in (store.delete, lambda key: put(store, key, b"1")):
        with pytest.raises(StoreDenied, match="link/object"):
            door("link/object")
    assert keys(store) == ["real/object"]
    assert (tmp_path / "real/object").read_bytes() == b"secret"


def test_link_to_a_file_is_refused(store: FileStore, tmp_path: Path) -> None:
    """A symbolic link instead of an object is not listed, examined or read."""
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert keys(store) == []
    with pytest.raises(ObjectNotFound):
        store.stat("link")
    with pytest.raises(ObjectNotFound):
        get(store, "link")


def test_link_in_place_of_the_part_is_refused(store: FileStore, tmp_path: Path) -> None:
    """A malicious link with the part's name does not redirect the write."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"kept")
    (tmp_path / f".object.{ME.job_id}.{ME.token}.part").symlink_to(victim)
    with pytest.raises(StoreDenied):
        store.writer("object", owner=ME, resume=True)
    assert victim.read_bytes() == b"kept"


def test_pipe_in_place_of_an_object_does_not_hang(store: FileStore, tmp_path: Path) -> None:
    """A read of anything but a regular file is refused at once."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ObjectNotFound):
        get(store, "pipe")


# The directory and its file system


def test_missing_root_is_not_made(tmp_path: Path) -> None:
    """Without its root each method fails with a hint about the mount, and creates nothing."""
    store = FileStore("local", tmp_path / "not mounted")
    for door in (lambda: put_bytes(store, "a", b"1", ME), lambda: keys(store), store.usage, lambda: store.stat("a")):
        with pytest.raises(StoreUnavailable, match="mounted"):
            door()
    assert names(tmp_path) == []


def test_size_hint_beyond_the_free_space(store: FileStore, tmp_path: Path) -> None:
    """An object that cannot fit is refused before its first byte, with both sizes."""
    usage = store.usage()
    assert usage.free is not None
    with pytest.raises(StoreFull, match=re.escape(human_size(usage.free * 2))) as refused:
        store.writer("a/object", usage.free * 2, owner=ME)
    assert "free" in str(refused.value)
    assert names(tmp_path) == []


def test_full_on_the_way(store: FileStore, tmp_path: Path) -> None:
    """A failed write is permanent: later writes and the commit raise it too, and nothing is left."""
    with store.writer("a/object", owner=ME) as sink:
        with files_no_larger_than(2 * CHUNK + 5), pytest.raises(StoreFull):
            fill(sink, BIG)
        with pytest.raises(StoreFull):
            sink.write(b"more")
        with pytest.raises(StoreFull):
            sink.commit()
    assert names(tmp_path) == []


def test_bytes_behind_a_failed_write_are_not_kept(store: FileStore, tmp_path: Path) -> None:
    """After an error of the file system, no bytes are kept for a later attempt."""
    with store.writer("a/object", owner=ME) as sink:
        with files_no_larger_than(CHUNK), pytest.raises(StoreFull):
            fill(sink, BIG)
        sink.suspend()
    assert names(tmp_path) == []


def test_part_cut_by_somebody_else(store: FileStore, tmp_path: Path) -> None:
    """The part's size is compared with the written bytes before it gets its final name."""
    with store.writer("object", owner=ME) as sink:
        fill(sink, BIG)
        os.truncate(tmp_path / f".object.{ME.job_id}.{ME.token}.part", 1000)
        with pytest.raises(StoreUnavailable, match="1000 bytes"):
            sink.commit()
    assert names(tmp_path) == []


def test_object_cut_while_it_is_read(store: FileStore, tmp_path: Path) -> None:
    """A reader of an object that becomes shorter raises an error and does not end early."""
    put(store, "object", BIG)
    chunks = store.reader("object").open()
    next(chunks)
    os.truncate(tmp_path / "object", CHUNK)
    with pytest.raises(SourceUnavailable, match="early"):
        list(chunks)


def test_open_reader_keeps_the_old_object(store: FileStore) -> None:
    """An overwrite is atomic for an open reader, which gets the old bytes to their end."""
    put(store, "object", BIG)
    chunks = store.reader("object").open()
    head = next(chunks)
    put(store, "object", BIG[::-1])
    assert head + b"".join(chunks) == BIG


def test_unreadable_directory_is_not_empty(public_root: Path) -> None:
    """An unreadable directory is an error of the listing and the sweep."""
    store = FileStore("local", public_root)
    put_bytes(store, "a/b/object", b"1", ME)
    (public_root / "a").chmod(0)
    with unprivileged():
        for door in (lambda: keys(store), lambda: store.sweep(0)):
            with pytest.raises(StoreDenied):
                door()
    (public_root / "a").chmod(0o750)


def test_no_right_to_write(public_root: Path) -> None:
    """The error of an unwritable directory has a remedy."""
    with unprivileged(), pytest.raises(StoreDenied, match="right to write"):
        put_bytes(FileStore("local", public_root), "a/object", b"1", ME)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EFBIG, StoreFull),
        (errno.EACCES, StoreDenied),
        (errno.EPERM, StoreDenied),
        (errno.EROFS, StoreDenied),
        (errno.ELOOP, StoreDenied),
        (errno.ESTALE, StoreUnavailable),
        (errno.EIO, StoreUnavailable),
        (errno.ETIMEDOUT, StoreUnavailable),
        (errno.ENOTCONN, StoreUnavailable),
        (errno.EMFILE, StoreUnavailable),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_error_map(number: int, kind: type[WorkerError]) -> None:
    """Full and denied are permanent, all others are temporary, and the text names the object."""
    error = translated(OSError(number, os.strerror(number)), "local:a/object")
    assert type(error) is kind
    assert "local:a/object" in str(error)


def test_commit_with_the_directory_removed(store: FileStore, tmp_path: Path) -> None:
    """The commit of a writer whose part and directory were removed is refused."""
    with store.writer("a/object", owner=ME) as sink:
        fill(sink, BIG)
        (tmp_path / f"a/.object.{ME.job_id}.{ME.token}.part").unlink()
        (tmp_path / "a").rmdir()
        with pytest.raises(Cancelled):
            sink.commit()
    assert names(tmp_path) == []


def test_directory_in_place_of_an_object(store: FileStore, tmp_path: Path) -> None:
    """An object cannot replace a directory, and its part is deleted."""
    put_bytes(store, "a/object/below", b"1", ME)
    with pytest.raises(StoreDenied):
        put_bytes(store, "a/object", b"2", ME)
    assert names(tmp_path) == ["a", "a/object", "a/object/below"]
    assert read_bytes(store, "a/object/below") == b"1"


def test_no_handles_are_left_open(store: FileStore, tmp_path: Path) -> None:
    """Sinks and readers close their handles in every case."""
    before = open_handles(tmp_path)
    put(store, "a/object", BIG[:100])
    store.writer("a/other", owner=ME).abort()
    store.writer("a/other", owner=ME).suspend()
    next(store.reader("a/object").open())
    with pytest.raises(StoreFull):
        store.writer("a/full", 1 << 60, owner=ME)
    assert keys(store) == ["a/object"]
    assert open_handles(tmp_path) == before
