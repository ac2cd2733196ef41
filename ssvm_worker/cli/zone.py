"""``ssvm quota | workers | scale``: the usage of accounts, the state of workers, and the number of workers needed."""

from __future__ import annotations

import argparse
from typing import Any

from ssvm_worker import config
from ssvm_worker.config.schema import LANES
from ssvm_worker.ledger.quota import AccountUsage
from ssvm_worker.wiring import assembly

from .output import Output


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm quota | workers | scale``."""
    note = "list the bytes that accounts store and may store"
    about = f"{note.capitalize()}. `ssvm verify --all` counts the stored bytes again."
    quota = commands.add_parser("quota", help=note, description=about, examples=("quota", "quota 2"), parents=[common])
    quota.add_argument("account", nargs="?", metavar="ACCOUNT", help="list only this account")
    quota.set_defaults(command=_quota)
    workers = commands.add_parser(
        "workers",
        help="list the workers with their state (Up, Draining or Down) and running jobs",
        examples=("workers", "workers --zone zone2"),
        parents=[common],
    )
    workers.add_argument("--zone", help="list only the workers of this zone")
    workers.set_defaults(command=_workers)
    scale = commands.add_parser(
        "scale",
        help="show how many workers each zone needs and which idle workers can be stopped",
        examples=("scale", "scale --zone zone2 --json"),
        parents=[common],
    )
    scale.add_argument("--zone", help="show only this zone; without it, show all zones that have workers or jobs")
    scale.set_defaults(command=_scale)


def _quota(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    limits = settings.quota
    known = {each.account: each for each in assembly.open_quota(settings).usage()}
    listed = [args.account] if args.account else sorted({*known, *limits.accounts})
    rows = [known.get(each, AccountUsage(each)).to_dict(limits.of(each)) for each in listed]
    output.table(rows, ("account", "used", "reserved", "limit", "free"), "no account stores anything")
    return 0


def _workers(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations.health import similar_zone  # imports redis

    settings = config.load(args.config)
    registry = assembly.open_registry(settings)
    rows = [each.to_dict() for each in registry.workers(args.zone)]
    if not output.as_json:
        for row in rows:
            row["busy"] = f"{row['active']}/{row['capacity']}"
            row |= {"seen": f"{row['seen'][:19]}Z", "lanes": "all" if set(row["lanes"]) >= {*LANES} else row["lanes"]}
    columns = ("worker", "state", "zone", "busy", "version", "seen", "lanes", "away")
    output.table(rows, columns, f"no workers{similar_zone(settings, args.zone) if args.zone else ''}")
    return 0


def _scale(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.operations.scaling import decisions  # imports redis

    rows = [each.to_dict() for each in decisions(config.load(args.config), args.zone)]
    output.table(rows, ("zone", "workers", "desired", "active", "queued", "removable", "why"), "no zone has workers")
    return 0
