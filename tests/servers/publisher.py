"""A publisher who signs files: a real gpg with its own key."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.neighbours import missing


class Publisher:
    """A publisher with one key: see ``keyring``."""

    def __init__(self, home: Path, name: str) -> None:
        self._environment = os.environ | {"GNUPGHOME": str(home)}
        self._run("--quick-gen-key", f"{name} <{name}@example.org>", "ed25519", "sign", "never")
        #: Return the file of the public key.
        self.keyring = home / "publisher.gpg"
        self.keyring.write_bytes(self._run("--export"))

    def sign(self, data: bytes) -> bytes:
        """Return a detached signature."""
        return self._run("--detach-sign", data=data)

    def clear_sign(self, data: bytes) -> bytes:
        """Return the text with an inline signature."""
        return self._run("--clear-sign", data=data)

    def close(self) -> None:
        """Stop the gpg agent."""
        subprocess.run(["gpgconf", "--kill", "gpg-agent"], env=self._environment, check=False)

    def _run(self, *arguments: str, data: bytes = b"") -> bytes:
        command = ["gpg", "--batch", "--passphrase", "", "--pinentry-mode", "loopback", *arguments]
        return subprocess.run(command, input=data, env=self._environment, capture_output=True, check=True).stdout


def _publisher(name: str) -> Iterator[Publisher]:
    if not shutil.which("gpg") or not shutil.which("gpgv"):
        missing("gpg and gpgv", "apt install gpg gpgv")
    # Not pytest's directory, because the path of the agent's socket must be short.
    with tempfile.TemporaryDirectory(prefix="gpg-", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o700)
        publisher = Publisher(Path(home), name)
        yield publisher
        publisher.close()


@pytest.fixture(scope="module")
def publisher() -> Iterator[Publisher]:
    """Return a publisher with a known key."""
    yield from _publisher("publisher")


@pytest.fixture(scope="module")
def stranger() -> Iterator[Publisher]:
    """Return a publisher with an unknown key."""
    yield from _publisher("stranger")
