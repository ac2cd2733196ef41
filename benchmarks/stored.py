"""The data of the S3 benchmarks: artifacts of one object in a directory, and a new server for each run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Owner
from tests.servers.s3 import S3Server

from .download import write_random

OBJECT = "image.raw"
BUCKET = "bench"


def store(root: Path, artifact: Artifact, size: int) -> Path:
    """Store an artifact with one random object, and return the object's path."""
    path = root / artifact.key(OBJECT)
    path.parent.mkdir(parents=True)
    entry = Entry(OBJECT, size, f"sha256:{write_random(path, size)}")
    write_manifest(FileStore("primary", root), Manifest(artifact, "bench", (entry,)), Owner())
    return path


@contextlib.contextmanager
def fresh(server: S3Server, folder: Path) -> Iterator[None]:
    """Run a server with an empty bucket while the block runs. *folder* is the server's directory."""
    folder.mkdir()
    with server:
        server.make_bucket(BUCKET)
        yield
