"""docs/how-to/install.md and upgrade.md, block by block, on a bare Debian with systemd: `make install-test`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.neighbours import ROOT
from tests.servers.debian import Debian
from tests.servers.http import HttpServer

pytestmark = pytest.mark.install

INSTALL, UPGRADE = (ROOT / "docs/how-to" / name for name in ("install.md", "upgrade.md"))
#: The image that the page downloads.
IMAGE = re.compile(r"https://cloud\.debian\.org/\S+")


def blocks(page: Path, section: str) -> list[str]:
    """Return the fenced blocks of commands of a section."""
    [text] = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", page.read_text(), re.S | re.M)
    return re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)


@pytest.fixture
def debian(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Debian]:
    """Return a bare machine of this release, with the source of this project and nothing else."""
    machine = Debian(request.param, tmp_path / "console.log")
    try:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        packed = subprocess.run(["tar", "-c", "--null", "-T-"], cwd=ROOT, input=names, check=True, capture_output=True)
        machine.run("tar -x", stdin=packed.stdout)
        # The test's own server is on loopback.
        machine.run("mkdir -p /etc/ssvm; echo SSVM_DOWNLOAD__ALLOW_NETWORKS=127.0.0.0/8 >/etc/ssvm/zone1.env")
        yield machine
    finally:
        machine.stop()


def follow(machine: Debian, server: HttpServer, section: str) -> None:
    """Run the commands of this section of the page, and of those that all installations have in common."""
    url = server.serve("debian.qcow2", images.qcow2())
    for each in (section, "The broker", "Store and settings", "Start"):
        for block in blocks(INSTALL, each):
            print(machine.run(IMAGE.sub(url, block)))


def work(machine: Debian, server: HttpServer, number: int) -> None:
    """Run another job, and check everything."""
    url = server.serve("other.iso", images.iso())
    machine.run(f"ssvm submit download --url {url} --account 1 --id {number} --wait; ssvm doctor")


def main_process(machine: Debian) -> str:
    """Return the process id of the running worker."""
    return machine.run("systemctl show --value --property=MainPID ssvm-worker@zone1")


@pytest.mark.parametrize("debian", ["bookworm", "trixie"], indirect=True)
def test_package(debian: Debian, http_server: HttpServer) -> None:
    """With the package a job succeeds and `ssvm doctor` is ok, also after an upgrade and a rollback."""
    follow(debian, http_server, "The Debian package")
    assert debian.run("stat -c '%a %U %G' /etc/ssvm/worker.toml") == "640 root ssvm\n"
    assert debian.run(f"stat -c %U /proc/{main_process(debian).strip()}") == "ssvm\n"
    old = debian.run("ls dist/*.deb").strip()
    debian.run(
        f"dpkg-deb -R {old} n; sed -i 's/^Version:.*/Version: 99-1/' n/DEBIAN/control; dpkg-deb -Znone -b n n.deb"
    )
    upgrade, rollback, purge = blocks(UPGRADE, "The Debian package")
    for number, step in enumerate(
        (upgrade.replace("ssvm-worker_NEW", "n"), rollback.replace("ssvm-worker_OLD.deb", old))
    ):
        before = main_process(debian)
        print(debian.run(step))
        assert main_process(debian) not in (before, "0\n")
        work(debian, http_server, 2 + number)
    print(debian.run(purge))
    left = debian.run("find /etc /opt /run /usr/bin /usr/lib /usr/share /var /srv -xdev -name '*ssvm*' 2>&- || true")
    assert left.split() == ["/etc/ssvm"]
    assert debian.run("ls /etc/ssvm /srv/secondary").split() == [
        "/etc/ssvm:",
        "zone1.env",
        "/srv/secondary:",
        "template",
    ]


@pytest.mark.parametrize("debian", ["bookworm"], indirect=True)
def test_wheel(debian: Debian, http_server: HttpServer) -> None:
    """With the wheel a job succeeds and `ssvm doctor` is ok, also after an upgrade and a rollback."""
    follow(debian, http_server, "Without the package")
    old = debian.run("ls dist/*.whl").strip()
    files = "pyproject.toml ssvm_worker/__init__.py"
    debian.run(rf"sed -i -E 's/^(version|__version__) = .*/\1 = \"99.0\"/' {files}; make wheel")
    [upgrade] = blocks(UPGRADE, "The wheel")
    for number, wheel in enumerate((old.replace(old.split("-")[1], "99.0"), old)):
        before = main_process(debian)
        print(debian.run(upgrade.replace("ssvm_worker-NEW.whl", wheel)))
        assert debian.run("ssvm --version").split() == ["ssvm", wheel.split("-")[1]]
        assert main_process(debian) not in (before, "0\n")
        work(debian, http_server, 2 + number)
