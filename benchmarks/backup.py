"""Verified backup of a snapshot, compared with govc and SHA-256. To S3 as well, compared with govc and then s5cmd."""

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
    """Let each side export the same snapshot. Each run with S3 has a new server."""
    if not has_go():
        return [left_out("backup", "Go, which builds the simulator and govc, is not installed")]
    with lab(scratch, size) as vcenter:
        rows = contest("backup to a directory", [ours(vcenter), _govc(vcenter)], vcenter.sent, runs)
        return rows + _with_s3(vcenter, runs)


def ours(vcenter: Lab, more: str = "", *stores: str) -> Contender:
    """Return a job in the foreground, with *more* settings and additional stores."""
    config = vcenter.root / "worker.toml"
    config.write_text(f'{vcenter.settings}[stores.primary]\nurl = "file://{vcenter.root}/store"\n{more}')
    fields = {"vcenter": "vc1", "vm": vcenter.vm.path, "snapshot": SNAPSHOT, "account": "a", "volume": "v", "id": "b"}
    fields["stores"] = ",".join(["primary", *stores])
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "backup", "--json", *options]
    return Contender(OURS, command, taker(vcenter.root / "store" / _KEY, _DISK), {"SSVM_CONFIG": str(config)})


def _govc(vcenter: Lab) -> Contender:
    options = ["-vm", vcenter.vm.path, "-snapshot", SNAPSHOT, "-sha", "256"]
    command = [vcenter.govc, "export.ovf", *options, str(vcenter.root / "out")]
    return Contender("govc export.ovf -sha 256", command, _disk_of(vcenter), vcenter.environment)


def _disk_of(vcenter: Lab) -> Callable[[], int]:
    def take() -> int:
        size = sum(each.stat().st_size for each in (vcenter.root / "out").rglob("*.vmdk"))
        shutil.rmtree(vcenter.root / "out")
        return size

    return take


def _with_s3(vcenter: Lab, runs: int) -> list[Row]:
    program = s5cmd()
    if not program:
        return [left_out("backup to a directory and S3", "s5cmd is not installed")]
    server = S3Server(vcenter.root / "weed")
    settings = (
        f'[stores.archive]\nurl = "s3://{BUCKET}"\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
    )
    contenders = [_both(ours(vcenter, settings, "archive"), server), _then_s5cmd(vcenter, server, program)]
    return contest(
        "backup to a directory and S3", contenders, vcenter.sent, runs, partial(fresh, server, vcenter.root / "weed")
    )


def _both(one: Contender, server: S3Server) -> Contender:
    """Count the smaller of the sizes in the directory and in the bucket."""
    made = one.made
    return Contender(one.name, one.command, lambda: min(made(), _stored(server)), one.environment, 1.6)


def _then_s5cmd(vcenter: Lab, server: S3Server, program: Path) -> Contender:
    export = _govc(vcenter)
    copy = [str(program), "--endpoint-url", server.endpoint, "cp", f"{vcenter.root}/out/", f"s3://{BUCKET}/"]
    command = ["/bin/sh", "-c", f"{shlex.join(export.command)} && {shlex.join(copy)}"]
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    environment = {**export.environment, **keys, "AWS_REGION": "us-east-1"}
    return Contender("govc, s5cmd cp", command, lambda: min(export.made(), _stored(server)), environment, 1.6)


def _stored(server: S3Server) -> int:
    """Return the bytes of the disks in the bucket."""
    listed = server.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return sum(each["Size"] for each in listed if each["Key"].endswith(".vmdk"))
