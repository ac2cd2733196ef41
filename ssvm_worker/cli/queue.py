"""``ssvm jobs | job | retry | cancel``: jobs that workers run."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from ssvm_worker import config
from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import (
    EXIT_CANCELLED,
    EXIT_PERMANENT,
    EXIT_RETRYABLE,
    LASTING,
    InvalidRequest,
    WorkerError,
    misused,
)
from ssvm_worker.jobs import JOBS
from ssvm_worker.units import parse_duration, printable
from ssvm_worker.wiring import assembly

from . import job_text
from .output import Output, migration_report, named_lines
from .progress import Bar

if TYPE_CHECKING:
    from ssvm_worker.ledger.job_filter import JobFilter
    from ssvm_worker.ledger.ledger import Ledger
    from ssvm_worker.ledger.record import Record

STATES = ("queued", "running", "succeeded", "failed", "cancelled")
_FILTERS = ("state", "zone", "lane", "job", "account", "error", "since", "until")
#: The number of jobs that `ssvm jobs` lists.
_LISTED = 50
_EXAMPLES = {
    "jobs": ("jobs --state failed --since 2h", "jobs --account 2 --error StoreFull"),
    "job": ("job 4f2a9c    # a unique beginning of the id is enough", "job tmpl-201 --follow"),
    "retry": ("retry 4f2a9c tmpl-201", "retry --error StoreFull --since 1d    # all failed jobs with this error"),
    "cancel": ("cancel 4f2a9c tmpl-201", "cancel --account 2 --state queued"),
}


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm jobs | job | retry | cancel``."""

    def add(name: str, note: str) -> Any:
        return commands.add_parser(name, help=note, examples=_EXAMPLES[name], parents=[common])

    jobs = add("jobs", "list jobs, the newest first, with the reason for their state")
    _add_filters(jobs, STATES)
    jobs.add_argument("--parts", metavar="ID", help="list all jobs that ran as parts of job ID")
    jobs.add_argument(
        "--limit", metavar="N", type=_number, default=_LISTED, help=f"print at most N rows (default: {_LISTED})"
    )
    jobs.add_argument("--offset", metavar="N", type=_number, default=0, help="skip the first N rows")
    jobs.set_defaults(command=_jobs)
    job = add("job", "show a job: its state, the reason, and what to do")
    job.add_argument("job_id", metavar="ID", help="the id of the job, or its unique beginning")
    job.add_argument("--follow", action="store_true", help="show a progress bar until the job has ended")
    job.set_defaults(command=_job)
    for name, act, states, note in (
        ("retry", _retry, ("failed", "cancelled"), "queue failed or cancelled jobs again"),
        ("cancel", _cancel, ("queued", "running"), "cancel queued or running jobs"),
    ):
        each = add(name, note)
        each.add_argument("job_ids", metavar="ID", nargs="*", help="the id of a job, or its unique beginning")
        _add_filters(each, states)
        each.set_defaults(command=act, states=states)


def _add_filters(parser: argparse.ArgumentParser, states: Sequence[str]) -> None:
    group = parser.add_argument_group("filters", "A job must meet all of them.")
    group.add_argument("--state", choices=states, help="jobs in this state")
    group.add_argument("--zone", help="jobs of this zone")
    group.add_argument("--lane", choices=LANES, help="jobs of this lane")
    group.add_argument("--job", metavar="JOB", choices=tuple(JOBS), help="jobs of this kind, such as download")
    group.add_argument("--account", help="jobs of this account")
    group.add_argument("--error", metavar="CLASS", help="jobs with this error, such as StoreFull")
    group.add_argument("--since", metavar="TIME", help="jobs that changed after TIME: 2h (ago) or 2026-01-31T18:00Z")
    group.add_argument("--until", metavar="TIME", help="jobs that changed before TIME")


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def _filter(args: argparse.Namespace, states: Sequence[str]) -> JobFilter:
    from ssvm_worker.ledger.job_filter import JobFilter

    return JobFilter(
        states=(args.state,) if args.state else tuple(states),
        **{name: getattr(args, name) for name in ("zone", "lane", "job", "account", "error")},
        since=_moment(args.since, "--since") if args.since else 0.0,
        until=_moment(args.until, "--until") if args.until else float("inf"),
    )


def _moment(text: str, option: str) -> float:
    """Return a time in seconds since the epoch. The text is ISO 8601, or a duration before now."""
    with contextlib.suppress(ValueError):
        return time.time() - parse_duration(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise misused(InvalidRequest("Invalid time", f"{option} {text}", "Give 2h or 2026-01-31T18:00Z")) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def send(settings: Settings, record: Record) -> None:
    """Send the message of a job to the workers."""
    # Celery takes half a second to import. Only the commands that send a message import it.
    from ssvm_worker.wiring.celery_sender import send_wakeup

    send_wakeup(settings, record)


def _jobs(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    wanted = _filter(args, STATES)
    with assembly.open_ledger(settings) as ledger:
        parts = ledger.parts(ledger.find_id(args.parts)) if args.parts else None
        found = ledger.find(wanted) if parts is None else filter(wanted.matches, parts)
        records = list(islice(found, args.offset, args.offset + args.limit + 1))
    has_more = len(records) > args.limit
    pairs = [(record, assembly.shown(record)) for record in records[: args.limit]]
    if output.as_json:
        output.result([shown for _, shown in pairs])
    elif pairs:
        print("\n".join(job_text.table(job_rows(settings, pairs), output.width)))
    else:
        from ssvm_worker.operations.health import similar_zone

        print(f"no jobs{similar_zone(settings, args.zone) if args.zone else ''}")
    if has_more:
        output.note("there are more jobs: give a filter, or a higher --limit")
    return 0


def job_rows(settings: Settings, pairs: Sequence[tuple[Record, dict[str, Any]]]) -> Iterator[dict[str, str]]:
    """Yield the cells of each job. A queued job whose record has no reason gets that of its lane."""
    from ssvm_worker.operations.health import idle

    idle_once = cache(lambda zone, lane: idle(settings, zone, lane))
    for record, shown in pairs:
        row = job_text.row(record, shown, full_ids=not sys.stdout.isatty())
        if record.state == "queued" and not job_text.held(record):
            row["why"] = idle_once(record.zone, record.lane) or row["why"]
        yield row


def _job(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    with assembly.open_ledger(settings) as ledger:
        job_id = ledger.find_id(args.job_id)
        if args.follow:
            return follow(ledger, job_id, output, settings)
        record = ledger.get(job_id)
    shown = assembly.shown(record)
    if output.as_json:
        output.result(shown)
    else:
        hint = _why_queued(settings, record) if record.state == "queued" else ""
        print(job_text.details(record, shown, hint))
    return 0


def _retry(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)

    def retry(ledger: Ledger, job_id: str) -> tuple[Record, str]:
        last = ledger.get(job_id).error or {}
        record = ledger.retry(job_id, _actor())
        send(settings, record)
        if last.get("error") in LASTING:
            output.note(
                f"{job_id} will probably fail again with {last['error']}: {last.get('remedy') or last.get('what')}"
            )
        return record, f"queued again: {job_id}"

    return _change(args, output, settings, retry)


def _cancel(args: argparse.Namespace, output: Output) -> int:
    def cancel(ledger: Ledger, job_id: str) -> tuple[Record, str]:
        record = ledger.cancel(job_id, _actor())
        return record, f"{'cancelled' if record.state == 'cancelled' else 'asked to stop'}: {job_id}"

    return _change(args, output, config.load(args.config), cancel)


def _change(
    args: argparse.Namespace,
    output: Output,
    settings: Settings,
    change: Callable[[Ledger, str], tuple[Record, str]],
) -> int:
    """Change the jobs of the command line: those with the ids, or those that the filters want.

    One id prints its record, or raises its error. With several, the errors of some do not stop the others.
    """
    # With a filter, retry means failed jobs. A cancelled job was cancelled on purpose.
    wanted = _filter(args, [each for each in args.states if each != "cancelled"])
    is_filtered = any(getattr(args, name) for name in _FILTERS)
    if bool(args.job_ids) == is_filtered:
        raise misused(InvalidRequest("Give either ids of jobs or filters", "", "`ssvm jobs` with a filter lists them"))
    with assembly.open_ledger(settings) as ledger:
        if len(args.job_ids) == 1:
            record, done = change(ledger, ledger.find_id(args.job_ids[0]))
            output.result(assembly.shown(record), done)
            return 0
        ids = args.job_ids or [each.job_id for each in ledger.find(wanted)]
        results, status = [], 0
        for given in ids:
            try:
                record, done = change(ledger, ledger.find_id(given))
            except WorkerError as error:
                results.append({"job_id": given, "error": error.as_dict()})
                status = status or error.exit_code
                print(printable(f"ssvm: {type(error).__name__}: {error}"), file=sys.stderr)
                continue
            results.append(assembly.shown(record))
            output.line(done)
    if output.as_json or not ids:
        output.result(results, "no jobs match")
    return status


def _actor() -> str:
    try:
        return f"{getpass.getuser()} (ssvm)"
    except (KeyError, OSError):
        return "ssvm"


def follow(ledger: Ledger, job_id: str, output: Output, settings: Settings) -> int:
    """Show a progress bar until the job has ended, print its record, and return its exit status."""
    bar = Bar(job_text.short_id(job_id), disable=output.as_json or output.quiet)
    try:
        while not (current := ledger.get(job_id)).ended:
            shown = {"stage": current.state} | (current.progress or {"bytes": 0})
            if current.state == "queued":
                shown["stage"] = f"queued: {_why_queued(settings, current)}"
            bar.show(shown)
            time.sleep(0.5)
        record = assembly.shown(current)
        bar.show((record["progress"] or {"bytes": 0}) | {"stage": record["state"]})
    except KeyboardInterrupt:
        bar.close()
        output.note(f"no longer waiting; the job continues. To stop it: ssvm cancel {job_id}")
        return EXIT_CANCELLED
    finally:
        bar.close()
    output.result(record, _ending(record))
    if record["state"] == "succeeded":
        return 0
    if record["state"] == "cancelled":
        return EXIT_CANCELLED
    return EXIT_RETRYABLE if (record.get("error") or {}).get("retryable") else EXIT_PERMANENT


def _why_queued(settings: Settings, record: Record) -> str:
    """Return why a queued job does not run yet."""
    from ssvm_worker.operations.health import idle

    lacks_worker = "" if job_text.held(record) else idle(settings, record.zone, record.lane)
    return lacks_worker or job_text.waiting(record) or "workers are busy"


def _ending(record: dict[str, Any]) -> str:
    report = migration_report(record["result"])
    if record["state"] == "succeeded":
        return f"succeeded  {record['job_id']}\n{report or named_lines(record['result'] or {})}".rstrip()
    error = record.get("error") or {}
    lines = [f"{record['state']}  {record['job_id']}", *([report] if report else [])]
    lines.append(printable(f"{error.get('error', '')}: {error.get('message', '')}"))
    return "\n".join(lines).rstrip(": \n")
