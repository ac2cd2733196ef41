"""The disks of an OVF are read as CloudStack reads them, and each can have its own OVF."""

from __future__ import annotations

import pytest

from ssvm_worker.errors import CorruptImage, ObjectNotFound, UnsafeImage, WorkerError
from ssvm_worker.formats.ova import read_descriptor
from ssvm_worker.formats.ovf_disks import keep_disk, read_disks
from tests.archives import ovf_of, ovf_with_hardware

OVF = ovf_with_hardware("root.vmdk", "data.vmdk", others=("tools.iso", "vm.nvram"))


def test_fields() -> None:
    """Each disk has its id, file, capacity in bytes, controller and number, and ISO images follow the disks."""
    root, data, iso = read_disks(OVF, "a.ovf")
    assert (root.id, root.file, root.capacity, root.number) == ("vmdisk0", "root.vmdk", 1 << 30, 0)
    assert (root.controller, root.controller_type) == ("SCSI Controller 0", "lsilogic")
    assert (root.bootable, data.bootable, iso.bootable) == (True, False, False)
    assert (data.file, data.number, data.is_iso) == ("data.vmdk", 1, False)
    assert (iso.id, iso.file, iso.is_iso, iso.number, iso.controller) == ("file2", "tools.iso", True, 2, "")


def test_no_hardware() -> None:
    """Disks of an OVF without hardware are listed too, without a controller."""
    found = read_disks(ovf_of("a.vmdk", "b.vmdk"), "a.ovf")
    assert [(each.file, each.bootable, each.controller) for each in found] == [
        ("a.vmdk", True, ""),
        ("b.vmdk", False, ""),
    ]


@pytest.mark.parametrize(("configuration", "expected"), [("", 2), ("small", 1), ("large", 2), ("other", 1)])
def test_configuration(configuration: str, expected: int) -> None:
    """A deployment configuration has the disks that name it, and those that name none."""
    two = OVF.replace(b"<Item><rasd:InstanceID>5", b'<Item ovf:configuration="large huge"><rasd:InstanceID>5')
    found = read_disks(two, "a.ovf", configuration)
    assert sum(not each.is_iso for each in found) == expected


def _with_unit(capacity: str, unit: str) -> bytes:
    return OVF.replace(b'ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"', f"{capacity} {unit}".encode(), 1)


@pytest.mark.parametrize(
    ("capacity", "unit", "expected"),
    [
        ("3", "", 3),
        ("3", "byte * 2^20", 3 << 20),
        ("3", "GigaBytes", 3 << 30),
        ("3", "byte*2^10", 3 << 10),
        ("${size}", "byte * 2^30", 0),
        ("9" * 18, "byte * 2^40", 0),
        ("9" * 5000, "", 0),
        ("-1", "", 0),
    ],
)
def test_capacity(capacity: str, unit: str, expected: int) -> None:
    """Units of DSP0243 are applied, and a capacity that is no number or too large is 0."""
    given = _with_unit(f'ovf:capacity="{capacity}"', f'ovf:capacityAllocationUnits="{unit}"')
    assert read_disks(given, "a.ovf")[0].capacity == expected


def test_parents_in_a_circle() -> None:
    """Hardware items that are parents of each other end the search for the controller."""
    circle = OVF.replace(b"<rasd:InstanceID>3</rasd:InstanceID>", b"<rasd:InstanceID>3</rasd:InstanceID>" * 2).replace(
        b"<rasd:ElementName>SCSI", b"<rasd:Parent>4</rasd:Parent><rasd:ElementName>SCSI"
    )
    assert read_disks(circle, "a.ovf")[0].id == "vmdisk0"


@pytest.mark.parametrize("file", ["root.vmdk", "data.vmdk"])
def test_keep_disk(file: str) -> None:
    """The OVF of one disk has only this disk, its file and its hardware item, and keeps namespace prefixes."""
    kept = keep_disk(OVF, file, "a.ovf")
    assert read_descriptor(kept, "a.ovf").disks == (file,)
    assert read_descriptor(kept, "a.ovf").others == ()
    assert [each.file for each in read_disks(kept, "a.ovf")] == [file]
    assert kept.count(b"<rasd:HostResource>") == 1
    assert b'ovf:href="' in kept
    assert b"SCSI Controller 0" in kept


BAD = {
    "an entity": (b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + OVF[39:], UnsafeImage),
    "many entities": (b'<!DOCTYPE x [<!ENTITY a "aaaaaaaa">]>' + OVF[39:], UnsafeImage),
    "a path": (OVF.replace(b"root.vmdk", b"../root.vmdk"), UnsafeImage),
    "an encoded path": (OVF.replace(b"root.vmdk", b"..%2froot.vmdk"), UnsafeImage),
    "no file": (OVF.replace(b'ovf:fileRef="file0"', b'ovf:fileRef="file9"'), CorruptImage),
    "no XML": (b"MZ" * 100, CorruptImage),
}


@pytest.mark.parametrize(("data", "error"), BAD.values(), ids=BAD.keys())
def test_hostile(data: bytes, error: type[WorkerError]) -> None:
    """An OVF with a document type, a path outside its package, or a missing file is refused."""
    with pytest.raises(error):
        read_disks(data, "a.ovf")
    with pytest.raises(error):
        keep_disk(data, "root.vmdk", "a.ovf")


def test_unknown_disk() -> None:
    """A file that is not a disk of the OVF has no OVF."""
    with pytest.raises(ObjectNotFound):
        keep_disk(OVF, "tools.iso", "a.ovf")
