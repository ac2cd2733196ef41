"""``ssvm submit``: queues jobs for workers."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import Any

from ssvm_worker import config
from ssvm_worker.operations.traces import traceparent
from ssvm_worker.wiring import assembly

from .output import Output
from .queue import follow, send
from .request_options import add_jobs, read_request


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm submit``."""
    submit = commands.add_parser(
        "submit",
        help="queue a job for a worker",
        examples=("submit delete --account 2 --id 201 --wait", "submit download --request download.json --zone zone2"),
        parents=[common],
    )
    for each in add_jobs(submit, common):
        each.add_argument("--wait", action="store_true", help="wait for the end and exit with the status of the job")
        each.add_argument("--zone", help="let the workers of this zone run the job (default: the zone of the settings)")
        each.set_defaults(command=_submit)


def _submit(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations.health import idle  # imports redis

    settings = config.load(args.config)
    new = assembly.new_job(settings, args.job, read_request(args, args.job.Request), zone=args.zone or "")
    with assembly.open_ledger(settings) as ledger:
        record, is_new = ledger.submit(replace(new, traceparent=traceparent(os.environ.get("TRACEPARENT"))))
        if is_new:
            send(settings, record)
        if record.state == "queued" and (reason := idle(settings, record.zone, record.lane)):
            output.note(f"the job waits: {reason}{'' if reason.endswith('?') else '.'} See `ssvm doctor`")
        if args.wait:
            return follow(ledger, new.job_id, output, settings)
        output.result(
            assembly.shown(record), f"{record.state}  {new.job_id}\nto follow the job: ssvm job {new.job_id} --follow"
        )
    return 0
