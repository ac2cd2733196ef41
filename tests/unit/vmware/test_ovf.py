"""The OVF descriptor that the worker writes if the server has none, and the check of the server's own."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.demo.simulator import VCenterSimulator
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.units import KiB
from ssvm_worker.vmware.hardware import Controller, Disk, Hardware, Nic
from ssvm_worker.vmware.ovf import OvfDisk, build, checksums, lists_files
from tests.backup_bench import PREFIX, Bench
from tests.servers.vcenter import TestVM, make_vm

OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"
RASD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"
SCSI = Controller(1000, "ParaVirtualSCSIController", 0)
NVME = Controller(31000, "VirtualNVMEController", 0)
UNUSED = Controller(200, "VirtualIDEController", 0)
DISKS = (Disk(2000, "Hard disk 1", 8 << 30, SCSI, 0), Disk(32000, "Hard disk 2", 1 << 40, NVME, 3))
STORED = [
    OvfDisk(DISKS[0], "b1-disk0.vmdk", 1234567, 1 << 20, "/vm-1/ParaVirtualSCSIController0:0"),
    OvfDisk(DISKS[1], "b1-disk1.vmdk", 7654321, 2 << 20, "/vm-1/VirtualNVMEController0:3"),
]
HARDWARE = Hardware(
    name='<"Zoë" & Söhne>',
    guest_id="debian12_64Guest",
    version="vmx-21",
    firmware="efi",
    cpus=4,
    memory_mib=2048,
    controllers=(UNUSED, SCSI, NVME),
    disks=DISKS,
    nics=(Nic("VirtualVmxnet3", "Prod & Test"), Nic("VirtualE1000e", "Prod & Test")),
    cores_per_socket=2,
    settings=(("bootOptions.efiSecureBootEnabled", "true"), ("nestedHVEnabled", "true")),
    video=(("videoRamSizeInKB", "8192"),),
)


def parsed() -> ElementTree.Element:
    return ElementTree.fromstring(build(HARDWARE, STORED))


def items(root: ElementTree.Element) -> list[dict[str, str]]:
    """Return each resource as a dictionary."""
    return [{each.tag.removeprefix(RASD): each.text or "" for each in item} for item in root.iter(f"{OVF}Item")]


def test_files_and_disks() -> None:
    """Each disk has a file with its counted size, and the capacity from the snapshot's config."""
    files = {file.get(f"{OVF}id"): file for file in parsed().iter(f"{OVF}File")}
    for disk, stored in zip(parsed().iter(f"{OVF}Disk"), STORED, strict=True):
        file = files[disk.get(f"{OVF}fileRef")]
        assert (file.get(f"{OVF}href"), file.get(f"{OVF}size")) == (stored.name, str(stored.size))
        assert disk.get(f"{OVF}capacity") == str(stored.disk.capacity)
        assert disk.get(f"{OVF}populatedSize") == str(stored.populated)


def test_places() -> None:
    """Each disk is on its own controller and unit, and a controller without a disk is omitted."""
    found = items(parsed())
    controllers = {item["InstanceID"]: item["ResourceSubType"] for item in found if item["ResourceType"] in "5 6 20"}
    disks = [item for item in found if item["ResourceType"] == "17"]
    places = [(controllers[disk["Parent"]], disk["AddressOnParent"], disk["HostResource"]) for disk in disks]
    assert places == [
        ("VirtualSCSI", "0", "ovf:/disk/vmdisk0"),
        ("vmware.nvme.controller", "3", "ovf:/disk/vmdisk1"),
    ]
    assert len(controllers) == 2


def test_machine() -> None:
    """CPUs, memory, network cards and firmware come from the config, and any name is escaped."""
    root = parsed()
    quantities = {item["ResourceType"]: item.get("VirtualQuantity") for item in items(root)}
    assert (quantities["3"], quantities["4"]) == ("4", "2048")
    cards = [(item["ResourceSubType"], item["Connection"]) for item in items(root) if item["ResourceType"] == "10"]
    assert cards == [("Vmxnet3", "Prod & Test"), ("E1000e", "Prod & Test")]
    assert [each.get(f"{OVF}name") for each in root.iter(f"{OVF}Network")] == ["Prod & Test"]
    assert root.findtext(f"{OVF}VirtualSystem/{OVF}Name") == HARDWARE.name


def test_settings() -> None:
    """Secure boot, the topology of the CPUs and the video card come from the config, in VMware's form."""
    vmw = "{http://www.vmware.com/schema/ovf}"
    settings = {each.get(f"{vmw}key"): each.get(f"{vmw}value") for each in parsed().iter(f"{vmw}Config")}
    assert settings == {"firmware": "efi", "videoRamSizeInKB": "8192", **dict(HARDWARE.settings)}
    assert [each.text for each in parsed().iter(f"{vmw}CoresPerSocket")] == ["2"]


def test_instance_ids() -> None:
    """No two resources have the same id."""
    ids = [item["InstanceID"] for item in items(parsed())]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("", ""), True),
        (("1234567", "8589934592"), False),
        (("b1-disk1", "disk-1"), False),
        (("</", "<"), False),
    ],
    ids=["as stored", "the capacity for a size", "another name", "not well-formed"],
)
def test_check_of_the_servers(change: tuple[str, str], expected: bool) -> None:
    """A server's descriptor is accepted only if it names the stored files with their real sizes."""
    assert lists_files(build(HARDWARE, STORED).decode().replace(*change), STORED) is expected


def test_checksum_lines() -> None:
    """The .mf has one line for each file, in the form that OVF tools read."""
    assert checksums([("a.ovf", "00ff"), ("b.vmdk", "12")]) == b"SHA256(a.ovf)= 00ff\nSHA256(b.vmdk)= 12\n"


@pytest.mark.parametrize(
    ("network", "name"), [("", "VM Network"), ("distributed", "DC0_DVPG0"), ("opaque", "segment-1")]
)
def test_networks(bench: Bench, network: str, name: str) -> None:
    """The network of an adapter is its port group's name or its NSX segment's id, and not its summary."""
    vm = make_vm(bench.vcenter, 64 * KiB, network=network)
    with bench.session(vm) as it:
        assert [each.network for each in it.hardware().nics] == [name]


@pytest.mark.parametrize("fault", ["MethodNotFound", "VmConfigFault", "NoPermission"])
def test_fallback(bench: Bench, vm: TestVM, vcenter: VCenterSimulator, fault: str) -> None:
    """If the server cannot write a descriptor, the worker writes one, and the manifest gives the reason."""
    vcenter.fault(calls={"CreateDescriptor": fault})
    bench.run(vm)
    root = ElementTree.fromstring(read_bytes(bench.primary, f"{PREFIX}/b1.ovf"))
    sizes = [int(file.get(f"{OVF}size") or 0) for file in root.iter(f"{OVF}File")]
    assert sizes == [len(stream) for stream in vm.streams]
    manifest = read_manifest(bench.primary, bench.request(vm).artifact)
    assert manifest.facts["descriptor"].startswith("our own: the server")
