"""The results of jobs, as the record shows them. The pages of docs/reference/ and the tests use these types."""

# No `from __future__ import annotations`: `NotRequired` in a quoted annotation would not count.

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic needs it below Python 3.12


class DownloadResult(TypedDict):
    """The result of `download`."""

    #: The key of the image. For an OVA, the key of its descriptor.
    key: str
    #: The size in bytes of all images as stored.
    size: int
    #: The size in bytes that a guest sees.
    virtual_size: int
    #: The format of the stored image.
    format: str
    #: The digest of the stored image.
    digest: str
    #: The names of all objects of the artifact.
    objects: list[str]
    #: The stores that have the artifact.
    stores: list[str]
    #: The stores that lack the artifact, each with an error and the `copy_job` that copies it.
    owed: dict[str, Any]
    #: How often the stream was resumed.
    resumptions: int
    #: Whether an earlier job had made the artifact.
    reused: bool


class FetchResult(TypedDict):
    """The result of `fetch`."""

    #: The store that has the files.
    store: str
    #: The keys of all files.
    objects: list[str]
    #: The number of bytes of all files.
    bytes: int


class UploadResult(TypedDict):
    """The result of `upload`."""

    #: The key of the object, or of the first object of an OVA.
    key: str
    #: The destination, without password and query.
    url: str
    #: The number of bytes sent.
    size: int
    #: The digest of the bytes sent.
    digest: str


class BackupResult(TypedDict):
    """The result of `backup`. The error IncompleteBackup has it too."""

    #: The place of the backup on its stores.
    key: str
    #: The size in bytes of all objects.
    size: int
    #: The size in bytes of all disks as the guest sees them.
    virtual_size: int
    #: `full` or `incremental`.
    mode: str
    #: Incremental: bytes that this backup added to the volume's packs.
    new_bytes: NotRequired[int]
    #: Incremental: bytes that it shares with other backups.
    reused_bytes: NotRequired[int]
    #: Whether all disks are exported.
    complete: bool
    #: Whether the file systems of the guest were quiesced.
    quiesced: bool | None
    #: The managed object id of the snapshot.
    snapshot: str
    #: Whether the job removed its snapshot. Null: the snapshot was given by the request.
    snapshot_removed: bool | None
    #: The job that removes the snapshot, if this job could not.
    removal_job: NotRequired[str]
    #: All disks of the VM: label, place, capacity, `status`, and the reason `why` one is not exported.
    disks: list[dict[str, Any]]
    #: Findings of the checks before the export: `check`, `state`, `detail` and `remedy`.
    warnings: list[dict[str, Any]]
    #: What is missing besides disks.
    remarks: list[str]
    #: The names of all objects of the backup.
    objects: list[str]
    #: The stores that have the backup.
    stores: list[str]
    #: The stores that lack the backup, each with an error and the `copy_job` that copies it.
    owed: dict[str, Any]
    #: Whether an earlier job had made the backup.
    reused: bool


class ConsolidateResult(TypedDict):
    """The result of `consolidate`."""

    #: The VM, as the request names it.
    vm: str
    #: Whether there was a snapshot to remove.
    removed: bool


class RestoredVm(TypedDict):
    """The result of `restore` as a new VM."""

    #: The managed object id of the new VM.
    vm: str
    #: The name of the new VM.
    name: str
    #: Each sent disk: `file`, `size`, `digest`, and whether the host `confirmed` the digest.
    files: list[dict[str, Any]]
    #: Warnings of vCenter about the new VM.
    warnings: list[str]


class RestoredFiles(TypedDict):
    """The result of `restore` as a template or as image files."""

    #: The place of the new artifact.
    key: str
    #: The size in bytes of all objects.
    size: int
    #: The size in bytes that a guest sees.
    virtual_size: int
    #: The format of the images.
    format: str
    #: Each image: `key`, `size` and `digest`.
    disks: list[dict[str, Any]]
    #: The names of all objects of the artifact.
    objects: list[str]
    #: The stores that have the artifact.
    stores: list[str]
    #: The stores that lack the artifact, each with an error and the `copy_job` that copies it.
    owed: dict[str, Any]
    #: Whether an earlier job had made the artifact.
    reused: bool


class CopyResult(TypedDict):
    """The result of `copy` of one artifact."""

    #: The place of the artifact.
    prefix: str
    #: The store that the artifact was copied from.
    source: str
    #: The target stores.
    stores: list[str]
    #: For each target: the copied `objects`, `packs` and `bytes`, and whether it had the artifact (`reused`).
    copied: dict[str, dict[str, Any]]
    #: Whether the artifact was deleted at the source.
    moved: bool


class StoreCopyResult(TypedDict):
    """The result of `copy` with `all`. If a copy fails, the record has this result and the error."""

    #: The store that the artifacts were copied from.
    source: str
    #: The target stores.
    stores: list[str]
    #: The number of artifacts at the source.
    found: int
    #: The number of artifacts per outcome: copied, moved, there, gone, failed, cancelled.
    counts: dict[str, int]
    #: The number of bytes copied.
    bytes: int
    #: The number of artifacts that were not started because a store failed.
    not_begun: int
    #: The number of objects that belong to no complete artifact.
    others: int
    #: At most 1000 artifacts, failed ones first: `outcome`, `bytes`, and `job_id` or error.
    artifacts: list[dict[str, Any]]


class TransferResult(TypedDict):
    """The result of `transfer`."""

    #: The store that has or had the files.
    source: str
    #: The target store.
    store: str
    #: The new place of the object or directory.
    key: str
    #: The new keys of all objects.
    objects: list[str]
    #: The number of bytes copied or moved.
    bytes: int
    #: Whether the files were moved.
    moved: bool


class SplitResult(TypedDict):
    """The result of `split`."""

    #: The place of the template of the disk.
    prefix: str
    #: The key that a package of this template has, or would have.
    package: str
    #: The key of the disk.
    key: str
    #: The size in bytes of the disk as stored.
    size: int
    #: The size in bytes that a guest sees.
    virtual_size: int
    #: The store of the template.
    store: str


class VerifyResult(TypedDict):
    """The result of `verify` of one artifact."""

    #: The number of objects read.
    objects: int
    #: The number of bytes read.
    bytes: int
    #: The stores of the artifact.
    stores: list[str]
    #: Whether the ledger has stored the time and the findings.
    recorded: bool
    #: With `boot`: `screenshot`, `screen`, `accelerator` and more: [boot](../how-to/restore.md#does-it-boot).
    boot: NotRequired[dict[str, Any]]


class VerifyAllResult(TypedDict):
    """The result of `verify` of several artifacts."""

    #: The number of artifacts read.
    artifacts: int
    #: The number of bytes read.
    bytes: int
    #: The number of findings: 0, because a job with findings fails.
    findings: int
    #: The stores of the artifacts.
    stores: list[str]
    #: Whether the ledger has stored the times and the findings.
    recorded: bool


class DeleteResult(TypedDict):
    """The result of `delete`."""

    #: The place of the artifact.
    prefix: str
    #: The number of deleted objects for each store.
    deleted: dict[str, int]
    #: Backups: for each store the number of `deleted` packs and their `bytes`, or why they are `kept`.
    packs: NotRequired[dict[str, dict[str, Any]]]


class CleanupResult(TypedDict):
    """The result of `cleanup`."""

    #: Whether the job only reported what it would remove.
    dry_run: bool
    #: The number of removed objects for each kind of leftover.
    counts: dict[str, int]
    #: The number of removed bytes.
    bytes: int
    #: Each candidate: `store`, `what`, `where`, `objects`, `bytes` and the reason `why`.
    found: list[dict[str, Any]]
    #: The number of expired job records.
    records: int
    #: The number of expired links.
    links: int
    #: Stores and vCenters that were not cleaned up, each with its error.
    failed: dict[str, Any]


#: The results of each job.
RESULTS: dict[str, tuple[Any, ...]] = {
    "download": (DownloadResult,),
    "fetch": (FetchResult,),
    "upload": (UploadResult,),
    "backup": (BackupResult,),
    "consolidate": (ConsolidateResult,),
    "restore": (RestoredVm, RestoredFiles),
    "copy": (CopyResult, StoreCopyResult),
    "transfer": (TransferResult,),
    "split": (SplitResult,),
    "verify": (VerifyResult, VerifyAllResult),
    "delete": (DeleteResult,),
    "cleanup": (CleanupResult,),
}
