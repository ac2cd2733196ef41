"""Restore of a backup as a new VM, every digest checked, against govc, which checks none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .backup import ours as backing_up
from .contest import OURS, Broken, Contender, Row, contest, left_out
from .vcenter import Lab, has_go, lab

_POOL, _DATASTORE = "DC0_C0", "LocalDS_0"
_OVF = "store/snapshots/a/v/b/b.ovf"


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Each side imports the same backup from the same directory into the same vCenter."""
    if not has_go():
        return [left_out("restore", "Go is not installed, which builds the simulator and govc")]
    with lab(scratch, size) as it:
        _back_up(it)
        return contest("restore as a VM", [_ours(it), _govc(it)], it.sent, runs)


def _back_up(it: Lab) -> None:
    one = backing_up(it)
    done = subprocess.run(one.command, env=os.environ | dict(one.environment), capture_output=True, text=True)
    if done.returncode:
        raise Broken(f"there is nothing to restore: {done.stderr[-2000:]}")


def _ours(it: Lab) -> Contender:
    fields = {"account": "a", "volume": "v", "id": "b", "vcenter": "vc1", "name": "ours"}
    fields |= {"pool": _POOL, "datastore": _DATASTORE}
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "ssvm_worker", "run", "restore", "--json", *options]
    return Contender(OURS, command, _taken(it, "ours"), {"SSVM_CONFIG": str(it.root / "worker.toml")})


def _govc(it: Lab) -> Contender:
    place = ["-name", "theirs", "-pool", f"{_POOL}/Resources", "-ds", _DATASTORE]
    command = [it.govc, "import.ovf", *place, str(it.root / _OVF)]
    return Contender("govc import.ovf", command, _taken(it, "theirs"), it.environment)


def _taken(it: Lab, name: str) -> Callable[[], int]:
    """Bytes that the host has taken for that VM, which is removed."""

    def take() -> int:
        last: dict[str, int] = it.simulator.state()["puts"][-1]
        it.tell("vm.destroy", name)
        return last["bytes"]

    return take
