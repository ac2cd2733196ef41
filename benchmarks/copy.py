"""Copy from a directory to S3, with each object verified, compared with `rclone copy --checksum`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ssvm_worker.artifacts.layout import Artifact
from tests.servers.s3 import S3Server

from .contest import OURS, Contender, Row, contest, left_out
from .stored import BUCKET, fresh, store

_RCLONE = Path(sys.executable).with_name("rclone")
#: Artifacts of the large store.
_MANY = 8


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Copy one artifact, then a store of eight artifacts with the same total size. Every run has a new server."""
    missing = [name for name in ("weed", "rclone") if not _RCLONE.with_name(name).exists()]
    if missing:
        return [left_out("copy", f"{missing[0]} is not installed")]
    return [
        *_contest("copy an artifact to S3", scratch / "one", 1, size, runs),
        *_contest(f"copy a store of {_MANY} to S3", scratch / "many", _MANY, size // _MANY * _MANY, runs),
    ]


def _contest(name: str, scratch: Path, artifacts: int, size: int, runs: int) -> list[Row]:
    (root := scratch / "store").mkdir(parents=True)
    for number in range(artifacts):
        store(root, Artifact("template", "2", str(number)), size // artifacts)
    server = S3Server(scratch / "weed")
    contenders = [_ours(server, scratch, artifacts), _rclone(server, root)]
    rows = contest(name, contenders, size, runs, partial(fresh, server, scratch / "weed"))
    for each in root.rglob("*.raw"):
        each.unlink()  # the files are in memory
    return rows


def _ours(server: S3Server, scratch: Path, artifacts: int) -> Contender:
    config = scratch / "worker.toml"
    config.write_text(
        f'state_dir = "{scratch}/state"\n[stores.primary]\nurl = "file://{scratch}/store"\n'
        f'[stores.archive]\nurl = "s3://{BUCKET}"\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
    )
    which = ["--all"] if artifacts > 1 else ["--account", "2", "--id", "0"]
    command = [sys.executable, "-m", "ssvm_worker", "run", "copy", "--json", "--stores", "archive", *which]
    return Contender(OURS, command, _copied(server), {"SSVM_CONFIG": str(config)})


def _rclone(server: S3Server, root: Path) -> Contender:
    """Return rclone with its defaults: four files at once, four parts of 5 MiB each, the MD5 of each file first."""
    keys = {"RCLONE_S3_ACCESS_KEY_ID": server.access_key, "RCLONE_S3_SECRET_ACCESS_KEY": server.secret_key}
    where = {"RCLONE_S3_PROVIDER": "SeaweedFS", "RCLONE_S3_ENDPOINT": server.endpoint}
    command = [str(_RCLONE), "--config", "", "--s3-no-check-bucket", "copy", "--checksum", str(root), f":s3:{BUCKET}"]
    return Contender("rclone copy --checksum", command, _copied(server), keys | where)


def _copied(server: S3Server) -> Callable[[], int]:
    """Return a function that counts the bytes of the copied images."""

    def size() -> int:
        listed = server.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return sum(each["Size"] for each in listed if each["Key"].endswith("/image.raw"))

    return size
