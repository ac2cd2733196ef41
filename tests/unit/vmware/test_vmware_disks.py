"""The identification of disks: among the VM's own by any of their names, and among the files of a lease."""

from __future__ import annotations

import pytest

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.vmware.export import DiskSource, ExportLink
from ssvm_worker.vmware.hardware import Controller, Disk, select_disks
from ssvm_worker.vmware.lease import LeaseFile, match_files
from ssvm_worker.vmware.trust import Address

SCSI0 = Controller(1000, "ParaVirtualSCSIController", 0)
SCSI1 = Controller(1001, "VirtualLsiLogicSASController", 1)
SATA = Controller(15000, "VirtualAHCIController", 0)
DISKS = [
    Disk(2000, "Hard disk 1", 1024, SCSI0, 0),
    Disk(2017, "Hard disk 2", 2048, SCSI1, 1, "independent"),
    Disk(16000, "Hard disk 3", 4096, SATA, 0),
]


def files(*keys: str) -> list[LeaseFile]:
    """Return the files of a lease with those device keys."""
    return [LeaseFile(f"/vm-7/{key}", f"https://esx/{key}", "", not key.startswith("nvram")) for key in keys]


@pytest.mark.parametrize("name", ["16000", "Hard disk 3", "hard DISK 3", "sata0:0"])
def test_names(name: str) -> None:
    """A disk is selected by its key, its label or its position."""
    assert select_disks(DISKS, [name]) == [DISKS[2]]


def test_all() -> None:
    """Without names all disks of a snapshot are selected, and a disk that is named twice only once."""
    assert select_disks(DISKS, None) == [DISKS[0], DISKS[2]]
    assert select_disks(DISKS, ["2000", "scsi0:0"]) == [DISKS[0]]


@pytest.mark.parametrize("name", ["Hard disk 2", "2017", "scsi1:1", "Hard disk 9", ""])
def test_refused(name: str) -> None:
    """The error of a missing disk, or of one in no snapshot, names it."""
    with pytest.raises(InvalidRequest):
        select_disks(DISKS, [name])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["VirtualAHCIController0:0", "ParaVirtualSCSIController0:0"], {2000: 1, 16000: 0}),
        (["nvram", "ParaVirtualSCSIController0:0", "VirtualLsiLogicSASController1:1"], {2000: 1, 2017: 2}),
        (["disk:0", "disk:1", "disk:2"], {2000: 0, 2017: 1, 16000: 2}),
        (["disk:0", "nvram", "disk:1"], {2000: 0, 16000: 2}),
        (["disk:0"], {}),
        (["VirtualNVMEController0:0"], {}),
        ([], {}),
    ],
    ids=[
        "by place, in any order",
        "by place, with other files between",
        "by order, all disks",
        "by order, without the independent ones",
        "by order, but too few",
        "at a place where no disk is",
        "an empty lease",
    ],
)
def test_files_of_a_lease(keys: list[str], expected: dict[int, int]) -> None:
    """A file belongs to the disk at the same position, or by order if the numbers agree."""
    offered = files(*keys)
    assert match_files(offered, DISKS) == {disk: offered[number] for disk, number in expected.items()}


@pytest.mark.parametrize(
    ("url", "host", "expected"),
    [
        ("https://*/ha-nfc/52/disk-0.vmdk", "esx1.example", "esx1.example:8443"),
        ("https://*:902/ha-nfc/52/disk-0.vmdk", "esx1.example", "esx1.example:902"),
        ("https://*/ha-nfc/52/disk-0.vmdk", "fd00::7", "[fd00::7]:8443"),
        ("https://esx2.example/nfc/52/disk-0.vmdk", "vc.example", "esx2.example"),
    ],
)
def test_any_host(url: str, host: str, expected: str) -> None:
    """``*`` is the connected host and port, and a named host is unchanged."""
    assert ExportLink(url, "", Address(host, "u", "p", port=8443), "").parts.netloc == expected


def test_pins() -> None:
    """The lease's thumbprint takes precedence, and the vCenter's own counts only for the vCenter."""
    address = Address("vc.example", "u", "p", thumbprint="ab" * 32)
    assert ExportLink("https://esx/x", "CD:" * 19 + "CD", address, "").pin == "cd" * 20
    assert ExportLink("https://vc.example/x", "", address, "").pin == "ab" * 32
    assert ExportLink("https://esx/x", "", address, "").pin is None


def test_names_without_tickets() -> None:
    """The name of a source is safe to log, because it omits the ticket in the path."""
    source = DiskSource(
        ExportLink("https://esx/nfc/52ab-ticket/disk-0.vmdk", "", Address("h", "u", "p"), "c"), lambda: None
    )
    assert source.name == "esx/…/disk-0.vmdk"
