"""config/cloudstack/: units, settings and the installer of a stock system VM."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ssvm_worker import config
from ssvm_worker.cloudstack.properties import environment_of_cmdline
from tests.neighbours import ROOT, missing
from tests.waiting import PATIENCE_S

FILES = ROOT / "config/cloudstack"
SYSTEM_VM = FILES / "systemvm"
CMDLINE = (
    "template=domP type=secstorage host=192.0.2.2,192.0.2.3@static port=8250 name=s-7-VM zone=3 pod=1 guid=s-7-VM\n"
)
#: The service of the Java agent, as a stock system VM has it.
_JAVA = "[Unit]\nDescription=CloudStack Agent\n[Service]\nType=simple\nExecStart=/bin/false\nRestart=on-failure\n"
INSTALLED = {
    "cloud.service.d/ssvm.conf",
    "ssvm-serve.service",
    "ssvm-serve.service.d/cloudstack.conf",
    "ssvm-systemvm.service",
    "ssvm-systemvm.service.d/cloudstack.conf",
    "ssvm.slice",
}


class SystemVm:
    """The directories of a system VM, below a temporary one, with a `systemctl` that only records its arguments."""

    def __init__(self, root: Path, cmdline: str = CMDLINE) -> None:
        self.root = root
        (root / "var/cache/cloud").mkdir(parents=True)
        (root / "var/cache/cloud/cmdline").write_text(cmdline)
        self.log = root / "systemctl.log"
        (root / "bin").mkdir()
        (root / "bin/systemctl").write_text(f'#!/bin/sh\necho "$*" >> {self.log}\n')
        (root / "bin/systemctl").chmod(0o755)

    def put_worker(self, where: str = "opt/ssvm-worker") -> Path:
        """Copy what a bundle contains to a directory, and return it."""
        directory = self.root / where
        (directory / ".venv/bin").mkdir(parents=True)
        (directory / ".venv/bin/ssvm").symlink_to(Path(sys.executable).parent / "ssvm")
        shutil.copytree(ROOT / "config", directory / "config")
        return directory

    def run(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the installer."""
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [str(SYSTEM_VM / "install.sh"), *arguments],
            env=os.environ | {"PATH": path, "ROOT": str(self.root)} | environ,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    @property
    def units(self) -> set[str]:
        """The installed files."""
        folder = self.root / "etc/systemd/system"
        return {str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()}

    @property
    def commands(self) -> list[str]:
        """What systemctl was called with."""
        return self.log.read_text().splitlines() if self.log.exists() else []


def test_install_and_remove(tmp_path: Path) -> None:
    """The installer writes units and settings, keeps edited settings, and removes only what it has written."""
    vm = SystemVm(tmp_path)
    vm.put_worker()
    done = vm.run()
    assert done.returncode == 0, done.stderr
    assert vm.units == INSTALLED
    assert vm.commands == ["daemon-reload", "restart cloud.service"]
    settings = tmp_path / "etc/ssvm/worker.toml"
    assert config.load(settings, {}).zone == "3"
    settings.write_text(settings.read_text() + "# edited\n")
    assert vm.run().returncode == 0
    assert settings.read_text().endswith("# edited\n")
    assert vm.run("--remove").returncode == 0
    assert vm.units == set()
    assert vm.commands[-1] == "start cloud.service"


def test_other_system_vm(tmp_path: Path) -> None:
    """In a console proxy the installer does nothing and succeeds, because its user data may be shared."""
    vm = SystemVm(tmp_path, "type=consoleproxy zone=1\n")
    assert vm.run(BUNDLE="http://127.0.0.1:1/x").returncode == 0
    assert (vm.units, vm.commands) == (set(), [])


def test_bundle(tmp_path: Path) -> None:
    """The installer unpacks a bundle with the right checksum only."""
    vm = SystemVm(tmp_path)
    bundle = tmp_path / "bundle.tgz"
    directory = vm.put_worker("made/ssvm-worker")
    with tarfile.open(bundle, "w:gz") as archive:
        archive.add(directory, "ssvm-worker")
    wrong = vm.run(BUNDLE=f"file://{bundle}", BUNDLE_SHA256="0" * 64)
    assert (wrong.returncode, "another checksum" in wrong.stderr, vm.units) == (1, True, set())
    done = vm.run(BUNDLE=f"file://{bundle}", BUNDLE_SHA256=hashlib.sha256(bundle.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stderr
    assert vm.units == INSTALLED


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ({}, (), "set BUNDLE"),
        ({"BUNDLE": "http://127.0.0.1:1/x"}, (), "needs BUNDLE_SHA256"),
        ({}, ("--undo",), "unknown argument --undo"),
    ],
)
def test_refusals(tmp_path: Path, given: dict[str, str], arguments: tuple[str, ...], message: str) -> None:
    """The installer changes nothing if something is missing, and says what."""
    vm = SystemVm(tmp_path)
    done = vm.run(*arguments, **given)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert (vm.units, vm.commands) == (set(), [])


def test_shellcheck() -> None:
    """shellcheck accepts the installer and all other scripts."""
    if not shutil.which("shellcheck"):
        missing("shellcheck", "install shellcheck")
    scripts = [ROOT / ".ci/run", *(ROOT / "tests").rglob("*.sh"), *(ROOT / "config").rglob("*.sh")]
    assert SYSTEM_VM / "install.sh" in scripts
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_units(tmp_path: Path) -> None:
    """systemd accepts the units in a stock system VM, and the unit `cloud` starts all of them."""
    if not shutil.which("systemd-analyze"):
        missing("systemd-analyze", "install systemd")
    vm = SystemVm(tmp_path)
    vm.put_worker()
    assert vm.run().returncode == 0
    folder = tmp_path / "etc/systemd/system"
    (folder / "cloud.service").write_text(_JAVA)
    for file in filter(Path.is_file, folder.rglob("*")):
        file.write_text(file.read_text().replace("/opt/ssvm-worker/.venv/bin", str(Path(sys.executable).parent)))
    names = [str(folder / name) for name in ("cloud.service", "ssvm-systemvm.service", "ssvm-serve.service")]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    text = (folder / "cloud.service.d/ssvm.conf").read_text()
    assert "Wants=ssvm-systemvm.service ssvm-serve.service" in text
    for file in SYSTEM_VM.glob("*.d/*.conf"):
        assert "Slice=ssvm.slice" in file.read_text()


def test_settings_of_the_system_vm(tmp_path: Path) -> None:
    """The settings in a system VM are complete with CloudStack's own files, and the broker is the embedded one."""
    cmdline = tmp_path / "cmdline"
    cmdline.write_text(CMDLINE)
    settings = config.load(SYSTEM_VM / "worker.toml", environment_of_cmdline(str(cmdline)))
    assert settings.broker.embedded
    assert (settings.cloudstack.servers, settings.cloudstack.name) == (("192.0.2.2", "192.0.2.3"), "s-7-VM")
    assert settings.zone == "3"


@pytest.mark.parametrize("name", ["beside.toml", "alone.toml"])
def test_settings_of_hosts(name: str) -> None:
    """The settings of the other deployments are valid, and the server must show a certificate."""
    section = config.load(FILES / name, {}).cloudstack
    assert section.servers
    assert section.ca_file
    assert not section.insecure
