"""Somebody who signs: a real gpg with a key of its own."""

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
    """Has one key; see ``keyring``."""

    def __init__(self, home: Path, name: str) -> None:
        self._environment = os.environ | {"GNUPGHOME": str(home)}
        self._run("--quick-gen-key", f"{name} <{name}@example.org>", "ed25519", "sign", "never")
        #: The public key.
        self.keyring = home / "publisher.gpg"
        self.keyring.write_bytes(self._run("--export"))

    def sign(self, data: bytes) -> bytes:
        """A detached signature."""
        return self._run("--detach-sign", data=data)

    def clear_sign(self, data: bytes) -> bytes:
        """The text with its signature within."""
        return self._run("--clear-sign", data=data)

    def close(self) -> None:
        """End the agent."""
        subprocess.run(["gpgconf", "--kill", "gpg-agent"], env=self._environment, check=False)

    def _run(self, *arguments: str, data: bytes = b"") -> bytes:
        command = ["gpg", "--batch", "--passphrase", "", "--pinentry-mode", "loopback", *arguments]
        return subprocess.run(command, input=data, env=self._environment, capture_output=True, check=True).stdout


def _publisher(name: str) -> Iterator[Publisher]:
    if not shutil.which("gpg") or not shutil.which("gpgv"):
        missing("gpg and gpgv", "apt install gpg gpgv")
    # Not pytest's: the agent's socket must have a short path.
    with tempfile.TemporaryDirectory(prefix="gpg-", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o700)
        publisher = Publisher(Path(home), name)
        yield publisher
        publisher.close()


@pytest.fixture(scope="module")
def publisher() -> Iterator[Publisher]:
    """Whose key is known."""
    yield from _publisher("publisher")


@pytest.fixture(scope="module")
def stranger() -> Iterator[Publisher]:
    """Whose key is not."""
    yield from _publisher("stranger")
