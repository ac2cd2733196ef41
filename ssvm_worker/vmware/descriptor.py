"""The OVF descriptor from the server, and the raw configuration of a VM as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pyVmomi import vim, vmodl
from pyVmomi.VmomiJSONEncoder import VmomiJSONEncoder

from .connection import Connection
from .faults import API_ERRORS, fault_name
from .ovf import OvfDisk, OvfFile, lists_files
from .snapshot import Snapshot


def server_descriptor(
    connection: Connection, vm: Any, snapshot: Snapshot, disks: Sequence[OvfDisk], other_files: Sequence[OvfFile]
) -> tuple[str | None, str]:
    """Return the server's descriptor of the snapshot and "", or None and the reason.

    The descriptor names the stored files with the sizes that the worker counted.
    This function does not raise API errors: without a usable descriptor, the backup gets one that the worker builds.
    """
    files: list[OvfDisk | OvfFile] = [*disks, *other_files]
    params = vim.OvfManager.CreateDescriptorParams(
        snapshot=connection.object(vim.vm.Snapshot, snapshot.moref),
        ovfFiles=[_ovf_file(each) for each in files],
        includeImageFiles=False,
    )
    try:
        result = connection.content.ovfManager.CreateDescriptor(vm, params)
    except vmodl.fault.MethodNotFound:
        return None, "the server does not support it"
    except API_ERRORS as error:
        return None, f"the server failed: {fault_name(error)}"
    if result.error:
        return None, "the server reports: " + "; ".join(fault_name(each) for each in result.error)
    if not lists_files(result.ovfDescriptor, disks, other_files):
        return None, "the server's descriptor does not name the stored files with their sizes"
    return result.ovfDescriptor, ""


def _ovf_file(file: OvfDisk | OvfFile) -> Any:
    sizes = {"capacity": file.disk.capacity, "populatedSize": file.populated} if isinstance(file, OvfDisk) else {}
    return vim.OvfManager.OvfFile(deviceId=file.lease_key, path=file.name, size=file.size, **sizes)


def config_json(config: Any) -> bytes:
    """Return the whole configuration of the API as JSON."""
    text = json.dumps(config, cls=VmomiJSONEncoder, strip_dynamic=True, indent=1, ensure_ascii=False, sort_keys=True)
    return (text + "\n").encode()
