"""``ssvm verify``: reads one or many artifacts again, or lists the results of earlier runs."""

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
from ssvm_worker.units import human_size, printable
from ssvm_worker.wiring import assembly

from .output import Output
from .run import run_here
from .store import add_place, artifact_of, store_names

_ABOUT = (
    "Read artifacts again and compare them with their manifests. PLACE names one artifact. With --all, --sample or "
    "--oldest, PLACE limits the choice, for example to snapshots/ACCOUNT, and --store defaults to all stores. "
    "The exit status is 1 if the command reports findings."
)
_EXAMPLES = ("verify template/tmpl/2/201", "verify --sample 5% --rate 50MiB/s", "verify snapshots/2 --oldest 10")
#: Artifacts whose times are read from the ledger in one request.
_BATCH = 1000


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm verify``."""
    parser = commands.add_parser(
        "verify",
        help="read artifacts again and compare them with their manifests",
        description=_ABOUT,
        examples=_EXAMPLES,
        parents=[common],
    )
    add_place(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="verify every artifact")
    which.add_argument("--sample", metavar="N%|N", default="", help="verify N artifacts, or N %%, chosen at random")
    which.add_argument("--oldest", metavar="N", type=int, default=0, help="verify the N that were checked longest ago")
    which.add_argument("--findings", action="store_true", help="only list the damage that earlier runs found")
    which.add_argument("--times", action="store_true", help="only list when each artifact was last verified")
    boot = "boot a restored copy of a backup in QEMU without network, and keep a screenshot (see [boot])"
    parser.add_argument("--boot", action="store_true", help=boot)
    parser.add_argument("--rate", metavar="RATE", default="", help="limit the speed of reading, for example 50MiB/s")
    parser.set_defaults(command=_verify)


def _verify(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    if args.findings:
        return _findings(settings, output)
    if args.times:
        return _times(args, settings, output)
    if args.all or args.sample or args.oldest:
        if args.id or args.account:
            remedy = "Give PLACE instead of --account and --id"
            raise misused(InvalidRequest("--all, --sample and --oldest choose from many artifacts", "verify", remedy))
        stores = store_names(args, settings) if args.store else list(settings.stores)
        fields = {"all": args.all, "sample": args.sample, "oldest": args.oldest, "prefix": args.place or ""}
    else:
        artifact = artifact_of(args)
        fields = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
        stores = store_names(args, settings)
    job = JOBS["verify"]
    request = parse_request(job.Request, fields | {"stores": stores, "rate": args.rate, "boot": args.boot}, job.name)
    result = run_here(settings, job, request, quiet=output.as_json or output.quiet)
    output.result(result, _sound(result))
    return 0


def _sound(result: dict[str, Any]) -> str:
    """Return the result of a verification without findings as text. A job with findings fails."""
    read = f"{result['objects']} objects" if "objects" in result else f"{result['artifacts']} artifacts"
    lines = [f"ok: {read}, {human_size(result['bytes'])}, from {', '.join(result['stores'])}"]
    if screenshot := (result.get("boot") or {}).get("screenshot"):
        lines.append(f"booted: see {screenshot}")
    if not result["recorded"]:
        lines.append("the ledger has not stored this result, because the broker is unreachable")
    return "\n".join(lines)


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
    results = assembly.open_verdicts(settings)

    def rows() -> Iterator[dict[str, Any]]:
        for name in store_names(args, settings) if args.store else settings.stores:
            artifacts = artifacts_below(assembly.open_answering_store(settings, name), args.place or "")
            prefixes = (each.prefix for each in artifacts)
            while batch := list(islice(prefixes, _BATCH)):
                for prefix, verified in zip(batch, results.times(name, batch), strict=True):
                    yield {"store": name, "artifact": prefix, "verified": iso(verified) if verified else None}

    output.table(rows(), ("store", "artifact", "verified"), "no artifacts")
    return 0
