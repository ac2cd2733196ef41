"""Commands for people answer within seconds, also if the file system of a directory store hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.neighbours import ROOT
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


@pytest.mark.skipif(os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK), reason="only root mounts, with /dev/fuse")
def test_commands(tmp_path: Path) -> None:
    """Each command says that the store does not answer, and those about all stores show the other one."""
    for each in ("hung", "good"):
        (tmp_path / each).mkdir()
    file = tmp_path / "worker.toml"
    file.write_text(
        f'state_dir = "{tmp_path}"\n[broker]\nurl = "redis://127.0.0.1:1/0"\n'
        f'[stores.good]\nurl = "file://{tmp_path}/good"\n[stores.hung]\nurl = "file://{tmp_path}/hung"\n'
    )

    def run(command: str) -> tuple[int, str]:
        ssvm = [sys.executable, "-m", "ssvm_worker", *command.split(), "--config", str(file)]
        mounted = [sys.executable, "-m", "tests.servers.hung_mount", str(tmp_path / "hung"), *ssvm]
        done = subprocess.run(mounted, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        results = dict(zip(COMMANDS, pool.map(run, COMMANDS), strict=True))
    assert {command: status for command, (status, _) in results.items()} == COMMANDS, results
    assert all("has not answered within 10 s" in shown for _, shown in results.values()), results
    assert all("good" in results[command][1] for command in ("stores", "doctor"))
