"""docs/how-to/cloudstack.md, deployment A, in a bare Debian 12, which a system VM also has: `make install-test`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.demo.cloudstack.management import ManagementServer, make_management_server
from ssvm_worker.demo.cloudstack.server import ServerTimes
from tests import images
from tests.neighbours import ROOT
from tests.servers.debian import SOURCE, Debian
from tests.servers.http import HttpServer
from tests.unit.cloudstack.commands.agents import PLACE
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.install

PAGE = (ROOT / "docs/how-to/cloudstack.md").read_text()
#: The Java agent of the VM. It only exists, and holds no connection.
_JAVA = "[Unit]\nDescription=CloudStack Agent\n[Service]\nExecStart=/bin/sleep infinity\nRestart=on-failure\n"
_CONF = "/usr/local/cloud/systemvm/conf"
#: What step 7 adds. The image store is a directory, because a container cannot mount an export.
_STORES = f'\n[stores.primary]\nurl = "file:///srv/secondary"\n[cloudstack.stores]\n"{PLACE}" = "primary"\n'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ManagementServer]:
    """A strict server whose zone has a running SSVM and one NFS store."""
    times = ServerTimes(ping=PATIENCE_S, poll=0.5)
    with make_management_server(tmp_path / "ca", times=times) as server:
        server.strict = True
        server.zone.allowed_internal_sites = ["127.0.0.0/8"]
        server.zone.add_store(PLACE)
        server.zone.add_system_vm("s-7-VM", "192.0.2.77")
        yield server


@pytest.fixture
def system_vm(server: ManagementServer, tmp_path: Path) -> Iterator[Debian]:
    """A machine with the Java agent, and with the files that a management server writes into a system VM."""
    machine = Debian("bookworm", tmp_path / "console.log")
    try:
        machine.run("apt-get -qq update; apt-get -qq install --no-install-recommends python3-venv curl >/dev/null")
        issued = server.authority.issue("127.0.0.1", name="s-7-VM")
        for file in (issued.certificate, issued.key, issued.ca):
            machine.run(f"mkdir -p {_CONF}; cat >{_CONF}/{file.name}", stdin=file.read_bytes())
        words = f"type=secstorage host={server.host}@static port={server.port} name=s-7-VM zone=1 pod=1 guid=s-7-VM"
        machine.run("mkdir -p /var/cache/cloud; cat >/var/cache/cloud/cmdline", stdin=words.encode())
        machine.run("cat >/etc/systemd/system/cloud.service", stdin=_JAVA.encode())
        machine.run("systemctl daemon-reload; systemctl start cloud")
        yield machine
    finally:
        machine.stop()


def make_bundle(machine: Debian) -> tuple[str, str]:
    """Make the bundle as step 1 of the page says, and return its URL and its digest. Nothing else of it stays."""
    given = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(given, cwd=ROOT, check=True, capture_output=True).stdout
    packed = subprocess.run(["tar", "-c", "--null", "-T-"], cwd=ROOT, input=names, check=True, capture_output=True)
    machine.run("mkdir /opt/ssvm-worker; tar -x -C /opt/ssvm-worker", stdin=packed.stdout)
    [step] = re.findall(r"^       git clone … /opt/ssvm-worker && (.*?)\n\n", PAGE, re.S | re.M)
    digest = machine.run(step).split()[-2]
    machine.run("rm -rf /opt/ssvm-worker")
    return f"file://{SOURCE}/ssvm-worker.tgz", digest


def test_deployment_a(server: ManagementServer, system_vm: Debian, http_server: HttpServer) -> None:
    """After the ten steps the agent is Up and makes a template, and `--remove` starts the Java agent again."""
    bundle, digest = make_bundle(system_vm)
    installer = (ROOT / "config/cloudstack/systemvm/install.sh").read_bytes()
    system_vm.run("cat >install.sh", stdin=installer)
    print(system_vm.run(f"BUNDLE={bundle} BUNDLE_SHA256={digest} bash install.sh"))
    server.wait_up(timeout=PATIENCE_S)
    system_vm.run("mkdir -p /srv/secondary; cat >>/etc/ssvm/worker.toml", stdin=_STORES.encode())
    system_vm.run("systemctl restart ssvm-systemvm cloud")
    until(lambda: server.host_row("s-7-VM").states.count("Up") == 2, "Up again")
    template = server.register_template(http_server.serve("a.qcow2", images.qcow2()))
    server.wait_ready(template, PATIENCE_S)
    ssvm = "/opt/ssvm-worker/.venv/bin/ssvm"
    assert "failed" not in system_vm.run(f"{ssvm} doctor --cloudstack --from-cmdline")
    assert "succeeded" in system_vm.run(f"{ssvm} jobs")
    units = system_vm.run("systemctl show --property=Slice --value cloud ssvm-systemvm ssvm-serve").split()
    assert units == ["ssvm.slice"] * 3
    assert "host s-7-VM is Up with the id 1" in system_vm.run("journalctl -u cloud")
    assert server.delete(template).ok
    system_vm.run("bash install.sh --remove")
    assert "sleep infinity" in system_vm.run("systemctl show --property=ExecStart cloud")
    assert system_vm.run("systemctl is-active cloud; systemctl is-active ssvm-systemvm || true").split()[0] == "active"
    assert server.zone.problems == []
