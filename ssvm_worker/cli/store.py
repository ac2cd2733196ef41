"""What lies on the image stores: list, stat, delete, stores."""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ssvm_worker import config
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import artifacts_below, read_manifest
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import (
    EXIT_PERMANENT,
    EXIT_RETRYABLE,
    InvalidRequest,
    ObjectNotFound,
    Permanent,
    WorkerError,
    misused,
)
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.operations.mounts import breaker_of, sudoers
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.wiring import assembly

from .output import Output
from .run import add_force, run_here

#: Manifests that are read at once; one after the other, a store across a network would be waited for most of the time.
_READERS = 8
_Row = dict[str, Any] | None


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm list | stat | delete | stores``."""
    listing = commands.add_parser("list", help="list the artifacts of a store", parents=[common])
    listing.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="for example template/tmpl/2")
    listing.add_argument("--store", metavar="NAME", help="the first of the settings when absent")
    listing.set_defaults(command=_list)
    for name, act, note in (
        ("stat", _stat, "show an artifact's manifest"),
        ("delete", _by_job, "delete an artifact; missing is fine"),
    ):
        each = commands.add_parser(name, help=note, description=note, parents=[common])
        add_place(each)
        if act is _by_job:
            add_force(each)
        each.set_defaults(command=act, job_name=name)
    stores = commands.add_parser("stores", help="usage and health of every store", parents=[common])
    stores.add_argument("--sudoers", metavar="USER", help="print the sudo rule that lets a worker of USER mount them")
    stores.set_defaults(command=_stores)


def add_place(parser: argparse.ArgumentParser) -> None:
    """The options that name an artifact and stores."""
    parser.add_argument(
        "place", nargs="?", metavar="PLACE", help="template/tmpl/ACCOUNT/ID, volumes/…, snapshots/…, or a key"
    )
    for name in ("kind", "account", "id", "volume"):
        parser.add_argument(f"--{name}", help="in place of PLACE")
    parser.add_argument("--store", "--stores", metavar="A,B", help="the first of the settings when absent")


def store_names(args: argparse.Namespace, settings: Settings) -> list[str]:
    """The stores that were asked for; the first of the settings where none was."""
    names = [each for each in (args.store or next(iter(settings.stores), "")).split(",") if each]
    if not names:
        raise misused(InvalidRequest("The settings name no image store", "stores", "Add [stores.primary] with a url"))
    return names


def artifact_of(args: argparse.Namespace) -> Artifact:
    """The artifact that was asked for; InvalidRequest."""
    if args.place:
        return _artifact_at(args.place.strip("/"))
    if not (args.account and args.id):
        raise misused(InvalidRequest("Which artifact?", "", "Give PLACE, or --kind, --account and --id (and --volume)"))
    return Artifact(args.kind or "template", args.account, args.id, args.volume or "")


def _artifact_at(place: str) -> Artifact:
    """The artifact at a place, or the one that the object at that key belongs to."""
    try:
        return Artifact.of_prefix(place)
    except InvalidRequest:
        above = place.rpartition("/")[0]
        if not above:
            raise
        return Artifact.of_prefix(above)


def _list(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    store = assembly.open_store_named(settings, store_names(args, settings)[0])
    unreadable: list[str] = []

    def noted() -> Iterator[dict[str, Any]]:
        for row in listed(store, args.prefix.strip("/")):
            if "error" in row:
                unreadable.append(row["artifact"])
            yield row

    output.table(noted(), ("artifact", "kind", "size", "objects", "created"), "no artifacts")
    return EXIT_PERMANENT if unreadable else 0


def listed(store: Store, prefix: str) -> Iterator[dict[str, Any]]:
    """A row for each artifact below a prefix, in their order; one whose manifest cannot be read has the error in it.

    Raises what the store raises: one that does not answer is an error, not rows.
    """
    for row in _ahead(lambda each: _row(store, each), artifacts_below(store, prefix)):
        if row:
            yield row


def _ahead(look: Callable[[Artifact], _Row], artifacts: Iterator[Artifact]) -> Iterator[_Row]:
    """Look at all of them, some at once, in their order."""
    waiting: deque[Future[_Row]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        for each in artifacts:
            waiting.append(pool.submit(look, each))
            if len(waiting) > 4 * _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _row(store: Store, artifact: Artifact) -> _Row:
    """None of one that was deleted meanwhile."""
    try:
        manifest = read_manifest(store, artifact)
    except ObjectNotFound:
        return None
    except Permanent as error:
        return {"artifact": artifact.prefix, "kind": "unreadable", "error": error.as_dict()}
    return {
        "artifact": artifact.prefix,
        "kind": manifest.artifact.kind,
        "size": manifest.size,
        "objects": len(manifest.entries),
        "created": manifest.created,
        "job_id": manifest.job_id,
    }


def _stat(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    store = assembly.open_store_named(settings, store_names(args, settings)[0])
    manifest = read_manifest(store, artifact_of(args))
    text = manifest.to_json().decode()
    output.result(json.loads(text), text.rstrip())
    return 0


def _by_job(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    artifact = artifact_of(args)
    fields = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
    job = JOBS[args.job_name]
    request = parse_request(job.Request, fields | {"stores": store_names(args, settings)}, job.name)
    output.result(run_here(settings, job, request, quiet=output.as_json, force=args.force))
    return 0


def _stores(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    if args.sudoers:
        rule = sudoers(settings, args.sudoers)
        output.result({"sudoers": rule}, rule.rstrip())
        return 0
    rows = [_health(settings, name) for name in settings.stores]
    output.table(
        rows,
        ("name", "url", "state", "breaker", "total", "used", "free", "latency_ms", "error"),
        "no stores in the settings",
    )
    return 0 if all(row["state"] == "up" for row in rows) else EXIT_RETRYABLE


def _health(settings: Settings, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "url": settings.stores[name].url, "state": "up"}
    try:
        store = assembly.open_store_named(settings, name)
    except WorkerError as error:
        return row | {"state": "down", "error": str(error)}
    try:
        row |= _looked_at(store)
    except WorkerError as error:
        row |= {"state": "down", "error": str(error)}
    breaker = breaker_of(store)
    return row | {"breaker": breaker.state} | ({"reason": breaker.described()} if breaker.reason else {})


def _looked_at(store: Store) -> dict[str, Any]:
    started = time.monotonic()
    next(iter(store.list("template/tmpl/0")), None)
    usage = store.usage()
    latency = round((time.monotonic() - started) * 1000, 1)
    return {"total": usage.total, "used": usage.used, "free": usage.free, "latency_ms": latency}
