"""``ssvm cleanup``: what cron calls. It says one line when there was something, and nothing when there was not."""

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
    """``ssvm cleanup``."""
    job = JOBS["cleanup"]
    note = "remove what dead jobs have left on the stores, and old records; quiet when there is nothing"
    parser = commands.add_parser("cleanup", help=note, description=job.summary, parents=[common])
    parser.add_argument(
        "--older-than", metavar="TIME", default="24h", help="how long nobody has touched it: 90m, 24h, 7d (24h)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only tell what would go, and why")
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
    lines = [_finding(each) for each in result["found"]] if result["dry_run"] else []
    lines += [f"{name} is not cleaned up: {error['message']}" for name, error in result["failed"].items()]
    if counts:
        what = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())
        lines.append(
            f"cleanup {'would remove' if result['dry_run'] else 'removed'} {what}: {human_size(result['bytes'])}"
        )
    return "\n".join(map(printable, lines))


def _finding(found: dict[str, Any]) -> str:
    return f"{found['what']} {found['store']}:{found['where']} ({human_size(found['bytes'])}): {found['why']}"
