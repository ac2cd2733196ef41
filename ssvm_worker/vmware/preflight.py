"""Checks before a backup, which change nothing. The job, its manifest and ``ssvm doctor`` use the findings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.errors import (
    Cancelled,
    InvalidRequest,
    ResourceBusy,
    SourceDenied,
    SourceUnavailable,
    WorkerError,
)

from .connection import Connection
from .export import ExportLink, check_host, pins_of
from .faults import UNSUPPORTED, fault_name, translated
from .hardware import EXPORTED, Hardware
from .placement import FoundObjects
from .snapshot import find_old_snapshots, needs_consolidation

OK, WARNING, ERROR = "ok", "warning", "error"
#: The privileges for each step of a backup, by the ids in vSphere's type information.
PRIVILEGES = {
    "reading the VM": ("System.View", "System.Read"),
    "exporting its snapshot, and the OVF descriptor": ("VApp.Export",),
}
#: Further privileges if the job makes its own snapshot.
SNAPSHOT_PRIVILEGES = {
    "making the snapshot": ("VirtualMachine.State.CreateSnapshot",),
    "removing and consolidating it": ("VirtualMachine.State.RemoveSnapshot",),
}
#: The privileges of a restore, for each part of its target. Source: the reference of ``ResourcePool.ImportVApp``, and
#: govmomi issue 2600, where a user tried them out.
RESTORE_PRIVILEGES: dict[str, dict[str, tuple[str, ...]]] = {
    "pool": {"importing the VM": ("VApp.Import", "Resource.AssignVMToPool")},
    "folder": {
        "creating the VM": (
            "VirtualMachine.Inventory.Create",
            "VirtualMachine.Config.AddNewDisk",
            "VirtualMachine.Config.AddRemoveDevice",
            "VirtualMachine.Config.AdvancedConfig",
            "VirtualMachine.Config.Settings",
            "VirtualMachine.Config.CPUCount",
            "VirtualMachine.Config.Memory",
        ),
        "removing an unfinished VM": ("VirtualMachine.Inventory.Delete",),
    },
    "datastore": {"storing its disks": ("Datastore.AllocateSpace",)},
    "network": {"connecting its adapters": ("Network.Assign",)},
}
#: Seconds after which a job's snapshot is reported. Few backups take longer.
_OLD_S = 24 * 3600.0
#: The edition key of the free ESXi (vSphere Hypervisor).
_FREE_EDITION = "esxBasic"
#: Snapshots in one chain: the limit of vSphere, and the number from which a warning is given. It is not documented if
#: the snapshot of the backup counts.
_MAX_LEVELS, _MANY_LEVELS = 32, 30
#: The properties of a VM that show why vSphere would make no snapshot.
_OBSTACLE_PATHS = (
    "config.flags",
    "config.ftInfo",
    "config.hardware.device",
    "config.managedBy",
    "disabledMethod",
    "runtime.connectionState",
    "runtime.powerState",
    "snapshot",
)
#: The first hardware version with changed block tracking.
_TRACKING = 7


@dataclass(frozen=True)
class PreflightFinding:
    """The result of one check, with a remedy."""

    check: str
    #: ok | warning | error
    state: str
    detail: str
    remedy: str = ""
    #: The class of the exception for an error.
    failure: type[WorkerError] = SourceDenied

    def as_dict(self) -> dict[str, Any]:
        """Return check, state, detail and remedy."""
        return {"check": self.check, "state": self.state, "detail": self.detail, "remedy": self.remedy}


def examine_vm(
    connection: Connection, vm: Any, hardware: Hardware, own_snapshot: bool, *, try_encrypted: bool = False
) -> list[PreflightFinding]:
    """Check a VM. *own_snapshot*: whether the job would make a snapshot.

    *try_encrypted*: whether the job would export encrypted disks if vSphere lets it.
    """
    steps = PRIVILEGES | (SNAPSHOT_PRIVILEGES if own_snapshot else {})
    return [
        *_run("privileges", lambda: _check_privileges(connection, vm, steps)),
        *_run("license", lambda: _check_license(connection)),
        *_run("consolidation", lambda: _check_consolidation(connection, vm)),
        *_check_hardware(hardware),
        *_check_encryption(hardware, try_encrypted),
        *_run("snapshot", lambda: _check_obstacles(connection, vm, own_snapshot)),
        *_run("ESXi host", lambda: _check_host_of(connection, vm)),
        *_run("OVF descriptor", lambda: _check_descriptor(connection, vm, hardware)),
    ]


def examine_target(connection: Connection, found: FoundObjects) -> list[PreflightFinding]:
    """Check the user's privileges on the target of a new VM."""
    parts = [("pool", found.pool), ("folder", found.folder), ("datastore", found.datastore)]
    parts += [("network", each) for each in found.networks.values()]
    findings = []
    for kind, entity in parts:
        findings += _run("privileges", partial(_check_privileges, connection, entity, RESTORE_PRIVILEGES[kind]))
    return findings


def examine_hosts(connection: Connection, found: FoundObjects) -> list[PreflightFinding]:
    """Check the connection to each ESXi host that may get the new VM: the worker sends the disks directly to it."""
    with translated("Searching for hosts", connection.address.name):
        owner = connection.read(found.pool, "owner")["owner"]
        hosts = [found.host] if found.host else connection.read(owner, "host")["host"] or []
    return [finding for host in hosts for finding in _run("ESXi host", partial(_check_host, connection, host))]


def examine_server(connection: Connection) -> list[PreflightFinding]:
    """Check a vCenter: the user's privileges at its root, the connection to each host, and old snapshots of jobs."""
    steps = PRIVILEGES | SNAPSHOT_PRIVILEGES
    root = _run("privileges", lambda: _check_privileges(connection, connection.content.rootFolder, steps))
    # A role on a folder or on the VMs is enough. So a lack at the root proves nothing.
    remedy = (
        "If the role is on a folder or on VMs, check one of them with --vm. Otherwise give the role these privileges"
    )
    found = [replace(each, state=WARNING, remedy=remedy) if each.state == ERROR else each for each in root]
    with translated("Searching for hosts", connection.address.name):
        hosts = [host for host, _ in connection.each(vim.HostSystem, "name")]
    for host in hosts:
        found += _run("ESXi host", partial(_check_host, connection, host))
    found += _run("snapshots", lambda: _check_old_snapshots(connection))
    return found + _run("consolidation", lambda: _check_all_consolidation(connection))


def _run(check: str, examine: Callable[[], Iterator[PreflightFinding]]) -> list[PreflightFinding]:
    """Run a check. If vSphere does not allow the check, return a warning: the backup itself may still be allowed."""
    try:
        with translated("Checking before the backup", check):
            return list(examine())
    except WorkerError as error:
        if not isinstance(error.__cause__, vmodl.MethodFault):
            raise
        return [PreflightFinding(check, WARNING, f"The check failed: {error.what}", error.remedy)]


def _check_privileges(
    connection: Connection, entity: Any, steps: dict[str, tuple[str, ...]]
) -> Iterator[PreflightFinding]:
    ids = [each for needed in steps.values() for each in needed]
    user, missing = missing_privileges(connection, entity, ids)
    if not missing:
        yield PreflightFinding("privileges", OK, f"{user} has {', '.join(ids)}")
    for step, needed in steps.items():
        for each in missing.intersection(needed):
            detail = f"{user} lacks {each} on {entity._moId}, needed for {step}"
            yield PreflightFinding("privileges", ERROR, detail, f"Give {user} a role with {each} there")


def missing_privileges(connection: Connection, entity: Any, ids: Sequence[str]) -> tuple[str, set[str]]:
    """Return the user's name and the missing privileges. Raises the faults of the API untranslated."""
    session = connection.read(connection.content.sessionManager, "currentSession")["currentSession"]
    user = session.userName if session else connection.address.username
    manager = connection.content.authorizationManager
    missing = _not_granted(manager.HasUserPrivilegeOnEntities([entity], user, ids))
    if missing and session:
        # Some versions may expect another spelling of the user's domain. The query by session needs no user name.
        with suppress(vmodl.MethodFault):
            missing &= _not_granted(manager.HasPrivilegeOnEntities([entity], session.key, sorted(missing)))
    return user, missing


def _not_granted(answers: Sequence[Any]) -> set[str]:
    return {each.privId for answer in answers for each in answer.privAvailability if not each.isGranted}


def _check_hardware(hardware: Hardware) -> Iterator[PreflightFinding]:
    number = hardware.version.removeprefix("vmx-")
    old = number.isdigit() and int(number) < _TRACKING
    remedy = "Upgrade the VM's compatibility" if old else ""
    detail = f"{hardware.version}{': too old to track changed blocks' if old else ''}"
    yield PreflightFinding("hardware version", WARNING if old else OK, detail, remedy)
    if hardware.is_template:
        detail = "The VM is a template: vSphere makes no snapshot of it"
        yield PreflightFinding("template", ERROR, detail, "Convert it to a VM first")
    excluded = [disk for disk in hardware.disks if disk.status != EXPORTED]
    for disk in excluded:
        detail = f"{disk.label} ({disk.place}) is {disk.status}: no snapshot contains it, and the backup will lack it"
        remedy = "Change its mode in vSphere, or back it up inside the guest and list the other disks in the request"
        yield PreflightFinding("disks", WARNING, detail, remedy)
    if not excluded:
        yield PreflightFinding("disks", OK, f"{len(hardware.disks)}, all in snapshots")


def _check_encryption(hardware: Hardware, try_encrypted: bool) -> Iterator[PreflightFinding]:
    """Refuse encrypted disks: the guide "vSphere Security" says that vSphere exports no encrypted VM.

    It is not documented whether vSphere exports the disks of a VM that has only a virtual TPM.
    """
    if hardware.encrypted and not try_encrypted:
        detail = "The VM is encrypted, and vSphere documents that it exports no encrypted VM"
        remedy = 'Decrypt the VM, or try it with encrypted = "try" in the request'
        yield PreflightFinding("encryption", ERROR, detail, remedy, InvalidRequest)
        return
    for part in hardware.secrets:
        detail = f"The VM has {part}: the export is not encrypted, and vSphere may refuse the export or the import"
        yield PreflightFinding("encryption", WARNING, detail, "Protect the store of the backup, and test a restore")


def _check_license(connection: Connection) -> Iterator[PreflightFinding]:
    """Find the free edition of a standalone ESXi host, whose API allows no change and no export.

    vCenter manages no host with that license. A user may lack the privilege to read licenses: then the host refuses
    the snapshot itself.
    """
    manager = connection.content.licenseManager
    if connection.content.about.apiType != "HostAgent" or manager is None:
        return
    with suppress(vmodl.fault.SecurityError):
        licenses = connection.read(manager, "licenses")["licenses"] or ()
        for each in licenses:
            if each.editionKey.startswith(_FREE_EDITION):
                detail = f"The host has the license {each.name} ({each.editionKey}), whose API exports nothing"
                yield PreflightFinding("license", ERROR, detail, "Use a license with backup APIs")


def _check_obstacles(connection: Connection, vm: Any, own_snapshot: bool) -> Iterator[PreflightFinding]:
    """Report the states of a VM in which vSphere makes or exports no snapshot, or may refuse to."""
    values = connection.read(vm, *_OBSTACLE_PATHS)
    found = [*_blocking_states(values), *_blocking_devices(values)] if own_snapshot else []
    if str(values["runtime.connectionState"]) != "connected":
        detail = f"The VM is {values['runtime.connectionState']}"
        remedy = "Check the VM and its host in vCenter"
        found.append(PreflightFinding("snapshot", ERROR, detail, remedy, SourceUnavailable))
    if found:
        yield from found
    else:
        yield PreflightFinding("snapshot", OK, "Nothing prevents it")


def _blocking_states(values: dict[str, Any]) -> Iterator[PreflightFinding]:
    finding = partial(PreflightFinding, "snapshot")
    if "CreateSnapshotEx_Task" in (values["disabledMethod"] or ()):
        remedy = "Check if another backup program or task uses the VM; try again later"
        yield finding(ERROR, "vSphere has disabled CreateSnapshotEx_Task for the VM", remedy, ResourceBusy)
    if values["config.flags"] and values["config.flags"].snapshotLocked:
        remedy = "Check if another program has locked them; try again later"
        yield finding(ERROR, "The VM's snapshots are locked", remedy, ResourceBusy)
    if tolerance := values["config.ftInfo"]:
        is_primary = tolerance.role == 1
        detail = f"The VM is the {'primary' if is_primary else 'secondary'} of a fault tolerance group"
        remedy = "If it fails, turn fault tolerance off" if is_primary else "Back up the primary VM"
        yield finding(WARNING if is_primary else ERROR, detail, remedy, InvalidRequest)
    if manager := values["config.managedBy"]:
        detail = f"The VM is managed by {manager.extensionKey}, which may not allow a snapshot"
        yield finding(WARNING, detail, "If it fails, use that product's own backup")
    depth = _depth(values["snapshot"].rootSnapshotList if values["snapshot"] else ())
    if depth >= _MANY_LEVELS:
        state = ERROR if depth >= _MAX_LEVELS else WARNING
        detail = f"The VM has {depth} snapshots in a row; vSphere allows {_MAX_LEVELS}"
        yield finding(state, detail, "Remove old snapshots of the VM", InvalidRequest)


def _blocking_devices(values: dict[str, Any]) -> Iterator[PreflightFinding]:
    finding = partial(PreflightFinding, "snapshot")
    for device in values["config.hardware.device"] or ():
        label = device.deviceInfo.label if device.deviceInfo else f"The device {device.key}"
        backing = getattr(device, "backing", None)
        is_independent = (getattr(backing, "diskMode", "") or "").startswith("independent")
        if getattr(backing, "sharing", None) == "sharingMultiWriter" and not is_independent:
            detail = f"{label} is shared with other VMs (multi-writer): vSphere makes no snapshot of it"
            yield finding(ERROR, detail, "Make it independent, or stop sharing it", InvalidRequest)
        if str(getattr(device, "sharedBus", None) or "noSharing") != "noSharing":
            detail = f"{label} shares its bus ({device.sharedBus}): vSphere makes no snapshot of the VM"
            yield finding(ERROR, detail, "Back up the cluster from inside the guests", InvalidRequest)
        is_on = str(values["runtime.powerState"]) == "poweredOn"
        if isinstance(device, vim.vm.device.VirtualPCIPassthrough) and is_on:
            detail = f"{label} is a device of the host: vSphere may make no snapshot of the running VM"
            yield finding(WARNING, detail, "If it fails, back up the VM while it is off")


def _depth(trees: Sequence[Any]) -> int:
    """Return the number of snapshots in the longest chain."""
    level, depth = list(trees), 0
    while level:
        depth += 1
        level = [child for tree in level for child in tree.childSnapshotList or ()]
    return depth


def _check_old_snapshots(connection: Connection) -> Iterator[PreflightFinding]:
    """Report snapshots that ended jobs have probably left behind."""
    found = find_old_snapshots(connection)
    old = [each for each in found if each.created < time.time() - _OLD_S]
    for each in old:
        date = time.strftime("%Y-%m-%d", time.gmtime(each.created))
        detail = f"{each.snapshot.name} on {each.vm_name} ({each.vm}) was made on {date} by the job {each.job_id}"
        remedy = "Remove it in vCenter if that job has ended (`ssvm job ID`)"
        yield PreflightFinding("snapshots", WARNING, detail, remedy)
    if not old:
        yield PreflightFinding("snapshots", OK, f"{len(found)} of backup jobs, none older than a day")


_UNMERGED = "needs consolidation: a removed snapshot has left delta disks, which grow with each write"
_CONSOLIDATE = "Consolidate its disks in vCenter; if that fails, look for a disk that another program has attached"


def _check_consolidation(connection: Connection, vm: Any) -> Iterator[PreflightFinding]:
    if needs_consolidation(connection, vm):
        yield PreflightFinding("consolidation", WARNING, f"The VM {_UNMERGED}", _CONSOLIDATE)


def _check_all_consolidation(connection: Connection) -> Iterator[PreflightFinding]:
    """Report each VM whose disks need consolidation, also if another program has caused it."""
    needed = "runtime.consolidationNeeded"
    found = list(connection.each(vim.VirtualMachine, "name", needed))
    for vm, values in found:
        if values[needed]:
            yield PreflightFinding("consolidation", WARNING, f"{values['name']} ({vm._moId}) {_UNMERGED}", _CONSOLIDATE)
    if not any(values[needed] for _, values in found):
        yield PreflightFinding("consolidation", OK, f"{len(found)} VMs, none needs it")


def _check_host_of(connection: Connection, vm: Any) -> Iterator[PreflightFinding]:
    host = connection.read(vm, "runtime.host")["runtime.host"]
    if host is None:
        detail = "vCenter does not give the VM's host"
        yield PreflightFinding("ESXi host", WARNING, detail, "Check if the VM is accessible")
        return
    yield from _check_host(connection, host, ERROR)


def _check_host(connection: Connection, host: Any, maintenance: str = WARNING) -> Iterator[PreflightFinding]:
    """Check name, port and certificate of a host: the worker reads disks directly from it.

    *maintenance* is the state of the finding for a host in maintenance mode.
    """
    if connection.content.about.apiType == "HostAgent":
        yield PreflightFinding("ESXi host", OK, f"{connection.address.name}, which is connected")
        return
    paths = ("name", "port", "sslThumbprint", "sslCertificate")
    # All fields come with their parent, because servers before 9.0 refuse a path that they do not know.
    config, in_maintenance = connection.read(host, "summary.config", "runtime.inMaintenanceMode").values()
    name, port, print_, certificate = (getattr(config, each, None) or "" for each in paths)
    if in_maintenance:
        detail = f"{name} is in maintenance mode, so vSphere may start no task there"
        remedy = "Wait for the end of the maintenance, or move the VM"
        yield PreflightFinding("ESXi host", maintenance, detail, remedy, ResourceBusy)
        return
    thumbprint = pins_of(certificate, print_)
    netloc = f"[{name}]" if ":" in name else name
    link = ExportLink(f"https://{netloc}:{port or 443}/", thumbprint, connection.address, "")
    try:
        check_host(link, connection.check)
    except Cancelled:
        raise
    except WorkerError as error:
        detail = error.what + f" [{error.where}]"
        if isinstance(error, SourceDenied) and not thumbprint:
            # vCenter does not say which certificate to expect. A lease may say so, and its connection is checked.
            yield PreflightFinding("ESXi host", WARNING, detail, "Set ca_file to the authority of the hosts")
            return
        yield PreflightFinding("ESXi host", ERROR, detail, error.remedy, type(error))
        return
    yield PreflightFinding("ESXi host", OK, f"{link.parts.netloc} answers with the expected certificate")


def _check_descriptor(connection: Connection, vm: Any, hardware: Hardware) -> Iterator[PreflightFinding]:
    """Request a descriptor without files: the server reports the devices that it cannot describe."""
    params = vim.OvfManager.CreateDescriptorParams(name=hardware.name, ovfFiles=[], includeImageFiles=False)
    try:
        result = connection.content.ovfManager.CreateDescriptor(vm, params)
    except UNSUPPORTED:
        detail = "The server does not support descriptors; the worker writes its own"
        yield PreflightFinding("OVF descriptor", OK, detail)
        return
    found = [fault_name(getattr(each, "fault", each)) for each in (*result.error, *result.warning)]
    # It is not known what real servers export of an encrypted VM. If the server cannot describe it, the backup fails.
    rejected = bool(result.error and hardware.secrets)
    for each in found:
        remedy = "Remove the named device, or decrypt the VM" if rejected else "The worker writes its own OVF"
        yield PreflightFinding("OVF descriptor", ERROR if rejected else WARNING, f"The server reports: {each}", remedy)
    if not found:
        yield PreflightFinding("OVF descriptor", OK, "The server can write one")
