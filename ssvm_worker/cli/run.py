"""``ssvm run JOB``: the very same job in the foreground, without a broker."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ssvm_worker import assembly, config, logs, traces
from ssvm_worker.errors import NOT_THERE, ResourceBusy, WorkerError
from ssvm_worker.jobs import Job, find_job
from ssvm_worker.jobs.attempt import Attempt, SubJob, Unrecorded
from ssvm_worker.jobs.request import JobRequest, fingerprint, parse_request
from ssvm_worker.settings import Settings

from .fields import add_jobs, read_request
from .output import Bar, Output
from .told import told


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm run``."""
    parser = commands.add_parser("run", help="run a job in the foreground, no broker", parents=[])
    for each in add_jobs(parser, common):
        each.set_defaults(command=_run)


def _run(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    request = parse_request(args.job.Request, read_request(args, args.job.Request), args.job.name)
    result = run_here(settings, args.job, request, quiet=output.as_json)
    output.result(result, told(result))
    return 0


def run_here(settings: Settings, job: Job, request: JobRequest, *, quiet: bool = False) -> dict[str, Any]:
    """Run one attempt in this process; whatever it ends with, nothing half-done is left on any store.

    SIGINT and SIGTERM cancel it. Raises the job's error.
    """
    stop: list[str] = []
    bar = Bar(job.name, disable=quiet)
    stores = sorted(each.url for each in settings.stores.values())
    job_id = request.job_id or f"run-{uuid.uuid4().hex[:12]}"
    with (
        logs.working(job_id),
        traces.tracing(job.name, traces.traceparent(os.environ.get("TRACEPARENT")), job_id=job_id) as trace,
        _stopping(stop),
        _alone(job.resource(request), stores),
        contextlib.closing(bar),
    ):
        attempt = assembly.make_attempt(
            settings,
            job_id,
            publish=trace.watch(bar.show),
            stop_reason=lambda: stop[0] if stop else None,
            jobs=_JobsHere(settings, stores),
        )
        try:
            return job.run(request, attempt)
        except BaseException as error:
            if isinstance(error, WorkerError):
                trace.fail(error.as_dict())
            stop.clear()
            _discard(job, request, attempt)
            raise


@dataclass(frozen=True)
class _JobsHere(assembly.RecordedJobs):
    """A job within a foreground run holds this machine's lock, and where there is a ledger that of all workers too."""

    stores: Sequence[str]

    @contextlib.contextmanager
    def begin(self, whole: str, job_id: str, job: str, request: dict[str, Any]) -> Iterator[SubJob | None]:
        it = find_job(job)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(_alone(it.resource(parse_request(it.Request, request, job)), self.stores))
            except ResourceBusy:
                yield None
                return
            yield (
                held.enter_context(super().begin(whole, job_id, job, request)) if self._recorded else Unrecorded(job_id)
            )

    @cached_property
    def _recorded(self) -> bool:
        try:
            with assembly.open_ledger(self.settings) as ledger:
                ledger.counts()
        except NOT_THERE:
            return False
        return True


def _discard(job: Job, request: JobRequest, attempt: Attempt) -> None:
    """Remove what is left; that this fails too must not hide why the job did."""
    try:
        job.discard(request, attempt.cleaning())
    except WorkerError as error:
        attempt.log.warning("leftovers remain until `ssvm cleanup`: %s", error)


@contextlib.contextmanager
def _stopping(stop: list[str]) -> Iterator[None]:
    """SIGINT and SIGTERM ask the attempt to stop, which cleans up, in place of killing it on the spot."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stop.append("user"))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _alone(resource: str, stores: Sequence[str]) -> Iterator[None]:
    """Hold this machine's lock of what the job writes on these stores; ResourceBusy if another foreground job does."""
    if not resource:
        yield
        return
    path = Path(tempfile.gettempdir()) / f"ssvm-run-{os.getuid()}-{fingerprint(' '.join((resource, *stores)))}.lock"
    while not _is_at(lock := _open_locked(path, resource), path):
        os.close(lock)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _open_locked(path: Path, resource: str) -> int:
    # Others may write into the temporary directory too: no link of theirs is followed, nothing of theirs cut short.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(path, flags, 0o600)
    except OSError as error:
        what = f"The lock file {path.name} cannot be opened: {error.strerror}"
        raise ResourceBusy(what, resource, "Remove it") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ResourceBusy("Another `ssvm run` is writing this", resource, "Wait until it has ended") from error
    return lock


def _is_at(lock: int, path: Path) -> bool:
    """Whether the file that we have locked is still the one there: whoever had it before us has removed it."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
