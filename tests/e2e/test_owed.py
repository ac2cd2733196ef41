"""A store that was absent, full or closed when a job stored its artifact gets a copy automatically later."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from ssvm_worker.demo.simulator import VCenterSimulator
from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.servers.vcenter import make_vm
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e

DATA = os.urandom(1 << 20)


def archive(faulty: FaultyS3, real: S3Server, bucket: str) -> dict[str, str]:
    """Return the settings of a store in that bucket, on a server with faults on request."""
    keys = {"access_key": real.access_key, "secret_key": real.secret_key}
    return {"url": f"s3://{bucket}", "endpoint": faulty.endpoint} | keys


def keys(server: S3Server, bucket: str) -> list[str]:
    """Return the keys of the bucket."""
    return sorted(each["Key"] for each in server.client().list_objects_v2(Bucket=bucket)["Contents"])


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PutObject", status=403, code="AccessDenied"),
        Fault("PutObject", status=507, code="InsufficientStorage"),
        Fault("PutObject", status=500),
    ],
    ids=["it refuses", "it is full", "it is away"],
)
def test_drains(
    make_site: Callable[..., Site], http_server: HttpServer, faulty_s3: FaultyS3, s3_server: S3Server, fault: Fault
) -> None:
    """When the second store works again it gets the artifact, and the first job's record names the copy job."""
    bucket = s3_server.make_bucket()
    site = make_site(stores={"archive": archive(faulty_s3, s3_server, bucket)}, retry={"max_attempts": 1})
    site.start()
    faulty_s3.faults.append(fault)
    url = http_server.serve("image.raw", DATA)
    first = site.wait(site.submit("download", url=url, account="1", id="t1", stores=["primary", "archive"]))
    assert first.result
    copy_id = first.result["owed"]["archive"]["copy_job"]
    site.until(lambda: len(site.ledger.get(copy_id).attempts) > 2, "the copy has failed twice")

    faulty_s3.faults.clear()
    record = site.wait(copy_id)

    assert record.state == "succeeded", record.error
    assert keys(s3_server, bucket) == [each for each in site.files() if each.startswith("template/")]
    stored = s3_server.client().get_object(Bucket=bucket, Key="template/tmpl/1/t1/t1.raw")["Body"].read()
    assert stored == DATA


def test_incomplete_backup(
    make_site: Callable[..., Site], vcenter: VCenterSimulator, faulty_s3: FaultyS3, s3_server: S3Server
) -> None:
    """An incomplete backup, whose job has failed, is also copied to the store that lacks it."""
    vm = make_vm(vcenter, 1 << 16, 1 << 16, modes=("persistent", "independent_persistent"))
    login = {"host": vcenter.host, "port": vcenter.port, "username": vcenter.username, "password": vcenter.password}
    bucket = s3_server.make_bucket()
    site = make_site(
        stores={"archive": archive(faulty_s3, s3_server, bucket)},
        vcenters={"vc": login | {"ca_file": str(vcenter.ca_file)}},
    )
    site.start()
    faulty_s3.faults.append(Fault("PutObject", status=403, code="AccessDenied"))
    fields = {"vcenter": "vc", "vm": vm.machine.path, "account": "1", "volume": "v", "id": "b"}
    first = site.wait(site.submit("backup", **fields, stores=["primary", "archive"]))

    assert first.error
    assert (first.state, first.error["error"]) == ("failed", "IncompleteBackup")
    assert first.result
    faulty_s3.faults.clear()
    record = site.wait(first.result["owed"]["archive"]["copy_job"])
    assert record.state == "succeeded", record.error
    assert keys(s3_server, bucket) == [each for each in site.files() if each.startswith("snapshots/")]
