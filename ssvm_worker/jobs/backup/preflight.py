"""Checks of vSphere and of the stores before a backup, which change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssvm_worker.errors import Cancelled, StoreFull, WorkerError
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import MiB, human_size
from ssvm_worker.vmware.hardware import Disk
from ssvm_worker.vmware.preflight import ERROR, OK, WARNING, PreflightFinding

from .snapshot_limits import check_datastores

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VM

#: Minimum free bytes of a store: for descriptors, the head of each disk, and the manifest.
_MIN_FREE = MiB


def preflight(
    vm: VM, stores: Mapping[str, Store], disks: Sequence[Disk], own_snapshot: bool, *, try_encrypted: bool = False
) -> list[PreflightFinding]:
    """Check the VM, and the free space of the stores for a backup of *disks*. The first store is the primary."""
    findings = vm.examine(vm.hardware(), own_snapshot, try_encrypted=try_encrypted)
    if own_snapshot:
        findings += check_datastores(vm)
    max_bytes = sum(disk.capacity for disk in disks)
    return findings + [_check_space(stores, name, max_bytes, number == 0) for number, name in enumerate(stores)]


def refuse(findings: Sequence[PreflightFinding], where: str) -> list[dict[str, Any]]:
    """Return the warnings for result and manifest, or raise an error that lists all errors and warnings.

    The error is Permanent if one of the findings is, because another attempt would fail too. Otherwise it is Retryable.
    """
    warnings = [each for each in findings if each.state == WARNING]
    errors = sorted((each for each in findings if each.state == ERROR), key=lambda each: each.failure.retryable)
    if errors:
        reported = errors + warnings
        what = "; ".join(f"{each.check}: {each.detail}" for each in reported)
        remedy = ". ".join(dict.fromkeys(each.remedy for each in reported if each.remedy))
        raise errors[0].failure(f"Nothing was touched, because of {len(errors)} error(s): {what}", where, remedy)
    return [each.as_dict() for each in warnings]


def _check_space(stores: Mapping[str, Store], name: str, max_bytes: int, is_primary: bool) -> PreflightFinding:
    """Check a store's free space. The compressed size of the disks is unknown, so little space is only a warning."""
    check = f"room on {name}"
    try:
        free = stores[name].usage().free  # a store is opened here, and this may fail too
    except Cancelled:
        raise
    except WorkerError as error:
        return PreflightFinding(check, ERROR if is_primary else WARNING, str(error), "", type(error))
    if free is None:
        return PreflightFinding(check, OK, "The store does not report its free space")
    if free < _MIN_FREE:
        detail = f"Only {human_size(free)} free"
        return PreflightFinding(check, ERROR if is_primary else WARNING, detail, "Free space on the store", StoreFull)
    if free < max_bytes:
        detail = f"{human_size(free)} free; the disks have {human_size(max_bytes)} with empty space, uncompressed"
        return PreflightFinding(check, WARNING, detail, "Free space if the backup does not fit")
    return PreflightFinding(check, OK, f"{human_size(free)} free, at most {human_size(max_bytes)} needed")
