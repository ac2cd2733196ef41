"""What the server learns about an OVA for a VM that is deployed as it is."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.cloudstack.ovf_information import read_information
from ssvm_worker.errors import WorkerError
from ssvm_worker.stores.file.store import FileStore
from tests.archives import ovf_with_hardware
from tests.unit.cloudstack.commands.test_datadisks import recorded

TEMPLATE = Artifact("template", "1", "224")
_DISK = "<Item><rasd:InstanceID>4"
#: The OVF of the recorded OVA, as far as its answer shows it.
RECORDED = (
    ovf_with_hardware("t-disk1.vmdk")
    .decode()
    .replace("vmdisk0", "vmdisk1")
    .replace(
        "<VirtualSystem ",
        '<NetworkSection><Info/><Network ovf:name="VM Network"><Description>n</Description></Network></NetworkSection>'
        "<VirtualSystem ",
    )
    .replace(
        "<VirtualHardwareSection>",
        '<OperatingSystemSection ovf:id="101"><Info/><Description>Other Linux (64-bit)</Description>'
        "</OperatingSystemSection><VirtualHardwareSection><System><vssd:VirtualSystemType "
        'xmlns:vssd="urn:v">vmx-10</vssd:VirtualSystemType></System>'
        "<Item><rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits><rasd:Description>cpu</rasd:Description>"
        "<rasd:ElementName>1 virtual CPU(s)</rasd:ElementName><rasd:InstanceID>1</rasd:InstanceID>"
        "<rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>1</rasd:VirtualQuantity></Item>"
        "<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:Description>mem</rasd:Description>"
        "<rasd:ElementName>128MB</rasd:ElementName><rasd:InstanceID>2</rasd:InstanceID>"
        "<rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>128</rasd:VirtualQuantity></Item>",
    )
    .replace("<Item><rasd:InstanceID>3", "<Item><rasd:Description>SCSI</rasd:Description><rasd:InstanceID>3")
    .replace(
        _DISK,
        "<Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:ElementName>Hard Disk 1</rasd:ElementName>"
        "<rasd:InstanceID>4",
    )
)


def read(directory: Path, ovf: str) -> dict[str, Any]:
    """Return the information about an OVA whose descriptor is *ovf*."""
    folder = directory / TEMPLATE.prefix
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.ovf").write_text(ovf)
    (folder / "t-disk1.vmdk").write_bytes(bytes(65536))
    return read_information(FileStore("primary", directory), TEMPLATE).fields()


def test_recorded(tmp_path: Path) -> None:
    """The information about the recorded OVA is that of the Java agent, apart from the directory of the disk."""
    found = read(tmp_path, RECORDED)
    answers = [each["ovfInformationTO"] for each in recorded("DownloadAnswer") if "ovfInformationTO" in each]
    (disk,), java = found.pop("disks"), answers[0]
    (java_disk,) = java.pop("disks")
    assert java_disk.pop("path").endswith(f"/{disk.pop('path')}")
    assert (disk, found) == (java_disk, java)


MORE = RECORDED.replace(
    "</VirtualHardwareSection>",
    '<Item ovf:configuration="small big"><rasd:AddressOnParent>7</rasd:AddressOnParent>'
    "<rasd:AutomaticAllocation>true</rasd:AutomaticAllocation><rasd:Connection>VM Network</rasd:Connection>"
    "<rasd:ElementName>nic</rasd:ElementName><rasd:InstanceID>5</rasd:InstanceID>"
    "<rasd:ResourceSubType>E1000</rasd:ResourceSubType><rasd:ResourceType>10</rasd:ResourceType></Item>"
    "<Item><rasd:Connection>other</rasd:Connection><rasd:ResourceType>10</rasd:ResourceType></Item>"
    "<Item><rasd:ElementName>no type</rasd:ElementName></Item></VirtualHardwareSection>"
    "<ProductSection><Info/><Category>Network</Category>"
    '<Property ovf:key="ip" ovf:type="string" ovf:userConfigurable="true" ovf:value="10.0.0.1">'
    "<Label>Address</Label></Property>"
    '<Property ovf:key="fixed" ovf:type="string"/>'
    '<Property ovf:key="pw" ovf:type="string" ovf:password="true" ovf:userConfigurable="true"/></ProductSection>'
    "<EulaSection><Info>Terms</Info><License>Übel\nline 2</License></EulaSection>",
).replace(
    "<DiskSection>",
    '<DeploymentOptionSection><Info/><Configuration ovf:id="small"><Label>S</Label></Configuration>'
    '<Configuration ovf:id="none"/></DeploymentOptionSection><DiskSection>',
)


def test_all_sections(tmp_path: Path) -> None:
    """Properties, network cards, configurations and licenses have the fields of CloudStack's classes."""
    found = read(tmp_path, MORE)
    shared = {"type": "string", "qualifiers": "", "userConfigurable": True, "category": "Network"}
    assert found["properties"] == [
        shared | {"key": "ip", "value": "10.0.0.1", "label": "Address", "password": False, "index": 0},
        shared | {"key": "pw", "value": "", "password": True, "index": 1},
    ]
    (network, other) = found["networks"]
    assert (network["addressOnParent"], network["automaticAllocation"], network["InstanceID"]) == (7, True, 5)
    assert (network["name"], network["resourceSubType"], network["resourceType"]) == ("VM Network", "E1000", "10")
    assert other["name"] == "other"
    small, none = found["hardwareSection"]["configurations"]
    assert (small["id"], small["label"], small["index"]) == ("small", "S", 0)
    assert [each["resourceType"] for each in small["hardwareItems"]] == ["EthernetAdapter"]
    assert (none["hardwareItems"], none["index"]) == ([], 1)
    assert [each["instanceId"] for each in found["hardwareSection"]["commonHardwareItems"][:4]] == ["1", "2", "3", "4"]
    (license_,) = found["eulaSections"]
    assert (license_["info"], license_["index"]) == ("Terms", 0)
    packed = license_["compressedLicense"]
    assert min(packed) < 0, "the bytes of Java have a sign"
    assert gzip.decompress(bytes(each % 256 for each in packed)).decode() == "Übel\nline 2"


@pytest.mark.parametrize("number", ["9" * 5000, "99999999999999999999", "-5", "1e9", ""])
def test_bad_numbers(tmp_path: Path, number: str) -> None:
    """A number that Java cannot read is left out of the answer."""
    ovf = MORE.replace("VirtualQuantity>128<", f"VirtualQuantity>{number}<").replace(">7<", f">{number}<")
    items = read(tmp_path, ovf)["hardwareSection"]["commonHardwareItems"]
    assert items[1].get("virtualQuantity") == (-5 if number == "-5" else None)


def test_hostile(tmp_path: Path) -> None:
    """An OVF with a document type is refused, and so is one whose file is missing."""
    for ovf in (RECORDED.replace("<Envelope", "<!DOCTYPE x><Envelope"), RECORDED.replace("t-disk1", "t-disk2")):
        with pytest.raises(WorkerError):
            read(tmp_path, ovf)
