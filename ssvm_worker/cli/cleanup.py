"""``ssvm cleanup``, for cron: prints one line if there was something to remove, else nothing.

With ``--dry-run`` a person reads it, so it also says that there is nothing. The log on standard error has the problems.
"""

from __future__ import annotations

import argparse
from typing import Any

from ssvm_worker import config
from ssvm_worker.errors import EXIT_RETRYABLE
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.units import human_size, printable

from .output import Output
from .run import run_here


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm cleanup``."""
    note = "remove leftovers of ended jobs and expired backups from the stores, and old job records"
    parser = commands.add_parser(
        "cleanup",
        help=note,
        description=JOBS["cleanup"].summary,
        examples=("cleanup --dry-run", "cleanup --older-than 7d"),
        parents=[common],
    )
    parser.add_argument(
        "--older-than",
        metavar="TIME",
        default="24h",
        help="remove only leftovers that did not change for TIME, for example 90m, 24h or 7d (default: 24h)",
    )
    parser.add_argument("--dry-run", action="store_true", help="remove nothing; list what would be removed, and why")
    parser.set_defaults(command=_cleanup)


def _cleanup(args: argparse.Namespace, output: Output) -> int:
    job = JOBS["cleanup"]
    request = parse_request(job.Request, {"older_than": args.older_than, "dry_run": args.dry_run}, job.name)
    result = run_here(config.load(args.config), job, request, quiet=True)
    text = _text(result)
    if output.as_json or text:
        output.result(result, text)
    return EXIT_RETRYABLE if result["failed"] else 0


def _text(result: dict[str, Any]) -> str:
    counts = result["counts"] | ({"old record": result["records"]} if result["records"] else {})
    counts |= {"ended link": result["links"]} if result["links"] else {}
    lines = []
    if result["dry_run"]:
        for each in result["found"]:
            lines.append(f"{each['what']} {each['store']}:{each['where']} ({human_size(each['bytes'])}): {each['why']}")
    if counts:
        removed = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())
        verb = "would remove" if result["dry_run"] else "removed"
        lines.append(f"cleanup {verb} {removed}: {human_size(result['bytes'])}")
    if result["dry_run"] and not lines:
        unseen = f". Not examined: {', '.join(result['failed'])}" if result["failed"] else ""
        lines = [f"cleanup would remove nothing{unseen}"]
    return "\n".join(map(printable, lines))
