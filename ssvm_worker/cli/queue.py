"""``ssvm jobs | job | retry | cancel``: jobs that workers run."""

from __future__ import annotations

import argparse
import getpass
import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ssvm_worker import config
from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import EXIT_CANCELLED, EXIT_PERMANENT, EXIT_RETRYABLE
from ssvm_worker.units import human_size, printable
from ssvm_worker.wiring import assembly

from .output import Bar, Output, migration_report

if TYPE_CHECKING:
    from ssvm_worker.ledger.ledger import Ledger
    from ssvm_worker.ledger.record import Record

STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm jobs | job | retry | cancel``."""
    jobs = commands.add_parser("jobs", help="list jobs, the newest first", parents=[common])
    jobs.add_argument("--state", choices=STATES, help="list only jobs in this state")
    jobs.add_argument("--zone", help="list only jobs of this zone")
    jobs.add_argument("--lane", choices=LANES, help="list only jobs of this lane")
    jobs.add_argument("--parts", metavar="ID", help="list all jobs that ran as parts of job ID")
    jobs.add_argument("--limit", metavar="N", type=int, default=50, help="print at most N rows (default: 50)")
    jobs.add_argument("--offset", metavar="N", type=int, default=0, help="skip the first N rows")
    jobs.set_defaults(command=_jobs)
    job = commands.add_parser("job", help="show the record of a job", parents=[common])
    job.add_argument("job_id", metavar="ID", help="the id of the job")
    job.add_argument("--follow", action="store_true", help="show a progress bar until the job has ended")
    job.set_defaults(command=_job)
    for name, act, note in (
        ("retry", _retry, "queue a failed or cancelled job again"),
        ("cancel", _cancel, "cancel a queued or running job"),
    ):
        each = commands.add_parser(name, help=note, parents=[common])
        each.add_argument("job_id", metavar="ID", help="the id of the job")
        each.set_defaults(command=act)


def send(settings: Settings, record: Record) -> None:
    """Send the message of a job to the workers."""
    # Celery takes half a second to import. Only the commands that send a message import it.
    from ssvm_worker.wiring.celery_sender import ring

    ring(settings, record)


def _jobs(args: argparse.Namespace, output: Output) -> int:
    with assembly.open_ledger(config.load(args.config)) as ledger:
        if args.parts:
            records = [each for each in ledger.parts(args.parts) if args.state in (None, each.state)]
        else:
            records = ledger.page(
                state=args.state, zone=args.zone, lane=args.lane, limit=args.limit, offset=args.offset
            )
        rows = [assembly.shown(record) for record in records]
    for row in rows:
        row["done"] = "100 %" if row["state"] == "succeeded" else _done(row["progress"])
        row["tries"] = row["attempts"][-1]["number"] if row["attempts"] else 0
    output.table(rows, ("job_id", "job", "zone", "state", "tries", "done", "created"), "no jobs")
    return 0


def _done(progress: Any) -> str:
    if not progress:
        return "-"
    total, moved = progress.get("total"), progress.get("bytes") or 0
    try:
        return f"{100 * moved // total} %" if total else human_size(moved)
    except TypeError:  # one malformed record must not end the list
        return "-"


def _job(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    with assembly.open_ledger(settings) as ledger:
        if args.follow:
            return follow(ledger, args.job_id, output, settings)
        record = assembly.shown(ledger.get(args.job_id))
    output.result(record, json.dumps(record, indent=2, ensure_ascii=False))
    return 0


def _retry(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    with assembly.open_ledger(settings) as ledger:
        record = ledger.retry(args.job_id, _actor())
        send(settings, record)
        output.result(assembly.shown(record), f"queued again: {args.job_id}")
    return 0


def _cancel(args: argparse.Namespace, output: Output) -> int:
    with assembly.open_ledger(config.load(args.config)) as ledger:
        record = ledger.cancel(args.job_id, _actor())
        outcome = "cancelled" if record.state == "cancelled" else "asked to stop"
        output.result(assembly.shown(record), f"{outcome}: {args.job_id}")
    return 0


def _actor() -> str:
    try:
        return f"{getpass.getuser()} (ssvm)"
    except (KeyError, OSError):
        return "ssvm"


def follow(ledger: Ledger, job_id: str, output: Output, settings: Settings) -> int:
    """Show a progress bar until the job has ended, print its record, and return its exit status."""
    bar = Bar(job_id[:16], disable=output.as_json)
    try:
        while not (current := ledger.get(job_id)).ended:
            shown = {"stage": current.state} | (current.progress or {"bytes": 0})
            if current.state == "queued":
                shown["stage"] = _why_queued(settings, current)
            bar.show(shown)
            time.sleep(0.5)
        record = assembly.shown(current)
        bar.show((record["progress"] or {"bytes": 0}) | {"stage": record["state"]})
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

    if record.waits_for:
        return f"queued: {record.waits_for} is in use"
    if record.not_before > time.time():
        return f"queued: next try at {datetime.fromtimestamp(record.not_before, UTC).strftime('%H:%M:%S UTC')}"
    return f"queued: {idle(settings, record.zone, record.lane) or 'workers are busy'}"


def _ending(record: dict[str, Any]) -> str:
    report = migration_report(record["result"])
    if record["state"] == "succeeded":
        return f"succeeded  {record['job_id']}\n{report or json.dumps(record['result'], indent=2, ensure_ascii=False)}"
    error = record.get("error") or {}
    lines = [f"{record['state']}  {record['job_id']}", *([report] if report else [])]
    lines.append(printable(f"{error.get('error', '')}: {error.get('message', '')}"))
    return "\n".join(lines).rstrip(": \n")
