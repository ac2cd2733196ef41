"""Download a template, ISO or volume from a URL to image stores, verified and inspected in one pass."""

from __future__ import annotations

from typing import Any

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import ChecksumMismatch, CorruptImage, InvalidRequest, SourceChanged
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.cloudstack_properties import properties
from ssvm_worker.jobs.publish import listing, placed, publish
from ssvm_worker.jobs.request import fingerprint
from ssvm_worker.jobs.store_set import StoreSet
from ssvm_worker.jobs.usage import holding
from ssvm_worker.streaming.interfaces import Store

from .origin_file import OriginFile, find_expected
from .request import Request
from .store_image import StoredImage

__all__ = ["Request", "discard", "resource", "run"]

#: How often one attempt starts again from the first byte, where the pieces of a resumed stream do not fit.
_CLEAN_STARTS = 2


def resource(request: Request) -> str:
    """Only one job at a time writes an artifact."""
    return request.artifact.prefix


def discard(request: Request, attempt: Attempt) -> None:
    """Remove what failed attempts have left on the stores."""
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact, attempt.confirm)


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Store the image on every store, or on none; the manifest is written last."""
    stores = {name: attempt.store(name) for name in dict.fromkeys(request.stores)}
    expected = find_expected(request, attempt)
    if done := _already_there(request, attempt, expected, stores):
        return done
    with holding(attempt, request.account, request.quota, len(stores)):
        return _fetch(OriginFile(request, attempt, expected), stores)


def _fetch(fetch: OriginFile, stores: dict[str, Store]) -> dict[str, Any]:
    """Go on where an earlier attempt was, or begin; again from the first byte where the pieces do not fit."""
    draft = fetch.usable_draft(next(iter(stores.values())))
    for left in range(_CLEAN_STARTS, -1, -1):
        try:
            return _transfer(fetch, stores, draft)
        except (ChecksumMismatch, CorruptImage, SourceChanged) as error:
            # The seam may be what is wrong; a stream of one piece has none. What was resumed at one mirror may have
            # come to another one, so a clean start may be cut and changed as well: a few are made.
            if not fetch.resumptions or not left:
                raise
            fetch.attempt.log.warning("starting again from the first byte: %s", error)
        fetch.attempt.held.restart()
        fetch, draft = OriginFile(fetch.request, fetch.attempt, fetch.expected), None
    raise AssertionError("unreachable: the last start returns or raises")


def _transfer(fetch: OriginFile, stores: dict[str, Store], draft: Manifest | None) -> dict[str, Any]:
    """One pass over the file, from its first byte or from where the *draft*'s attempt stopped."""
    request, attempt = fetch.request, fetch.attempt
    attempt.progress.start("connecting")
    targets = StoreSet(attempt, request.artifact, stores)
    targets.sweep(spare=attempt.job_id if draft else "")
    manifest, stored, small = StoredImage(fetch, targets).store(draft)
    stored.owed.update(targets.owed)
    properly = properties(request, manifest)
    manifest = listing(manifest, properly, "properties")
    done = publish(attempt, stores, stored, manifest, small | properly)
    return _result(manifest) | done | {"resumptions": fetch.resumptions, "reused": False}


def _already_there(
    request: Request, attempt: Attempt, expected: Digest | None, stores: dict[str, Store]
) -> dict[str, Any] | None:
    """The result of an earlier job if it made just this artifact; InvalidRequest if it made another one."""
    primary = next(iter(stores.values()))
    manifest = find_manifest(primary, request.artifact)
    if manifest is None:
        return None
    as_asked = request.convert_to in (None, manifest.entries[0].facts["format"])
    same_url = manifest.source.get("fingerprint") == fingerprint(request.url)
    if not as_asked or not (str(expected) in manifest.source["digests"] if expected else same_url):
        raise InvalidRequest(
            f"There is another {request.kind} under this id",
            f"{primary.name}:{request.artifact.prefix}",
            "Delete it first (`ssvm delete`), or use a new id",
        )
    return _result(manifest) | placed(attempt, stores, request.artifact) | {"resumptions": 0, "reused": True}


def _result(manifest: Manifest) -> dict[str, Any]:
    image = manifest.entries[0]  # of a package its descriptor
    return {
        "key": manifest.artifact.key(image.name),
        "size": sum(each.size for each in manifest.entries if each.role in ("image", "disk")),
        "virtual_size": image.facts["virtual_size"],
        "format": image.facts["format"],
        "digest": image.digest,
        "objects": [each.name for each in manifest.entries],
    }
