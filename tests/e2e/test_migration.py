"""A whole store moves through the queue, even if workers are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import DRAFT, Entry, Manifest, write_manifest
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes
from tests.servers.s3 import S3Server
from tests.servers.s3_faults import Fault, FaultyS3
from tests.servers.worker import ROOT, Site

pytestmark = pytest.mark.e2e

MiB = 1 << 20
BIG = os.urandom(12 * MiB)


def fill(site: Site) -> dict[str, bytes]:
    """Store seven volumes, one of them large, and return the store's content."""
    store, owner = FileStore("primary", site.store), Owner("made", 1)
    for number in range(7):
        place, data = Artifact("volume", "1", f"v{number}"), BIG if number == 3 else os.urandom(1000)
        put_bytes(store, place.key("x.raw"), data, owner)
        write_manifest(store, Manifest(place, "made", (Entry("x.raw", len(data), str(digest_of(data))),)), owner)
    return {each: (site.store / each).read_bytes() for each in site.files()}


def test_killed(make_site: Callable[..., Site], faulty_s3: FaultyS3, s3_server: S3Server) -> None:
    """If the worker of a move is killed, another continues, and finally all artifacts have moved."""
    keys = {"endpoint": faulty_s3.endpoint, "access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    bucket, held = s3_server.make_bucket(), threading.Event()
    site = make_site(stores={"archive": {"url": f"s3://{bucket}"} | keys}, retry={"max_attempts": 50})
    before = fill(site)
    first = site.start()
    faulty_s3.faults.append(Fault("UploadPart 2", until=held, times=1))
    job_id = site.submit("copy", all=True, move=True, stores=["archive"], parallel=2)
    site.until(lambda: "UploadPart 2" in faulty_s3.names(), "the second part of the large one is under way")

    site.start()
    first.kill()
    record = site.wait(job_id)
    held.set()

    assert record.state == "succeeded", record.error
    assert site.files() == []
    client = s3_server.client()
    keys_there = [each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]]
    # A worker that is killed between its manifest and its draft leaves the draft until the clean-up.
    there = [key for key in keys_there if not key.endswith(DRAFT)]
    assert {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in there} == before
    assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    assert {each.state for each in site.ledger.page()} == {"succeeded"}


def test_command(make_site: Callable[..., Site], tmp_path: Path) -> None:
    """`ssvm submit copy --all --wait` prints a line per artifact and the sum, and fails if one is missing."""
    (archive := tmp_path / "archive").mkdir()
    site = make_site(stores={"archive": {"url": f"file://{archive}"}})
    before = fill(site)
    (site.store / "volumes/1/v5/x.raw").write_bytes(b"damaged")
    site.start()

    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "ssvm_worker", "submit", "copy", "--all", "--stores", "archive", "--wait"]
        where = {"SSVM_CONFIG": str(site.file), "PATH": os.environ["PATH"]}
        return subprocess.run([*argv, *options], env=where, cwd=ROOT, capture_output=True, text=True, check=False)

    done = submit()
    assert done.returncode == 1, done.stderr
    assert "failed    volumes/1/v5  The object has 7 bytes" in done.stdout
    assert done.stdout.count("copied    volumes/1/v") == 6
    assert "of 7 artifacts, 12 MiB, from primary to archive" in done.stdout

    (site.store / "volumes/1/v5/x.raw").write_bytes(before["volumes/1/v5/x.raw"])
    done = submit("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["counts"] == {"there": 6, "copied": 1}
    assert {
        str(each.relative_to(archive)): each.read_bytes() for each in archive.rglob("*") if each.is_file()
    } == before
