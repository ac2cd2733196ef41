"""Translation of vSphere's faults into the worker's errors."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from xml.parsers.expat import ExpatError

from pyVmomi import vim, vmodl

from ssvm_worker.errors import (
    LeaseLost,
    ResourceBusy,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
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


@contextmanager
def translated(what: str, where: str) -> Iterator[None]:
    """Translate the exceptions of API calls into WorkerErrors. *what* names the step."""
    try:
        yield
    except API_ERRORS as error:
        raise as_worker_error(error, what, where) from error


def as_worker_error(error: BaseException, what: str, where: str) -> WorkerError:
    """Return the WorkerError for a fault or a failed connection."""
    if isinstance(error, vim.fault.InvalidLogin):
        return SourceDenied(f"{what}: vCenter rejected the user name or password", where, "Check the settings")
    if isinstance(error, vim.fault.NotAuthenticated):
        return SourceUnavailable(f"{what}: the session has ended", where, "Try again")
    if isinstance(error, vim.fault.NoPermission):
        remedy = f"Give the user the privilege {error.privilegeId or 'for it'}"
        return SourceDenied(f"{what}: the user may not do this", where, remedy)
    if isinstance(error, vmodl.fault.ManagedObjectNotFound):
        return SourceNotFound(f"{what}: the object is gone", where, "Check if it was deleted or moved")
    if isinstance(error, vim.fault.Timedout):
        return LeaseLost(f"{what}: the lease has expired", where, "Try again; a slow store can be the reason")
    if isinstance(error, BUSY):
        return ResourceBusy(f"{what}: another task holds the VM ({fault_name(error)})", where, "Try again later")
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
    message = getattr(fault, "msg", None)
    return f"{name} ({message})" if message and message != name else name
