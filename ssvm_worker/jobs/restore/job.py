"""Restore a backup: as a new VM, as a template, or as image files on stores; one disk of it, or all."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ssvm_worker.artifacts.layout import Artifact, check_name
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import ArtifactRequest, QuotaField
from ssvm_worker.jobs.usage import holding
from ssvm_worker.vmware.place import VmTarget

from .backup_reader import BackupDisk, listed, read_backup, select_disk
from .to_files import FileTarget, restore_files
from .to_vm import remove_leftover, restore_vm

_TARGETS = ("vcenter", "template", "directory")
#: Fields that only one of the targets has.
_OF_A_VM = ("folder", "pool", "datastore", "networks")
_OF_FILES = ("stores", "disk")


class Request(ArtifactRequest):
    """A backup, and just one target: vcenter, template or directory."""

    kind: Literal["backup"] = "backup"
    volume: str = Field(min_length=1, description="The volume or VM that the backup is of")
    store: str = Field("primary", description="Where the backup is")
    quota: QuotaField = None
    disk: str | None = Field(None, description="One disk, by number (from 0), label, place or key; all when absent")
    template: str | None = Field(None, description="Target: the id of a new template of the same account")
    directory: str | None = Field(None, description="Target: volumes/ACCOUNT/ID, where image files will lie")
    format: Literal["raw", "qcow2", "vmdk"] = Field("qcow2", description="Of a template or files")
    stores: list[str] | None = Field(
        None, min_length=1, description="Where a template or files go, the first must succeed; the backup's when absent"
    )
    vcenter: str | None = Field(None, description="Target: a new VM in the vCenter of that name in the settings")
    name: str = Field("", max_length=80, description="Of the new VM; or what people call the template")
    folder: str | None = Field(None, description="VM folder: name, path or id; the datacenter's own when absent")
    pool: str | None = Field(
        None, description="Resource pool, cluster or host: name or id; needed if there are several"
    )
    datastore: str | None = Field(None, description="Name or id; needed if the pool reaches several")
    networks: dict[str, str] = Field(default_factory=dict, description="The VM's network in the backup = network there")

    @field_validator("template")
    @classmethod
    def _safe_id(cls, value: str | None) -> str | None:
        try:
            return value if value is None else check_name(value, "template")
        except WorkerError as error:
            raise ValueError(str(error)) from error

    @field_validator("directory")
    @classmethod
    def _place_of_files(cls, value: str | None) -> str | None:
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
            raise ValueError(f"give one target of {', '.join(_TARGETS)}; there is {' and '.join(given) or 'none'}")
        others = _OF_FILES if self.vcenter else _OF_A_VM
        if wrong := [each for each in others if getattr(self, each)]:
            raise ValueError(f"{', '.join(wrong)}: not with {given[0]}")
        if self.vcenter and not self.name:
            raise ValueError("name: missing, the new VM needs one")
        return self

    @property
    def target(self) -> Artifact:
        """The artifact that a template or files will be."""
        if self.template:
            return Artifact("template", self.account, self.template)
        return Artifact.of_prefix(self.directory or "")

    @property
    def place(self) -> VmTarget:
        """Where a new VM goes."""
        return VmTarget(self.name, self.folder, self.pool, self.datastore, self.networks)

    @property
    def targets(self) -> list[str]:
        """The stores that it goes to."""
        return list(dict.fromkeys(self.stores or [self.store]))


def resource(request: Request) -> str:
    """Only one job at a time writes a target."""
    return f"vm:{request.vcenter}/{request.name}" if request.vcenter else request.target.prefix


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Make the target whole, or leave nothing of it: what is read is verified before it is committed."""
    attempt.progress.start("reading the backup")
    disks = read_backup(attempt, attempt.store(request.store), request.artifact)
    if request.vcenter:
        return restore_vm(request.vcenter, request.place, attempt, disks)
    target = FileTarget(request.target, request.format, request.name, request.targets)
    with holding(attempt, target.artifact.account, request.quota, len(target.stores)):
        return restore_files(target, attempt, _chosen(request, disks))


def discard(request: Request, attempt: Attempt) -> None:
    """Remove what failed attempts have left."""
    if request.vcenter:
        remove_leftover(request.vcenter, request.place, attempt)
        return
    for name in request.targets:
        discard_artifact(attempt.store(name), request.target, attempt.confirm)


def _chosen(request: Request, disks: list[BackupDisk]) -> list[BackupDisk]:
    chosen = disks if request.disk is None else [select_disk(disks, request.disk)]
    if request.template and len(chosen) != 1:
        raise InvalidRequest(
            f"A template has one disk, the backup has {len(chosen)}", "disk", f"Say which. {listed(disks)}"
        )
    return chosen
