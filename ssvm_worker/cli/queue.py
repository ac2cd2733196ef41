"""Jobs through the queue: submit, follow, look, retry, cancel."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ssvm_worker import config
from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import EXIT_CANCELLED, EXIT_PERMANENT, EXIT_RETRYABLE
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.units import human_size, printable
from ssvm_worker.wiring import assembly

from .output import Bar, Output
from .request_options import add_jobs, read_request
from .told import told

if TYPE_CHECKING:  # redis takes a third of the time in which `ssvm run` starts, and it has no use for it
    from ssvm_worker.ledger.ledger import Ledger
    from ssvm_worker.ledger.record import Record

STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm submit | jobs | job | retry | cancel``."""
    _add_submit(commands, common)
    jobs = commands.add_parser("jobs", help="list jobs, the newest first", parents=[common])
    jobs.add_argument("--state", choices=STATES)
    jobs.add_argument("--zone")
    jobs.add_argument("--lane", choices=LANES)
    jobs.add_argument("--parts", metavar="ID", help="only those that were run as parts of this one, all of them")
    jobs.add_argument("--limit", type=int, default=50, help="rows at most (50)")
    jobs.add_argument("--offset", type=int, default=0, help="rows to skip")
    jobs.set_defaults(command=_jobs)
    job = commands.add_parser("job", help="show one job's record", parents=[common])
    job.add_argument("job_id", metavar="ID")
    job.add_argument("--follow", action="store_true", help="show a bar until the job has ended")
    job.set_defaults(command=_job)
    for name, act, note in (
        ("retry", _retry, "queue a failed or cancelled job again"),
        ("cancel", _cancel, "cancel a queued or running job"),
    ):
        each = commands.add_parser(name, help=note, parents=[common])
        each.add_argument("job_id", metavar="ID")
        each.set_defaults(command=act)


def _add_submit(commands: Any, common: argparse.ArgumentParser) -> None:
    submit = commands.add_parser("submit", help="queue a job")
    for each in add_jobs(submit, common):
        each.add_argument("--wait", action="store_true", help="wait for the end; the exit status is the job's")
        each.add_argument("--zone", help="the zone whose workers run it; else the settings' own")
        each.set_defaults(command=_submit)


def _ring(settings: Settings, record: Record) -> None:
    # Celery takes half a second to import; only the commands that send a message wait for it.
    from ssvm_worker.wiring.celery_sender import ring

    ring(settings, record)


def _submit(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations.health import idle  # redis comes with it

    settings = config.load(args.config)
    new = assembly.new_job(settings, args.job, read_request(args, args.job.Request), zone=args.zone or "")
    with assembly.open_ledger(settings) as ledger:
        record, is_new = ledger.submit(replace(new, traceparent=traceparent(os.environ.get("TRACEPARENT"))))
        if is_new:
            _ring(settings, record)
        if record.state == "queued" and (why := idle(settings, record.zone, record.lane)):
            print(f"ssvm: the job waits: {why}. See `ssvm workers` and `ssvm doctor`", file=sys.stderr)
        if args.wait:
            return _follow(ledger, new.job_id, output, settings)
        output.result(
            assembly.shown(record), f"{record.state}  {new.job_id}\nfollow it with: ssvm job {new.job_id} --follow"
        )
    return 0


def _jobs(args: argparse.Namespace, output: Output) -> int:
    with assembly.open_ledger(config.load(args.config)) as ledger:
        if args.parts:
            known = ledger.parts(args.parts)
            records = [each for each in known if args.state in (None, each.state)]
        else:
            limits = {"limit": args.limit, "offset": args.offset}
            records = ledger.page(state=args.state, zone=args.zone, lane=args.lane, **limits)
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
    except TypeError:  # an odd record must not end the list
        return "-"


def _job(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    with assembly.open_ledger(settings) as ledger:
        if args.follow:
            return _follow(ledger, args.job_id, output, settings)
        record = assembly.shown(ledger.get(args.job_id))
    output.result(record, json.dumps(record, indent=2, ensure_ascii=False))
    return 0


def _retry(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    with assembly.open_ledger(settings) as ledger:
        record = ledger.retry(args.job_id, _actor())
        _ring(settings, record)
        output.result(assembly.shown(record), f"queued again: {args.job_id}")
    return 0


def _cancel(args: argparse.Namespace, output: Output) -> int:
    with assembly.open_ledger(config.load(args.config)) as ledger:
        record = ledger.cancel(args.job_id, _actor())
        state = "cancelled" if record.state == "cancelled" else "asked to stop"
        output.result(assembly.shown(record), f"{state}: {args.job_id}")
    return 0


def _actor() -> str:
    try:
        return f"{getpass.getuser()} (ssvm)"
    except (KeyError, OSError):
        return "ssvm"


def _follow(ledger: Ledger, job_id: str, output: Output, settings: Settings) -> int:
    """Show a bar until the job has ended; print its record; the exit status is the job's."""
    bar = Bar(job_id[:16], disable=output.as_json)
    try:
        while not (known := ledger.get(job_id)).ended:
            progress = known.progress or {"bytes": 0}
            is_queued = known.state == "queued"
            bar.show({"stage": known.state} | progress | ({"stage": _waits(settings, known)} if is_queued else {}))
            time.sleep(0.5)
        record = assembly.shown(known)
        bar.show((record["progress"] or {"bytes": 0}) | {"stage": record["state"]})
    finally:
        bar.close()
    output.result(record, _ending(record))
    return _exit_code(record)


def _waits(settings: Settings, record: Record) -> str:
    """Why a queued job does not run."""
    from ssvm_worker.operations.health import idle

    if record.waits_for:
        return f"queued: {record.waits_for} is in use"
    if record.not_before > time.time():
        return f"queued: next try at {datetime.fromtimestamp(record.not_before, UTC).strftime('%H:%M:%S UTC')}"
    return f"queued: {idle(settings, record.zone, record.lane) or 'workers are busy'}"


def _ending(record: dict[str, Any]) -> str:
    many = told(record["result"])
    if record["state"] == "succeeded":
        shown = many or json.dumps(record["result"], indent=2, ensure_ascii=False)
        return f"succeeded  {record['job_id']}\n{shown}"
    error = record.get("error") or {}
    lines = [f"{record['state']}  {record['job_id']}", *([many] if many else [])]
    said = printable(f"{error.get('error', '')}: {error.get('message', '')}")
    return "\n".join([*lines, said]).rstrip(": \n")


def _exit_code(record: dict[str, Any]) -> int:
    if record["state"] == "succeeded":
        return 0
    if record["state"] == "cancelled":
        return EXIT_CANCELLED
    return EXIT_RETRYABLE if (record.get("error") or {}).get("retryable") else EXIT_PERMANENT
