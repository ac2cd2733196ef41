"""Upload from a directory to S3, with the digest checked, compared with s5cmd and rclone with their defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ssvm_worker.artifacts.layout import Artifact
from tests.servers.s3 import S3Server

from .contest import OURS, Contender, Row, contest, left_out
from .stored import BUCKET, OBJECT, fresh, store

_BIN = Path(sys.executable).parent
_ARTIFACT = Artifact("template", "a", "image")


def s5cmd() -> Path | None:
    """Return the path of the program itself. The package also installs a Python script that starts it."""
    try:
        files = distribution("s5cmd").files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(each.locate())) for each in files if str(each).endswith("s5cmd/bin/s5cmd")), None)


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Upload to a new server in every run, so that no run cleans up after another."""
    if not (_BIN / "weed").exists():
        return [left_out("upload", "SeaweedFS is not installed")]
    source = store(scratch / "store", _ARTIFACT, size)
    peers = {"s5cmd": s5cmd(), "rclone": rclone if (rclone := _BIN / "rclone").exists() else None}

    server = S3Server(scratch / "weed")
    contenders = [_ours(server, scratch), *_peers(server, source, peers)]
    rows = contest("upload to S3", contenders, size, runs, partial(fresh, server, scratch / "weed"))
    return rows + [left_out("upload to S3", f"{name} is not installed") for name, path in peers.items() if not path]


def _ours(server: S3Server, scratch: Path) -> Contender:
    config = scratch / "worker.toml"
    config.write_text(
        f'[stores.primary]\nurl = "file://{scratch}/store"\n[credentials.s3]\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
    )
    fields = {"key": _ARTIFACT.key(OBJECT), "url": f"s3://{BUCKET}/ours", "credentials": "s3"}
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "upload", "--json", *options]
    return Contender(OURS, command, _size(server, "ours"), {"SSVM_CONFIG": str(config)})


def _peers(server: S3Server, source: Path, found: dict[str, Path | None]) -> Iterator[Contender]:
    if found["s5cmd"]:
        command = [str(found["s5cmd"]), "--endpoint-url", server.endpoint, "cp", str(source), f"s3://{BUCKET}/s5cmd"]
        keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        yield Contender("s5cmd cp", command, _size(server, "s5cmd"), {**keys, "AWS_REGION": "us-east-1"})
    if found["rclone"]:
        command = [str(found["rclone"]), "--config", "", "--s3-no-check-bucket", "copyto", str(source)]
        keys = {"RCLONE_S3_ACCESS_KEY_ID": server.access_key, "RCLONE_S3_SECRET_ACCESS_KEY": server.secret_key}
        where = {"RCLONE_S3_PROVIDER": "SeaweedFS", "RCLONE_S3_ENDPOINT": server.endpoint}
        yield Contender("rclone copyto", [*command, f":s3:{BUCKET}/rclone"], _size(server, "rclone"), keys | where)


def _size(server: S3Server, key: str) -> Callable[[], int]:
    return lambda: int(server.client().head_object(Bucket=BUCKET, Key=key)["ContentLength"])
