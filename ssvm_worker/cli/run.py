"""``ssvm run JOB``: runs a job in the foreground, without a worker."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ssvm_worker import config
from ssvm_worker.config.credentials import named_credentials
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import NOT_THERE, ResourceBusy, StoreUnavailable, WorkerError
from ssvm_worker.jobs import Job, find_job
from ssvm_worker.jobs.attempt import Attempt, Progress
from ssvm_worker.jobs.request import JobRequest, fingerprint, parse_request
from ssvm_worker.jobs.services import SubJob, UnrecordedJob
from ssvm_worker.operations import logs, traces
from ssvm_worker.runner.periodic import PeriodicThread
from ssvm_worker.units import human_size
from ssvm_worker.wiring import assembly
from ssvm_worker.wiring.connections import find_vcenter

from .job_text import what
from .output import Output, migration_report
from .progress import Bar
from .request_options import add_jobs, read_request

#: Seconds between two pictures of the bar, and for its thread to end.
_SHOW_EVERY_S, _JOIN_S = 0.5, 10.0


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm run``."""
    parser = commands.add_parser(
        "run",
        help="run a job in the foreground, without a worker",
        examples=("run download --url https://example.org/a.qcow2 --account 2 --id 201", "run download --help"),
        parents=[common],
    )
    for each in add_jobs(parser, common):
        add_force(each)
        each.set_defaults(command=_run)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``."""
    note = "run without the broker's lock if the broker is unreachable; unsafe while a worker writes the same data"
    parser.add_argument("--force", action="store_true", help=note)


def _run(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    request = parse_request(args.job.Request, read_request(args, args.job.Request), args.job.name)
    result = run_here(settings, args.job, request, quiet=output.as_json or output.quiet, force=args.force)
    output.result(result, migration_report(result))
    return 0


def run_here(
    settings: Settings, job: Job, request: JobRequest, *, quiet: bool = False, force: bool = False
) -> dict[str, Any]:
    """Run one attempt of a job in this process and return its result. Raise the job's error.

    - If the attempt fails, its incomplete objects are removed from the stores.
    - The attempt holds the same lock as a worker's job. The ledger has a record of it, and `ssvm cancel` stops it.
    - With *force*, the attempt runs without this lock if the broker is unreachable.
    - SIGINT and SIGTERM cancel the attempt.
    """
    _check_names(settings, request)
    stop: list[str] = []
    bar = Bar(what(request.model_dump()) or job.name, disable=quiet)
    jobs = _JobsHere(settings, sorted(each.url for each in settings.stores.values()), force)
    job_id = request.job_id or f"run-{uuid.uuid4().hex[:12]}"
    with (
        logs.working(job_id),
        traces.tracing(job.name, traces.traceparent(os.environ.get("TRACEPARENT")), job_id=job_id) as trace,
        _cancel_on_signal(stop),
        jobs.exclusive(job, request, job_id) as claim,
        contextlib.closing(bar),
    ):
        services = assembly.open_services(settings, shared_slots=False)
        services.jobs = jobs
        attempt = assembly.make_attempt(
            settings,
            claim.job_id,
            services,
            token=claim.token,
            publish=trace.show,
            is_foreground=True,
            stop_reason=lambda: stop[0] if stop else claim.stop_reason(),
            confirm=claim.confirm,
        )
        try:
            attempt.log.info("%s started", job.name)
            with _shown(bar, attempt.progress):
                claim.result = job.run(request, attempt)
            attempt.progress.publish()
            attempt.log.info("%s done, %s moved", job.name, human_size(attempt.progress.moved))
            bar.finish("done")
            return claim.result
        except BaseException as error:
            if isinstance(error, WorkerError):
                trace.fail(error.as_dict())
            stop.clear()
            _discard(job, request, attempt)
            raise


@contextlib.contextmanager
def _shown(bar: Bar, progress: Progress) -> Iterator[None]:
    """Show the progress while the block runs, also while nothing moves."""
    rounds = PeriodicThread("bar", lambda: bar.show(progress.snapshot()), _SHOW_EVERY_S)
    rounds.start()
    try:
        yield
    finally:
        rounds.stop(_JOIN_S)
        bar.show(progress.snapshot())


def _check_names(settings: Settings, request: Any) -> None:
    """Raise InvalidRequest if the request names a store, vCenter or credentials that the settings do not have.

    Raise StoreUnavailable if the file system of a named store does not answer.
    """
    given = {*(getattr(request, "stores", ()) or ()), getattr(request, "store", ""), getattr(request, "source", "")}
    for name in sorted(given - {"", None}, key=lambda name: (name in settings.stores, name)):
        assembly.open_answering_store(settings, name)
    if name := getattr(request, "vcenter", None):
        find_vcenter(settings, name)
    if name := getattr(request, "credentials", None):
        named_credentials(settings, name, request.url)


@dataclass(frozen=True)
class _JobsHere(assembly.RecordedJobs):
    """The jobs of a foreground run. Each holds a lock of this machine, and the ledger's lock if there is a ledger."""

    stores: Sequence[str]
    #: Run without the ledger's lock if the broker is unreachable.
    force: bool

    @contextlib.contextmanager
    def begin(self, parent_job_id: str, job_id: str, job: str, request: dict[str, Any]) -> Iterator[SubJob | None]:
        found = find_job(job)
        parsed = parse_request(found.Request, request, job)
        with contextlib.ExitStack() as stack:
            try:
                claim = stack.enter_context(self.exclusive(found, parsed, job_id, parent_job_id))
            except ResourceBusy:
                yield None
                return
            yield claim

    @contextlib.contextmanager
    def exclusive(self, job: Job, request: JobRequest, job_id: str, parent_job_id: str = "") -> Iterator[SubJob]:
        """Hold the lock of the job's resource while the block runs; raise ResourceBusy if another job holds it.

        Raises StoreUnavailable if the ledger is unreachable and the job may change packs that other backups share.
        Only the ledger's lock keeps workers from these backups.
        """
        resource = job.resource(request)
        with machine_lock(resource, self.stores):
            if not resource or not self._has_ledger(job, request):
                yield UnrecordedJob(job_id)
                return
            fields = request.model_dump(mode="json", exclude_defaults=True)
            with super().begin(parent_job_id, job_id, job.name, fields) as claim:
                if claim is None:
                    remedy = "Wait for its end or cancel it. `ssvm reap` releases the lock of a worker that died"
                    raise ResourceBusy("Another job is writing this resource", resource, remedy)
                yield claim

    def _has_ledger(self, job: Job, request: JobRequest) -> bool:
        """Return whether the ledger answers; raise StoreUnavailable if the job must not run without the ledger."""
        if self._unreachable is None:
            return True
        broker, resource = self.settings.broker, job.resource(request)
        # There is no worker if an embedded broker does not answer, nor if the settings have no [broker] section.
        has_workers = bool(broker.model_fields_set) and not broker.embedded
        if has_workers and not self.force and resource.startswith("snapshots/") and self._shares_packs(job, request):
            raise StoreUnavailable(
                f"Cannot lock the volume: {self._unreachable.what}",
                resource,
                "Check broker.url. If no worker uses this volume, give --force",
            ) from self._unreachable
        return False

    def _shares_packs(self, job: Job, request: JobRequest) -> bool:
        """Return whether the job may write or remove packs. Every job on backups may, except a full backup."""
        modes = {name: each.backup_mode for name, each in self.settings.stores.items()}
        mode = getattr(request, "mode", None) or modes.get(next(iter(getattr(request, "stores", ())), ""))
        return job.name != "backup" or mode == "incremental"

    @cached_property
    def _unreachable(self) -> WorkerError | None:
        """The error of the ledger; None if the ledger answers."""
        try:
            with assembly.open_ledger(self.settings) as ledger:
                ledger.counts()
        except NOT_THERE as error:
            return error
        return None


def _discard(job: Job, request: JobRequest, attempt: Attempt) -> None:
    """Remove the leftovers of the attempt, unless its lock is lost.

    An error is only logged, so that it does not hide the job's error.
    """
    cleaning = attempt.for_cleanup()
    try:
        cleaning.confirm()
        job.discard(request, cleaning)
    except WorkerError as error:
        attempt.log.warning("cannot remove leftovers, the next `ssvm cleanup` will: %s", error)


@contextlib.contextmanager
def _cancel_on_signal(stop: list[str]) -> Iterator[None]:
    """Append a stop reason on SIGINT and SIGTERM, so that the attempt cleans up instead of dying at once."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, lambda *_: stop.append("user"))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def machine_lock(resource: str, stores: Sequence[str]) -> Iterator[None]:
    """Hold this machine's lock of a resource on these stores while the block runs. A job may have no resource.

    The lock is the abstract name of a Unix socket, see unix(7): it is no file, and the kernel frees it when this
    process ends. Raises ResourceBusy if another foreground job holds the lock.
    """
    if not resource:
        yield
        return
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0ssvm-run-{os.getuid()}-{fingerprint(' '.join((resource, *stores)))}")
        except OSError as error:
            what = "Another `ssvm run` is writing this resource"
            raise ResourceBusy(what, resource, "Wait for its end") from error
        yield
