"""A backup restored as image files: identical by qemu-img, or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.errors import (
    Cancelled,
    ChecksumMismatch,
    CorruptImage,
    InvalidRequest,
    ObjectNotFound,
    StoreUnavailable,
)
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.restore import job as restore
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores import open_store
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import KiB, MiB
from tests import grain_bench
from tests.attempts import attempt
from tests.backups import BACKUP, content, store_backup
from tests.documents import check_document
from tests.faults import store_failing, store_failing_commit
from tests.qemu import assert_same_disk
from tests.servers.s3 import S3Server

DISKS = [content(3 * MiB + 512, seed=1), content(1 * MiB, seed=2)]
PLACE = "volumes/acme/r1"


def asked(**fields: Any) -> restore.Request:
    """Return a request for the whole backup as files."""
    backup = {"account": "acme", "volume": "vol1", "id": "b1"}
    target = {} if {"template", "vcenter"} & set(fields) else {"directory": PLACE}
    return parse_request(restore.Request, backup | target | fields, "restore")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """Return a directory store with a backup of two disks."""
    (tmp_path / "store").mkdir()
    store = FileStore("primary", tmp_path / "store")
    store_backup(store, *DISKS)
    return store


def source(tmp_path: Path, number: int) -> Path:
    """Return the original disk as a raw file."""
    path = tmp_path / f"source{number}"
    path.write_bytes(DISKS[number])
    return path


@pytest.mark.parametrize("format_", ["raw", "qcow2", "vmdk"])
def test_whole_vm(store: FileStore, tmp_path: Path, format_: str) -> None:
    """Every disk becomes a file that qemu-img finds intact and identical, and their artifact passes verify."""
    restore.run(asked(format=format_), attempt(store))

    for number in range(2):
        made = tmp_path / "store" / PLACE / f"r1-disk{number}.{format_}"
        assert_same_disk(made, format_, source(tmp_path, number))
    request = {"kind": "volume", "account": "acme", "id": "r1"}
    verify.run(parse_request(verify.Request, request, "verify"), attempt(store))


@pytest.mark.parametrize("format_", ["raw", "qcow2", "vmdk"])
def test_s3_to_s3(s3_server: S3Server, tmp_path: Path, format_: str) -> None:
    """A disk is restored from one bucket to another, in any format."""
    keys = {"endpoint": s3_server.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    here, there = (open_store(name, f"s3://{s3_server.make_bucket()}", **keys) for name in ("here", "there"))
    store_backup(here, *DISKS)

    restore.run(asked(store="here", stores=["there"], disk="0", format=format_), attempt(here, there))

    (tmp_path / "made").write_bytes(b"".join(there.reader(f"{PLACE}/r1.{format_}").open()))
    assert_same_disk(tmp_path / "made", format_, source(tmp_path, 0))


@pytest.mark.parametrize("format_", ["raw", "qcow2", "vmdk"])
def test_incremental_backup(tmp_path: Path, format_: str) -> None:
    """A backup that shares grains with an earlier one restores alone, in any format."""
    store = FileStore("primary", tmp_path)
    first = grain_bench.disk(20)
    second = grain_bench.changed(first, 3, 8) + bytes(512)
    grain_bench.back_up(store, "b0", first)
    grain_bench.back_up(store, "b1", second)
    (tmp_path / "source").write_bytes(second)

    restore.run(asked(format=format_), attempt(store))

    assert_same_disk(tmp_path / PLACE / f"r1.{format_}", format_, tmp_path / "source")


def test_damaged_incremental_backup(tmp_path: Path) -> None:
    """A damaged pack of grains leaves nothing at the target."""
    store = FileStore("primary", tmp_path)
    grain_bench.back_up(store, "b1", grain_bench.disk(20))
    _flip(tmp_path / grain_bench.packs(store)[0], 200_000)

    fail(asked(format="raw"), attempt(store), CorruptImage)

    assert left(store) == []


def test_template(store: FileStore, tmp_path: Path) -> None:
    """A disk becomes a template in CloudStack's layout, with the properties that CloudStack reads."""
    result = restore.run(asked(template="t1", disk="Hard disk 2", name="web server"), attempt(store))
    check_document("restore.result", result)

    place = tmp_path / "store/template/tmpl/acme/t1"
    assert_same_disk(place / "t1.qcow2", "qcow2", source(tmp_path, 1))
    properties = (place / "template.properties").read_text()
    assert "filename=t1.qcow2\n" in properties
    assert f"virtualsize={len(DISKS[1])}\n" in properties
    assert result["objects"] == ["t1.qcow2", "template.properties"]


def test_raw_is_sparse_where_the_disk_is(tmp_path: Path) -> None:
    """A raw file is sparse where the disk is empty."""
    store = FileStore("primary", tmp_path)
    store_backup(store, b"\1" * 64 * KiB + bytes(16 * MiB))

    restore.run(asked(format="raw"), attempt(store))

    seen = (tmp_path / PLACE / "r1.raw").stat()
    assert seen.st_size == 16 * MiB + 64 * KiB
    assert seen.st_blocks * 512 < 1 * MiB


@pytest.mark.parametrize("name", ["1", "b1-disk1.vmdk", "Hard disk 2", "scsi0:1", "2001"])
def test_one_disk(store: FileStore, tmp_path: Path, name: str) -> None:
    """One disk is selected by number, object, label, position or key."""
    restore.run(asked(disk=name, format="raw"), attempt(store))

    assert (tmp_path / "store" / PLACE / "r1.raw").read_bytes() == DISKS[1]


def test_two_stores(store: FileStore) -> None:
    """The files are written to every named store in one pass."""
    archive = MemoryStore("archive")

    result = restore.run(asked(stores=["archive", "primary"], format="raw"), attempt(store, archive))

    assert result["stores"] == ["archive", "primary"]
    for number, raw in enumerate(DISKS):
        assert b"".join(archive.reader(f"{PLACE}/r1-disk{number}.raw").open()) == raw


def test_second_store_fails(store: FileStore) -> None:
    """A second store that fails midway does not affect the first, is owed, and keeps no files."""
    archive = MemoryStore("archive")
    failing = store_failing(archive, after=len(DISKS[1]))

    result = restore.run(asked(stores=["primary", "archive"], format="raw"), attempt(store, failing))

    assert list(result["owed"]) == ["archive"]
    assert not list(archive.list())
    assert not archive.uncommitted()


def test_twice(store: FileStore) -> None:
    """A repeated restore is answered from its manifest."""
    first = restore.run(asked(), attempt(store))

    assert restore.run(asked(), attempt(store, job_id="job-2")) == first | {"reused": True}


@pytest.mark.parametrize("other", [{"format": "raw"}, {"disk": "0"}], ids=["another format", "one disk only"])
def test_something_else_is_there(store: FileStore, other: dict[str, str]) -> None:
    """An existing target is never overwritten."""
    restore.run(asked(), attempt(store))

    with pytest.raises(InvalidRequest, match="already"):
        restore.run(asked(**other), attempt(store, job_id="job-2"))


def left(store: Store) -> list[str]:
    """Return the objects where the files would be."""
    return [each.key for each in store.list(PLACE)]


def fail(request: restore.Request, trying: Any, error: Any) -> None:
    """Fail the job so, and check that its leftovers are deleted because no attempt follows."""
    with pytest.raises(error):
        restore.run(request, trying)
    trying.stop_reason = lambda: None
    restore.discard(request, trying)


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(70_000, id="in a grain"),
        pytest.param(64 * KiB, id="in a marker"),
        pytest.param(-1024 + 300, id="in the footer, where nobody reads it"),
    ],
)
@pytest.mark.parametrize("format_", ["raw", "qcow2", "vmdk"])
def test_damaged_backup(store: FileStore, tmp_path: Path, format_: str, at: int) -> None:
    """Damage in the second disk leaves no file of either disk at the target."""
    _flip(tmp_path / "store" / BACKUP.key("b1-disk1.vmdk"), at)

    fail(asked(format=format_), attempt(store), (CorruptImage, ChecksumMismatch))

    assert left(store) == []
    assert store.sweep(0) == 0


@pytest.mark.parametrize("format_", ["raw", "qcow2", "vmdk"])
def test_shortened_backup(store: FileStore, tmp_path: Path, format_: str) -> None:
    """A truncated disk leaves nothing at the target."""
    file = tmp_path / "store" / BACKUP.key("b1-disk1.vmdk")
    file.write_bytes(file.read_bytes()[:300_000])

    fail(asked(format=format_), attempt(store), (CorruptImage, ChecksumMismatch))

    assert left(store) == []


@pytest.mark.parametrize(
    ("after", "where"),
    [
        pytest.param(0, "disk0", id="at the first byte"),
        pytest.param(2 * MiB, "disk0", id="in the middle"),
        pytest.param(64 * KiB, "disk1", id="in the second disk"),
    ],
)
def test_target_fails(store: FileStore, after: int, where: str) -> None:
    """A failing target is a temporary error, and nothing is left on it."""
    archive = MemoryStore("archive")
    failing = store_failing(archive, after, chosen=lambda key: where in key)

    fail(asked(stores=["archive"], format="raw"), attempt(store, failing), StoreUnavailable)

    assert left(archive) == []
    assert not archive.uncommitted()


def test_retry_after_a_failure(store: FileStore, tmp_path: Path) -> None:
    """After an attempt that was killed behind the first disk, the next attempt writes all disks."""
    failing = store_failing_commit(store, times=1, chosen=lambda key: key.endswith("disk1.raw"))
    with pytest.raises(StoreUnavailable):
        restore.run(asked(format="raw"), attempt(failing, number=1))

    restore.run(asked(format="raw"), attempt(store, number=2, token=1))

    assert (tmp_path / "store" / PLACE / "r1-disk1.raw").read_bytes() == DISKS[1]
    assert store.sweep(0) == 0


@pytest.mark.parametrize("format_", ["raw", "qcow2", "vmdk"])
def test_cancelled(store: FileStore, format_: str) -> None:
    """A cancel in the middle leaves nothing."""
    trying = attempt(store)
    trying.stop_reason = lambda: "user" if trying.progress.bytes > MiB else None

    fail(asked(format=format_), trying, Cancelled)

    assert left(store) == []
    assert store.sweep(0) == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        pytest.param({"directory": None}, "one target of vcenter, template, directory", id="no target"),
        pytest.param({"template": "t1", "directory": PLACE}, "template and directory", id="two targets"),
        pytest.param({"directory": "snapshots/acme/vol1/b2"}, "volumes/ACCOUNT/ID", id="among the backups"),
        pytest.param({"directory": "../../etc"}, "Invalid prefix of an artifact", id="a path that climbs"),
        pytest.param({"directory": "volumes/acme/r1/"}, "volumes/ACCOUNT/ID", id="a slash too many"),
        pytest.param({"template": "../x"}, "characters", id="a template id that climbs"),
        pytest.param({"datastore": "fast"}, "datastore: not with directory", id="a datastore for files"),
        pytest.param({"vcenter": "vc1"}, "name: missing", id="a VM without a name"),
        pytest.param({"vcenter": "vc1", "name": "x", "disk": "0"}, "disk: not with vcenter", id="a VM of one disk"),
        pytest.param({"format": "vhd"}, "raw", id="unknown format"),
    ],
)
def test_requests_that_are_refused_when_read(fields: dict[str, Any], said: str) -> None:
    """An invalid request is refused before any change, with the problem."""
    with pytest.raises(InvalidRequest, match=said):
        asked(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        pytest.param({"id": "b2"}, ObjectNotFound, "no complete backup", id="no such backup"),
        pytest.param({"disk": "7"}, InvalidRequest, "Hard disk 2|hard disk 2", id="no such disk"),
        pytest.param({"template": "t1"}, InvalidRequest, "scsi0:1", id="a template of two disks"),
        pytest.param({"stores": ["nowhere"]}, InvalidRequest, "primary", id="unknown store"),
    ],
)
def test_wrong_restores(store: FileStore, fields: dict[str, Any], error: type[Exception], said: str) -> None:
    """The error of a wrong request lists what exists instead."""
    with pytest.raises(error, match=said):
        restore.run(asked(**fields), attempt(store))
