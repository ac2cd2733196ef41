"""Verified backup of a snapshot, compared with govc and SHA-256. To S3 as well, compared with govc and then s5cmd."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .contest import Contender, Parts, Row, contest, left_out
from .download import taker, tls_s
from .parts import hash_s, start_s, write_s
from .stored import BUCKET, SLOW, AnyS3, fresh, join_s, servers
from .upload import s5cmd
from .vcenter import SNAPSHOT, Lab, has_go, lab
from .workers import own_sides, warm_worker

_KEY = "snapshots/a/v/b"
_DISK = "b-disk0.vmdk"


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Let each side export the same snapshot. Each run with S3 has a new server."""
    if not has_go():
        return [left_out("backup", "Go, which builds the simulator and govc, is not installed")]
    with lab(scratch, size) as vcenter:
        config, fields, made = job(vcenter)
        own = {"SHA-256": hash_s(vcenter.sent), "write": write_s(scratch, vcenter.sent)}
        parts = Parts(
            {**own, "receive": tls_s(scratch / "web", vcenter.sent)}, start_s("requests", "pyVmomi", "pydantic")
        )
        with warm_worker(config) as worker:
            sides = [*own_sides(config, worker, "backup", fields, made), _govc(vcenter)]
            rows = contest("backup to a directory", sides, vcenter.sent, runs, parts=parts)
        return rows + _with_s3(vcenter, runs, parts)


def job(vcenter: Lab, more: str = "", *stores: str) -> tuple[Path, dict[str, str], Callable[[], int]]:
    """Return the settings with *more* lines, the fields of a job with additional stores, and its taker."""
    config = vcenter.root / "worker.toml"
    config.write_text(f'{vcenter.settings}[stores.primary]\nurl = "file://{vcenter.root}/store"\n{more}')
    fields = {"vcenter": "vc1", "vm": vcenter.vm.path, "snapshot": SNAPSHOT, "account": "a", "volume": "v", "id": "b"}
    fields["stores"] = ",".join(["primary", *stores])
    return config, fields, taker(vcenter.root / "store" / _KEY, _DISK)


def _govc(vcenter: Lab) -> Contender:
    options = ["-vm", vcenter.vm.path, "-snapshot", SNAPSHOT, "-sha", "256"]
    command = [vcenter.govc, "export.ovf", *options, str(vcenter.root / "out")]
    return Contender("govc export.ovf -sha 256", command, _disk_of(vcenter), vcenter.environment, 1.0, 1.2)


def _disk_of(vcenter: Lab) -> Callable[[], int]:
    def take() -> int:
        size = sum(each.stat().st_size for each in (vcenter.root / "out").rglob("*.vmdk"))
        shutil.rmtree(vcenter.root / "out")
        return size

    return take


def _with_s3(vcenter: Lab, runs: int, parts: Parts) -> list[Row]:
    """Let each side export to a directory and S3. The store signs its parts with one more SHA-256 of the bytes."""
    needed = {**parts.seconds, "SHA-256 of the parts": parts.seconds["SHA-256"]}
    program = s5cmd()
    if not program:
        return [left_out("backup to a directory and S3", "s5cmd is not installed")]
    rows = []
    for name, server in servers(vcenter.root).items():
        settings = (
            f'[stores.archive]\nurl = "s3://{BUCKET}"\nendpoint = "{server.endpoint}"\n'
            f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
        )
        config, fields, made = job(vcenter, settings, "archive")
        both, folder = partial(_smaller, made, server), vcenter.root / "server"
        join = join_s(server, folder, vcenter.sent)
        parts = Parts(needed, parts.start, one_connection=False, join=join)
        with warm_worker(config) as worker:
            sides = [*own_sides(config, worker, "backup", fields, both), _then_s5cmd(vcenter, server, program)]
            new = partial(fresh, server, folder)
            # SeaweedFS takes three times as long as all clients together.
            times = 1 if name == SLOW else runs
            title = f"backup to a directory and {name}"
            rows += contest(title, sides, vcenter.sent, times, fresh=new, parts=parts)
    return rows


def _smaller(made: Callable[[], int], server: AnyS3) -> int:
    """Return the smaller of the sizes in the directory and in the bucket."""
    return min(made(), _stored(server))


def _then_s5cmd(vcenter: Lab, server: AnyS3, program: Path) -> Contender:
    export = _govc(vcenter)
    copy = [str(program), "--endpoint-url", server.endpoint, "cp", f"{vcenter.root}/out/", f"s3://{BUCKET}/"]
    command = ["/bin/sh", "-c", f"{shlex.join(export.command)} && {shlex.join(copy)}"]
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    environment = {**export.environment, **keys, "AWS_REGION": "us-east-1"}
    return Contender("govc, s5cmd cp", command, partial(_smaller, export.made, server), environment, None, 1.5)


def _stored(server: AnyS3) -> int:
    """Return the bytes of the disks in the bucket."""
    listed = server.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return sum(each["Size"] for each in listed if each["Key"].endswith(".vmdk"))
