"""The OVF descriptor as the server writes it, and the raw config beside it."""

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
    connection: Connection, vm: Any, snapshot: Snapshot, disks: Sequence[OvfDisk], beside: Sequence[OvfFile]
) -> tuple[str | None, str]:
    """The server's descriptor of the snapshot with our files and their counted sizes; or None, and why there is none.

    Never fails: a backup has a descriptor of our own where the server has none, or one that does not name our files.
    """
    params = vim.OvfManager.CreateDescriptorParams(
        snapshot=connection.object(vim.vm.Snapshot, snapshot.moref),
        ovfFiles=[*(_ovf_file(each) for each in disks), *(_beside(each) for each in beside)],
        includeImageFiles=False,
    )
    try:
        result = connection.content.ovfManager.CreateDescriptor(vm, params)
    except vmodl.fault.MethodNotFound:
        return None, "the server cannot write one"
    except API_ERRORS as error:
        return None, f"the server failed to write one: {fault_name(error)}"
    if result.error:
        return None, "the server reports: " + "; ".join(fault_name(each) for each in result.error)
    if not lists_files(result.ovfDescriptor, disks, beside):
        return None, "the server's does not name the stored files with their sizes"
    return result.ovfDescriptor, ""


def _ovf_file(each: OvfDisk) -> Any:
    return vim.OvfManager.OvfFile(
        deviceId=each.lease_key,
        path=each.name,
        size=each.size,
        capacity=each.disk.capacity,
        populatedSize=each.populated,
    )


def _beside(each: OvfFile) -> Any:
    return vim.OvfManager.OvfFile(deviceId=each.lease_key, path=each.name, size=each.size)


def config_json(config: Any) -> bytes:
    """The whole configuration as the API gives it."""
    text = json.dumps(config, cls=VmomiJSONEncoder, strip_dynamic=True, indent=1, ensure_ascii=False, sort_keys=True)
    return (text + "\n").encode()
