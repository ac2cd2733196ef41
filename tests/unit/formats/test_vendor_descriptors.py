"""OVF descriptors of many vendors: each is read, or refused for the right reason."""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ssvm_worker.errors import ImageError
from ssvm_worker.formats.ova import read_descriptor
from ssvm_worker.formats.ovf_disks import read_disks

ARCHIVE = Path(__file__).parents[2] / "data/vmware/ovf.tar.xz"
#: Reasons, and the descriptors that have them. All others are read.
REFUSED = {
    # No Disk, or only Disks without a file.
    "UnknownFormat: The OVF has no disks": """
        aag-1-vm-AA category-grouping cdRemoteAtapi deploymentoption descriptor2 disk-capacity-property disk-no-file
        dvxPCIPassthrough eula eula-vm extra-config-complete-vapp invalid-property-key ipassignment network
        no_version_num nostalgia-vapp nvapp-disks-0 nvapp004 nvapp005 nvapp007 nvapp008 properties_filtering
        scaleoutStartup scaleoutUnbound scaleoutVApp sriovEthernetCard storagegroup tagBasedPlacement002
        tagBasedPlacement004 tagBasedPlacementGroup001 tagBasedPlacementGroup002 trivial unknownsections
        unknownsections_updated unsupported-resourcesubtype unsupported-resourcetype vbox10 vbox10_0.9 vbox11 vbox11_0.9
        vbox7 vbox7_0.9 vbox8 vbox8_0.9 vdg-vm""",
    "UnknownFormat: The OVF has a file that is compressed or in chunks": "comp002",
    # ../ or a folder in the name of a file.
    "UnsafeImage: The OVF points outside its package": """
        complete_vs empty_system file-ref-path identity_compression invalid_no_vm invalid_ref_id no_net no_resourcetype
        no_vh nvapp-disks-1 pbm ras_sec_elsewhr section_compatibility_neg sub_E10000 sub_vmxnet
        valid_multiple_subtypes""",
    "CorruptImage: The OVF cannot be read": "invalid_env",
}


def descriptors() -> Iterator[tuple[str, bytes]]:
    """Yield the names without ``.ovf``, and the contents."""
    with lzma.open(ARCHIVE) as packed, tarfile.open(fileobj=packed) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file
            yield member.name.removesuffix(".ovf"), file.read()


def reason_of(data: bytes, name: str) -> str:
    """Return why an OVF is refused, or an empty string."""
    try:
        descriptor = read_descriptor(data, name)
        listed = read_disks(data, name)
    except ImageError as error:
        return f"{type(error).__name__}: {error.what}"
    assert {each.file for each in listed if each.file and not each.is_iso} <= set(descriptor.disks)
    assert descriptor.disks
    return ""


def test_vendors_descriptors() -> None:
    """Each descriptor is read, or refused for the reason in the table."""
    expected = {name: reason for reason, names in REFUSED.items() for name in names.split()}
    found = {name: reason_of(data, name) for name, data in descriptors()}
    assert len(found) == 105
    assert {name for name, reason in found.items() if reason} == set(expected)
    assert [name for name, reason in expected.items() if not found[name].startswith(reason)] == []
