"""The jobs, in one explicit list: a new job is one new module and one line here."""

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
    """One kind of work: how it is asked for, where it queues, and what runs it.

    Its module is imported when it is first wanted: a command, or a worker's child, pays for the job that it runs.
    """

    name: str
    #: download | upload | backup | maintenance
    lane: str
    summary: str
    #: Returns the module with the members of a job: Request, run, discard, resource.
    load: Callable[[str], Any] = lambda name: importlib.import_module(f".{name}.job", __name__)

    @cached_property
    def module(self) -> Any:
        """What does it; imported now, if nobody has wanted it before."""
        return self.load(self.name)

    @property
    def Request(self) -> type[JobRequest]:
        """How it is asked for."""
        return self.module.Request  # type: ignore[no-any-return]

    def run(self, request: Any, attempt: Attempt) -> dict[str, Any]:
        """Do the work; what it returns is the result, JSON-shaped."""
        return self.module.run(request, attempt)  # type: ignore[no-any-return]

    def discard(self, request: Any, attempt: Attempt) -> None:
        """Remove all that failed attempts have left; called when no attempt will follow."""
        self.module.discard(request, attempt)

    def resource(self, request: Any) -> str:
        """What only one job at a time may write: an artifact or a destination; "" for a job that only reads."""
        return self.module.resource(request)  # type: ignore[no-any-return]


_DOWNLOAD = "Download a template, ISO or volume from a URL to image stores, verified and inspected in one pass."
_UPLOAD = "Upload a stored object to S3 or to an HTTP(S) URL that takes a PUT, its digest checked on the way out."
_COPY = "Copy an artifact from one image store to others, each object verified as it passes."
_RESTORE = "Restore a backup: as a new VM, as a template, or as image files on stores; one disk of it, or all."
_VERIFY = "Read an artifact again: all is compared with the manifest, and a backup's disks, OVF and .mf judged."
_CLEANUP = "Remove what dead jobs have left, backups that no retention rule keeps, unneeded packs, and old records."

JOBS = {
    job.name: job
    for job in (
        Job("download", "download", _DOWNLOAD),
        Job("upload", "upload", _UPLOAD),
        Job("backup", "backup", "Export a VM's snapshot from vCenter to image stores."),
        Job("restore", "backup", _RESTORE),
        Job("copy", "maintenance", _COPY),
        Job("verify", "maintenance", _VERIFY),
        Job("delete", "maintenance", "Delete an artifact from image stores; that it is not there is fine."),
        Job("cleanup", "maintenance", _CLEANUP),
    )
}


def find_job(name: str) -> Job:
    """The job of that name; InvalidRequest lists the names there are."""
    name = name.removeprefix("ssvm.")
    if name not in JOBS:
        what = f"There is no job named {name[:60]!a}{suggestion(name, JOBS).removesuffix('?')}"
        raise misused(InvalidRequest(what, "", f"There are: {', '.join(JOBS)}"))
    return JOBS[name]
