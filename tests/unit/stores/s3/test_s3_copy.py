"""copy to S3: inside one service the server copies the bytes, and an attempt reuses a killed one's parts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import MANIFEST
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.errors import CorruptImage, StoreUnavailable
from ssvm_worker.jobs.copy import job as copy
from ssvm_worker.jobs.verify import job as verify
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.stores.s3.store import S3Store
from ssvm_worker.stores.s3.upload import PartCopier
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import MiB
from tests.attempts import again, attempt
from tests.contracts.store import BIG, ME, fill, get, put
from tests.copies import PLACE, store_artifact
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.unit.stores.s3.test_s3_servers import calls_of, settings_of

_NUMBERS = itertools.count(1)
OBJECTS = {"7.raw": BIG, "template.properties": b"id=7\n"}
KEY = PLACE.key("7.raw")


def pair(server: S3Server | RcloneS3) -> tuple[S3Store, S3Store]:
    """Return two stores in two buckets of one service, with the artifact in the first."""
    settings = settings_of(server)
    source = S3Store("primary", server.make_bucket(), f"from-{next(_NUMBERS)}", settings)
    target = S3Store("archive", server.make_bucket(), "", settings)
    store_artifact(source, OBJECTS)
    assert target.features == source.features
    return source, target


def run(source: Store, target: Store, **how: Any) -> None:
    """Copy the artifact."""
    request = copy.Request(kind="template", account="2", id="7", stores=["archive"])
    copy.run(request, attempt(source, target, **how))


def same(source: Store, target: Store) -> bool:
    """Return whether the copy is complete, with no other object beside it."""
    found = verify.run(verify.Request(kind="template", account="2", id="7", stores=["archive"]), attempt(target))
    equal = [read_bytes(each, KEY) == BIG for each in (source, target)]
    return bool(found) and equal == [True, True] and target.sweep(0) == 0


def test_the_server_copies(s3_server: S3Server) -> None:
    """If one service has both buckets, all parts are copied there, and none is sent."""
    source, target = pair(s3_server)
    calls = calls_of(target)
    run(source, target)
    assert (calls.count("UploadPartCopy"), calls.count("UploadPart")) == (3, 0)
    assert same(source, target)


def test_what_a_server_does_not_copy_is_sent(rclone_s3: RcloneS3) -> None:
    """A server that answers but copies nothing is detected by the probe, and is not used for copies."""
    source, target = pair(rclone_s3)
    calls = calls_of(target)
    run(source, target)
    assert (calls.count("UploadPartCopy"), calls.count("UploadPart")) == (0, 3)
    assert same(source, target)


def test_a_server_that_copies_something_else(s3_server: S3Server) -> None:
    """A part whose digest differs from the bytes that were read is sent."""
    source, target = pair(s3_server)
    other = S3Store("primary", source._bucket.name, "other", source._bucket.settings)
    put(other, KEY, BIG[: 6 * MiB] + b"!" + BIG[6 * MiB + 1 :])
    copier = PartCopier(source._bucket.name, other._root + KEY)
    sink = target.writer(KEY, len(BIG), owner=ME)
    sink._copier = copier
    with sink:
        fill(sink, BIG).commit()
    assert copier.mismatched
    assert get(target, KEY) == BIG


@pytest.mark.parametrize("status", [400, 501, 503])
def test_a_server_that_refuses_to_copy(faulty_s3: FaultyS3, s3_server: S3Server, status: int) -> None:
    """After a refused copy, the part is sent."""
    settings = settings_of(s3_server, endpoint=faulty_s3.endpoint)
    source, target = (S3Store(name, s3_server.make_bucket(), "", settings) for name in ("primary", "archive"))
    store_artifact(source, OBJECTS)
    assert target.features.copies
    faulty_s3.faults = [Fault("UploadPartCopy 2", status, "NotImplemented")]
    run(source, target)
    assert same(source, target)


@pytest.mark.parametrize("now", [BIG[:-1] + b"!", BIG[:-1], b"!" + BIG[1:]], ids=["last byte", "short", "first byte"])
def test_damage_is_not_copied(s3_server: S3Server, now: bytes) -> None:
    """The server's parts of a damaged object are deleted."""
    source, target = pair(s3_server)
    s3_server.client().put_object(Bucket=source._bucket.name, Key=source._root + KEY, Body=now)
    calls = calls_of(target)
    with pytest.raises(CorruptImage):
        run(source, target)
    assert "UploadPartCopy" in calls
    assert "CompleteMultipartUpload" not in calls
    assert find_manifest(target, PLACE) is None
    assert target.sweep(0) == 0


def test_other_keys_are_no_one_service(s3_server: S3Server, rclone_s3: RcloneS3) -> None:
    """Between two services the bytes are sent, even if both accept the same keys."""
    source = store_artifact(S3Store("primary", rclone_s3.make_bucket(), "", settings_of(rclone_s3)), OBJECTS)
    target = S3Store("archive", s3_server.make_bucket(), "", settings_of(s3_server))
    assert target.features.copies
    calls = calls_of(target)
    run(source, target)
    assert (calls.count("UploadPartCopy"), calls.count("UploadPart")) == (0, 3)
    assert same(source, target)


@pytest.mark.parametrize("how", ["sent", "copied"])
def test_the_next_attempt_goes_on(faulty_s3: FaultyS3, s3_server: S3Server, how: str) -> None:
    """The next attempt, in another process, neither sends nor copies existing parts again."""
    settings = settings_of(s3_server, endpoint=faulty_s3.endpoint)
    bucket = s3_server.make_bucket()
    source: Any = MemoryStore("primary")
    if how == "copied":
        source = S3Store("primary", s3_server.make_bucket(), "", settings)
    store_artifact(source, OBJECTS)
    assert S3Store("archive", bucket, "", settings).features.copies
    faulty_s3.faults = [Fault("CompleteMultipartUpload", 503, "SlowDown")]
    with pytest.raises(StoreUnavailable):
        run(source, S3Store("archive", bucket, "", settings), will_resume=again)
    faulty_s3.faults, before = [], len(faulty_s3.calls)

    target = S3Store("archive", bucket, "", settings)
    run(source, target, will_resume=again, number=2, token=2)

    sent = [each.name for each in faulty_s3.calls[before:] if each.name.startswith("UploadPart")]
    assert sent == []
    assert same(source, target)
    assert f"{PLACE.prefix}/{MANIFEST}" in [each.key for each in target.list()]
