"""Limits for the time that a VM has a snapshot: few VMs at once, and free space on their datastores.

Each write of a VM with a snapshot needs new space, and vSphere pauses every VM of a full datastore.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ssvm_worker.errors import Cancelled, SourceDenied, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.units import human_size

if TYPE_CHECKING:
    from ssvm_worker.vmware.preflight import PreflightFinding
    from ssvm_worker.vmware.session import VM

#: Seconds between two checks of the free space during an export.
_EVERY_S = 60.0


def take_slots(attempt: Attempt, vm: VM, held: ExitStack) -> None:
    """Wait until the VM may have a snapshot: a slot of its ESXi host and one of each of its datastores.

    *held* releases the slots. All jobs take them in the same order, so they cannot wait for each other.
    The wait may be longer than the session's life, so this function logs in again after it.
    """
    options = vm.options
    limits = {f"snapshots:esxi:{vm.host()}": options.per_host}
    limits |= {f"snapshots:datastore:{each.id}": options.per_datastore for each in vm.datastores()}
    for name in sorted(limits):
        held.enter_context(attempt.slot(name, limits[name]))
    vm.revive()


def check_datastores(vm: VM) -> list[PreflightFinding]:
    """Check the free space of the VM's datastores against ``datastore_warn_percent`` and ``datastore_min_percent``."""
    from ssvm_worker.vmware.preflight import ERROR, OK, WARNING, PreflightFinding  # imports pyVmomi

    findings = []
    for each in vm.datastores():
        detail = f"{each.free_percent:.0f} % of {each.name} is free ({human_size(each.free)})"
        state, remedy = OK, ""
        if each.free_percent < vm.options.datastore_warn_percent:
            state, remedy = WARNING, "Free space on the datastore: a snapshot grows with each write of the VM"
        if each.free_percent < vm.options.datastore_min_percent:
            state = ERROR
        findings.append(PreflightFinding("datastore", state, detail, remedy, SourceDenied))
    return findings


class SpaceWatch:
    """The check of the datastores during an export. Threads may share it."""

    def __init__(self, attempt: Attempt, vm: VM) -> None:
        self._attempt = attempt
        self._vm = vm
        self._lock = threading.Lock()
        self._next = time.monotonic() + _EVERY_S

    def check(self) -> None:
        """Raise SourceDenied if a datastore has too little space. Ask vSphere at most once in ``_EVERY_S`` seconds.

        If vSphere does not answer, the export continues, and the next check asks again.
        The error is permanent, so that the job removes its snapshot at once: a failed backup is better than paused VMs.
        """
        from ssvm_worker.vmware.preflight import ERROR

        with self._lock:
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _EVERY_S
        try:
            findings = check_datastores(self._vm)
        except Cancelled:
            raise
        except WorkerError as error:
            self._attempt.log.warning("the free space of the VM's datastores is not known: %s", error)
            return
        if short := [each.detail for each in findings if each.state == ERROR]:
            what = f"The backup ends before the snapshot fills a datastore: {'; '.join(short)}"
            raise SourceDenied(what, self._vm.moref, "Free space on the datastore, or lower datastore_min_percent")
