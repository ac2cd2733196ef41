"""``ssvm link | serve``: links by which people fetch one object or send one image, and the HTTP service behind them."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ssvm_worker import config
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import find_manifest
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, extra_missing, misused
from ssvm_worker.jobs.download.request import Request as DownloadRequest
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.upload.job import read_entry
from ssvm_worker.ledger.links import GET, PUT, Link, new_id
from ssvm_worker.units import human_duration, parse_duration
from ssvm_worker.wiring import assembly

from .output import Output

#: SigV4 limits presigned URLs to 7 days. Our own links have the same limit.
_MAX_SECONDS = 7 * 86400
#: The options of ``--upload``: fields of the download request.
_UPLOAD_FIELDS = {
    "kind": "template (default), iso or volume",
    "name": "the display name of the image",
    "format": "the format that the image must have (default: auto)",
    "checksum": "the checksum that the image must have",
    "max_bytes": "refuse a larger image",
    "callback_url": "send the job record to this URL at the end",
}


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm link | serve``."""
    link = commands.add_parser(
        "link",
        help="create a link to an object that expires",
        examples=(
            "link template/tmpl/2/201/201.qcow2 --for 2d",
            "link template/tmpl/2/510 --upload --name Debian --max-bytes 10GiB",
            "link --list",
        ),
        parents=[common],
    )
    link.add_argument("key", nargs="?", metavar="KEY", help="the key of the object: template/tmpl/ACCOUNT/ID/NAME")
    link.add_argument(
        "--for", dest="lasting", metavar="TIME", default="4h", help="expire after TIME, at most 7d (default: 4h)"
    )
    link.add_argument("--store", metavar="NAME", help="link to this store (default: the first of the settings)")
    link.add_argument("--upload", action="store_true", help="create a link for sending one image to the artifact KEY")
    for name, note in _UPLOAD_FIELDS.items():
        link.add_argument(f"--{name.replace('_', '-')}", help=f"with --upload: {note}")
    action = link.add_mutually_exclusive_group()
    action.add_argument("--revoke", metavar="ID|KEY", help="revoke a link, or all links of a key")
    action.add_argument("--list", action="store_true", help="list the links that are valid")
    link.set_defaults(command=_link)
    serve = commands.add_parser(
        "serve",
        help="run the HTTP service behind the links",
        examples=("serve", "serve --listen 0.0.0.0:8480"),
        parents=[common],
    )
    serve.add_argument(
        "--listen", metavar="HOST:PORT", default="", help="listen on this address instead of serve.listen"
    )
    serve.add_argument("--api", action="store_true", help="also serve the HTTP API, as serve.api = true does")
    serve.set_defaults(command=_serve)


def _serve(args: argparse.Namespace, output: Output) -> int:  # noqa: ARG001 - every command has both parameters
    try:
        from ssvm_worker.serve.server import serve
    except ImportError as error:
        raise extra_missing(f"`ssvm serve` needs {error.name}", "serve", "serve") from error
    serve(config.load(args.config), args.listen, api=args.api)
    return 0


def _link(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    if args.revoke:
        return _revoke(settings, args.revoke, output)
    if args.list:
        rows = []
        for each in assembly.open_links(settings).all():
            left = human_duration(max(0, each.until - time.time()))
            row = {"link": each.id, "verb": each.verb, "store": each.store, "key": each.key}
            rows.append({**row, "until": f"{_timestamp(each.until)} ({left})", "by": each.by})
        output.table(rows, ("link", "verb", "store", "key", "until", "by"), "no links")
        return 0
    if not args.key:
        raise misused(InvalidRequest("Missing argument: KEY", "", "Give KEY, --list or --revoke ID|KEY"))
    seconds = _seconds(args.lasting)
    create = _create_upload_link if args.upload else _create_link
    created = create(settings, args, seconds, output)
    output.result(created, created["url"])
    return 0


def _seconds(text: str) -> int:
    remedy = "Give a time such as 30m, 4h or 7d"
    try:
        seconds = int(parse_duration(text))
    except ValueError as error:
        raise misused(InvalidRequest(f"--for {error}", text, remedy)) from error
    if not 0 < seconds <= _MAX_SECONDS:
        raise misused(InvalidRequest("--for must be between 1 second and 7 days", text, remedy))
    return seconds


def _create_link(settings: Settings, args: argparse.Namespace, seconds: int, output: Output) -> dict[str, Any]:
    """Create a presigned URL if the store supports this, else a link to our own service."""
    name, key = args.store or next(iter(settings.stores), ""), args.key.strip("/")
    store = assembly.open_answering_store(settings, name)
    read_entry(store, key)
    until = int(time.time()) + seconds
    shown = {"store": name, "key": key, "until": _timestamp(until)}
    presign: Callable[..., str] | None = getattr(store, "presign", None)
    if presign:
        return {"url": presign(key, seconds), **shown, "revocable": False}
    if not hasattr(store, "handle"):
        raise InvalidRequest("This store cannot serve files", f"{name}:{key}", "Copy the artifact to another store")
    link = Link(new_id(), GET, until, name, key, created=int(time.time()), by=getpass.getuser())
    return {"url": _save(settings, link, output), "link": link.id, **shown, "revocable": True}


def _create_upload_link(settings: Settings, args: argparse.Namespace, seconds: int, output: Output) -> dict[str, Any]:
    """Create a link for sending one image. Check the request now, so that errors do not reach only the sender."""
    artifact, link_id, now = Artifact.of_prefix(args.key), new_id(), int(time.time())
    names = [each for each in (args.store or next(iter(settings.stores), "")).split(",") if each]
    stores = [assembly.open_answering_store(settings, name) for name in names]
    fields: dict[str, Any] = {
        "url": f"upload:{link_id}",
        "account": artifact.account,
        "id": artifact.id,
        "kind": artifact.kind,
    }
    fields |= {"stores": names}
    fields |= {name: getattr(args, name) for name in _UPLOAD_FIELDS if getattr(args, name) is not None}
    request = parse_request(DownloadRequest, fields, "download")
    if request.artifact.prefix != artifact.prefix:
        raise misused(InvalidRequest(f"KEY does not match --kind {request.kind}", args.key, "Give the right kind"))
    if find_manifest(stores[0], artifact):
        raise InvalidRequest(
            "The artifact exists already", f"{names[0]}:{artifact.prefix}", "Delete it first, or use a new id"
        )
    values = request.model_dump(mode="json", exclude_defaults=True)
    link = Link(link_id, PUT, now + seconds, names[0], artifact.prefix, values, now, getpass.getuser())
    shown = {"store": link.store, "key": link.key, "until": _timestamp(link.until), "revocable": True}
    return {"url": _save(settings, link, output), "link": link.id, "job_id": link.job_id, **shown}


def _save(settings: Settings, link: Link, output: Output) -> str:
    """Save a link, which makes it valid, and return its URL."""
    signed, links = assembly.link_signer(settings).sign(link.path, link.until), assembly.open_links(settings)
    links.add(link)
    section = settings.serve
    known = section.url or links.address()
    if not known:
        output.note("no `ssvm serve` has started yet, and only it answers this link. Start it, or set serve.url")
    base = known or f"{'https' if section.certificate_file else 'http'}://{section.listen}"
    return base.rstrip("/") + signed


def _revoke(settings: Settings, id_or_key: str, output: Output) -> int:
    links = assembly.open_links(settings)
    link = links.find(id_or_key)
    found = [link] if link else [each for each in links.all() if each.key == id_or_key.strip("/")]
    revoked = [each.id for each in found if links.revoke(each)]
    for each in found:
        if each.verb == PUT:
            # Cancel the upload of this link. The job removes the bytes that have arrived.
            with assembly.open_ledger(settings) as ledger, contextlib.suppress(ObjectNotFound, InvalidRequest):
                ledger.cancel(each.job_id, f"{getpass.getuser()} (ssvm)")
    if not revoked:
        remedy = "`ssvm link --list` shows the valid links. A presigned S3 URL ends only when it expires, or when "
        raise ObjectNotFound("There is no such link", id_or_key, f"{remedy}the keys of its store are revoked")
    output.result({"revoked": revoked}, f"revoked {', '.join(revoked)}")
    return 0


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
