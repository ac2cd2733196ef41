"""verify of a backup: digests, the structure of each disk, and agreement of OVF, .mf and manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.manifest import Manifest, read_manifest, write_manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Owner, Store
from ssvm_worker.streaming.pipeline import put_bytes, read_bytes
from ssvm_worker.units import KiB
from tests.attempts import attempt
from tests.backups import BACKUP, content, store_backup

REQUEST = {"kind": "backup", "account": "acme", "volume": "vol1", "id": "b1"}


@pytest.fixture
def store() -> Store:
    """Return a store with a backup of two disks."""
    store = MemoryStore("primary")
    store_backup(store, content(512 * KiB, seed=1), content(256 * KiB, seed=2))
    return store


def run(store: Store) -> dict[str, Any]:
    return verify.run(parse_request(verify.Request, REQUEST, "verify"), attempt(store))


def rewrite(store: Store, name: str, change: Callable[[bytes], bytes]) -> None:
    """Replace the content of an object, and its digest in the manifest."""
    data = change(read_bytes(store, BACKUP.key(name)))
    put_bytes(store, BACKUP.key(name), data, Owner())
    manifest: Manifest = read_manifest(store, BACKUP)
    entry = manifest.entry(name)
    assert entry is not None
    write_manifest(
        store,
        manifest.with_entry(dataclasses.replace(entry, size=len(data), digest=str(digest_of(data)))),
        Owner(),
    )


def test_nothing_found(store: Store) -> None:
    """An unchanged backup passes."""
    assert run(store)["objects"] == 4


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        pytest.param("b1-disk1.vmdk", lambda it: it[:-512], "no end-of-stream marker", id="a disk without its end"),
        pytest.param("b1-disk0.vmdk", lambda it: bytes(len(it)), "no VMDK header", id="a disk of zeros"),
        pytest.param("b1.ovf", lambda it: it.replace(b"-disk1", b"-disk7"), "names b1-disk7", id="a file too many"),
        pytest.param("b1.ovf", lambda it: it.replace(b"-disk1", b"-disk7"), "not name b1-disk1", id="a file too few"),
        pytest.param("b1.ovf", lambda it: it.replace(b'size="', b'size="9'), "instead of", id="another size"),
        pytest.param("b1.ovf", lambda _: b"<Envelope>", "cannot be read", id="no OVF"),
        pytest.param("b1.mf", lambda it: it.replace(b"disk1", b"disk7"), "b1.mf names", id="a checksum too many"),
        pytest.param("b1.mf", lambda it: it.replace(b"= ", b"= 00")[:-3], "b1.mf|no known form", id="no checksums"),
        pytest.param("b1.mf", lambda it: it[:-5] + b"0000\n", "b1.mf gives b1-disk1.vmdk", id="another checksum"),
    ],
)
def test_contradictions(store: Store, name: str, change: Callable[[bytes], bytes], said: str) -> None:
    """Contradictions between its parts are found even if every digest is right."""
    rewrite(store, name, change)

    with pytest.raises(CorruptImage, match=said):
        run(store)


def test_damage_and_structure(store: Store) -> None:
    """Damage in a disk is reported once, by its digest."""
    data = read_bytes(store, BACKUP.key("b1-disk1.vmdk"))
    put_bytes(store, BACKUP.key("b1-disk1.vmdk"), bytes(len(data)), Owner())

    with pytest.raises(CorruptImage, match=r"1 of 4 objects are damaged: .*disk1.vmdk has sha256"):
        run(store)
