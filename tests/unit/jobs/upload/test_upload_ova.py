"""A backup uploaded as one OVA: tar and its .mf agree with the backup, or nothing is uploaded."""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import Any

import pytest

from ssvm_worker.errors import ChecksumMismatch, InvalidRequest, ObjectNotFound
from ssvm_worker.formats.ova import read_checksums, read_descriptor
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.upload import job as upload
from ssvm_worker.jobs.upload.ova_export import OvaExport, OvaMember, plan_ova
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import GiB, KiB, MiB
from tests.attempts import attempt
from tests.backups import BACKUP, content, store_backup
from tests.faults import store_corrupting
from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server

DISKS = [content(1 * MiB, seed=1), content(640 * KiB, seed=2)]
NAMES = ["b1.ovf", "b1.mf", "b1-disk0.vmdk", "b1-disk1.vmdk"]


@pytest.fixture
def store() -> Store:
    """Return a store with a backup of two disks."""
    store = MemoryStore("primary")
    store_backup(store, *DISKS)
    return store


def asked(**fields: Any) -> upload.Request:
    named = {"kind": "backup", "account": "acme", "volume": "vol1", "id": "b1", "format": "ova"}
    return parse_request(upload.Request, named | fields, "upload")


def members(data: bytes) -> dict[str, bytes]:
    """Return tar's list of the package's members, in order."""
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return {each.name: opened.extractfile(each).read() for each in opened}  # type: ignore[union-attr]


def test_package_at_a_put_url(store: Store, http_server: HttpServer) -> None:
    """The package has the descriptor, the .mf, and each file as stored, with a size known in advance."""
    result = upload.run(asked(url=http_server.take("up")), attempt(store))

    data = http_server.stored["/up"]
    found = members(data)
    assert list(found) == NAMES
    assert found == {name: read_bytes(store, BACKUP.key(name)) for name in NAMES}
    assert (result["size"], result["digest"]) == (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}")


def test_checksums_in_the_package(store: Store, http_server: HttpServer) -> None:
    """The .mf of the package has the digest of every other member, and the descriptor names every file."""
    upload.run(asked(url=http_server.take("up")), attempt(store))

    found = members(http_server.stored["/up"])
    sums = read_checksums(found["b1.mf"], "b1.mf")
    assert {name: str(each) for name, each in sums.items()} == {
        name: f"sha256:{hashlib.sha256(found[name]).hexdigest()}" for name in NAMES if name != "b1.mf"
    }
    assert list(read_descriptor(found["b1.ovf"], "b1.ovf").disks) == NAMES[2:]


def test_package_in_s3(store: Store, s3_server: S3Server) -> None:
    """A package arrives completely in a bucket."""
    bucket = s3_server.make_bucket()
    keys = {"endpoint": s3_server.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    upload.run(
        asked(url=f"s3://{bucket}/b1.ova", credentials="lab"), attempt(store, settings={"credentials": {"lab": keys}})
    )

    body = s3_server.client().get_object(Bucket=bucket, Key="b1.ova")["Body"].read()
    assert list(members(body)) == NAMES


def test_package_can_be_downloaded(store: Store, http_server: HttpServer) -> None:
    """The download job accepts the worker's packages with their digests."""
    data = b"".join(plan_ova(attempt(store), store, BACKUP).chunks())
    fields = {"url": http_server.serve("b1.ova", data), "account": "acme", "id": "t1"}
    here = MemoryStore("primary")

    download.run(parse_request(download.Request, fields, "download"), attempt(here))

    assert read_bytes(here, "template/tmpl/acme/t1/t1-disk1.vmdk") == read_bytes(store, BACKUP.key("b1-disk1.vmdk"))


@pytest.mark.parametrize("member", NAMES)
def test_damaged_member(http_server: HttpServer, member: str) -> None:
    """A damaged member is detected during the upload, and nothing arrives."""
    store = MemoryStore("primary")
    store_backup(store_corrupting(store, at=100, chosen=lambda key: key.endswith(member)), *DISKS)

    with pytest.raises(ChecksumMismatch, match=member):
        upload.run(asked(url=http_server.take("up")), attempt(store))

    assert http_server.stored == {}


def test_members_beyond_8_gib() -> None:
    """The header of a large disk has its size, although ustar's own field ends at 8 GiB."""
    made = OvaExport(BACKUP, [OvaMember("b1-disk0.vmdk", 100 * GiB, lambda: iter(()))])
    head = next(made.chunks())

    assert tarfile.TarInfo.frombuf(head, "utf-8", "strict").size == 100 * GiB
    assert made.size == 100 * GiB + 10 * KiB


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        pytest.param({"kind": "template"}, "become an ova", id="of a template"),
        pytest.param({"key": BACKUP.key("b1.ovf")}, "become an ova", id="of a key"),
        pytest.param({"format": "tar.gz"}, "ova", id="unknown format"),
    ],
)
def test_requests_that_are_refused_when_read(fields: dict[str, str], said: str) -> None:
    """Only backups can be packaged."""
    with pytest.raises(InvalidRequest, match=said):
        asked(url="s3://b/k", **fields)


def test_no_such_backup(store: Store) -> None:
    """A package of a missing backup is refused."""
    with pytest.raises(ObjectNotFound, match="no complete backup"):
        upload.run(asked(url="http://127.0.0.1:1/up", id="b2"), attempt(store))


def test_the_other_name_of_the_field() -> None:
    """The field may also be named fmt."""
    values = {"kind": "backup", "account": "acme", "volume": "v", "id": "b", "url": "s3://b/k", "fmt": "ova"}
    assert parse_request(upload.Request, values, "upload").format == "ova"
