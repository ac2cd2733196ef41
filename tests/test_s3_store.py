"""The store in a bucket keeps the promises of every store, on a real server; what is S3's own is here."""

from __future__ import annotations

import itertools

import pytest

from ssvm_worker.stores.s3 import S3Store
from ssvm_worker.stores.s3_bucket import S3Settings
from ssvm_worker.units import MiB
from tests.contracts.store import StoreContract
from tests.servers.s3 import S3Server

_NUMBERS = itertools.count(1)


def settings_of(server: S3Server, **more: object) -> S3Settings:
    """How to reach that server; the parts are the smallest that S3 takes."""
    values = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    return S3Settings(**{"part_size": 5 * MiB, **values, **more})  # type: ignore[arg-type]


@pytest.fixture
def store(s3_server: S3Server, s3_bucket: str) -> S3Store:
    """A store of the test's own: a prefix in the module's bucket."""
    return S3Store("archive", s3_bucket, f"test-{next(_NUMBERS)}", settings_of(s3_server))


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, store: S3Store) -> S3Store:
        return store
