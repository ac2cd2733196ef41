"""What vSphere's faults mean in our words."""

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

from .trust import PinMismatch, reason

#: What a call through pyVmomi raises.
API_ERRORS = (vmodl.MethodFault, OSError, HTTPException, ExpatError)
BUSY = (
    vim.fault.TaskInProgress,
    vim.fault.ConcurrentAccess,
    vim.fault.ResourceInUse,
    vim.fault.FileLocked,
    vim.fault.InvalidState,
)
#: The method, or what it is asked for, is not in this product or version.
UNSUPPORTED = (vmodl.fault.MethodNotFound, vmodl.fault.NotSupported, vmodl.fault.InvalidRequest)


@contextmanager
def translated(what: str, where: str) -> Iterator[None]:
    """Turn what a call raises into our errors; *what* says which step it was."""
    try:
        yield
    except API_ERRORS as error:
        raise meaning(error, what, where) from error


def meaning(error: BaseException, what: str, where: str) -> WorkerError:
    """The error of ours that a fault stands for."""
    if isinstance(error, vim.fault.InvalidLogin):
        return SourceDenied(f"{what}: vCenter refuses the user name or password", where, "Look at the settings")
    if isinstance(error, vim.fault.NotAuthenticated):
        return SourceUnavailable(f"{what}: the session has ended", where, "Try again")
    if isinstance(error, vim.fault.NoPermission):
        remedy = f"Give the user the privilege {error.privilegeId or 'for it'}"
        return SourceDenied(f"{what}: the user may not do this", where, remedy)
    if isinstance(error, vmodl.fault.ManagedObjectNotFound):
        return SourceNotFound(f"{what}: the object is gone", where, "Look whether it was deleted or moved")
    if isinstance(error, vim.fault.Timedout):
        return LeaseLost(f"{what}: the lease has expired", where, "Try again; a slow store may be the reason")
    if isinstance(error, BUSY):
        return ResourceBusy(f"{what}: another task holds the VM ({fault_name(error)})", where, "Try again later")
    if isinstance(error, vmodl.MethodFault):
        return SourceUnavailable(f"{what}: vCenter answered {fault_name(error)}", where, "Look at its tasks and events")
    if isinstance(error, ssl.SSLCertVerificationError | PinMismatch):
        return SourceDenied(
            f"{what}: the certificate is not trusted: {reason(error)}", where, "See ca_file, thumbprint"
        )
    return SourceUnavailable(f"{what}: the connection failed: {error}", where, "Look at vCenter and the way to it")


def fault_name(fault: object) -> str:
    """The fault's short name with its message, if it has one: FileFault (…)."""
    name = type(fault).__name__.rpartition(".")[2]
    message = getattr(fault, "msg", None)
    return f"{name} ({message})" if message and message != name else name
