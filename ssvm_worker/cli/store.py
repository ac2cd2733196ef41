"""``ssvm list | stat | delete | stores``: the artifacts on the image stores, and the state of the stores."""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import groupby
from typing import Any

from ssvm_worker import config
from ssvm_worker.artifacts.layout import DRAFT, MANIFEST, PACKS, Artifact, place_of
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

#: Manifests that are read at the same time. Reading one after the other would mostly wait for the network.
_READERS = 8
#: Seconds after which `ssvm stores` prints the stores that have answered.
_SOON_S = 2.0
_KINDS = "template|iso|volume|backup"
_Row = dict[str, Any] | None


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm list | stat | delete | stores``."""
    listing = commands.add_parser(
        "list",
        help="list the artifacts of a store",
        examples=("list", "list snapshots/2 --store archive --details"),
        parents=[common],
    )
    listing.add_argument(
        "prefix", nargs="?", default="", metavar="PREFIX", help="list only this prefix, such as template/tmpl/2"
    )
    listing.add_argument("--store", metavar="NAME", help="list this store (default: the first of the settings)")
    listing.add_argument(
        "--details", action="store_true", help="also read each manifest, and report unreadable ones (slow on S3)"
    )
    listing.set_defaults(command=_list)
    for name, act, note in (
        ("stat", _stat, "show the manifest of an artifact"),
        ("delete", _delete, "delete an artifact; deleting a missing artifact is not an error"),
    ):
        shown = (f"{name} template/tmpl/2/201", f"{name} --kind backup --account 2 --volume web --id 1")
        each = commands.add_parser(name, help=note, description=note, examples=shown, parents=[common])
        add_place(each)
        if act is _delete:
            add_force(each)
        each.set_defaults(command=act)
    stores = commands.add_parser(
        "stores",
        help="show the usage and the health of every store",
        examples=("stores", "stores --sudoers ssvm > /etc/sudoers.d/ssvm"),
        parents=[common],
    )
    stores.add_argument("--sudoers", metavar="USER", help="print the sudo rule that allows USER to mount the stores")
    stores.set_defaults(command=_stores)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an artifact and stores."""
    note = "name the artifact by its prefix (template/tmpl/ACCOUNT/ID, volumes/…, snapshots/…) or by a key"
    parser.add_argument("place", nargs="?", metavar="PLACE", help=note)
    for name in ("kind", "account", "id", "volume"):
        note = f"name the artifact by its {name} and other fields instead of PLACE"
        parser.add_argument(f"--{name}", metavar=_KINDS if name == "kind" else None, help=note)
    parser.add_argument(
        "--store", "--stores", metavar="A,B", help="name the stores (default: the first of the settings)"
    )


def store_names(args: argparse.Namespace, settings: Settings) -> list[str]:
    """Return the stores of ``--store``, or the first store of the settings; raise InvalidRequest if there is none."""
    names = [each for each in (args.store or next(iter(settings.stores), "")).split(",") if each]
    if not names:
        raise misused(InvalidRequest("The settings name no image store", "stores", "Add [stores.primary] with a url"))
    return names


def artifact_of(args: argparse.Namespace) -> Artifact:
    """Return the artifact that the arguments name; raise InvalidRequest if they name none.

    PLACE is the prefix of the artifact, or the key of one of its objects.
    """
    if not args.place:
        if not (args.account and args.id):
            remedy = "Give PLACE, or --kind, --account and --id (and --volume)"
            raise misused(InvalidRequest("Missing argument: PLACE", "", remedy))
        return Artifact(args.kind or "template", args.account, args.id, args.volume or "")
    place = args.place.strip("/")
    try:
        return Artifact.of_prefix(place)
    except InvalidRequest:
        prefix = place.rpartition("/")[0]
        if not prefix:
            raise
        return Artifact.of_prefix(prefix)


def _list(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    store = assembly.open_answering_store(settings, store_names(args, settings)[0])
    unreadable: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for row in (read_artifacts if args.details else list_artifacts)(store, args.prefix.strip("/")):
            if "error" in row:
                unreadable.append(row["artifact"])
            yield row

    output.table(rows(), ("artifact", "kind", "size", "objects", "created"), "no artifacts")
    return EXIT_PERMANENT if unreadable else 0


def list_artifacts(store: Store, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each artifact below a prefix, in the order of the store.

    It reads no manifest. Size and number of objects are those of the list, and ``created`` is the manifest's time.
    Memory is constant. Raises the error of a store that does not answer.
    """
    for place, objects in groupby(store.list(prefix), lambda each: place_of(each.key)):
        size, names, created = 0, list[str](), None
        for each in objects:
            name = each.key.removeprefix(f"{place}/")
            if name == MANIFEST:
                created = each.modified
            elif name != DRAFT:
                size += each.size
                names.append(name)
        if created is not None and place and not place.endswith(f"/{PACKS}"):
            kind = Artifact.of_prefix(place).kind
            yield {
                "artifact": place,
                # Templates and ISOs have the same prefixes.
                "kind": "iso" if kind == "template" and any(each.endswith(".iso") for each in names) else kind,
                "size": size,
                "objects": len(names),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created)),
            }


def read_artifacts(store: Store, prefix: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each artifact below a prefix from its manifest, in the order of the store.

    A row has the field ``error`` if the manifest cannot be read. An artifact that is deleted meanwhile has no row.
    Raises the error of a store that does not answer.
    """
    pending: deque[Future[_Row]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        for artifact in artifacts_below(store, prefix):
            pending.append(pool.submit(_row, store, artifact))
            if len(pending) > 4 * _READERS and (row := pending.popleft().result()):
                yield row
        while pending:
            if row := pending.popleft().result():
                yield row


def _row(store: Store, artifact: Artifact) -> _Row:
    """Return the row of an artifact; None if the artifact does not exist any more."""
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
    store = assembly.open_answering_store(settings, store_names(args, settings)[0])
    manifest = read_manifest(store, artifact_of(args))
    text = manifest.to_json().decode()
    output.result(json.loads(text), text.rstrip())
    return 0


def _delete(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    artifact = artifact_of(args)
    fields = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id, "volume": artifact.volume}
    job = JOBS["delete"]
    request = parse_request(job.Request, fields | {"stores": store_names(args, settings)}, job.name)
    result = run_here(settings, job, request, quiet=output.as_json or output.quiet, force=args.force)
    counts = ", ".join(f"{count} objects from {store}" for store, count in result["deleted"].items())
    output.result(result, f"deleted {result['prefix']}: {counts}")
    return 0


def _stores(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    if args.sudoers:
        rule = sudoers(settings, args.sudoers)
        output.result({"sudoers": rule}, rule.rstrip())
        return 0
    with ThreadPoolExecutor(max(1, len(settings.stores))) as pool:
        looks = {name: pool.submit(_health, settings, name) for name in settings.stores}
        waiting = wait(looks.values(), None if output.as_json else _SOON_S).not_done
        late = [name for name, each in looks.items() if each in waiting]
        soon = [name for name in looks if name not in late]
        hidden = {} if output.as_json else {"closed": ""}  # a closed circuit breaker is the normal state
        for names in [each for each in (soon, late) if each] or [[]]:
            if soon and names is late:
                output.note(f"waiting for {', '.join(late)}")
            rows = (looks[name].result() for name in names)
            output.table(
                (row | {"breaker": hidden.get(row.get("breaker", ""), row.get("breaker"))} for row in rows),
                ("name", "url", "state", "breaker", "total", "free", "latency_ms", "error"),
                "the settings name no image store",
            )
    return 0 if all(each.result()["state"] == "up" for each in looks.values()) else EXIT_RETRYABLE


def _health(settings: Settings, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "url": settings.stores[name].url, "state": "up"}
    opened: Store | None = None
    try:
        with assembly.store_to_examine(settings, name) as store:
            opened = store
            started = time.monotonic()
            next(iter(store.list("template/tmpl/0")), None)
            usage = store.usage()
        latency = round((time.monotonic() - started) * 1000, 1)
        row |= {"total": usage.total, "used": usage.used, "free": usage.free, "latency_ms": latency}
    except WorkerError as error:
        row |= {"state": "down", "error": str(error)}
    if opened is None:
        return row
    breaker = breaker_of(opened)
    return row | {"breaker": breaker.state} | ({"reason": breaker.described()} if breaker.reason else {})
