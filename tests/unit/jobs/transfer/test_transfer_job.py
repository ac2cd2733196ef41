"""Files are copied or moved unchanged, also without a manifest, and an artifact is complete or does not exist."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import find_manifest, read_manifest
from ssvm_worker.errors import CorruptImage, InvalidRequest, ObjectNotFound, StoreUnavailable
from ssvm_worker.jobs.moving import move_object
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.transfer import job as transfer
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner, Store
from tests.archives import ovf_of
from tests.attempts import attempt
from tests.contracts.store import put
from tests.copies import content, store_artifact

JAVA = {"9e8d.qcow2": b"x" * 3_000_000, "template.properties": b"uniquename=7-2-aa\n"}


class Renameless(MemoryStore):
    """A store that cannot rename, like S3."""

    rename = None  # type: ignore[assignment]


@pytest.fixture(params=["file", "memory", "renameless"])
def primary(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind."""
    if request.param == "file":
        (tmp_path / "primary").mkdir()
        return FileStore("primary", tmp_path / "primary")
    return Renameless("primary") if request.param == "renameless" else MemoryStore("primary")


def run(*stores: Store, **fields: Any) -> dict[str, Any]:
    """Run a transfer."""
    return transfer.run(parse_request(transfer.Request, fields, "transfer"), attempt(*stores))


def java_template(store: Store, prefix: str = "template/tmpl/2/7") -> None:
    """Store a template as the Java agent does."""
    for name, data in JAVA.items():
        put(store, f"{prefix}/{name}", data)


def test_directory_without_manifest(primary: Store, archive: MemoryStore) -> None:
    """All files of a directory are copied, and stay at the source."""
    java_template(primary)
    before = content(primary)
    result = run(primary, archive, source="primary", key="template/tmpl/2/7", store="archive")
    assert content(archive) == content(primary) == before
    assert result["objects"] == ["template/tmpl/2/7/9e8d.qcow2", "template/tmpl/2/7/template.properties"]
    assert result["bytes"] == sum(map(len, JAVA.values()))


def test_one_object(primary: Store, archive: MemoryStore) -> None:
    """One object is copied to another key, and replaces an older one."""
    put(primary, "snapshots/2/31/5f2b", b"snapshot")
    put(archive, "snapshots/2/31/other", b"old")
    fields = {"source": "primary", "key": "snapshots/2/31/5f2b", "store": "archive", "to": "snapshots/2/31/other"}
    assert run(primary, archive, **fields)["objects"] == ["snapshots/2/31/other"]
    assert content(archive) == {"snapshots/2/31/other": b"snapshot"}


def test_same_again(primary: Store, archive: MemoryStore) -> None:
    """A complete copy of an artifact is not copied again."""
    java_template(primary)
    fields = {"source": "primary", "key": "template/tmpl/2/7", "store": "archive"}
    run(primary, archive, **fields)
    assert run(primary, archive, **fields)["bytes"] == 0


def test_leftovers_of_an_attempt(primary: Store, archive: MemoryStore) -> None:
    """Files of an attempt that failed are removed first, and by discard."""
    java_template(primary)
    request = parse_request(
        transfer.Request, {"source": "primary", "key": "template/tmpl/2/7", "store": "archive"}, "transfer"
    )
    put(archive, "template/tmpl/2/7/older.qcow2", b"left")
    transfer.run(request, attempt(primary, archive))
    assert content(archive) == content(primary)
    transfer.discard(request, attempt(primary, archive))
    assert content(archive) == content(primary)
    archive.delete("template/tmpl/2/7/template.properties")
    transfer.discard(request, attempt(primary, archive))
    assert content(archive) == {}


@pytest.mark.parametrize("key", ["snapshots/2/31/5f2b", "template/tmpl/2/7/9e8d.qcow2"])
def test_killed(primary: Store, archive: MemoryStore, key: str) -> None:
    """An unfinished write of a killed attempt is removed by the next one, and by discard."""
    put(primary, key, b"data")
    fields = {"source": "primary", "key": key, "store": "archive"}
    request = parse_request(transfer.Request, fields, "transfer")
    archive.writer(key, owner=Owner("job-1", 0)).write(b"da")
    transfer.discard(request, attempt(primary, archive))
    assert archive.uncommitted() == set()
    archive.writer(key, owner=Owner("job-1", 0)).write(b"da")
    transfer.run(request, attempt(primary, archive, token=1))
    assert (archive.uncommitted(), content(archive)) == (set(), {key: b"data"})


def test_other_artifact_in_its_place(primary: Store, archive: MemoryStore) -> None:
    """Another artifact at the target is kept, and the copy fails."""
    java_template(primary)
    put(archive, "template/tmpl/2/7/b.qcow2", b"b")
    put(archive, "template/tmpl/2/7/template.properties", b"uniquename=b\n")
    with pytest.raises(InvalidRequest, match="another artifact"):
        run(primary, archive, source="primary", key="template/tmpl/2/7", store="archive")
    assert len(content(archive)) == 2


def test_manifest(primary: Store, archive: MemoryStore) -> None:
    """The manifest of a copy has its new account and id, and the same digests."""
    store_artifact(primary)
    run(primary, archive, source="primary", key="template/tmpl/2/7", store="archive", to="template/tmpl/3/8")
    copied = read_manifest(archive, Artifact("template", "3", "8"))
    assert copied.entries == read_manifest(primary, Artifact("template", "2", "7")).entries
    assert {each.key.rpartition("/")[0] for each in archive.list()} == {"template/tmpl/3/8"}


def test_damaged_source(primary: Store, archive: MemoryStore) -> None:
    """A file that differs from its manifest is not copied, and no artifact exists."""
    store_artifact(primary)
    put(primary, "template/tmpl/2/7/7.raw", b"damaged")
    with pytest.raises(CorruptImage):
        run(primary, archive, source="primary", key="template/tmpl/2/7", store="archive")
    assert find_manifest(archive, Artifact("template", "2", "7")) is None


@pytest.mark.parametrize("with_manifest", [False, True])
def test_move(primary: Store, with_manifest: bool) -> None:
    """A move changes the account of a volume, and leaves nothing at the old place."""
    if with_manifest:
        store_artifact(primary, {"7.raw": b"disk"}, Artifact("volume", "2", "7"))
    else:
        put(primary, "volumes/2/7/9e8d.qcow2", b"disk")
    fields = {"source": "primary", "store": "primary", "key": "volumes/2/7", "to": "volumes/3/7", "move": True}
    run(primary, **fields)
    assert {each.key.rpartition("/")[0] for each in primary.list()} == {"volumes/3/7"}
    assert b"disk" in content(primary).values()
    if with_manifest:
        assert read_manifest(primary, Artifact("volume", "3", "7")).artifact.account == "3"
    assert run(primary, **fields)["bytes"] == 0, "a repeated move finds its files at the new place"


class Failing(MemoryStore):
    """A store that fails at the second rename."""

    renames = 0

    def rename(self, key: str, to: str) -> None:
        """Fail once."""
        self.renames += 1
        if self.renames == 2:
            raise StoreUnavailable("The store fails", self.name)
        super().rename(key, to)


def test_interrupted_move() -> None:
    """A move continues after a failure in its middle, and no file is lost."""
    store = store_artifact(Failing("primary"), {"7.raw": b"1", "7-b.raw": b"2"}, Artifact("volume", "2", "7"))
    fields = {"source": "primary", "store": "primary", "key": "volumes/2/7", "to": "volumes/3/7", "move": True}
    request = parse_request(transfer.Request, fields, "transfer")
    with pytest.raises(StoreUnavailable):
        transfer.run(request, attempt(store))
    transfer.discard(request, attempt(store))
    transfer.run(request, attempt(store))
    assert len(read_manifest(store, Artifact("volume", "3", "7")).entries) == 2
    assert sorted(content(store)) == ["volumes/3/7/7-b.raw", "volumes/3/7/7.raw", "volumes/3/7/manifest.json"]


def test_occupied_move(primary: Store) -> None:
    """A move never replaces another volume."""
    put(primary, "volumes/2/7/a.qcow2", b"mine")
    put(primary, "volumes/3/7/b.qcow2", b"theirs")
    put(primary, "volumes/3/7/volume.properties", b"id=7\n")
    before = content(primary)
    with pytest.raises(InvalidRequest, match="another artifact"):
        run(primary, source="primary", store="primary", key="volumes/2/7", to="volumes/3/7", move=True)
    put(primary, "volumes/2/7/a.qcow2", b"mine")
    with pytest.raises(InvalidRequest, match="another artifact"):
        run(
            primary,
            source="primary",
            store="primary",
            key="volumes/2/7/a.qcow2",
            to="volumes/3/7/b.qcow2",
            move=True,
        )
    assert content(primary) == before


def test_missing(primary: Store, archive: MemoryStore) -> None:
    """A missing source is an error, also of a move."""
    with pytest.raises(ObjectNotFound):
        run(primary, archive, source="primary", key="template/tmpl/2/7", store="archive")
    with pytest.raises(ObjectNotFound):
        run(primary, source="primary", store="primary", key="volumes/2/7", to="volumes/3/7", move=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "../etc", "store": "archive"},
        {"key": "volumes/2/7", "store": "archive", "to": "volumes/../../etc"},
        {"key": "volumes/2/7", "store": "archive", "to": "/etc"},
        {"key": "volumes/2/7", "store": "archive", "move": True},
        {"key": "volumes/2/7", "store": "primary"},
        {"key": "volumes/2/7", "store": "primary", "to": "volumes/2/7/inside", "move": True},
        {"key": "volumes/2/7", "store": "primary", "to": "volumes/2", "move": True},
    ],
)
def test_invalid(fields: dict[str, Any]) -> None:
    """Hostile keys, a copy onto itself, and a move between stores are refused before the job exists."""
    with pytest.raises(InvalidRequest):
        parse_request(transfer.Request, {"source": "primary"} | fields, "transfer")


ODD = ("my disk.vmdk", "Übung (1).iso", "x" * 150 + " .vmdk")


@pytest.fixture
def odd(tmp_path: Path) -> FileStore:
    """A store with files that have names of an OVA, which this program never uses."""
    folder = tmp_path / "odd/volumes/2/7"
    folder.mkdir(parents=True)
    for name in (*ODD, "volume.properties"):
        (folder / name).write_bytes(name.encode())
    return FileStore("primary", tmp_path / "odd")


def test_odd_names(odd: FileStore, tmp_path: Path) -> None:
    """Files with names that this program never uses are copied and moved too."""
    (tmp_path / "archive").mkdir()
    target = FileStore("archive", tmp_path / "archive")
    result = run(odd, target, source="primary", key="volumes/2/7", store="archive")
    expected = {f"volumes/2/7/{name}": name.encode() for name in (*ODD, "volume.properties")}
    assert content(target.lenient()) == content(odd.lenient()) == expected
    assert set(result["objects"]) == expected.keys()
    assert run(odd, target, source="primary", key="volumes/2/7", store="archive")["bytes"] == 0
    run(odd, source="primary", key="volumes/2/7", store="primary", to="volumes/3/7", move=True)
    assert content(odd.lenient()) == {key.replace("/2/", "/3/"): data for key, data in expected.items()}
    assert [*odd.list()] == [*odd.list("volumes/3/7")] != []


def test_odd_names_for_a_strict_store(odd: FileStore, archive: MemoryStore) -> None:
    """A store that takes no such names gets nothing of the directory."""
    request = parse_request(
        transfer.Request, {"source": "primary", "key": "volumes/2/7", "store": "archive"}, "transfer"
    )
    with pytest.raises(InvalidRequest):
        transfer.run(request, attempt(odd, archive))
    transfer.discard(request, attempt(odd, archive))
    assert content(archive) == {}


def test_killed_at_an_odd_name(odd: FileStore, tmp_path: Path) -> None:
    """An unfinished write of such a file is swept."""
    (tmp_path / "archive").mkdir()
    target = FileStore("archive", tmp_path / "archive")
    target.lenient().writer(f"volumes/2/7/{ODD[0]}", owner=Owner("job-1", 0)).write(b"da")
    run(odd, target, source="primary", key="volumes/2/7", store="archive")
    assert not list((tmp_path / "archive").rglob(".*"))


def test_backup_is_refused(primary: Store, archive: MemoryStore) -> None:
    """A backup needs the job copy, which also copies its packs."""
    store_artifact(primary, {"b1.ovf": b"1"}, Artifact("backup", "2", "b1", "web"))
    with pytest.raises(InvalidRequest, match="copy"):
        run(primary, archive, source="primary", key="snapshots/2/web/b1", store="archive")


def test_rename_replaces(primary: Store) -> None:
    """A moved object has its bytes under the new key only, and replaces an older object there."""
    put(primary, "a/one", b"1")
    put(primary, "b/two", b"2")
    move_object(attempt(primary), primary, "a/one", "b/two")
    assert content(primary) == {"b/two": b"1"}
    move_object(attempt(primary), primary, "a/one", "b/two")  # again, after a lost answer
    with pytest.raises(ObjectNotFound):
        move_object(attempt(primary), primary, "a/one", "b/three")


def test_rename_of_a_link(tmp_path: Path) -> None:
    """A symbolic link in the place of an object is never renamed."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "store/a").mkdir(parents=True)
    (tmp_path / "store/a/one").symlink_to(tmp_path / "secret")
    store = FileStore("primary", tmp_path / "store")
    with pytest.raises(ObjectNotFound):
        store.rename("a/one", "b/two")
    assert hashlib.sha256((tmp_path / "secret").read_bytes()).hexdigest() == hashlib.sha256(b"secret").hexdigest()
    assert (tmp_path / "store/a/one").is_symlink()


VOLUME = "volumes/2/31/5f2b"
PACKED = {
    "source": "primary",
    "key": f"{VOLUME}/5f2b.ovf",
    "store": "primary",
    "to": f"{VOLUME}/5f2b.ova",
    "pack": True,
}
FILES = {
    "5f2b.ovf": ovf_of("5f2b-disk0.vmdk", "5f2b-disk1.vmdk", others=("vm.nvram",)),
    "5f2b-disk0.vmdk": b"0" * 3_000_000,
    "5f2b-disk1.vmdk": b"1" * 700,
    "vm.nvram": b"n",
}


def vmware_volume(store: Store, **missing: None) -> None:
    """Store a volume of VMware as the Java agent does."""
    for name, data in FILES.items():
        if name not in missing:
            put(store, f"{VOLUME}/{name}", data)


def test_pack(primary: Store) -> None:
    """The files of an OVF become one OVA, the OVF first, and all files stay."""
    vmware_volume(primary)
    before = content(primary)
    for _ in range(2):
        result = run(primary, **PACKED)
        package = content(primary).pop(PACKED["to"])
        assert (result["objects"], result["bytes"]) == ([PACKED["to"]], len(package))
        assert content(primary).keys() - before.keys() == {PACKED["to"]}
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        found = {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]
    assert list(found) == ["5f2b.ovf", "5f2b-disk0.vmdk", "5f2b-disk1.vmdk", "vm.nvram"]
    assert found == FILES


def test_pack_without_a_file(primary: Store) -> None:
    """A package without a file that its OVF names is refused, and no file is stored."""
    vmware_volume(primary, **{"5f2b-disk1.vmdk": None})
    with pytest.raises(CorruptImage, match="disk1"):
        run(primary, **PACKED)
    assert PACKED["to"] not in content(primary)


@pytest.mark.parametrize(
    "change",
    [{"move": True}, {"to": "volumes/2/32/a.ova"}, {"to": f"{VOLUME}/a.vmdk"}, {"key": f"{VOLUME}/a.vmdk"}, {"to": ""}],
)
def test_refused_pack(primary: Store, change: dict[str, Any]) -> None:
    """Only an OVF becomes an OVA, in the directory of its artifact."""
    with pytest.raises(InvalidRequest):
        run(primary, **(PACKED | change))
