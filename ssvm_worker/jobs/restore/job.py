"""Restore one disk or all disks of a backup: as a new VM, as a template, or as image files on stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ssvm_worker.artifacts.layout import Artifact, check_name
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import ArtifactRequest, QuotaField
from ssvm_worker.jobs.usage import reserve_quota

from .backup_reader import BackupDisk, listed, read_backup, select_disk
from .to_files import FileTarget, restore_files
from .to_vm import remove_leftover, restore_vm

if TYPE_CHECKING:
    from ssvm_worker.vmware.placement import VmTarget

_TARGETS = ("vcenter", "template", "directory")
#: Fields that are only valid for a new VM.
_OF_A_VM = ("folder", "pool", "datastore", "host", "networks")
#: Fields that are only valid for a template or files.
_OF_FILES = ("stores", "disk")


class Request(ArtifactRequest):
    """A request with a backup and exactly one target: vcenter, template or directory."""

    kind: Literal["backup"] = Field("backup", description="The kind of the artifact")
    volume: str = Field(min_length=1, description="The volume or VM of the backup")
    store: str = Field("primary", description="The store of the backup")
    quota: QuotaField = None
    disk: str | None = Field(None, description="One disk, by number (from 0), label, place or key; all when absent")
    template: str | None = Field(None, description="Target: the id of a new template of the same account")
    directory: str | None = Field(None, description="Target: volumes/ACCOUNT/ID for image files")
    format: Literal["raw", "qcow2", "vmdk"] = Field("qcow2", description="The format of a template or files")
    stores: list[str] | None = Field(
        None,
        min_length=1,
        description="The stores of a template or files; the first must succeed. The backup's when absent",
    )
    vcenter: str | None = Field(None, description="Target: a new VM in the vCenter of that name in the settings")
    name: str = Field("", max_length=80, description="The name of the new VM, or the display name of the template")
    folder: str | None = Field(None, description="VM folder: name, path or id; the datacenter's own when absent")
    pool: str | None = Field(
        None, description="Resource pool, cluster or host: name or id; required if there are several"
    )
    datastore: str | None = Field(
        None, description="Name or id, also of a datastore cluster; required if the pool can access several"
    )
    host: str | None = Field(
        None, description="ESXi host: name or id; when absent, DRS or the worker chooses one that can run the VM"
    )
    networks: dict[str, str] = Field(default_factory=dict, description="Network in the backup = network in the vCenter")

    @field_validator("template")
    @classmethod
    def _safe_id(cls, value: str | None) -> str | None:
        try:
            return value if value is None else check_name(value, "template")
        except WorkerError as error:
            raise ValueError(str(error)) from error

    @field_validator("directory")
    @classmethod
    def _valid_directory(cls, value: str | None) -> str | None:
        try:
            found = Artifact.of_prefix(value) if value is not None else None
            if found is not None and (found.kind == "backup" or found.prefix != value):
                raise ValueError("give volumes/ACCOUNT/ID or template/tmpl/ACCOUNT/ID")
        except WorkerError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _one_target(self) -> Request:
        given = [each for each in _TARGETS if getattr(self, each)]
        if len(given) != 1:
            raise ValueError(f"give exactly one target of {', '.join(_TARGETS)}, not {' and '.join(given) or 'none'}")
        others = _OF_FILES if self.vcenter else _OF_A_VM
        if wrong := [each for each in others if getattr(self, each)]:
            raise ValueError(f"{', '.join(wrong)}: not with {given[0]}")
        if self.vcenter and not self.name:
            raise ValueError("name: missing, the new VM needs one")
        return self

    @property
    def target(self) -> Artifact:
        """Return the artifact of a template or files."""
        if self.template:
            return Artifact("template", self.account, self.template)
        return Artifact.of_prefix(self.directory or "")

    @property
    def vm_target(self) -> VmTarget:
        """Return the target of a new VM."""
        from ssvm_worker.vmware.placement import VmTarget  # imports pyVmomi

        return VmTarget(self.name, self.folder, self.pool, self.datastore, self.networks, self.host)

    @property
    def targets(self) -> list[str]:
        """Return the stores of a template or files."""
        return list(dict.fromkeys(self.stores or [self.store]))


def resource(request: Request) -> str:
    """Return the lock's name. Only one job at a time writes a target."""
    return f"vm:{request.vcenter}/{request.name}" if request.vcenter else request.target.prefix


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Create the complete target, or nothing. The job verifies all data before the commit."""
    attempt.progress.start("reading the backup")
    disks = read_backup(attempt, attempt.store(request.store), request.artifact)
    if request.vcenter:
        return restore_vm(request.vcenter, request.vm_target, attempt, disks)
    target = FileTarget(request.target, request.format, request.name, request.targets)
    with reserve_quota(attempt, target.artifact.account, request.quota, len(target.stores)):
        return restore_files(target, attempt, _chosen(request, disks))


def discard(request: Request, attempt: Attempt) -> None:
    """Remove the data of failed attempts."""
    if request.vcenter:
        remove_leftover(request.vcenter, request.vm_target, attempt)
        return
    for name in request.targets:
        discard_artifact(attempt.store(name), request.target, attempt.confirm)


def _chosen(request: Request, disks: list[BackupDisk]) -> list[BackupDisk]:
    chosen = disks if request.disk is None else [select_disk(disks, request.disk)]
    if request.template and len(chosen) != 1:
        raise InvalidRequest(
            f"A template has one disk, the backup has {len(chosen)}", "disk", f"Give the disk. {listed(disks)}"
        )
    return chosen
