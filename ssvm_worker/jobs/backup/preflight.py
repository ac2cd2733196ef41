"""What a backup finds before it touches anything: vSphere's side and the stores', in one list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssvm_worker.errors import StoreFull, WorkerError
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import MiB, human_size
from ssvm_worker.vmware.finding import ERROR, OK, WARNING, PreflightFinding
from ssvm_worker.vmware.hardware import Disk

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VM

#: A store with less room than this takes no backup: descriptors, the head of each disk, and the manifest.
_LEAST = MiB


def preflight(vm: VM, stores: Mapping[str, Store], disks: Sequence[Disk], own_snapshot: bool) -> list[PreflightFinding]:
    """Everything that can be known beforehand of a backup of *disks*; the first store is the primary."""
    findings = vm.examine(vm.hardware(), own_snapshot)
    most = sum(disk.capacity for disk in disks)
    return findings + [_room(store, most, number == 0) for number, store in enumerate(stores.values())]


def refuse(findings: Sequence[PreflightFinding], where: str) -> list[dict[str, Any]]:
    """The warnings, for result and manifest; an error raises, with all that is wrong in its text.

    Raises a Permanent error if one of them is, because another attempt would meet it again; else a Retryable one.
    """
    warnings = [each for each in findings if each.state == WARNING]
    errors = sorted((each for each in findings if each.state == ERROR), key=lambda each: each.failure.retryable)
    if errors:
        told = errors + warnings
        what = "; ".join(f"{each.check}: {each.detail}" for each in told)
        remedy = ". ".join(dict.fromkeys(each.remedy for each in told if each.remedy))
        raise errors[0].failure(f"Nothing was touched, because of {len(errors)} error(s): {what}", where, remedy)
    return [each.as_dict() for each in warnings]


def _room(store: Store, most: int, is_primary: bool) -> PreflightFinding:
    """A store's free space; how much the disks deflate to is not known, so a close thing is a warning."""
    check = f"room on {store.name}"
    try:
        free = store.usage().free
    except WorkerError as error:
        return PreflightFinding(check, ERROR if is_primary else WARNING, str(error), "", type(error))
    if free is None:
        return PreflightFinding(check, OK, "The store does not say how much is free")
    if free < _LEAST:
        detail = f"Only {human_size(free)} free"
        return PreflightFinding(check, ERROR if is_primary else WARNING, detail, "Make room on the store", StoreFull)
    if free < most:
        detail = f"{human_size(free)} free; the disks have {human_size(most)}, less what is empty or deflates"
        return PreflightFinding(check, WARNING, detail, "Make room if it does not fit")
    return PreflightFinding(check, OK, f"{human_size(free)} free, at the most {human_size(most)} needed")
