"""The watch of a VM's power state during its export.

While an NFC lease is open, vSphere may refuse to switch the VM on (reference of HttpNfcLease). It is not documented
whether this is true of a snapshot's lease. So a guest that shuts down during a long export may stay off until its end.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ssvm_worker.errors import LeaseLost, WorkerError
from ssvm_worker.jobs.attempt import Attempt

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VM

#: Seconds between two checks during an export, and between two checks while the job has given its leases back.
_EVERY_S, _PAUSED_S = 60.0, 5.0


class PowerWatch:
    """The check during an export. Threads may share it."""

    def __init__(self, attempt: Attempt, vm: VM) -> None:
        #: A warning for the manifest for each time that the VM was switched off.
        self.warnings: list[dict[str, Any]] = []
        self._attempt = attempt
        self._vm = vm
        self._lock = threading.Lock()
        self._is_on = False
        self._is_on = self._look()
        self._next = time.monotonic() + _EVERY_S
        #: The time until which the job holds no lease.
        self._paused_until = 0.0

    def check(self) -> None:
        """Warn if the VM was switched off. Raise LeaseLost if the settings say that the job then gives its leases back.

        Asks vSphere at most once in ``_EVERY_S`` seconds.
        """
        with self._lock:
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + _EVERY_S
                was_on, self._is_on = self._is_on, self._look()
                if was_on and not self._is_on:
                    self._warn()
            if time.monotonic() < self._paused_until:
                raise LeaseLost("The VM was switched off, and the job gives its lease back", self._vm.moref)

    def wait(self) -> bool:
        """Wait without a lease until the VM is on, or the time is over. Return False if there is no pause now."""
        if not self._paused_until:
            return False
        while time.monotonic() < self._paused_until and not self._look():
            self._attempt.wait(min(_PAUSED_S, self._vm.options.lease_delay_s))
        with self._lock:
            self._paused_until = 0.0
        return True

    def _look(self) -> bool:
        """Return whether the VM is on. If vSphere does not say it, return the last known state."""
        with suppress(WorkerError):
            return self._vm.is_on()
        self._attempt.check()
        return self._is_on

    def _warn(self) -> None:
        pause_s = self._vm.options.power_off_pause_s
        when = time.strftime("%H:%M:%SZ", time.gmtime())
        detail = f"The VM was found switched off at {when} during the export"
        remedy = "If vSphere refuses to switch it on, cancel the backup, or set backup.power_off_pause_s"
        self.warnings.append({"check": "power state", "state": "warning", "detail": detail, "remedy": remedy})
        self._attempt.log.warning("%s. %s: `ssvm cancel %s`", detail, remedy, self._attempt.job_id)
        if pause_s:
            self._paused_until = time.monotonic() + pause_s
