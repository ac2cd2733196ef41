"""``ssvm doctor --trial``: its report reproduces a vCenter in the simulator, and has no names; nothing is left."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cli import main
from ssvm_worker.demo.simulator import SimulatedMachine, VCenterSimulator
from ssvm_worker.errors import Cancelled, SourceNotFound
from ssvm_worker.operations.trial import trial_disk
from ssvm_worker.units import MiB, TiB
from ssvm_worker.vmware.session import VCenterSession
from ssvm_worker.vmware.trial import QUESTIONS, TrialReport
from tests.images import stream_optimized
from tests.servers.vcenter import address_of, profile

# The tests set the switches of the simulator themselves.
pytestmark = pytest.mark.plain_vcenter
_numbers = itertools.count(1)
#: What a trial must find out, and whether the VM is on.
VCENTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "healthy": ({}, False),
    "awkward": (profile("awkward"), False),
    "differing-manifest": (profile("differing-manifest"), True),
    "version 9": (
        {"host_certificate": "chain", "host_thumbprint": "own", "certificate": "own"}
        | {"lacks": ["Datastore.AllocateSpace"]}
        | {"quiesce_task": "GenericVmConfigFault", "consolidate": True, "manifest": "absent"}
        | {"body_end": "no_last_chunk_cut", "progress_markers": "clean", "move": "InvalidState", "max_disk": 2 * TiB},
        False,
    ),
    "old": (
        {"manifest": "zero_size", "consolidate": True, "locked": True, "body_end": "close"}
        | {"descriptor_error": "OvfUnsupportedDeviceExport", "descriptor_warning": "OvfUnsupportedDeviceExport"}
        | {"calls": {"HttpNfcLeaseSetManifestChecksumType": "NotSupported"}}
        | {
            "import_warning": "OvfUnsupportedDeviceExport",
            "move": "lives",
            "upload_manifest": "correct",
            "put": {"do": "late", "seconds": 1.0},
        },
        True,
    ),
    "no snapshot": ({"snapshot_task": "NotSupported"}, False),
    "no lease": ({"lease_error": "NotSupported"}, False),
}


def scratch(vcenter: VCenterSimulator) -> SimulatedMachine:
    """Return a scratch VM with two disks, in a cluster."""
    streams = [stream_optimized(b"disk".rjust(MiB, b"\0"))] * 2
    return vcenter.add_vm(f"ssvm-trial-{next(_numbers)}", streams, [MiB, MiB], pool="DC0_C0")


def tried(vcenter: VCenterSimulator, machine: SimulatedMachine, is_on: bool = False) -> TrialReport:
    """Return the report of a trial."""
    with VCenterSession(address_of(vcenter)) as session:
        vm = session.find_vm(machine.id)
        if is_on:
            vm._connection.finish(vm._vm.PowerOnVM_Task(), 60)
        return vm.trial("trial-1%", lambda _: None, pause_s=0, disk=trial_disk())


@pytest.mark.parametrize("kind", VCENTERS)
def test_reproduces(vcenter: VCenterSimulator, kind: str) -> None:
    """A trial of a simulator with a report's switches finds the same switches, and leaves no snapshot and no lease."""
    switches, is_on = VCENTERS[kind]
    with vcenter.behaving_like({"switches": switches}):
        machine = scratch(vcenter)
        report = tried(vcenter, machine, is_on)
        state = vcenter.state()
    with VCenterSession(address_of(vcenter)) as session:
        session.find_vm(machine.id).consolidate()  # other tests look for VMs that need it
    assert report.switches == switches
    assert report.is_clean
    assert [name for name in state["snapshots"] if name.startswith("ssvm-backup-trial")] == []
    assert report.answers.keys() == {each.name for each in QUESTIONS}


def test_stream(vcenter: VCenterSimulator) -> None:
    """The report has the facts about a stream: markers, framing, padding, zeros and what a second read gives."""
    answers = tried(vcenter, scratch(vcenter)).answers
    stream = answers["stream"]
    assert stream["markers"] == {"directory": 1, "end": 1, "footer": 1, "grain": 1, "table": 1}
    assert (stream["body"], stream["end"], stream["dirty_markers"], stream["zero_grains"]) == ("chunked", "clean", 0, 0)
    assert answers["second_lease"] == {"granted": 3}
    assert answers["again"]["same_file"]["bytes"] == answers["again"]["other_files"][0]["bytes"] == stream["bytes"]


@pytest.mark.parametrize("secret", ["encrypted", "tpm"])
def test_secrets(vcenter: VCenterSimulator, secret: str) -> None:
    """The report says whether the VM is encrypted or has a virtual TPM, because vSphere may refuse its export."""
    machine = vcenter.add_vm(f"ssvm-trial-{next(_numbers)}", [stream_optimized(bytes(MiB))], [MiB], **{secret: True})
    with vcenter.behaving_like({"switches": {"lease_error": "NotSupported"}}):
        answers = tried(vcenter, machine).answers
    assert {name: answers["vm"][name] for name in ("encrypted", "tpm")} == {"encrypted": False, "tpm": False} | {
        secret: True
    }
    assert answers["lease"] == {"fault": "NotSupported"}


def test_import(vcenter: VCenterSimulator) -> None:
    """The import without a host creates a VM and removes it, and never happens without its option."""
    machine = scratch(vcenter)
    made = tried(vcenter, machine).answers
    assert made["import"] == {"allowed": True, "removed_by_abort": True}
    assert made["upload"] == {
        "creates": False,
        "confirmed_after_s": made["upload"]["confirmed_after_s"],
        "warnings": [],
        "manifest": {"algorithm": "sha256", "digest": True, "size": True, "zero_size": False},
        "removed_by_abort": True,
    }
    with VCenterSession(address_of(vcenter)) as session:
        answers = session.find_vm(machine.id).trial("trial-3", lambda _: None).answers
        with pytest.raises(SourceNotFound):
            session.find_vm(f"{machine.path}-import")
    assert answers["import"] == answers["upload"] == {"not_asked": "--with-import is not given"}


@pytest.mark.parametrize(
    ("switches", "answer"),
    [
        ({}, {"allowed": True, "lease_lives": False}),
        ({"move": "lives"}, {"allowed": True, "lease_lives": True}),
        ({"move": "TaskInProgress"}, {"fault": "TaskInProgress"}),
        ({"lacks": ["Resource.ColdMigrate"]}, {"fault": "NoPermission"}),
    ],
)
def test_move(vcenter: VCenterSimulator, switches: dict[str, Any], answer: dict[str, Any]) -> None:
    """The trial finds out whether a VM can move during a lease, and whether the lease then lives."""
    machine = scratch(vcenter)
    with VCenterSession(address_of(vcenter)) as session:
        before = session.find_vm(machine.id).host()
        with vcenter.behaving_like({"switches": switches}):
            report = tried(vcenter, machine)
        assert session.find_vm(machine.id).host() == before
    assert report.answers["move"] == {"disabled_methods": []} | answer
    assert report.switches.get("move") == switches.get("move")
    assert report.is_clean


@pytest.mark.parametrize("largest", [2 * TiB, 62 * TiB])
def test_large_disk(vcenter: VCenterSimulator, largest: int) -> None:
    """The trial finds out whether disks above 2 TiB can be imported, and creates no VM for it."""
    with vcenter.behaving_like({"switches": {"max_disk": largest}}):
        with VCenterSession(address_of(vcenter)) as session:
            made = vcenter.state()["calls"].get("ImportVApp", 0)
            report = session.find_vm(scratch(vcenter).id).trial("trial-4", lambda _: None, pause_s=0)
        assert vcenter.state()["calls"].get("ImportVApp", 0) == made
    is_enough = largest > 3 * TiB
    errors = [] if is_enough else ["FileTooLarge"]
    assert report.answers["large_disk"] == {"largest": largest, "accepted": is_enough, "errors": errors}
    assert report.switches.get("max_disk") == (None if is_enough else largest)


def settings(vcenter: VCenterSimulator, directory: Path) -> str:
    """Write the settings of the simulator as vc1, and return their path."""
    (directory / "password").write_text(vcenter.password)
    lines = [
        "[vcenters.vc1]",
        f'host = "{vcenter.host}"\nport = {vcenter.port}\nusername = "{vcenter.username}"',
        f'password_file = "{directory}/password"\nca_file = "{vcenter.ca_file}"',
    ]
    (directory / "worker.toml").write_text("\n".join(lines))
    return str(directory / "worker.toml")


def doctor(vcenter: VCenterSimulator, tmp_path: Path, vm: str, *options: str) -> tuple[int, Path]:
    """Run the command. Return its exit status, and the path of the report."""
    file = tmp_path / "report.json"
    command = ["doctor", "--config", settings(vcenter, tmp_path), "--vcenter", "vc1", "--vm", vm, "--trial", str(file)]
    return main([*command, *options]), file


def test_anonymous(vcenter: VCenterSimulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report contains no name, address, cookie, ticket, id or digest."""
    machine = scratch(vcenter)
    before = vcenter.state()["leases"].keys()
    status, file = doctor(vcenter, tmp_path, machine.id, "--yes")
    text = file.read_text()
    assert status == 0, capsys.readouterr()
    private = [vcenter.host, str(vcenter.port), vcenter.username, vcenter.password, vcenter.thumbprint]
    private += [machine.id, machine.instance_uuid, machine.path.rpartition("/")[2], "LocalDS", "DC0", str(tmp_path)]
    private += [disk.label for disk in machine.disks] + list(vcenter.state()["leases"].keys() - before)
    private += ["soap_session", "https:", "/nfc/", "ssvm-backup", "administrator", "BEGIN"]
    assert [each for each in private if each.lower() in text.lower()] == []
    # No address but the version of the API; no UUID, thumbprint, digest or token.
    assert set(re.findall(r"\d+\.\d+\.\d+\.\d+", text)) <= {"8.0.3.0"}
    assert re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}|([0-9A-F]{2}:){5}|[0-9a-f]{20}|[\w+/=-]{45}", text) == []
    with vcenter.behaving_like(json.loads(text)):
        assert tried(vcenter, machine).switches == {}


def test_withheld(vcenter: VCenterSimulator) -> None:
    """An answer that contains a name is not in the report."""
    report = TrialReport({"product": {"name": "made by acme-vc"}, "drs": {"clusters": 1}})
    report.withhold({"ACME-vc", "1"})
    assert report.answers == {
        "product": {"withheld": "the answer contained a name or a secret"},
        "drs": {"clusters": 1},
    }


def test_dry_run(vcenter: VCenterSimulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run lists each question, and calls the vCenter not once."""
    calls = vcenter.state()["calls"]
    status, file = doctor(vcenter, tmp_path, "vm-1", "--dry-run")
    assert (status, file.exists(), vcenter.state()["calls"]) == (0, False, calls)
    listed = capsys.readouterr().out
    assert [each.name for each in QUESTIONS if each.does not in listed] == []


def test_asks_first(vcenter: VCenterSimulator, tmp_path: Path) -> None:
    """Without a terminal and --yes, the trial does not start."""
    calls = vcenter.state()["calls"]
    status, file = doctor(vcenter, tmp_path, "vm-1")
    assert (status, file.exists(), vcenter.state()["calls"]) == (2, False, calls)


@pytest.mark.parametrize("why", ["another name", "a snapshot"])
def test_only_scratch_vms(vcenter: VCenterSimulator, tmp_path: Path, why: str) -> None:
    """The trial refuses a VM with another name or with a snapshot, and changes nothing."""
    name = "web" if why == "another name" else "ssvm-trial"
    machine = vcenter.add_vm(f"{name}-{next(_numbers)}", [b""], [MiB])
    if why == "a snapshot":
        with VCenterSession(address_of(vcenter)) as session:
            it = session.find_vm(machine.id)
            it._connection.finish(it._vm.CreateSnapshot_Task("theirs", "", False, False), 60)
    made = vcenter.state()["calls"].get("CreateSnapshotEx_Task")
    assert doctor(vcenter, tmp_path, machine.id, "--yes")[0] == 1
    assert vcenter.state()["calls"].get("CreateSnapshotEx_Task") == made


def test_time_limit(vcenter: VCenterSimulator) -> None:
    """A trial that must stop keeps its answers, aborts the lease and removes the snapshot."""
    machine, seen = scratch(vcenter), []

    def check() -> None:
        if "second_lease" in seen:
            raise Cancelled("deadline")

    with VCenterSession(address_of(vcenter), check) as session:
        report = session.find_vm(machine.id).trial("trial-2", seen.append, pause_s=0)
    state = vcenter.state()
    assert report.is_clean
    assert report.answers["lease"]["timeout_s"] == 300
    assert list(report.answers)[-1] == "second_lease"
    assert "ssvm-backup-trial-2" not in state["snapshots"]
