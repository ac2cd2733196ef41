"""Copies and clean-up through the queue, beside live jobs and killed workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.wiring.assembly import open_quota, open_verdicts
from tests.servers.http import Behaviour, HttpServer
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e

MiB = 1 << 20
DATA = os.urandom(20 * MiB)


def test_killed_copy(
    make_site: Callable[..., Site], http_server: HttpServer, faulty_s3: FaultyS3, s3_server: S3Server
) -> None:
    """A copy whose worker is killed between two parts is finished, and no multipart upload stays open."""
    keys = {"endpoint": faulty_s3.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    bucket, held = s3_server.make_bucket(), threading.Event()
    site = make_site(stores={"archive": {"url": f"s3://{bucket}"} | keys})
    first = site.start()
    site.wait(site.submit("download", url=http_server.serve("x", DATA), account="1", id="t1", format="raw"))
    faulty_s3.faults.append(Fault("UploadPart 2", until=held, times=1))
    job_id = site.submit("copy", account="1", id="t1", stores=["archive"])
    site.until(lambda: "UploadPart 2" in faulty_s3.names(), "the second part is under way")

    site.start()
    first.kill()
    record = site.wait(job_id)
    held.set()

    assert (record.state, len(record.attempts)) == ("succeeded", 2), record.error
    client = s3_server.client()
    assert client.get_object(Bucket=bucket, Key="template/tmpl/1/t1/t1.raw")["Body"].read() == DATA
    assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


def test_cleanup_beside_a_download(site: Site, http_server: HttpServer) -> None:
    """A clean-up without a minimum age deletes an ended job's leftovers, and nothing of a live job."""
    for _ in range(2):
        site.start()
    dead = site.store / "volumes/1/dead/dead.raw"
    dead.parent.mkdir(parents=True)
    dead.write_bytes(b"half")
    url = http_server.serve("image.raw", DATA, stall_after=10 * MiB, then=Behaviour(DATA))
    job_id = site.submit("download", url=url, account="1", id="t1", format="raw")
    site.until(lambda: site.durable_bytes() >= 5 * MiB, "it is noted that the first bytes are on the disk for good")

    cleaned = site.wait(site.submit("cleanup", older_than="0"))

    assert cleaned.result
    assert cleaned.result["counts"] == {"incomplete artifact": 1}
    assert not dead.exists()
    assert site.ledger.get(job_id).state in ("running", "queued")
    for worker in site.workers:
        worker.kill()
    site.start()
    record = site.wait(job_id)
    assert (record.state, (site.store / "template/tmpl/1/t1/t1.raw").read_bytes() == DATA) == ("succeeded", True)
    assert int(http_server.requests[-1].headers.get("Range", "bytes=0-")[6:-1]) > 0


def test_scrub(site: Site) -> None:
    """A scrub through the queue fails with its findings, which the ledger keeps until a clean scrub."""
    store = FileStore("primary", site.store)
    for id_ in ("a", "b", "c"):
        artifact = Artifact("template", "1", id_)
        put_bytes(store, artifact.key("x.raw"), b"body", Owner())
        write_manifest(store, Manifest(artifact, "j", (Entry("x.raw", 4, str(digest_of(b"body"))),)), Owner())
    (site.store / "template/tmpl/1/b/x.raw").write_bytes(b"?ody")
    site.start()

    failed = site.wait(site.submit("verify", all=True, rate="1GiB/s"))

    assert (failed.state, len(failed.attempts)) == ("failed", 1)
    assert failed.error
    assert "template/tmpl/1/b/x.raw has sha256:" in failed.error["message"]
    verdicts = open_verdicts(site.settings)
    assert [each.place for each in verdicts.findings()] == ["template/tmpl/1/b"]
    (site.store / "template/tmpl/1/b/x.raw").write_bytes(b"body")
    assert site.wait(site.submit("verify", oldest=9)).state == "succeeded"
    assert list(verdicts.findings()) == []


def test_quota_of_the_dead(make_site: Callable[..., Site], http_server: HttpServer) -> None:
    """A killed worker's reservation is free for the next attempt, and its bytes count once."""
    site = make_site(quota={"default": len(DATA) + MiB})
    first = site.start()
    url = http_server.serve("image.raw", DATA, stall_after=10 * MiB, then=Behaviour(DATA))
    job_id = site.submit("download", url=url, account="1", id="t1", format="raw")
    site.until(lambda: site.stored_bytes() >= 5 * MiB, "the first bytes are stored")
    (usage,) = open_quota(site.settings).usage()
    assert (usage.used, usage.reserved) == (0, len(DATA))
    site.start()
    first.kill()

    assert site.wait(job_id).state == "succeeded"

    refused = site.wait(site.submit("download", url=http_server.serve("other.raw", DATA), account="1", id="t2"))
    assert refused.error
    assert (refused.state, refused.error["error"]) == ("failed", "QuotaExceeded")
    site.until(lambda: [each.reserved for each in open_quota(site.settings).usage()] == [0], "nothing is held")
    (usage,) = open_quota(site.settings).usage()
    assert len(DATA) < usage.used < len(DATA) + MiB


def test_retention(make_site: Callable[..., Site]) -> None:
    """A worker's clean-up deletes expired backups under the volume's lock, which is a job of the ledger."""
    site = make_site(retention={"keep_last": 1})
    store = FileStore("primary", site.store)
    for day in (1, 2, 3):
        artifact = Artifact("backup", "1", f"b{day}", "vol")
        put_bytes(store, artifact.key("x.vmdk"), b"disk", Owner())
        created = f"2025-01-0{day}T00:00:00Z"
        write_manifest(store, Manifest(artifact, "j", (Entry("x.vmdk", 4, ""),), created=created), Owner())
    site.start()

    record = site.wait(site.submit("cleanup"))

    assert record.result
    assert record.result["counts"] == {"expired backup": 2}
    assert site.files() == ["snapshots/1/vol/b3/manifest.json", "snapshots/1/vol/b3/x.vmdk"]
    lock = site.ledger.page()[0]
    assert (lock.resource, lock.state) == ("snapshots/1/vol", "succeeded")
