"""What can be known before a backup touches anything, as findings: for the job, its manifest and ``doctor``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.errors import WorkerError

from .connection import Connection
from .export import ExportLink, secure
from .faults import UNSUPPORTED, fault_name, translated
from .finding import ERROR, OK, WARNING, PreflightFinding
from .hardware import EXPORTED, Hardware
from .old_snapshots import find_leftovers

#: What each step of a backup needs, by the ids in vSphere's own type information.
PRIVILEGES = {
    "reading the VM": ("System.View", "System.Read"),
    "exporting its snapshot, and the OVF descriptor": ("VApp.Export",),
}
#: And these, where the job makes its own snapshot.
SNAPSHOT_PRIVILEGES = {
    "making the snapshot": ("VirtualMachine.State.CreateSnapshot",),
    "removing and consolidating it": ("VirtualMachine.State.RemoveSnapshot",),
}
#: Seconds after which a snapshot of ours is worth a look: few backups take longer.
_OLD_S = 24 * 3600.0
#: The first hardware version with changed block tracking.
_TRACKING = 7


def of_vm(connection: Connection, vm: Any, hardware: Hardware, own_snapshot: bool) -> list[PreflightFinding]:
    """Look at a VM; *own_snapshot*: whether the job would make one. Nothing is changed."""
    steps = PRIVILEGES | (SNAPSHOT_PRIVILEGES if own_snapshot else {})
    return [
        *_look("privileges", lambda: _privileges(connection, vm, steps)),
        *_hardware(hardware),
        *_look("ESXi host", lambda: _host_of(connection, vm)),
        *_look("OVF descriptor", lambda: _descriptor(connection, vm, hardware)),
    ]


def of_server(connection: Connection) -> list[PreflightFinding]:
    """Look at a vCenter: the user's privileges at its root, and the way to each of its hosts."""
    steps = PRIVILEGES | SNAPSHOT_PRIVILEGES
    found = _look("privileges", lambda: _privileges(connection, connection.content.rootFolder, steps))
    with translated("Looking for hosts", connection.address.name):
        hosts = [host for host, _ in connection.each(vim.HostSystem, "name")]
    for host in hosts:
        found += _look("ESXi host", partial(_host, connection, host))
    return found + _look("snapshots", lambda: _leftovers(connection))


def _look(check: str, examine: Callable[[], Iterator[PreflightFinding]]) -> list[PreflightFinding]:
    """What vSphere does not let us look at is a warning: the backup itself may be allowed all the same."""
    try:
        with translated("Looking before the backup", check):
            return list(examine())
    except WorkerError as error:
        if not isinstance(error.__cause__, vmodl.MethodFault):
            raise
        return [PreflightFinding(check, WARNING, f"It could not be looked at: {error.what}", error.remedy)]


def _privileges(connection: Connection, entity: Any, steps: dict[str, tuple[str, ...]]) -> Iterator[PreflightFinding]:
    session = connection.read(connection.content.sessionManager, "currentSession")["currentSession"]
    user = session.userName if session else connection.address.username
    ids = [each for needed in steps.values() for each in needed]
    manager = connection.content.authorizationManager
    missing = _not_granted(manager.HasUserPrivilegeOnEntities([entity], user, ids))
    if missing and session:
        # How the server wants the user's domain spelt is not known of every version; the session needs no spelling.
        with suppress(vmodl.MethodFault):
            missing &= _not_granted(manager.HasPrivilegeOnEntities([entity], session.key, sorted(missing)))
    if not missing:
        yield PreflightFinding("privileges", OK, f"{user} has {', '.join(ids)}")
    for step, needed in steps.items():
        for each in missing.intersection(needed):
            detail = f"{user} lacks {each} on {entity._moId}, needed for {step}"
            yield PreflightFinding("privileges", ERROR, detail, f"Give {user} a role with {each}, propagated to the VM")


def _not_granted(found: Sequence[Any]) -> set[str]:
    return {each.privId for of in found for each in of.privAvailability if not each.isGranted}


def _hardware(hardware: Hardware) -> Iterator[PreflightFinding]:
    number = hardware.version.removeprefix("vmx-")
    old = number.isdigit() and int(number) < _TRACKING
    remedy = "Upgrade the VM's compatibility" if old else ""
    detail = f"{hardware.version}{': too old to track changed blocks' if old else ''}"
    yield PreflightFinding("hardware version", WARNING if old else OK, detail, remedy)
    if hardware.is_template:
        yield PreflightFinding(
            "template", ERROR, "It is a template: vSphere makes no snapshot of it", "Convert it to a VM first"
        )
    for what in hardware.secrets:
        detail = f"The VM has {what}: what is exported is in the clear, and vSphere may refuse to export or import it"
        yield PreflightFinding("encryption", WARNING, detail, "Keep the backup where it may be read; try a restore")
    left = [disk for disk in hardware.disks if disk.status != EXPORTED]
    for disk in left:
        detail = f"{disk.label} ({disk.place}) is {disk.status}: no snapshot holds it, the backup will be without it"
        remedy = (
            "Change its mode in vSphere, or back it up from inside the guest and name the other disks in the request"
        )
        yield PreflightFinding("disks", WARNING, detail, remedy)
    if not left:
        yield PreflightFinding("disks", OK, f"{len(hardware.disks)}, all in snapshots")


def _leftovers(connection: Connection) -> Iterator[PreflightFinding]:
    """Snapshots of ours that are old enough to be a dead job's."""
    found = find_leftovers(connection)
    old = [each for each in found if each.when < time.time() - _OLD_S]
    for each in old:
        made = time.strftime("%Y-%m-%d", time.gmtime(each.when))
        detail = f"{each.snapshot.name} on {each.vm_name} ({each.vm}) was made on {made} by the job {each.job_id}"
        yield PreflightFinding(
            "snapshots", WARNING, detail, "Remove it in vCenter if that job has ended (`ssvm job ID`)"
        )
    if not old:
        yield PreflightFinding("snapshots", OK, f"{len(found)} of ours, none older than a day")


def _host_of(connection: Connection, vm: Any) -> Iterator[PreflightFinding]:
    host = connection.read(vm, "runtime.host")["runtime.host"]
    if host is None:
        yield PreflightFinding(
            "ESXi host", WARNING, "vCenter does not say where the VM is", "Look whether it is accessible"
        )
        return
    yield from _host(connection, host)


def _host(connection: Connection, host: Any) -> Iterator[PreflightFinding]:
    """The worker reads disks from the host itself: name, port and certificate must be right from here."""
    if connection.content.about.apiType == "HostAgent":
        yield PreflightFinding("ESXi host", OK, f"{connection.address.name}, which is connected")
        return
    paths = ("summary.config.name", "summary.config.port", "summary.config.sslThumbprint")
    name, port, thumbprint = connection.read(host, *paths).values()
    shown = f"[{name}]" if ":" in name else name
    link = ExportLink(f"https://{shown}:{port or 443}/", thumbprint or "", connection.address, "")
    try:
        secure(link, connection.check).close()
    except WorkerError as error:
        yield PreflightFinding("ESXi host", ERROR, error.what + f" [{error.where}]", error.remedy, type(error))
        return
    yield PreflightFinding("ESXi host", OK, f"{name}:{port or 443} answers, and its certificate is the right one")


def _descriptor(connection: Connection, vm: Any, hardware: Hardware) -> Iterator[PreflightFinding]:
    """A dry run, without files: the server tells what it cannot describe."""
    params = vim.OvfManager.CreateDescriptorParams(name=hardware.name, ovfFiles=[], includeImageFiles=False)
    try:
        result = connection.content.ovfManager.CreateDescriptor(vm, params)
    except UNSUPPORTED:
        yield PreflightFinding("OVF descriptor", OK, "The server writes none; ours is used")
        return
    found = [fault_name(getattr(each, "fault", each)) for each in (*result.error, *result.warning)]
    # Nobody here has seen what real servers export of an encrypted VM: where they refuse to describe it, we do not try.
    refused = bool(result.error and hardware.secrets)
    for each in found:
        remedy = "Remove the device that it names, or decrypt the VM" if refused else "The OVF will be our own"
        yield PreflightFinding("OVF descriptor", ERROR if refused else WARNING, f"The server reports: {each}", remedy)
    if not found:
        yield PreflightFinding("OVF descriptor", OK, "The server can write one")
