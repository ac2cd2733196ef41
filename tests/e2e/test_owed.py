"""A store that was away, full or closed when a job stored its artifact gets it by itself, later."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.servers.http import HttpServer
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.servers.worker import Site

pytestmark = pytest.mark.e2e

DATA = os.urandom(1 << 20)


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
    """Once the second store is well again the artifact arrives there, and the first job's record tells by which job."""
    keys = {"endpoint": faulty_s3.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    bucket = s3_server.make_bucket()
    site = make_site(stores={"archive": {"url": f"s3://{bucket}"} | keys}, retry={"max_attempts": 1})
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
    listed = s3_server.client().list_objects_v2(Bucket=bucket)["Contents"]
    assert sorted(each["Key"] for each in listed) == [each for each in site.files() if each.startswith("template/")]
    stored = s3_server.client().get_object(Bucket=bucket, Key="template/tmpl/1/t1/t1.raw")["Body"].read()
    assert stored == DATA
