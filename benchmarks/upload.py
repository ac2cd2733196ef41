"""Upload from a directory to S3, with the digest checked, compared with s5cmd and rclone with their defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ssvm_worker.artifacts.layout import Artifact

from .contest import Contender, Parts, Row, contest, left_out
from .parts import hash_s, read_s, start_s
from .stored import BUCKET, OBJECT, AnyS3, fresh, join_s, servers, store
from .workers import own_sides, warm_worker

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
    source = store(scratch / "store", _ARTIFACT, size)
    peers = {"s5cmd": s5cmd(), "rclone": rclone if (rclone := _BIN / "rclone").exists() else None}
    rows = []
    needed = {"SHA-256 of the object and of its parts": 2 * hash_s(size), "read": read_s(source)}
    start = start_s("boto3", "pydantic")
    for name, server in servers(scratch).items():
        config = _config(scratch, server)
        join = join_s(server, scratch / "server", size)
        parts = Parts(needed, start, one_connection=False, join=join)
        fields = {"key": _ARTIFACT.key(OBJECT), "url": f"s3://{BUCKET}/ours", "credentials": "s3"}
        with warm_worker(config) as worker:
            own = own_sides(config, worker, "upload", fields, _size(server, "ours"))
            new = partial(fresh, server, scratch / "server")
            sides = [*own, *_peers(server, source, peers)]
            rows += contest(f"upload to {name}", sides, size, runs, fresh=new, parts=parts)
    return rows + [left_out("upload to S3", f"{name} is not installed") for name, path in peers.items() if not path]


def _config(scratch: Path, server: AnyS3) -> Path:
    config = scratch / "worker.toml"
    config.write_text(
        f'[stores.primary]\nurl = "file://{scratch}/store"\n[credentials.s3]\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
    )
    return config


def _peers(server: AnyS3, source: Path, found: dict[str, Path | None]) -> Iterator[Contender]:
    if found["s5cmd"]:
        command = [str(found["s5cmd"]), "--endpoint-url", server.endpoint, "cp", str(source), f"s3://{BUCKET}/s5cmd"]
        keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        environment = {**keys, "AWS_REGION": "us-east-1"}
        yield Contender("s5cmd cp", command, _size(server, "s5cmd"), environment, 1.0, 1.1)
    if found["rclone"]:
        command = [str(found["rclone"]), "--config", "", "--s3-no-check-bucket", "copyto", str(source)]
        keys = {"RCLONE_S3_ACCESS_KEY_ID": server.access_key, "RCLONE_S3_SECRET_ACCESS_KEY": server.secret_key}
        where = {"RCLONE_S3_PROVIDER": "Other", "RCLONE_S3_ENDPOINT": server.endpoint}
        command.append(f":s3:{BUCKET}/rclone")
        yield Contender("rclone copyto", command, _size(server, "rclone"), keys | where, 1.3, 1.4)


def _size(server: AnyS3, key: str) -> Callable[[], int]:
    return lambda: int(server.client().head_object(Bucket=BUCKET, Key=key)["ContentLength"])
