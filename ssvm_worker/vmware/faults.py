"""Translation of vSphere's faults into the worker's errors."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from xml.parsers.expat import ExpatError

from pyVmomi import vim, vmodl

from ssvm_worker.errors import (
    InvalidRequest,
    LeaseLost,
    ResourceBusy,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
    StoreFull,
    WorkerError,
)
from ssvm_worker.net.tls import PinMismatch

from .trust import failure_reason

#: The exceptions of a call through pyVmomi.
API_ERRORS = (vmodl.MethodFault, OSError, HTTPException, ExpatError)
#: Faults of a VM that another task uses.
BUSY = (
    vim.fault.TaskInProgress,
    vim.fault.ConcurrentAccess,
    vim.fault.ResourceInUse,
    vim.fault.FileLocked,
    vim.fault.InvalidState,
)
#: Faults of a method or an argument that this product or version does not support.
UNSUPPORTED = (vmodl.fault.MethodNotFound, vmodl.fault.NotSupported, vmodl.fault.InvalidRequest)
#: Faults of a license, such as that of the free ESXi.
_LICENSE = (vim.fault.RestrictedVersion, vmodl.fault.NotEnoughLicenses, vim.fault.InvalidLicense)
#: Faults, their error, the reason and the remedy. The first match counts; any other fault is SourceUnavailable.
_MEANINGS: tuple[tuple[tuple[type, ...], type[WorkerError], str, str], ...] = (
    ((vim.fault.InvalidLogin,), SourceDenied, "vCenter rejected the user name or password", "Check the settings"),
    ((vim.fault.NotAuthenticated,), SourceUnavailable, "the session has ended", "Try again"),
    ((vmodl.fault.ManagedObjectNotFound,), SourceNotFound, "the object is gone", "Check if it was deleted or moved"),
    ((vim.fault.Timedout,), LeaseLost, "the lease has expired", "Try again; a slow store can be the reason"),
    (
        (vim.fault.InvalidHostState,),
        ResourceBusy,
        "the state of the host does not allow it",
        "Check if the host is in maintenance mode; try again later",
    ),
    (BUSY, ResourceBusy, "another task holds the VM", "Try again later"),
    (
        (vim.fault.MethodDisabled, vim.fault.DisallowedOperationOnFailoverHost),
        ResourceBusy,
        "another program has disabled it",
        "Check other backup programs; try again later",
    ),
    (_LICENSE, SourceDenied, "the license does not allow it", "Use a license with backup APIs; the free ESXi has none"),
    ((vim.fault.NoDiskSpace,), StoreFull, "a datastore is full", "Free space on the datastore"),
    (
        (vim.fault.TooManySnapshotLevels,),
        InvalidRequest,
        "the VM has too many snapshots",
        "Remove or consolidate snapshots of the VM",
    ),
    ((vim.fault.NotFound, vim.fault.NoDiskFound), SourceNotFound, "an object is missing", "Check if it was deleted"),
    (
        (
            *UNSUPPORTED,
            vmodl.fault.InvalidArgument,
            vmodl.query.InvalidProperty,
            vim.fault.OvfFault,
            vim.fault.InvalidName,
            vim.fault.DuplicateName,
            vim.fault.InvalidDatastore,
            vim.fault.NoHost,
        ),
        InvalidRequest,
        "vSphere cannot do it",
        "Search the vendor's knowledge base for the fault, or change the VM or the request",
    ),
)
#: Faults after which a snapshot without quiescing would fail too.
NOT_OF_THE_GUEST = (
    vmodl.fault.SecurityError,
    vmodl.fault.ManagedObjectNotFound,
    vmodl.fault.HostCommunication,
    vim.fault.MethodDisabled,
    vim.fault.NoDiskSpace,
    vim.fault.TooManySnapshotLevels,
    *_LICENSE,
    *BUSY,
)


@contextmanager
def translated(what: str, where: str) -> Iterator[None]:
    """Translate the exceptions of API calls into WorkerErrors. *what* names the step."""
    try:
        yield
    except API_ERRORS as error:
        raise as_worker_error(error, what, where) from error


def as_worker_error(error: BaseException, what: str, where: str) -> WorkerError:
    """Return the WorkerError for a fault or a failed connection."""
    if isinstance(error, vim.fault.NoPermission) and not isinstance(error, vim.fault.NotAuthenticated):
        remedy = f"Give the user the privilege {error.privilegeId or 'for it'}"
        return SourceDenied(f"{what}: the user may not do this", where, remedy)
    for kinds, made, reason, remedy in _MEANINGS:
        if isinstance(error, kinds):
            source = getattr(error, "source", None)
            by = f", by {source}" if source else ""
            return made(f"{what}: {reason}: {fault_name(error)}{by}", where, remedy)
    if isinstance(error, vmodl.MethodFault):
        return SourceUnavailable(f"{what}: vCenter answered {fault_name(error)}", where, "Check its tasks and events")
    if isinstance(error, ssl.SSLCertVerificationError | PinMismatch):
        return SourceDenied(
            f"{what}: the certificate is not trusted: {failure_reason(error)}", where, "Check ca_file or thumbprint"
        )
    return SourceUnavailable(
        f"{what}: the connection failed: {error}", where, "Check vCenter and the network path to it"
    )


def fault_name(fault: object) -> str:
    """Return the fault's short name, and its message if it has one: FileFault (…)."""
    name = type(fault).__name__.rpartition(".")[2]
    messages = [getattr(fault, "msg", None), *(each.message for each in getattr(fault, "faultMessage", None) or ())]
    message = "; ".join(dict.fromkeys(each for each in messages if each))
    return f"{name} ({message})" if message and message != name else name
