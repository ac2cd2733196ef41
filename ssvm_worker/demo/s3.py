"""An S3 server for the demo and for tests: SeaweedFS on loopback, from a wheel of the extra ``demo``."""

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
from pathlib import Path
from typing import IO, Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ssvm_worker.errors import StoreUnavailable, extra_missing

from .ports import free_port

_READY_S = 180
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


def find_weed() -> Path | None:
    """Return the path of SeaweedFS's program, next to this Python or on PATH; None if it is not installed."""
    local = Path(sys.executable).parent / "weed"
    found = str(local) if local.exists() else shutil.which("weed")
    return Path(found) if found else None


def sdk_client(endpoint: str, access_key: str, secret_key: str, ca_file: str | None = None) -> Any:
    """Return an SDK client that does not retry and that uses no checksum features, which small servers lack."""
    return boto3.Session().client(
        "s3",
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        endpoint_url=endpoint,
        verify=ca_file,
        config=Config(
            signature_version="s3v4",  # also for presigned URLs, whose default is version 2
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1},
        ),
    )


class S3Server:
    """SeaweedFS on loopback. The context manager starts it, waits until it accepts objects, and kills it."""

    access_key = "demo-access"
    secret_key = "demo-secret"  # noqa: S105 - a server on loopback that runs for minutes

    def __init__(self, directory: Path | None = None, domain: str = "") -> None:
        """Find the program; raise ConfigError if SeaweedFS is not installed.

        *domain*: clients can use ``BUCKET.domain`` as the host name of a bucket.
        """
        program = find_weed()
        if program is None:
            raise extra_missing("SeaweedFS is not installed", "weed", "demo")
        self._program = program
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._domain = domain
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
        return sdk_client(self.endpoint, self.access_key, self.secret_key)

    def client(self) -> Any:
        """Return an SDK client, for checks that do not use the worker's own code."""
        return self._client

    def make_bucket(self, name: str = "") -> str:
        """Create a bucket and return its name. Without *name*, choose a unique one."""
        name = name or f"bucket-{next(_NUMBERS)}"
        self.client().create_bucket(Bucket=name)
        return name

    def _command(self) -> list[str]:
        config = self._directory / "s3.json"
        identity = {
            "name": "demo",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config.write_text(json.dumps({"identities": [identity]}))
        ports = [f"-{name}={free_port()}" for name in _PORTS]
        return [
            str(self._program),
            "server",
            "-master.telemetry=false",
            f"-dir={self._directory}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *ports,
            "-s3",
            f"-s3.port={self.port}",
            f"-s3.domainName={self._domain}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
            f"-filer.localSocket={self._directory}/filer.sock",
            f"-s3.localSocket={self._directory}/s3.sock",
            # Each bucket uses seven volumes from its first object on. Without a free volume the server answers 500.
            "-volume.max=2000",
            "-master.volumeSizeLimitMB=1024",
        ]

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _READY_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self._directory / "log").read_text(errors="replace")[-2000:]
                raise StoreUnavailable(f"SeaweedFS does not start: {tail}", self.endpoint, "Read its log")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        client = self.client()
        try:
            if "ready" not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            return False
        return True
