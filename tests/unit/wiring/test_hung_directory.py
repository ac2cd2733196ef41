"""Commands for people answer within seconds, also if the file system of a directory store hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.neighbours import ROOT
from tests.servers.broker import Broker
from tests.servers.vcenter import TestVM, VCenterSimulator
from tests.waiting import PATIENCE_S

_PLACE = "template/tmpl/2/201"


#: Each command with its exit status.
COMMANDS = {
    "stores": 75,
    "doctor": 1,
    "list --store hung": 75,
    f"stat {_PLACE} --store hung": 75,
    f"delete {_PLACE} --store hung --force": 75,
    f"verify {_PLACE} --store hung": 75,
    f"link {_PLACE}/201.qcow2 --store hung": 75,
}


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK), reason="only root mounts, with /dev/fuse"
)


def settings_file(tmp_path: Path, broker: str, more: str = "") -> Path:
    """Create the directories of a good store and of one that will hang, and return the settings file."""
    for each in ("hung", "good"):
        (tmp_path / each).mkdir()
    file = tmp_path / "worker.toml"
    file.write_text(
        f'state_dir = "{tmp_path}"\n[broker]\n{broker}\n'
        f'[stores.good]\nurl = "file://{tmp_path}/good"\n[stores.hung]\nurl = "file://{tmp_path}/hung"\n{more}'
    )
    return file


def run(file: Path, command: str) -> tuple[int, str]:
    """Run a command while the directory of a store hangs. Return its exit status and everything that it printed."""
    ssvm = [sys.executable, "-m", "ssvm_worker", *command.split(), "--config", str(file)]
    mounted = [sys.executable, "-m", "tests.servers.hung_mount", str(file.parent / "hung"), *ssvm]
    done = subprocess.run(mounted, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    return done.returncode, done.stdout + done.stderr


def test_commands(tmp_path: Path) -> None:
    """Each command says that the store does not answer, and those about all stores show the other one."""
    file = settings_file(tmp_path, 'url = "redis://127.0.0.1:1/0"')
    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        results = dict(zip(COMMANDS, pool.map(lambda command: run(file, command), COMMANDS), strict=True))
    assert {command: status for command, (status, _) in results.items()} == COMMANDS, results
    assert all("has not answered within 10 s" in shown for _, shown in results.values()), results
    assert all("good" in results[command][1] for command in ("stores", "doctor"))


@pytest.mark.parametrize("command", ["cleanup", "cleanup --dry-run", "run cleanup"])
def test_cleanup(broker: Broker, tmp_path: Path, command: str) -> None:
    """Clean-up says once that a store does not answer, and cleans up the other one."""
    file = settings_file(tmp_path, f'url = "{broker.url}"\nprefix = "{broker.prefix}"')
    left = tmp_path / "good" / _PLACE / "201.qcow2"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    os.utime(left, (0, 0))
    status, shown = run(file, command)
    assert status == (0 if command.startswith("run") else 75), shown
    assert "incomplete artifact" in shown
    if not command.startswith("run"):
        assert shown.count("has not answered within 10 s") == 1, shown
    assert left.exists() == ("--dry-run" in command)


def test_doctor_of_a_vm(vcenter: VCenterSimulator, vm: TestVM, tmp_path: Path) -> None:
    """doctor says of a VM's secondary store that it does not answer, and examines the rest."""
    names = ("host", "username", "password", "ca_file")
    keys = "".join(f'{name} = "{getattr(vcenter, name)}"\n' for name in names)
    more = f"[vcenters.vc]\nport = {vcenter.port}\n{keys}"
    file = settings_file(tmp_path, 'url = "redis://127.0.0.1:1/0"', more)
    status, shown = run(file, f"doctor --vcenter vc --vm {vm.machine.id} --json")
    rows = {row["check"]: row for row in json.loads(shown.splitlines()[0])}
    assert (status, rows["room on good"]["state"], rows["room on hung"]["state"]) == (0, "ok", "warning"), shown
    assert "has not answered within 10 s" in rows["room on hung"]["detail"]
