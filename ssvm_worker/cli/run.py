"""``ssvm run JOB``: the same job in the foreground, without a worker."""

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

from ssvm_worker import config
from ssvm_worker.config.credentials import named_credentials
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import NOT_THERE, ResourceBusy, StoreUnavailable, WorkerError
from ssvm_worker.jobs import Job, find_job
from ssvm_worker.jobs.attempt import Attempt, SubJob, UnrecordedJob
from ssvm_worker.jobs.request import JobRequest, fingerprint, parse_request
from ssvm_worker.operations import logs, traces
from ssvm_worker.wiring import assembly

from .output import Bar, Output
from .request_options import add_jobs, read_request
from .told import told


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm run``."""
    parser = commands.add_parser("run", help="run a job in the foreground, no worker needed", parents=[])
    for each in add_jobs(parser, common):
        add_force(each)
        each.set_defaults(command=_run)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``."""
    note = "go on without the broker's lock if the broker cannot be reached; only if no worker is at work there"
    parser.add_argument("--force", action="store_true", help=note)


def _run(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    request = parse_request(args.job.Request, read_request(args, args.job.Request), args.job.name)
    result = run_here(settings, args.job, request, quiet=output.as_json, force=args.force)
    output.result(result, told(result))
    return 0


def run_here(
    settings: Settings, job: Job, request: JobRequest, *, quiet: bool = False, force: bool = False
) -> dict[str, Any]:
    """Run one attempt in this process; however it ends, no half-done object is left on a store.

    The attempt holds the same lock as a worker's job: the ledger knows it, and `ssvm cancel` stops it. *force*: go on
    without that lock if the broker cannot be reached. SIGINT and SIGTERM cancel the attempt. Raises the job's error.
    """
    _check_names(settings, request)
    stop: list[str] = []
    bar = Bar(job.name, disable=quiet)
    jobs = _JobsHere(settings, sorted(each.url for each in settings.stores.values()), force)
    job_id = request.job_id or f"run-{uuid.uuid4().hex[:12]}"
    with (
        logs.working(job_id),
        traces.tracing(job.name, traces.traceparent(os.environ.get("TRACEPARENT")), job_id=job_id) as trace,
        _stopping(stop),
        jobs.alone(job, request, job_id) as claim,
        contextlib.closing(bar),
    ):
        attempt = assembly.make_attempt(
            settings,
            claim.job_id,
            token=claim.token,
            publish=trace.watch(bar.show),
            stop_reason=lambda: stop[0] if stop else claim.stop_reason(),
            confirm=claim.confirm,
            jobs=jobs,
        )
        try:
            claim.result = job.run(request, attempt)
            return claim.result
        except BaseException as error:
            if isinstance(error, WorkerError):
                trace.fail(error.as_dict())
            stop.clear()
            _discard(job, request, attempt)
            raise


def _check_names(settings: Settings, request: Any) -> None:
    """Raise InvalidRequest for a store or credentials that the settings do not have, before there is a job."""
    given = {*(getattr(request, "stores", ()) or ()), getattr(request, "store", ""), getattr(request, "source", "")}
    for name in sorted(given - {"", None, *settings.stores}):
        assembly.open_store_named(settings, name)
    if name := getattr(request, "credentials", None):
        named_credentials(settings, name, request.url)


@dataclass(frozen=True)
class _JobsHere(assembly.RecordedJobs):
    """The jobs of a foreground run: each holds a lock of this machine, and the ledger's lock if there is a ledger."""

    stores: Sequence[str]
    #: Go on without the ledger's lock if the broker cannot be reached.
    force: bool

    @contextlib.contextmanager
    def begin(self, whole: str, job_id: str, job: str, request: dict[str, Any]) -> Iterator[SubJob | None]:
        it = find_job(job)
        with contextlib.ExitStack() as held:
            try:
                claim = held.enter_context(self.alone(it, parse_request(it.Request, request, job), job_id, whole))
            except ResourceBusy:
                yield None
                return
            yield claim

    @contextlib.contextmanager
    def alone(self, job: Job, request: JobRequest, job_id: str, whole: str = "") -> Iterator[SubJob]:
        """Hold the lock of what the job writes; raise ResourceBusy if another job holds it.

        Raises StoreUnavailable where only the ledger's lock would keep workers from backups that share packs.
        """
        resource = job.resource(request)
        with _alone(resource, self.stores):
            if not resource or not self._has_ledger(job, request):
                yield UnrecordedJob(job_id)
                return
            fields = request.model_dump(mode="json", exclude_defaults=True)
            with super().begin(whole, job_id, job.name, fields) as claim:
                if claim is None:
                    remedy = "Wait for its end, or `ssvm cancel` it; `ssvm reap` frees what a dead worker holds"
                    raise ResourceBusy("Another job is writing this", resource, remedy)
                yield claim

    def _has_ledger(self, job: Job, request: JobRequest) -> bool:
        """Whether the ledger answers; StoreUnavailable if the job must not run without it."""
        if self._unreachable is None:
            return True
        broker, resource = self.settings.broker, job.resource(request)
        # An embedded broker that does not answer has no worker; without [broker] in the settings there are no workers.
        has_workers = bool(broker.model_fields_set) and not broker.embedded
        if has_workers and not self.force and resource.startswith("snapshots/") and self._shares_packs(job, request):
            raise StoreUnavailable(
                f"The lock of the volume cannot be taken. {self._unreachable.what}",
                resource,
                "Check broker.url. If no worker is at work on the volume, use --force",
            ) from self._unreachable
        return False

    def _shares_packs(self, job: Job, request: JobRequest) -> bool:
        """Whether the job may write or remove packs: all that write backups do, but a full backup."""
        modes = {name: each.backup_mode for name, each in self.settings.stores.items()}
        mode = getattr(request, "mode", None) or modes.get(next(iter(getattr(request, "stores", ())), ""))
        return job.name != "backup" or mode == "incremental"

    @cached_property
    def _unreachable(self) -> WorkerError | None:
        """Why the ledger does not answer; None if it does."""
        try:
            with assembly.open_ledger(self.settings) as ledger:
                ledger.counts()
        except NOT_THERE as error:
            return error
        return None


def _discard(job: Job, request: JobRequest, attempt: Attempt) -> None:
    """Remove what is left, unless the lock is lost; an error here must not hide the job's error."""
    cleaning = attempt.cleaning()
    try:
        cleaning.confirm()
        job.discard(request, cleaning)
    except WorkerError as error:
        attempt.log.warning("leftovers stay until the next `ssvm cleanup`: %s", error)


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
        raise ResourceBusy("Another `ssvm run` is writing this", resource, "Wait for its end") from error
    return lock


def _is_at(lock: int, path: Path) -> bool:
    """Whether the file that we have locked is still the one there: whoever had it before us has removed it."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
