"""Changed block tracking (CBT): the areas that vSphere reports as written since a change id.

The worker compares this report with the data and never relies on it. Known defects that lose changes:
KB 2090639 (a disk that grew beyond 128 GB) and KB 2136854 (vSphere 6.0, during consolidation).
"""

from __future__ import annotations

from typing import Any

from ssvm_worker.errors import SourceUnavailable

from .faults import translated
from .hardware import Disk

#: Offset and length in bytes.
Area = tuple[int, int]


def changed_areas(vm: Any, snapshot: Any, disk: Disk, change_id: str) -> list[Area]:
    """Return the areas of a snapshot's disk that were written since *change_id*, sorted by offset.

    *vm* and *snapshot* are pyVmomi objects. One answer may cover only a part of the disk.
    This function therefore repeats the query up to the end of the disk.
    Raises SourceUnavailable, or another WorkerError, if the server has no answer.
    """
    areas: list[Area] = []
    with translated("Querying changed blocks", vm._moId):
        offset = 0
        while offset < disk.capacity:
            answer = vm.QueryChangedDiskAreas(snapshot, disk.key, offset, change_id)
            areas += [(each.start, each.length) for each in answer.changedArea]
            end = answer.startOffset + answer.length
            if end <= offset:
                raise SourceUnavailable(f"vCenter reports no changed blocks from byte {offset} on", vm._moId)
            offset = end
    return sorted(areas)
