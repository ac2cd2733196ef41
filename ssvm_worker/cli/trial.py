"""``ssvm doctor --trial``: ask the operator, then try a vCenter on a scratch VM."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ConfigError, InvalidRequest, misused
from ssvm_worker.operations import trial
from ssvm_worker.operations.finding import Finding

from .output import Output


def add_trial_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a trial to ``ssvm doctor``."""
    parser.add_argument(
        "--trial",
        metavar="REPORT.json",
        type=Path,
        help="try the vCenter on the scratch VM --vm, whose name begins with ssvm-trial, and write an anonymous report",
    )
    parser.add_argument("--dry-run", action="store_true", help="with --trial: only list what it would do")
    parser.add_argument("--yes", action="store_true", help="with --trial: do not ask before it starts")
    parser.add_argument(
        "--with-import",
        action="store_true",
        help="with --trial: also create and remove a VM with the name of --vm and -import",
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="N", help="with --trial: stop after N minutes (default: 60)"
    )


def run_trial(args: argparse.Namespace, settings: Settings, output: Output) -> list[Finding]:
    """List what the trial does, ask the operator, and return the answers."""
    if not args.vcenter or not args.vm:
        missing = "--vm" if args.vcenter else "--vcenter"
        raise misused(InvalidRequest(f"Missing argument: {missing}", "--trial", "Give a vCenter and a scratch VM"))
    steps = trial.describe_trial()
    if args.dry_run:
        return steps
    for each in steps:
        output.note(f"{each.check}: {each.detail}")
    if not args.yes:
        if not sys.stdin.isatty():
            raise misused(InvalidRequest("The trial asks before it starts", "--trial", "Give --yes, or a terminal"))
        also = ", and creates and removes a VM" if args.with_import else ""
        print(f"This changes only the VM {args.vm}{also}. Type yes to start: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip() != "yes":
            raise misused(InvalidRequest("The trial was not started", "--trial"))
    try:
        with args.trial.open("w") as opened:
            options = trial.TrialOptions(60 * args.minutes, args.with_import)
            report, findings = trial.try_vcenter(settings, args.vcenter, args.vm, options, output.note)
            json.dump(report, opened, indent=1)
    except OSError as error:
        what = f"The report cannot be written: {error.strerror}"
        raise ConfigError(what, str(args.trial), "Name another file") from error
    output.note(f"The report is in {args.trial}")
    return findings
