"""copy: the other store has the artifact completely, as in its manifest, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.errors import CorruptImage, InvalidRequest, ObjectNotFound, StoreFull, StoreUnavailable, WorkerError
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from tests.attempts import again, attempt
from tests.contracts.store import put
from tests.copies import OBJECTS, PLACE, content, store_artifact
from tests.documents import check_document
from tests.faults import images, store_failing, store_failing_commit, store_full
from tests.grain_bench import back_up, changed, disk, packs, restored
from tests.servers.s3 import S3Server
from tests.unit.stores.s3.test_s3_store import settings_of

MiB = 1 << 20
HERE = {"account": "2", "id": "7"}
BACKUP = {"kind": "backup", "account": "acme", "volume": "vol1"}


@pytest.fixture
def source() -> MemoryStore:
    """Return a store with the artifact."""
    store: MemoryStore = store_artifact(MemoryStore("primary"))
    return store


def run(*stores: Store, how: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Copy from primary to archive, unless *fields* say otherwise."""
    request = parse_request(copy.Request, HERE | {"stores": ["archive"]} | fields, "copy")
    result = copy.run(request, attempt(*stores, **(how or {})))
    check_document("copy.result", result)
    return result


def test_copy(source: MemoryStore, archive: MemoryStore) -> None:
    """The other store has equal objects and an equal manifest, and the result has the copied amount."""
    result = run(source, archive)

    assert content(archive) == content(source)
    assert archive.uncommitted() == set()
    size = sum(map(len, OBJECTS.values()))
    assert result["copied"]["archive"] == {"objects": 3, "packs": 0, "bytes": size, "reused": False}


def test_several(source: MemoryStore, archive: MemoryStore) -> None:
    """Each named store gets the artifact."""
    other = MemoryStore("other")
    run(source, archive, other, stores=["archive", "other"])
    assert content(other) == content(archive) == content(source)


@pytest.mark.parametrize("there", ["s3", "file"])
def test_between_kinds(tmp_path: Path, s3_server: S3Server, there: str) -> None:
    """A copy from a directory to S3 and back equals the artifact, and passes verify."""
    names = ("archive", "primary") if there == "s3" else ("primary", "archive")
    s3 = S3Store(names[0], s3_server.make_bucket(), "", settings_of(s3_server))
    file = FileStore(names[1], tmp_path)
    source, target = (file, s3) if there == "s3" else (s3, file)
    run(store_artifact(source), target)
    assert content(target) == content(source)
    assert verify.run(parse_request(verify.Request, HERE | {"stores": ["archive"]}, "verify"), attempt(target))


def test_again(source: MemoryStore, archive: MemoryStore) -> None:
    """An artifact that exists already is not copied."""
    run(source, archive)
    when = archive.stat(PLACE.key("7.raw")).modified
    assert run(source, archive)["copied"]["archive"]["reused"]
    assert archive.stat(PLACE.key("7.raw")).modified == when


def test_another_in_its_place(source: MemoryStore, archive: MemoryStore) -> None:
    """Another artifact of that name is refused and stays unchanged."""
    before = content(store_artifact(archive, {"7.raw": b"another"}))
    with pytest.raises(InvalidRequest, match="another artifact"):
        run(source, archive)
    assert content(archive) == before


def test_nothing_to_copy(archive: MemoryStore) -> None:
    """An artifact that the source lacks cannot be copied."""
    with pytest.raises(ObjectNotFound):
        run(MemoryStore("primary"), archive)


def test_to_itself(source: MemoryStore) -> None:
    """A store cannot be copied to itself."""
    with pytest.raises(InvalidRequest, match="also one of the stores"):
        run(source, stores=["primary"])


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[:-1] + b"!", lambda data: data[:-1], lambda data: data + b"!"],
    ids=["other", "-1", "+1"],
)
def test_damaged_source(source: MemoryStore, archive: MemoryStore, name: str, spoil: Any) -> None:
    """Damage at the source is found before the commit, is named, and leaves nothing at the target."""
    put(source, PLACE.key(name), spoil(OBJECTS[name]))
    request = parse_request(copy.Request, HERE | {"stores": ["archive"]}, "copy")
    it = attempt(source, archive)
    with pytest.raises(CorruptImage, match=f"primary:template/tmpl/2/7/{name}"):
        copy.run(request, it)
    copy.discard(request, it)
    assert (content(archive), archive.uncommitted()) == ({}, set())


@pytest.mark.parametrize("error", [StoreUnavailable("gone"), StoreFull("full")], ids=["away", "full"])
def test_goes_on(source: MemoryStore, archive: MemoryStore, error: WorkerError) -> None:
    """After a failure the next attempt copies only missing objects."""
    failing = store_failing(archive, 0, error, chosen=lambda key: key.endswith("7-more.raw"))
    with pytest.raises(type(error)):
        run(source, failing)
    assert find_manifest(archive, PLACE) is None
    assert run(source, archive, how={"number": 2, "token": 1})["copied"]["archive"]["objects"] == 2
    assert content(archive) == content(source)


def test_goes_on_within_an_object(source: MemoryStore, archive: MemoryStore) -> None:
    """If the store can, the bytes of an unfinished object are reused."""
    with pytest.raises(StoreUnavailable):
        run(source, store_failing(archive, 2 * MiB, chosen=images), how={"will_resume": again})
    assert archive.uncommitted() == {PLACE.key("7.raw")}
    run(source, archive, how={"token": 1})
    assert content(archive) == content(source)


def test_damaged_remains(source: MemoryStore, archive: MemoryStore) -> None:
    """Damaged bytes of an earlier attempt are deleted, and the object is copied from its first byte."""
    with pytest.raises(StoreUnavailable):
        run(source, store_failing(archive, 2 * MiB, chosen=images), how={"will_resume": again})
    with archive.writer(PLACE.key("7.raw"), owner=Owner("job-1", 0)) as sink:
        sink.write(b"!" * MiB)
        sink.suspend()
    run(source, archive, how={"token": 1})
    assert content(archive) == content(source)


def test_full_store_keeps_no_part(source: MemoryStore, archive: MemoryStore) -> None:
    """A part does not stay on a full store until it has room."""
    with pytest.raises(StoreFull):
        run(source, store_full(archive, 2 * MiB, chosen=images), how={"will_resume": lambda _: True})
    assert archive.uncommitted() == set()


def test_remains_of_another(source: MemoryStore, archive: MemoryStore) -> None:
    """Leftovers of another killed attempt in the same place are deleted."""
    put_bytes(archive, PLACE.key("7.qcow2"), b"unfinished", Owner("job-dead", 1))
    run(source, archive)
    assert content(archive) == content(source)


def test_move(source: MemoryStore, archive: MemoryStore) -> None:
    """After a move only the target has the artifact."""
    before = content(source)
    assert run(source, archive, move=True)["moved"]
    assert (content(archive), content(source)) == (before, {})


def test_move_again(source: MemoryStore, archive: MemoryStore) -> None:
    """A move that was killed after the deletion at the source succeeds in the next attempt."""
    run(source, archive, move=True)
    assert run(source, archive, move=True)["moved"]


def test_move_of_what_was_damaged(source: MemoryStore, archive: MemoryStore) -> None:
    """A move with an incomplete target leaves the source unchanged."""
    run(source, archive)
    put(archive, PLACE.key("7.raw"), b"damaged")
    with pytest.raises(CorruptImage, match="archive:"):
        run(source, archive, move=True)
    assert find_manifest(source, PLACE)


def test_manifest_is_last(source: MemoryStore, archive: MemoryStore) -> None:
    """While one object is missing, the artifact does not exist at the target."""
    with pytest.raises(StoreUnavailable):
        run(source, store_failing_commit(archive, chosen=lambda key: key.endswith(".properties")))
    assert find_manifest(archive, PLACE) is None


@pytest.fixture
def volume() -> MemoryStore:
    """Return two incremental backups of a volume, which share packs."""
    store = MemoryStore("primary")
    back_up(store, "b1", disk(24))
    back_up(store, "b2", changed(disk(24), 3, 7))
    return store


def test_incremental(volume: MemoryStore, archive: MemoryStore) -> None:
    """A copied incremental backup has its packs, copies only missing ones, and restores."""
    first, second = (run(volume, archive, **BACKUP, id=each)["copied"]["archive"] for each in ("b1", "b2"))
    found = find_manifest(archive, Artifact("backup", "acme", "b2", "vol1"))
    assert found
    assert restored(archive, found) == changed(disk(24), 3, 7)
    assert first["packs"] + second["packs"] == len(packs(volume)) == len(packs(archive))


def test_damaged_pack(volume: MemoryStore, archive: MemoryStore) -> None:
    """A pack with one wrong byte is refused, and nothing is left at the target."""
    key = next(each.key for each in volume.list() if "/_packs/" in each.key)
    data = read_bytes(volume, key, 64 * MiB)
    put(volume, key, data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    request = parse_request(copy.Request, BACKUP | {"id": "b2", "stores": ["archive"]}, "copy")
    with pytest.raises(CorruptImage, match="pack"):
        copy.run(request, attempt(volume, archive))
    copy.discard(request, attempt(volume, archive))
    assert content(archive) == {}
