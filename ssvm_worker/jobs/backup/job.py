"""Export a VM's snapshot from vCenter to image stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import IncompleteBackup, InvalidRequest, SourceNotFound, SourceUnavailable, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.publish import placed
from ssvm_worker.jobs.request import ArtifactRequest, QuotaField
from ssvm_worker.jobs.usage import holding
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.vmware.hardware import select_disks

from .export_vm import VMExport
from .incremental import FULL, INCREMENTAL, sweep_packs, totals
from .missing_disks import lost_disks
from .preflight import preflight, refuse

if TYPE_CHECKING:
    from ssvm_worker.vmware.session import VM, VCenterSession
    from ssvm_worker.vmware.snapshot import Snapshot

#: Seconds that a job which has failed or was cancelled waits for its snapshot to go; vSphere goes on after that.
_CLEAN_UP_S = 60.0
#: Why a disk is not there that is independent or a raw device.
_OUTSIDE = "no snapshot holds it"


class Request(ArtifactRequest):
    """A snapshot to export."""

    kind: Literal["backup"] = "backup"
    vcenter: str = Field(description="The vCenter's name in the settings")
    vm: str = Field(min_length=1, description="Managed object id, instance UUID or inventory path")
    snapshot: str | None = Field(None, description="Managed object id or name; one is made and removed when absent")
    disks: list[str] | None = Field(
        None, min_length=1, description="Keys, labels or places (scsi0:1) of the disks wanted; all when absent"
    )
    volume: str = Field(min_length=1, description="The volume or VM that the snapshot is of")
    stores: list[str] = Field(["primary"], min_length=1, description="The first is the primary and must succeed")
    mode: Literal["full", "incremental"] | None = Field(
        None,
        description="Plain files, or only what the volume's backups do not have yet; the first store's when absent",
    )

    quota: QuotaField = None

    @property
    def origin(self) -> dict[str, Any]:
        """What tells this backup from another one under the same id."""
        return {"vcenter": self.vcenter, "vm": self.vm, "snapshot": self.snapshot, "disks": self.disks}


def resource(request: Request) -> str:
    """Only one job at a time writes backups of a volume, as they share what they have in common."""
    return request.artifact.resource


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Store every wanted disk, the OVF descriptor and the checksums; the manifest last.

    The job's own snapshot goes at the end, also after an error, unless another attempt will go on from it. Raises
    IncompleteBackup for a backup that is stored, and short of a disk that was wanted: that is no success.
    """
    stores = {name: attempt.store(name) for name in dict.fromkeys(request.stores)}
    return _already_there(request, attempt, stores) or _back_up(request, attempt, stores)


def _back_up(request: Request, attempt: Attempt, stores: dict[str, Store]) -> dict[str, Any]:
    attempt.progress.start("connecting")
    with (
        holding(attempt, request.account, request.quota, len(stores)),
        attempt.doors.vcenter(request.vcenter, check=attempt.check) as session,
    ):
        vm: VM = session.find_vm(request.vm)
        try:
            warnings = _look_first(request, attempt, vm, stores)
            snapshot = _snapshot(request, attempt, vm)
            incremental = _mode(request, attempt) == INCREMENTAL
            export = VMExport(attempt, request.artifact, stores, vm, snapshot, incremental=incremental)
            with _noticing_removal(attempt, vm, snapshot):
                manifest, kept = export.run(request.origin, request.disks, warnings)
        except BaseException as error:
            _give_up(request, attempt, session, vm, error)
            raise
        removed = _remove(request, attempt, vm, snapshot)
    return _unless_short(manifest, _result(manifest) | {"reused": False, "snapshot_removed": removed} | kept)


def _unless_short(manifest: Manifest, result: dict[str, Any]) -> dict[str, Any]:
    """The result, unless a disk that was wanted is lacking: IncompleteBackup has it then, as the backup stands."""
    if lost := lost_disks(manifest):
        told = [f"{each['label']} ({each['place']}) is {each['status']}: {each.get('why', _OUTSIDE)}" for each in lost]
        number = f"{len(lost)} of {len(manifest.facts['disks'])} disks"
        error = IncompleteBackup(
            f"The backup is stored, but short of {number}: {'; '.join(told)}",
            manifest.artifact.prefix,
            "What it has can be restored. For the next one, mend what is wrong, or name the disks that are wanted",
        )
        error.result = result
        raise error
    return result


def discard(request: Request, attempt: Attempt) -> None:
    """Remove what failed attempts have left: on the stores, and the job's snapshot where vCenter lets us."""
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact, attempt.confirm)
        if _mode(request, attempt) == INCREMENTAL:  # a full backup writes no packs, and may run without the lock
            sweep_packs(attempt.store(name), request.artifact, attempt)
    if request.snapshot is None:
        _remove_leftover(request, attempt)


def _mode(request: Request, attempt: Attempt) -> str:
    """How the backup is stored: as the request says, else as its first store is set."""
    return request.mode or attempt.backup_modes.get(request.stores[0], FULL)


def _already_there(request: Request, attempt: Attempt, stores: dict[str, Store]) -> dict[str, Any] | None:
    """The result of an earlier attempt or job if it made just this backup; InvalidRequest if it made another one."""
    store = next(iter(stores.values()))
    manifest = find_manifest(store, request.artifact)
    if manifest is None:
        return None
    if manifest.source.get("request") != request.origin:
        raise InvalidRequest(
            "There is another backup under this id",
            f"{store.name}:{request.artifact.prefix}",
            "Delete it first (`ssvm delete`), or use a new id",
        )
    removed: bool | None = None
    if manifest.job_id == attempt.job_id and manifest.source["snapshot"]["ours"]:
        # An earlier attempt may have died between the manifest and the removal.
        removed = _remove_leftover(request, attempt)
    where = placed(attempt, stores, request.artifact)
    return _unless_short(manifest, _result(manifest) | {"reused": True, "snapshot_removed": removed} | where)


def _look_first(request: Request, attempt: Attempt, vm: VM, stores: dict[str, Store]) -> list[dict[str, Any]]:
    """The warnings of what can be known beforehand; its errors are raised, and nothing was touched."""
    attempt.progress.start("looking first")
    disks = vm.hardware().disks
    chosen = select_disks(disks, request.disks) if request.snapshot is None else disks
    findings = preflight(vm, stores, chosen, own_snapshot=request.snapshot is None)
    for each in findings:
        attempt.log.info("%s: %s: %s", each.check, each.state, each.detail)
    return refuse(findings, vm.moref)


def _snapshot(request: Request, attempt: Attempt, vm: VM) -> Snapshot:
    attempt.progress.start("snapshot")
    if request.snapshot is not None:
        return vm.given_snapshot(request.snapshot)
    if snapshot := vm.own_snapshot(attempt.job_id):
        attempt.log.info("going on with the snapshot %s of an earlier attempt", snapshot.moref)
        return snapshot
    snapshot = vm.make_snapshot(attempt.job_id)
    how = "quiesced" if snapshot.quiesced else f"crash-consistent ({snapshot.remark})"
    attempt.log.info("made the snapshot %s, %s", snapshot.moref, how)
    return snapshot


@contextmanager
def _noticing_removal(attempt: Attempt, vm: VM, snapshot: Snapshot) -> Iterator[None]:
    """Somebody who removes the job's snapshot ends the attempt, not the job: another attempt makes another one."""
    try:
        yield
    except SourceNotFound as error:
        if snapshot.ours and vm.own_snapshot(attempt.job_id) is None:
            raise SourceUnavailable(
                "Somebody has removed the snapshot of the job", vm.moref, "The next attempt makes another one"
            ) from error
        raise


def _give_up(request: Request, attempt: Attempt, session: VCenterSession, vm: VM, error: BaseException) -> None:
    """Remove the job's snapshot, unless the next attempt will go on from it, or another worker does already."""
    if request.snapshot is not None or attempt.will_resume(error):
        return
    try:
        attempt.cleaning().confirm()
    except WorkerError as fenced:
        attempt.log.info("the snapshot is left to whoever has the job now: %s", fenced)
        return
    with session.shielded():
        _try_removal(attempt, vm, _CLEAN_UP_S)


def _remove(request: Request, attempt: Attempt, vm: VM, snapshot: Snapshot) -> bool | None:
    """Whether the job's snapshot is gone; None if it made none. A backup that stands does not fail over this."""
    if not snapshot.ours:
        return None
    attempt.progress.start("removing the snapshot")
    # After hours of export the session may have gone, and with it all who know of the snapshot.
    return _try_removal(attempt, vm) or _remove_leftover(request, attempt)


def _try_removal(attempt: Attempt, vm: VM, limit_s: float | None = None) -> bool:
    """Whether no snapshot of the job is left, nor the disks of one."""
    try:
        if snapshot := vm.own_snapshot(attempt.job_id):
            vm.remove_snapshot(snapshot, limit_s)
        vm.consolidate(limit_s)
    except WorkerError as error:
        attempt.log.warning("the snapshot of job %s on %s is not removed: %s", attempt.job_id, vm.moref, error)
        return False
    return True


def _remove_leftover(request: Request, attempt: Attempt) -> bool:
    """``_try_removal`` with a session of its own, which a cancel does not end."""
    try:
        with attempt.doors.vcenter(request.vcenter, check=lambda: None) as session:
            return _try_removal(attempt, session.find_vm(request.vm), _CLEAN_UP_S)
    except SourceNotFound:
        return True  # with the VM its snapshots are gone
    except WorkerError as error:
        attempt.log.warning("it is not known whether job %s has left a snapshot: %s", attempt.job_id, error)
        return False


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
