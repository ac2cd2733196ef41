"""`ssvm doctor` says of every dependency whether it is there, and what to do where it is not."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.doctor import Finding, examine
from ssvm_worker.settings import Settings
from tests.neighbours import free_port, missing
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import S3Server


def conversion(scratch: Path | None) -> Finding:
    """What is found of conversions; nobody listens for the rest."""
    broker = {"url": f"redis://127.0.0.1:{free_port()}/0"}
    settings = Settings.model_validate({"broker": broker, "download": {"scratch_dir": scratch}})
    return next(each for each in examine(settings) if each.check == "conversion")


def test_conversion(tmp_path: Path) -> None:
    """Where images are converted, qemu-img and the directory are named."""
    if not shutil.which("qemu-img"):
        missing("qemu-img", "apt-get install qemu-utils")
    found = conversion(tmp_path)
    assert found.ok
    assert str(tmp_path) in found.detail
    assert "qemu-img" in found.detail


def test_no_conversion() -> None:
    """Where no images are converted, nothing is needed for it."""
    assert conversion(None) == Finding("conversion", True, "not wanted: download.scratch_dir is not set")


def test_conversion_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory or a tool that is not there is a failure that says which."""
    assert "No such file" in conversion(tmp_path / "away").detail
    monkeypatch.setenv("PATH", str(tmp_path))
    found = conversion(tmp_path)
    assert not found.ok
    assert "Install qemu-utils" in found.detail


def archive(server: Any, tmp_path: Path, bucket: str) -> list[Finding]:
    """What is found of an S3 store; nobody listens for the rest."""
    keys = {"endpoint": server.endpoint, "access_key": server.access_key, "secret_key": server.secret_key}
    values = {
        "state_dir": tmp_path,
        "broker": {"url": f"redis://127.0.0.1:{free_port()}/0"},
        "stores": {"archive": {"url": f"s3://{bucket}/prefix", "ca_file": getattr(server, "ca_file", None), **keys}},
    }
    return [each for each in examine(Settings.model_validate(values)) if "archive" in each.check]


def test_s3(s3_server: S3Server, tmp_path: Path) -> None:
    """An S3 store is told with what its server can do; the rule for abandoned uploads is ready to be applied, once."""
    bucket, client = s3_server.make_bucket(), s3_server.client()
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [theirs]})

    store, uploads = archive(s3_server, tmp_path, bucket)
    assert "SHA-256 checksums, conditional commits" in store.detail
    command = shlex.split(uploads.detail[uploads.detail.index("aws s3api") :])
    assert command[command.index("--endpoint-url") + 1] == s3_server.endpoint
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=json.loads(command[-1]))

    store, uploads = archive(s3_server, tmp_path, bucket)
    assert "a lifecycle rule of the bucket aborts them" in uploads.detail
    rules = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert [each["ID"] for each in rules] == ["theirs", "abandoned-uploads"]


def test_s3_that_may_not_be_written(rclone_s3: RcloneS3, tmp_path: Path) -> None:
    """Keys that a server does not know, or a bucket that is not there, are failures; the hint never is."""
    store, uploads = archive(rclone_s3, tmp_path, "no-such-bucket")
    assert (store.ok, uploads.ok) == (False, True)
    assert "no-such-bucket" in store.detail
