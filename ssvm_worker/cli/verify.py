"""``ssvm verify``: one artifact read again, or many of a store; and what that has found so far."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ssvm_worker import config
from ssvm_worker.artifacts.manifest import artifacts_below
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import EXIT_PERMANENT, InvalidRequest, misused
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.ledger.scrub_results import iso
from ssvm_worker.units import printable
from ssvm_worker.wiring import assembly

from .output import Output
from .run import run_here
from .store import add_place, artifact_of, store_names

_EPILOG = """PLACE is one artifact. With --all, --sample or --oldest it is what they choose from, as snapshots/ACCOUNT,
and --store all of the settings when absent. Findings end the command with status 1, and so does --findings."""
#: Artifacts whose times are asked for in one go.
_BATCH = 1000


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm verify``."""
    note = "read artifacts again and compare them with their manifests"
    parser = commands.add_parser("verify", help=note, description=note, epilog=_EPILOG, parents=[common])
    add_place(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every artifact")
    which.add_argument("--sample", metavar="N%|N", default="", help="so many, chosen at random")
    which.add_argument("--oldest", metavar="N", type=int, default=0, help="the N that nobody has verified for longest")
    which.add_argument("--findings", action="store_true", help="only list what is known to be damaged")
    which.add_argument("--times", action="store_true", help="only list when each artifact was last read again")
    boot = (
        "boot a restored copy in QEMU, without network, and keep a screenshot: backups only, see [boot] in the settings"
    )
    parser.add_argument("--boot", action="store_true", help=boot)
    parser.add_argument("--rate", metavar="RATE", default="", help="read no faster than that: 50MiB/s")
    parser.set_defaults(command=_verify)


def _verify(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    if args.findings:
        return _findings(settings, output)
    if args.times:
        return _times(args, settings, output)
    many = args.all or args.sample or args.oldest
    fields = _many(args, settings) if many else _one(args, settings)
    job = JOBS["verify"]
    request = parse_request(job.Request, fields | {"rate": args.rate, "boot": args.boot}, job.name)
    output.result(run_here(settings, job, request, quiet=output.as_json))
    return 0


def _one(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    it = artifact_of(args)
    names = {"kind": it.kind, "account": it.account, "id": it.id, "volume": it.volume}
    return names | {"stores": store_names(args, settings)}


def _many(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    if args.id or args.account:
        what = "One artifact, or many?"
        raise misused(InvalidRequest(what, "verify", "Give PLACE in place of --account and --id"))
    chosen = {"all": args.all, "sample": args.sample, "oldest": args.oldest, "prefix": args.place or ""}
    return chosen | {"stores": store_names(args, settings) if args.store else list(settings.stores)}


def _findings(settings: Settings, output: Output) -> int:
    rows = [each.to_dict() for each in assembly.open_verdicts(settings).findings()]
    lines = [
        printable(f"{row['store']}:{row['artifact']} ({row['verified']}): {each}")
        for row in rows
        for each in row["findings"]
    ]
    output.result(rows, "\n".join(lines) or "no findings")
    return EXIT_PERMANENT if rows else 0


def _times(args: argparse.Namespace, settings: Settings, output: Output) -> int:
    verdicts = assembly.open_verdicts(settings)

    def rows() -> Iterator[dict[str, Any]]:
        for name in store_names(args, settings) if args.store else settings.stores:
            places = (
                each.prefix for each in artifacts_below(assembly.open_store_named(settings, name), args.place or "")
            )
            while batch := list(islice(places, _BATCH)):
                for place, when in zip(batch, verdicts.times(name, batch), strict=True):
                    yield {"store": name, "artifact": place, "verified": iso(when) if when else None}

    output.table(rows(), ("store", "artifact", "verified"), "no artifacts")
    return 0
