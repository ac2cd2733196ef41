"""Copies and clean-up through the queue, beside jobs that live and workers that die."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

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
    """A copy whose worker is killed between two parts is finished by another, and no multipart upload stays open."""
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
    """A clean-up that spares nothing for its age takes what a dead job has left, and nothing of a job that lives."""
    for _ in range(2):
        site.start()
    dead = site.store / "volumes/1/dead/dead.raw"
    dead.parent.mkdir(parents=True)
    dead.write_bytes(b"half")
    url = http_server.serve("image.raw", DATA, stall_after=10 * MiB, then=Behaviour(DATA))
    job_id = site.submit("download", url=url, account="1", id="t1", format="raw")
    site.until(lambda: site.stored_bytes() >= 5 * MiB, "the first bytes are stored")

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
