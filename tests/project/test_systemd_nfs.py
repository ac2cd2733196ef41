"""The systemd units and sudo: errors name the flags that forbid a mount, and the drop-in allows it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.config import parse
from ssvm_worker.net.nfs_url import parse_export
from ssvm_worker.operations.mounts import sudoers
from ssvm_worker.stores.nfs.commands import SystemCommands, full_command, mount_error, reason
from ssvm_worker.stores.nfs.mount import Mounted, MountTimeouts
from tests.neighbours import ROOT, missing

UNITS = ROOT / "config/systemd"
#: Units that use stores; the reaper uses only the ledger.
USERS = (
    *("ssvm-worker@.service", "ssvm-systemvm.service", "ssvm-serve.service", "ssvm-cleanup.service"),
    *("ssvm-flower.service", "ssvm-metrics.service"),
)
NOBODY = 65534
#: A port without a listener, so that the mount itself fails at once.
URL = "nfs://127.0.0.1:1/export/x?vers=4.2"


def service(*files: Path) -> dict[str, list[str]]:
    """Return the [Service] section of a unit and its drop-ins: each key with its values in order."""
    found: dict[str, list[str]] = {}
    for file in files:
        lines = file.read_text().partition("[Service]")[2].partition("\n[")[0].splitlines()
        for key, _, value in (each.partition("=") for each in lines if "=" in each and not each.startswith("#")):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("name", USERS)
def test_units(name: str) -> None:
    """A unit with stores can keep mountpoints, starts without a directory store, and has a sudo drop-in."""
    unit = service(UNITS / name)
    assert unit["StateDirectory"] == ["ssvm"]
    assert "-/srv/secondary" in " ".join(unit["ReadWritePaths"]).split()
    assert unit["NoNewPrivileges"][-1] == "yes"
    assert service(UNITS / name, UNITS / f"{name}.d/nfs.conf")["NoNewPrivileges"][-1] == "no"


def test_names_of_workers() -> None:
    """An instance is its zone, unless the instance's own file overrides that."""
    unit = service(UNITS / "ssvm-worker@.service")
    assert "SSVM_ZONE=%i" in unit["Environment"]
    assert unit["EnvironmentFile"] == ["-/etc/ssvm/%i.env"]


@pytest.fixture
def root() -> Iterator[Path]:
    """Return a state directory for an unprivileged user, who may not enter pytest's own directory."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        (Path(path) / "state").mkdir()
        os.chown(Path(path) / "state", NOBODY, NOBODY)
        yield Path(path) / "state"


@pytest.fixture
def rule(root: Path) -> Iterator[None]:
    """Return a real sudo, with the rule that `ssvm stores --sudoers` prints."""
    for command, package in (("sudo", "sudo"), ("setpriv", "util-linux"), ("mount.nfs", "nfs-common")):
        if not shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            missing(command, f"install {package}")
    if os.geteuid() != 0:
        missing("root", "run as root")
    settings = parse({"stores": {"primary": {"url": URL}}, "nfs": {"mount_root": str(root)}}, "the test")
    file = Path(f"/etc/sudoers.d/ssvm-test-{os.getpid()}")
    try:
        file.write_text(sudoers(settings, "nobody"))
        file.chmod(0o440)
        yield
    finally:
        file.unlink(missing_ok=True)


def mount(files: list[Path], root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the mount command as an unprivileged user under the flags of a unit; return its output."""
    flags = ["--no-new-privs"] if service(*files)["NoNewPrivileges"][-1] == "yes" else []
    mounted = Mounted(parse_export("primary", URL), root, SystemCommands(), MountTimeouts())
    mounted.paths.point.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: NOBODY)
        command = full_command(mounted.commands()[0])
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    done = subprocess.run(["setpriv", *flags, *user, *command], capture_output=True, text=True)
    return str(mount_error(reason(done.returncode, done.stderr), URL))


def test_mounting_under_the_flags_of_each_unit(root: Path, rule: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the drop-in the mount command runs, and otherwise the error names flag, drop-in and page."""
    for name in USERS:
        said = mount([UNITS / name], root, monkeypatch)
        assert '"no new privileges" flag is set' in said
        assert "NoNewPrivileges=yes" in said
        assert "docs/how-to/nfs.md" in said
        said = mount([UNITS / name, UNITS / f"{name}.d/nfs.conf"], root, monkeypatch)
        assert "sudo" not in said
        assert "mount.nfs" in said
