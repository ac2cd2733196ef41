"""Copy from a directory to S3, with each object verified, compared with `rclone copy --checksum`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ssvm_worker.artifacts.layout import Artifact

from .contest import OURS, Contender, Row, contest, left_out
from .stored import BUCKET, AnyS3, fresh, servers, store
from .workers import own_sides, warm_worker

_RCLONE = Path(sys.executable).with_name("rclone")
#: Artifacts of the large store.
_MANY = 8


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Copy one artifact, then a store of eight artifacts with the same total size. Every run has a new server."""
    if not _RCLONE.exists():
        return [left_out("copy", "rclone is not installed")]
    return [
        *_contest("copy an artifact", scratch / "one", 1, size, runs),
        *_contest(f"copy a store of {_MANY}", scratch / "many", _MANY, size // _MANY * _MANY, runs),
    ]


def _contest(name: str, scratch: Path, artifacts: int, size: int, runs: int) -> list[Row]:
    (root := scratch / "store").mkdir(parents=True)
    for number in range(artifacts):
        store(root, Artifact("template", "2", str(number)), size // artifacts)
    rows = []
    for to, server in servers(scratch).items():
        new = partial(fresh, server, scratch / "server")
        with ExitStack() as stack:
            own = _ours(server, scratch, artifacts, stack)
            rows += contest(f"{name} to {to}", [*own, _rclone(server, root)], size, runs, fresh=new)
    for each in root.rglob("*.raw"):
        each.unlink()  # the files are in memory
    return rows


def _ours(server: AnyS3, scratch: Path, artifacts: int, stack: ExitStack) -> list[Contender]:
    """Return our sides. The copy of a whole store takes long, so it is measured only as a command."""
    config = scratch / "worker.toml"
    config.write_text(
        f'state_dir = "{scratch}/state"\n[stores.primary]\nurl = "file://{scratch}/store"\n'
        f'[stores.archive]\nurl = "s3://{BUCKET}"\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
    )
    if artifacts == 1:
        worker = stack.enter_context(warm_worker(config))
        fields = {"stores": "archive", "account": "2", "id": "0"}
        return own_sides(config, worker, "copy", fields, _copied(server))
    command = [sys.executable, "-m", "ssvm_worker", "run", "copy", "--json", "--stores", "archive", "--all"]
    return [Contender(OURS, command, _copied(server), {"SSVM_CONFIG": str(config)})]


def _rclone(server: AnyS3, root: Path) -> Contender:
    """Return rclone with its defaults: four files at once, four parts of 5 MiB each, the MD5 of each file first."""
    keys = {"RCLONE_S3_ACCESS_KEY_ID": server.access_key, "RCLONE_S3_SECRET_ACCESS_KEY": server.secret_key}
    where = {"RCLONE_S3_PROVIDER": "Other", "RCLONE_S3_ENDPOINT": server.endpoint}
    command = [str(_RCLONE), "--config", "", "--s3-no-check-bucket", "copy", "--checksum", str(root), f":s3:{BUCKET}"]
    return Contender("rclone copy --checksum", command, _copied(server), keys | where)


def _copied(server: AnyS3) -> Callable[[], int]:
    """Return a function that counts the bytes of the copied images."""

    def size() -> int:
        listed = server.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return sum(each["Size"] for each in listed if each["Key"].endswith("/image.raw"))

    return size
