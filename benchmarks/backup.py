"""Backup of a snapshot, verified, against govc with SHA-256; to S3 in the same pass, against s5cmd behind govc."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.servers.s3 import S3Server

from .contest import OURS, Contender, Row, contest, left_out
from .download import taker
from .stored import BUCKET, fresh
from .upload import s5cmd
from .vcenter import SNAPSHOT, Lab, has_go, lab

_KEY = "snapshots/a/v/b"
_DISK = "b-disk0.vmdk"


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Each side exports the same snapshot; S3 has a new server in every run, as with the upload."""
    if not has_go():
        return [left_out("backup", "Go is not installed, which builds the simulator and govc")]
    with lab(scratch, size) as it:
        rows = contest("backup to a directory", [ours(it), _govc(it)], it.sent, runs)
        return rows + _with_s3(it, runs)


def ours(it: Lab, more: str = "", *stores: str) -> Contender:
    """A job in the foreground; *more* settings, and stores beside the first."""
    config = it.root / "worker.toml"
    config.write_text(f'{it.settings}[stores.primary]\nurl = "file://{it.root}/store"\n{more}')
    fields = {"vcenter": "vc1", "vm": it.vm.path, "snapshot": SNAPSHOT, "account": "a", "volume": "v", "id": "b"}
    fields["stores"] = ",".join(["primary", *stores])
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "backup", "--json", *options]
    return Contender(OURS, command, taker(it.root / "store" / _KEY, _DISK), {"SSVM_CONFIG": str(config)})


def _govc(it: Lab) -> Contender:
    command = [it.govc, "export.ovf", "-vm", it.vm.path, "-snapshot", SNAPSHOT, "-sha", "256", str(it.root / "out")]
    return Contender("govc export.ovf -sha 256", command, _disk_of(it), it.environment)


def _disk_of(it: Lab) -> Callable[[], int]:
    def take() -> int:
        size = sum(each.stat().st_size for each in (it.root / "out").rglob("*.vmdk"))
        shutil.rmtree(it.root / "out")
        return size

    return take


def _with_s3(it: Lab, runs: int) -> list[Row]:
    program = s5cmd()
    if not program:
        return [left_out("backup to a directory and S3", "s5cmd is not installed")]
    server = S3Server(it.root / "weed")
    settings = (
        f'[stores.archive]\nurl = "s3://{BUCKET}"\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
    )
    contenders = [_both(ours(it, settings, "archive"), server), _then_s5cmd(it, server, program)]
    return contest("backup to a directory and S3", contenders, it.sent, runs, partial(fresh, server, it.root / "weed"))


def _both(one: Contender, server: S3Server) -> Contender:
    """The smaller of what is in the directory and what is in the bucket is what was made."""
    made = one.made
    return Contender(one.name, one.command, lambda: min(made(), _stored(server)), one.environment, 1.6)


def _then_s5cmd(it: Lab, server: S3Server, program: Path) -> Contender:
    export = _govc(it)
    copy = [str(program), "--endpoint-url", server.endpoint, "cp", f"{it.root}/out/", f"s3://{BUCKET}/"]
    command = ["/bin/sh", "-c", f"{shlex.join(export.command)} && {shlex.join(copy)}"]
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    environment = {**export.environment, **keys, "AWS_REGION": "us-east-1"}
    return Contender("govc, s5cmd cp", command, lambda: min(export.made(), _stored(server)), environment, 1.6)


def _stored(server: S3Server) -> int:
    """Bytes of the disks in the bucket."""
    listed = server.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return sum(each["Size"] for each in listed if each["Key"].endswith(".vmdk"))
