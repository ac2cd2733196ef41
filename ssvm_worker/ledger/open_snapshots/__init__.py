"""The snapshots that backup jobs have made and not yet removed, for metrics and for their removal. Here: in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class OpenSnapshot:
    """A snapshot that still exists, or whose removal has left disks that need consolidation."""

    #: The backup job that made the snapshot.
    job_id: str
    #: The vCenter's name in the settings.
    vcenter: str
    #: The VM's managed object id.
    vm: str
    #: Seconds since the epoch.
    created: float
    #: Whether the snapshot is gone, but the VM's disks need consolidation.
    needs_consolidation: bool = False


class OpenSnapshots(Protocol):
    """The open snapshots of all jobs. Each method raises StoreUnavailable while their broker is away."""

    def note(self, snapshot: OpenSnapshot) -> None:
        """Store a snapshot, and replace an earlier entry of the job."""

    def forget(self, job_id: str) -> None:
        """Delete the entry of a job, whose snapshot is gone."""

    def all(self) -> Sequence[OpenSnapshot]:
        """Return all open snapshots, the oldest first."""


class LocalOpenSnapshots:
    """Snapshots in the memory of this process."""

    def __init__(self) -> None:
        self._known: dict[str, OpenSnapshot] = {}

    def note(self, snapshot: OpenSnapshot) -> None:
        self._known[snapshot.job_id] = snapshot

    def forget(self, job_id: str) -> None:
        self._known.pop(job_id, None)

    def all(self) -> Sequence[OpenSnapshot]:
        return sorted(self._known.values(), key=lambda each: each.created)
