"""The list of all jobs. A new job is one new module and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ssvm_worker.config.findings import suggestion
from ssvm_worker.errors import InvalidRequest, misused

from .attempt import Attempt
from .request import JobRequest


@dataclass(frozen=True)
class Job:
    """One kind of job: the model of its requests, its lane, and the functions that run it.

    The first use imports the job's module. So a command or a pool process imports only the job that it runs.
    """

    name: str
    #: download | upload | backup | maintenance
    lane: str
    summary: str
    #: Returns the module of the job, with the members Request, run, discard and resource.
    load: Callable[[str], Any] = lambda name: importlib.import_module(f".{name}.job", __name__)

    @cached_property
    def module(self) -> Any:
        """Return the module of the job. The first call imports it."""
        return self.load(self.name)

    @property
    def Request(self) -> type[JobRequest]:
        """Return the model of the job's requests."""
        return self.module.Request  # type: ignore[no-any-return]

    def run(self, request: Any, attempt: Attempt) -> dict[str, Any]:
        """Run the job. Return its result as JSON."""
        return self.module.run(request, attempt)  # type: ignore[no-any-return]

    def discard(self, request: Any, attempt: Attempt) -> None:
        """Remove everything that failed attempts left. Called if no further attempt follows."""
        self.module.discard(request, attempt)

    def resource(self, request: Any) -> str:
        """Return the resource that only one job at a time may write.

        The resource is an artifact or a destination. A job that only reads returns "".
        """
        return self.module.resource(request)  # type: ignore[no-any-return]


_DOWNLOAD = "Download a template, ISO or volume from a URL to image stores. One pass verifies and inspects the bytes."
_FETCH = "Download the files of a snapshot as they are. CloudStack copies snapshots between zones in this way."
_UPLOAD = "Upload a stored object to S3 or to an HTTP(S) URL that accepts a PUT. Verify its digest on the way."
_COPY = "Copy an artifact from one image store to others. Verify each object on the way."
_TRANSFER = "Copy or move files as they are, with or without a manifest: between image stores, or to another key."
_SPLIT = "Make a template of one disk of an OVA template, as CloudStack needs it for VMware."
_RESTORE = "Restore a backup, or one disk of it: as a new VM, as a template, or as image files on stores."
_CONSOLIDATE = "Remove the snapshot that an ended backup job has left, and consolidate the disks of its VM."
_VERIFY = "Read artifacts again. Compare them with the manifest, and check the disks, OVF and .mf of backups."
_CLEANUP = "Remove leftovers of ended jobs, backups past retention, unneeded packs, and old records."

JOBS = {
    job.name: job
    for job in (
        Job("download", "download", _DOWNLOAD),
        Job("fetch", "download", _FETCH),
        Job("upload", "upload", _UPLOAD),
        Job("backup", "backup", "Export a VM's snapshot from vCenter to image stores."),
        Job("restore", "backup", _RESTORE),
        Job("consolidate", "maintenance", _CONSOLIDATE),
        Job("copy", "maintenance", _COPY),
        Job("transfer", "maintenance", _TRANSFER),
        Job("split", "maintenance", _SPLIT),
        Job("verify", "maintenance", _VERIFY),
        Job("delete", "maintenance", "Delete an artifact from image stores. A missing artifact is not an error."),
        Job("cleanup", "maintenance", _CLEANUP),
    )
}


def find_job(name: str) -> Job:
    """Return the job of that name. Raise InvalidRequest with a list of all names if there is none."""
    name = name.removeprefix("ssvm.")
    if name not in JOBS:
        what = f"There is no job named {name[:60]!a}{suggestion(name, JOBS).removesuffix('?')}"
        raise misused(InvalidRequest(what, "", f"There are: {', '.join(JOBS)}"))
    return JOBS[name]
