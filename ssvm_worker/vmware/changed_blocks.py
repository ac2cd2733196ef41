"""Changed block tracking: what vSphere says was written since a change id. To check by, never to be trusted alone.

Known to lose changes: KB 2090639 (a disk grown beyond 128 GB), KB 2136854 (6.0, during consolidation).
"""

from __future__ import annotations

from typing import Any

from ssvm_worker.errors import SourceUnavailable

from .faults import translated
from .hardware import Disk

#: Offset and length in bytes.
Area = tuple[int, int]


def changed_areas(vm: Any, snapshot: Any, disk: Disk, change_id: str) -> list[Area]:
    """The areas of a snapshot's disk that were written since *change_id*, in order; *vm* and *snapshot* are pyVmomi's.

    One answer may cover only a part of the disk, so it is asked for until the disk's end.
    Raises SourceUnavailable and its like where the server cannot tell.
    """
    areas: list[Area] = []
    with translated("Asking for changed blocks", vm._moId):
        at = 0
        while at < disk.capacity:
            answer = vm.QueryChangedDiskAreas(snapshot, disk.key, at, change_id)
            areas += [(each.start, each.length) for each in answer.changedArea]
            behind = answer.startOffset + answer.length
            if behind <= at:
                raise SourceUnavailable(f"vCenter tells nothing of the disk from byte {at} on", vm._moId)
            at = behind
    return sorted(areas)
