"""Restore of a backup as a new VM, with every digest checked, compared with govc, which checks none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .backup import job as backup
from .contest import Broken, Contender, Parts, Row, contest, left_out
from .download import tls_s
from .parts import hash_s, read_s, start_s
from .vcenter import Lab, has_go, lab
from .workers import own_sides, warm_worker

_POOL, _DATASTORE = "DC0_C0", "LocalDS_0"
_OVF = "store/snapshots/a/v/b/b.ovf"
_STORED = "store/snapshots/a/v/b/b-disk0.vmdk"
_FIELDS = {"account": "a", "volume": "v", "id": "b", "vcenter": "vc1", "name": "ours"}
_FIELDS |= {"pool": _POOL, "datastore": _DATASTORE}


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Let each side import the same backup from the same directory into the same vCenter."""
    if not has_go():
        return [left_out("restore", "Go, which builds the simulator and govc, is not installed")]
    with lab(scratch, size) as vcenter:
        config, fields, _ = backup(vcenter)
        _back_up(config, fields)
        disk, size = vcenter.root / _STORED, vcenter.sent
        needed = {"read": read_s(disk), "SHA-256": hash_s(size), "TLS": tls_s(scratch / "web", size)}
        parts = Parts(needed, start_s("requests", "pyVmomi", "pydantic"))
        with warm_worker(config) as worker:
            own = own_sides(config, worker, "restore", _FIELDS, _taken(vcenter, "ours"))
            return contest("restore as a VM", [*own, _govc(vcenter)], vcenter.sent, runs, parts=parts)


def _back_up(config: Path, fields: dict[str, str]) -> None:
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "backup", "--json", *options]
    done = subprocess.run(command, env=os.environ | {"SSVM_CONFIG": str(config)}, capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"the backup for the restore failed: {done.stderr[-2000:]}")


def _govc(vcenter: Lab) -> Contender:
    place = ["-name", "theirs", "-pool", f"{_POOL}/Resources", "-ds", _DATASTORE]
    command = [vcenter.govc, "import.ovf", *place, str(vcenter.root / _OVF)]
    return Contender("govc import.ovf", command, _taken(vcenter, "theirs"), vcenter.environment, 1.0, 1.1)


def _taken(vcenter: Lab, name: str) -> Callable[[], int]:
    """Return a function that returns the bytes that the host received for a VM, and removes the VM."""

    def take() -> int:
        last: dict[str, int] = vcenter.simulator.state()["puts"][-1]
        vcenter.govc_run("vm.destroy", name)
        return last["bytes"]

    return take
