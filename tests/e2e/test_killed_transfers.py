"""kill -9 of a worker during an upload and a backup: another worker finishes it, and nothing is left."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.demo.simulator import VCenterSimulator
from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.servers.vcenter import make_vm
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e

MiB = 1 << 20
DATA = os.urandom(20 * MiB)


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Return an event that is set at the end, so that no blocked call outlives the test."""
    event = threading.Event()
    yield event
    event.set()


def site_with(make_site: Callable[..., Site], faulty_s3: FaultyS3) -> Site:
    """Return a site whose jobs may use the S3 server by the name ``lab``."""
    server = faulty_s3.server
    keys = {"endpoint": faulty_s3.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    return make_site(credentials={"lab": keys})


def test_upload(
    make_site: Callable[..., Site],
    http_server: HttpServer,
    faulty_s3: FaultyS3,
    s3_server: S3Server,
    held: threading.Event,
) -> None:
    """An upload whose worker is killed between two parts resumes, and no multipart upload stays open."""
    site, bucket = site_with(make_site, faulty_s3), s3_server.make_bucket()
    first = site.start()
    fields: dict[str, Any] = {"account": "1", "id": "t1", "format": "raw"}
    template = site.wait(site.submit("download", url=http_server.serve("x", DATA), **fields)).result
    assert template
    faulty_s3.faults.append(Fault("UploadPart 2", until=held, times=1))
    job_id = site.submit("upload", key=template["key"], url=f"s3://{bucket}/out", credentials="lab")
    site.until(lambda: "UploadPart 2" in faulty_s3.names(), "the second part is under way")

    site.start()
    first.kill()
    record = site.wait(job_id)

    assert (record.state, len(record.attempts)) == ("succeeded", 2), record.error
    assert s3_server.client().get_object(Bucket=bucket, Key="out")["Body"].read() == DATA
    assert s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    names = faulty_s3.names()
    assert (names.count("UploadPart 1"), names.count("CreateMultipartUpload")) == (1, 1)


def test_backup(make_site: Callable[..., Site], vcenter: VCenterSimulator) -> None:
    """A backup whose worker is killed in its second disk is finished without another read of the first."""
    vm = make_vm(vcenter, MiB, 2 * MiB)
    keys = {"host": vcenter.host, "port": vcenter.port, "username": vcenter.username, "password": vcenter.password}
    site = make_site(vcenters={"vc": keys | {"ca_file": str(vcenter.ca_file)}}, backup={"parallel_disks": 1})
    vcenter.fault(get={"file": Path(vm.machine.disks[1].file).name, "do": "stall", "at": 100_000, "times": 1})
    first = site.start()
    fields = {"vcenter": "vc", "vm": vm.machine.path, "account": "1", "volume": "v", "id": "b"}
    before = len(vcenter.state()["gets"])
    job_id = site.submit("backup", **fields)
    site.until(lambda: len(vcenter.state()["gets"]) == before + 2, "the second disk is asked for")

    site.start()
    first.kill()
    record = site.wait(job_id)

    assert (record.state, len(record.attempts)) == ("succeeded", 2), record.error
    assert [(site.store / f"snapshots/1/v/b/b-disk{n}.vmdk").read_bytes() for n in (0, 1)] == vm.streams
    assert len(vcenter.state()["gets"]) == before + 3
    assert [each for each in vcenter.state()["snapshots"] if job_id in each] == []
    assert [each for each in site.files() if ".part" in each or "draft" in each] == []
