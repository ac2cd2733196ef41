"""``ssvm link`` and ``ssvm serve``: objects out, and images in, for people who have a link and nothing else."""

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
from ssvm_worker.errors import ConfigError, InvalidRequest, ObjectNotFound, misused
from ssvm_worker.jobs.download import request as downloadrequest
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.jobs.served_objects import member
from ssvm_worker.ledger.links import GET, PUT, Link, new_id
from ssvm_worker.units import human_duration, parse_duration
from ssvm_worker.wiring import assembly

from .output import Output

#: What SigV4 allows for a presigned URL; a link of ours need not last longer.
_LONGEST_S = 7 * 86400


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm link | serve``."""
    link = commands.add_parser("link", help="a link to an object that works for a while", parents=[common])
    link.add_argument("key", nargs="?", metavar="KEY", help="of the object: template/tmpl/ACCOUNT/ID/NAME")
    link.add_argument("--for", dest="lasting", metavar="TIME", default="4h", help="30m, 4h, 7d at the most (4h)")
    link.add_argument("--store", metavar="NAME", help="the first of the settings when absent")
    _add_upload(link)
    what = link.add_mutually_exclusive_group()
    what.add_argument("--revoke", metavar="ID|KEY", help="end a link, or all links of a key")
    what.add_argument("--list", action="store_true", help="the links that stand")
    link.set_defaults(command=_link)
    serve = commands.add_parser("serve", help="the HTTP service behind the links of directory stores", parents=[common])
    serve.add_argument("--listen", metavar="HOST:PORT", default="", help="in place of serve.listen of the settings")
    serve.set_defaults(command=_serve)


def _add_upload(link: argparse.ArgumentParser) -> None:
    link.add_argument("--upload", action="store_true", help="a link by which one image is sent to the artifact at KEY")
    for name, note in (
        ("kind", "template (the default), iso or volume"),
        ("name", "what people call it"),
        ("format", "what it must be; auto when absent"),
        ("checksum", "what its digest must be"),
        ("max-bytes", "refuse a larger one"),
        ("callback-url", "gets the job record at the end"),
    ):
        link.add_argument(f"--{name}", help=f"with --upload: {note}")


def _serve(args: argparse.Namespace, output: Output) -> int:  # noqa: ARG001 - every command has both
    try:
        from ssvm_worker.serve.server import serve
    except ImportError as error:
        raise ConfigError(
            f"`ssvm serve` needs {error.name}", "serve", "Install it: pip install 'ssvm-worker[serve]'"
        ) from error
    serve(config.load(args.config), args.listen)
    return 0


def _link(args: argparse.Namespace, output: Output) -> int:
    settings = config.load(args.config)
    if args.revoke:
        return _revoke(settings, args.revoke, output)
    if args.list:
        rows = [_row(each) for each in assembly.open_links(settings).all()]
        output.table(rows, ("link", "verb", "store", "key", "until", "by"), "no links")
        return 0
    if not args.key:
        raise misused(InvalidRequest("A link to what?", "", "Give KEY, --list or --revoke ID|KEY"))
    if args.upload:
        made = _upload(settings, args, _seconds(args.lasting))
    else:
        name = args.store or next(iter(settings.stores), "")
        made = _made(settings, name, args.key.strip("/"), _seconds(args.lasting))
    output.result(made, made["url"])
    return 0


def _seconds(text: str) -> int:
    try:
        seconds = int(parse_duration(text))
    except ValueError as error:
        raise misused(InvalidRequest(f"--for {error}", text, "Give 4h or the like")) from error
    if not 0 < seconds <= _LONGEST_S:
        what = "A link lasts from 1 second to 7 days"
        raise misused(InvalidRequest(what, text, "Give 4h or the like"))
    return seconds


def _made(settings: Settings, name: str, key: str, seconds: int) -> dict[str, Any]:
    """A presigned URL where the store makes them, else one of our own service."""
    store = assembly.open_store_named(settings, name)
    member(store, key)
    until = int(time.time()) + seconds
    shown = {"store": name, "key": key, "until": _moment(until)}
    presign: Callable[..., str] | None = getattr(store, "presign", None)
    if presign:
        return {"url": presign(key, seconds), **shown, "revocable": False}
    if not hasattr(store, "handle"):
        raise InvalidRequest("That store has no files to serve", f"{name}:{key}", "Copy the artifact to another store")
    link = Link(new_id(), GET, until, name, key, created=int(time.time()), by=getpass.getuser())
    return {"url": _written(settings, link), "link": link.id, **shown, "revocable": True}


def _upload(settings: Settings, args: argparse.Namespace, seconds: int) -> dict[str, Any]:
    """A link by which one image comes in; what is wrong with the request is said now, not to its sender."""
    artifact, link_id, now = Artifact.of_prefix(args.key), new_id(), int(time.time())
    stores = [each for each in (args.store or next(iter(settings.stores), "")).split(",") if each]
    known = [assembly.open_store_named(settings, name) for name in stores]
    asked = {name: getattr(args, name) for name in ("kind", "name", "format", "checksum", "max_bytes", "callback_url")}
    fields = {"url": f"upload:{link_id}", "account": artifact.account, "id": artifact.id, "kind": artifact.kind}
    fields |= {"stores": stores} | {name: value for name, value in asked.items() if value is not None}
    request = parse_request(downloadrequest.Request, fields, "download")
    if request.artifact.prefix != artifact.prefix:
        raise misused(InvalidRequest(f"No {request.kind} lies there", args.key, "Give its own KEY"))
    if find_manifest(known[0], artifact):
        raise InvalidRequest(
            "There is one already", f"{stores[0]}:{artifact.prefix}", "Delete it first, or use a new id"
        )
    values = request.model_dump(mode="json", exclude_defaults=True)
    link = Link(link_id, PUT, now + seconds, stores[0], artifact.prefix, values, now, getpass.getuser())
    shown = {"store": link.store, "key": link.key, "until": _moment(link.until), "revocable": True}
    return {"url": _written(settings, link), "link": link.id, "job_id": link.job_id, **shown}


def _written(settings: Settings, link: Link) -> str:
    """The URL of a link that stands from now on."""
    signed, book = assembly.link_signer(settings).sign(link.path, link.until), assembly.open_links(settings)
    book.add(link)
    given = settings.serve
    base = given.url or book.address() or f"{'https' if given.certificate_file else 'http'}://{given.listen}"
    return base.rstrip("/") + signed


def _revoke(settings: Settings, which: str, output: Output) -> int:
    book = assembly.open_links(settings)
    one = book.find(which)
    found = [one] if one else [each for each in book.all() if each.key == which.strip("/")]
    revoked = [each.id for each in found if book.revoke(each)]
    for each in found:
        _stop(settings, each)
    if not revoked:
        remedy = (
            "`ssvm link --list` tells which stand. A presigned URL of S3 ends by itself, or with the keys of its store"
        )
        raise ObjectNotFound("There is no such link", which, remedy)
    output.result({"revoked": revoked}, f"revoked {', '.join(revoked)}")
    return 0


def _stop(settings: Settings, link: Link) -> None:
    """Whoever sends by that link is told to stop; what has come goes."""
    if link.verb == PUT:
        with assembly.open_ledger(settings) as ledger, contextlib.suppress(ObjectNotFound, InvalidRequest):
            ledger.cancel(link.job_id, f"{getpass.getuser()} (ssvm)")


def _row(link: Link) -> dict[str, Any]:
    left = human_duration(max(0, link.until - time.time()))
    names = {"link": link.id, "verb": link.verb, "store": link.store, "key": link.key}
    return {**names, "until": f"{_moment(link.until)} ({left})", "by": link.by}


def _moment(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
