"""The data of the S3 benchmarks: artifacts of one object in a directory, and a new server for each run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, Manifest, write_manifest
from ssvm_worker.demo.go_program import find_go
from ssvm_worker.demo.s3 import find_weed
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.units import MiB
from tests.servers.s3 import S3Server
from tests.servers.versity import VersityS3

from .download import write_random

AnyS3 = S3Server | VersityS3
OBJECT = "image.raw"
BUCKET = "bench"
#: The server that takes most of the time of a benchmark.
SLOW = "SeaweedFS"


def store(root: Path, artifact: Artifact, size: int) -> Path:
    """Store an artifact with one random object, and return the object's path."""
    path = root / artifact.key(OBJECT)
    path.parent.mkdir(parents=True)
    entry = Entry(OBJECT, size, f"sha256:{write_random(path, size)}")
    write_manifest(FileStore("primary", root), Manifest(artifact, "bench", (entry,)), Owner())
    return path


def servers(scratch: Path) -> dict[str, AnyS3]:
    """Return the installed S3 servers by name. versitygw is fast, and SeaweedFS is popular."""
    found: dict[str, AnyS3] = {}
    if find_go():
        found["versitygw"] = VersityS3(scratch / "server")
    if find_weed():
        found[SLOW] = S3Server(scratch / "server")
    return found


@contextlib.contextmanager
def fresh(server: AnyS3, folder: Path) -> Iterator[None]:
    """Run a server with an empty bucket while the block runs. *folder* is the server's directory."""
    folder.mkdir()
    with server:
        server.make_bucket(BUCKET)
        yield


def join_s(server: AnyS3, folder: Path, size: int) -> float:
    """Return the wall seconds in which a new server joins the parts of an upload. Its client has no other work then."""
    name, piece = {"Bucket": BUCKET, "Key": "joined"}, os.urandom(64 * MiB)
    with fresh(server, folder):
        client = server.client()
        upload = {**name, "UploadId": client.create_multipart_upload(**name)["UploadId"]}
        parts = [
            {"PartNumber": number, "ETag": client.upload_part(**upload, PartNumber=number, Body=piece)["ETag"]}
            for number in range(1, -(-size // len(piece)) + 1)
        ]
        started = time.perf_counter()
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        return time.perf_counter() - started
