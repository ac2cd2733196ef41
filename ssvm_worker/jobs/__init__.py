"""The jobs, in one explicit list: a new job is one new module and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssvm_worker.errors import InvalidRequest

from . import backup, cleanup, copy, delete, download, restore, upload, verify
from .attempt import Attempt
from .request import JobRequest


@dataclass(frozen=True)
class Job:
    """One kind of work: how it is asked for, where it queues, and what runs it."""

    name: str
    #: download | upload | backup | maintenance
    lane: str
    Request: type[JobRequest]
    #: Does the work; its return value is the result, JSON-shaped.
    run: Callable[[Any, Attempt], dict[str, Any]]
    #: Removes all that failed attempts have left; called when no attempt will follow.
    discard: Callable[[Any, Attempt], None]
    #: What only one job at a time may write: an artifact or a destination; "" for a job that only reads.
    resource: Callable[[Any], str]
    summary: str


def _job(module: Any, lane: str) -> Job:
    name = module.__name__.rpartition(".")[2]
    summary = module.__doc__.partition("\n")[0]
    return Job(name, lane, module.Request, module.run, module.discard, module.resource, summary)


JOBS = {
    job.name: job
    for job in (
        _job(download, "download"),
        _job(upload, "upload"),
        _job(backup, "backup"),
        _job(restore, "backup"),
        _job(copy, "maintenance"),
        _job(verify, "maintenance"),
        _job(delete, "maintenance"),
        _job(cleanup, "maintenance"),
    )
}


def find_job(name: str) -> Job:
    """The job of that name; InvalidRequest lists the names there are."""
    name = name.removeprefix("ssvm.")
    if name not in JOBS:
        raise InvalidRequest(f"There is no job named {name!r}", "", f"There are: {', '.join(JOBS)}")
    return JOBS[name]
