"""Export a VM's snapshot from vCenter to image stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import (
    IncompleteBackup,
    InvalidRequest,
    SourceNotFound,
    SourceUnavailable,
    WorkerError,
)
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import ArtifactRequest, QuotaField
from ssvm_worker.jobs.store_set import find_placement
from ssvm_worker.jobs.usage import reserve_quota
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.vmware.hardware import select_disks

from .consistency import lost_disks
from .export_vm import VMExport
from .incremental import FULL, INCREMENTAL, sweep_packs, totals
from .snapshot_removal import BUSY_DELAYS, CLEAN_UP_S, note_snapshot, remove_leftover, try_removal

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VM, VCenterSession
    from ssvm_worker.vmware.snapshot import Snapshot

#: The reason why a backup lacks an independent disk or a raw device.
_NO_SNAPSHOT = "no snapshot contains it"


class Request(ArtifactRequest):
    """A request to export a snapshot."""

    kind: Literal["backup"] = Field("backup", description="The kind of the artifact")
    vcenter: str = Field(description="The vCenter's name in the settings")
    vm: str = Field(min_length=1, description="Managed object id, instance UUID or inventory path")
    snapshot: str | None = Field(
        None, description="Managed object id or name; when absent, the job makes and removes one"
    )
    disks: list[str] | None = Field(
        None, min_length=1, description="Keys, labels or places (scsi0:1) of the disks; all when absent"
    )
    volume: str = Field(min_length=1, description="The volume or VM of the snapshot")
    stores: list[str] = Field(["primary"], min_length=1, description="The first is the primary and must succeed")
    mode: Literal["full", "incremental"] | None = Field(
        None,
        description="Plain files, or only the data that the volume's backups lack; the first store's mode when absent",
    )

    quiesce: Literal["required", "if_possible", "no"] | None = Field(
        None, description="Quiesce the file systems of the guest; as backup.quiesce of the settings when absent"
    )
    encrypted: Literal["refuse", "try"] = Field(
        "refuse", description="A VM with encrypted disks: refuse it before the snapshot, or try what vSphere allows"
    )
    quota: QuotaField = None

    @property
    def origin(self) -> dict[str, Any]:
        """Return the fields that distinguish this backup from another one with the same id."""
        return {"vcenter": self.vcenter, "vm": self.vm, "snapshot": self.snapshot, "disks": self.disks}


def resource(request: Request) -> str:
    """Return the lock's name. Only one job at a time writes backups of a volume, because backups share data."""
    return request.artifact.resource


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Store every requested disk, the OVF descriptor and the checksums, and finally the manifest.

    The job removes its own snapshot at the end, and also after an error unless another attempt will use it.
    Raises IncompleteBackup if the stored backup lacks a requested disk.
    """
    stores = {name: attempt.store(name) for name in dict.fromkeys(request.stores)}
    return _already_there(request, attempt, stores) or _back_up(request, attempt, stores)


def _back_up(request: Request, attempt: Attempt, stores: dict[str, Store]) -> dict[str, Any]:
    attempt.progress.start("connecting")
    with (
        reserve_quota(attempt, request.account, request.quota, len(stores)),
        attempt.services.connections.vcenter(request.vcenter, attempt.check) as session,
        ExitStack() as slots,
    ):
        attempt.reached.add(request.vcenter)
        vm: VM = session.find_vm(request.vm)
        try:
            # Check VM and stores before any change.
            from .preflight import preflight, refuse  # imports pyVmomi
            from .snapshot_limits import take_slots

            if request.snapshot is None:
                attempt.progress.start("waiting for a slot")
                take_slots(attempt, vm, slots)
            attempt.progress.start("preflight")
            disks = vm.hardware().disks
            chosen = select_disks(disks, request.disks) if request.snapshot is None else disks
            own, trial = request.snapshot is None, request.encrypted == "try"
            findings = preflight(vm, stores, chosen, own_snapshot=own, try_encrypted=trial)
            for each in findings:
                attempt.log.info("%s: %s: %s", each.check, each.state, each.detail)
            warnings = refuse(findings, vm.moref)
            quiesce = request.quiesce or vm.options.quiesce
            snapshot = _snapshot(request, attempt, vm, quiesce)
            warnings += _not_quiesced(snapshot, quiesce)
            incremental = _mode(request, attempt) == INCREMENTAL
            export = VMExport(attempt, request.artifact, stores, vm, snapshot, incremental=incremental)
            with _removal_is_retryable(attempt, vm, snapshot):
                manifest, kept = export.run(request.origin, request.disks, warnings)
        except BaseException as error:
            _remove_after_failure(request, attempt, session, vm, error)
            raise
        removed = _remove(request, attempt, vm, snapshot)
    return _require_complete(manifest, _result(manifest) | {"reused": False, "snapshot_removed": removed} | kept)


def _require_complete(manifest: Manifest, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result, or raise IncompleteBackup with the result if the backup lacks a requested disk."""
    if lost := lost_disks(manifest):
        reasons = [
            f"{each['label']} ({each['place']}) is {each['status']}: {each.get('why', _NO_SNAPSHOT)}" for each in lost
        ]
        number = f"{len(lost)} of {len(manifest.facts['disks'])} disks"
        error = IncompleteBackup(
            f"The backup is stored, but lacks {number}: {'; '.join(reasons)}",
            manifest.artifact.prefix,
            "The stored disks can be restored. For the next backup, fix the reason, or list the disks in the request",
        )
        error.result = result
        raise error
    return result


def discard(request: Request, attempt: Attempt) -> None:
    """Remove the data of failed attempts from the stores, and the job's snapshot if vCenter allows it."""
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact, attempt.confirm)
        if _mode(request, attempt) == INCREMENTAL:  # a full backup writes no packs and may run without the lock
            sweep_packs(attempt.store(name), request.artifact, attempt)
    if request.snapshot is None:
        remove_leftover(attempt, request.vcenter, request.vm)


def _mode(request: Request, attempt: Attempt) -> str:
    """Return the mode in the request, or by default the mode of its first store."""
    store = attempt.settings.stores.get(request.stores[0])
    return request.mode or (store.backup_mode if store else FULL)


def _already_there(request: Request, attempt: Attempt, stores: dict[str, Store]) -> dict[str, Any] | None:
    """Return the result of an earlier attempt or job that made this backup, or None.

    Raises InvalidRequest if another backup has the same id.
    """
    store = next(iter(stores.values()))
    manifest = find_manifest(store, request.artifact)
    if manifest is None:
        return None
    if manifest.source.get("request") != request.origin:
        raise InvalidRequest(
            "There is another backup with this id",
            f"{store.name}:{request.artifact.prefix}",
            "Delete it first (`ssvm delete`), or use a new id",
        )
    removed: bool | None = None
    if manifest.job_id == attempt.job_id and manifest.source["snapshot"]["ours"]:
        # An earlier attempt may have crashed after the manifest and before the removal of the snapshot.
        removed = remove_leftover(attempt, request.vcenter, request.vm)
    placement = find_placement(attempt, stores, request.artifact)
    return _require_complete(manifest, _result(manifest) | {"reused": True, "snapshot_removed": removed} | placement)


def _snapshot(request: Request, attempt: Attempt, vm: VM, quiesce: str) -> Snapshot:
    attempt.progress.start("snapshot")
    if request.snapshot is not None:
        return vm.given_snapshot(request.snapshot)
    if snapshot := vm.own_snapshot(attempt.job_id):
        attempt.log.info("using the snapshot %s of an earlier attempt", snapshot.moref)
        note_snapshot(attempt, request.vcenter, vm, snapshot)
        return snapshot
    snapshot = vm.make_snapshot(attempt.job_id, quiesce)
    note_snapshot(attempt, request.vcenter, vm, snapshot)
    how = "quiesced" if snapshot.quiesced else f"crash-consistent ({snapshot.remark})"
    attempt.log.info("made the snapshot %s, %s", snapshot.moref, how)
    return snapshot


def _not_quiesced(snapshot: Snapshot, wanted: str) -> list[dict[str, Any]]:
    """Return a warning if the job's snapshot lacks the quiescing that the settings want."""
    from ssvm_worker.vmware.snapshot import IS_OFF  # imports pyVmomi

    if snapshot.quiesced or not snapshot.ours or wanted == "no" or snapshot.remark == IS_OFF:
        return []
    detail = f"The backup is crash-consistent: {snapshot.remark or 'vSphere did not quiesce the guest'}"
    remedy = "Check the guest's tools and its log"
    return [{"check": "quiescing", "state": "warning", "detail": detail, "remedy": remedy}]


@contextmanager
def _removal_is_retryable(attempt: Attempt, vm: VM, snapshot: Snapshot) -> Iterator[None]:
    """Raise a retryable error if a user or program removes the job's snapshot. The next attempt makes a new one."""
    try:
        yield
    except SourceNotFound as error:
        if snapshot.ours and vm.own_snapshot(attempt.job_id) is None:
            raise SourceUnavailable(
                "A user or program removed the snapshot of the job", vm.moref, "The next attempt makes a new one"
            ) from error
        raise


def _remove_after_failure(
    request: Request, attempt: Attempt, session: VCenterSession, vm: VM, error: BaseException
) -> None:
    """Remove the job's snapshot, unless the next attempt will use it or another worker has taken over the job."""
    if request.snapshot is not None or attempt.will_resume(error):
        return
    try:
        attempt.for_cleanup().confirm()
    except WorkerError as fenced:
        attempt.log.info("the snapshot is kept for the worker that has taken over the job: %s", fenced)
        return
    with session.shielded():
        try_removal(attempt, vm, request.vcenter, CLEAN_UP_S)


def _remove(request: Request, attempt: Attempt, vm: VM, snapshot: Snapshot) -> bool | None:
    """Remove the job's snapshot. Return whether it is gone, or None if the job made none.

    A failed removal does not fail the stored backup.
    """
    if not snapshot.ours:
        return None
    attempt.progress.start("removing the snapshot")
    # After hours of export the session may have expired, so a failed removal is tried again with a new session.
    if try_removal(attempt, vm, request.vcenter, delays=BUSY_DELAYS):
        return True
    return remove_leftover(attempt, request.vcenter, request.vm)


def _result(manifest: Manifest) -> dict[str, Any]:
    return {
        "key": manifest.artifact.prefix,
        "size": manifest.size,
        "virtual_size": manifest.facts["virtual_size"],
        "complete": manifest.facts["complete"],
        "quiesced": manifest.source["snapshot"]["quiesced"],
        "snapshot": manifest.source["snapshot"]["moref"],
        "disks": manifest.facts["disks"],
        "warnings": manifest.facts.get("warnings", []),
        "remarks": manifest.facts.get("remarks", []),
        "objects": [each.name for each in manifest.entries],
        **totals(manifest),
    }
