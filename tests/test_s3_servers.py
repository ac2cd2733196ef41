"""Store and sink on a second S3 server, independent of the first; and what must hold on both."""

from __future__ import annotations

import itertools

import pytest

from ssvm_worker.stores.s3 import S3Store
from ssvm_worker.stores.s3_bucket import S3Settings
from ssvm_worker.units import MiB
from tests.contracts.store import StoreContract
from tests.servers.rclone import RcloneS3

_NUMBERS = itertools.count(1)


def settings_of(server: RcloneS3, **more: object) -> S3Settings:
    """How to reach that server; the parts are the smallest that S3 takes."""
    values = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    return S3Settings(**{"part_size": 5 * MiB, "tries": 1, "ca_file": server.ca_file, **values, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rclone_bucket(rclone_s3: RcloneS3) -> str:
    """A bucket of the module's own."""
    return rclone_s3.make_bucket()


class TestRcloneStore(StoreContract):
    @pytest.fixture
    def store(self, rclone_s3: RcloneS3, rclone_bucket: str) -> S3Store:
        return S3Store("archive", rclone_bucket, f"test-{next(_NUMBERS)}", settings_of(rclone_s3))
