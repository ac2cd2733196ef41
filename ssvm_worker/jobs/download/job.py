"""Download a template, ISO or volume from a URL to image stores. One pass verifies and inspects the bytes.

The pipeline of a download, from the socket to the manifest. Each line receives the chunks of the line above.

    net/sockets.py, net/http.py    WatchedTLSSocket          decrypts, and detects a stalled server
    sources/http/source.py         HttpSource.open           yields the body (other schemes: sources/*.py)
    sources/__init__.py            Mirrors.open              changes to another URL of the same file
    streaming/pipeline.py          Resuming                  reopens the source at the byte where it broke
                                   paced, limit, tap         limit the rate and the size, count the progress
    download/image.py              unpack                    hashes the offered file, removes a compression or tar
                 │
                 ├─ an image:      download/image.py         StoredImage.store names it and opens the sinks
                 │                 download/convert.py       Conversion.run, only if the request has convert_to
                 └─ an OVA:        download/store_ova.py     StoredOva.store does the same for each disk
                 │
    download/image.py              ImagePass.store           adds the observers: hasher, inspection, quota
    streaming/pipeline.py          store_stream              queues each chunk for every store, calls verify, commits
    stores/file/part_file.py       FileSink                  writes a .part file; commit syncs and renames it
    jobs/cloudstack_properties.py  properties                makes template.properties
    jobs/store_set.py              publish                   writes template.properties, then manifest.json

Next to the pipeline, the thread of ``ResumeNote`` records how many bytes are durable. ``OriginFile`` builds the lines
from the source to ``tap``. ``_transfer`` calls the rest.
"""

from __future__ import annotations

from typing import Any

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.artifacts.manifest import Manifest, find_manifest
from ssvm_worker.artifacts.manifest import discard as discard_artifact
from ssvm_worker.errors import ChecksumMismatch, CorruptImage, InvalidRequest, SourceChanged
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.cloudstack_properties import properties
from ssvm_worker.jobs.request import fingerprint
from ssvm_worker.jobs.store_set import StoreSet, add_small_objects, find_placement, publish
from ssvm_worker.jobs.usage import reserve_quota
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import StreamResult, tap

from .image import OriginFile, StoredImage, find_expected, unpack
from .request import Request
from .store_ova import PackageTee, StoredOva

__all__ = ["Request", "discard", "resource", "run"]

#: How often one attempt starts again from the first byte if the pieces of a resumed stream do not match.
_CLEAN_STARTS = 2


def resource(request: Request) -> str:
    """Return the artifact: only one job at a time may write it."""
    return request.artifact.prefix


def discard(request: Request, attempt: Attempt) -> None:
    """Remove everything that failed attempts left on the stores."""
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact, attempt.confirm)


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Store the image on every store, or on none. Resume where an earlier attempt stopped.

    If an earlier job made the same artifact, return its result. Raise InvalidRequest if it made another artifact.
    """
    stores = {name: attempt.store(name) for name in dict.fromkeys(request.stores)}
    expected = find_expected(request, attempt)
    if result := _existing(request, attempt, expected, stores):
        return result
    with reserve_quota(attempt, request.account, request.quota, len(stores)):
        origin = OriginFile(request, attempt, expected)
        draft = origin.usable_draft(next(iter(stores.values())))
        for clean_starts_left in range(_CLEAN_STARTS, -1, -1):
            try:
                return _transfer(origin, stores, draft)
            except (ChecksumMismatch, CorruptImage, SourceChanged) as error:
                # The pieces of a resumed stream may not match; a stream of one piece has no such excuse. A resumed
                # stream may continue at another mirror. A clean start may fail like that too, so there are several.
                if not origin.resumptions or not clean_starts_left:
                    raise
                attempt.log.warning("starting again from the first byte: %s", error)
            attempt.held.restart()
            origin, draft = OriginFile(request, attempt, origin.expected), None
    raise AssertionError("unreachable: the last start returns or raises")


def _transfer(origin: OriginFile, stores: dict[str, Store], draft: Manifest | None) -> dict[str, Any]:
    """Move the file once, from its first byte or from the byte where the attempt of the *draft* stopped."""
    request, attempt = origin.request, origin.attempt
    attempt.progress.start("connecting")
    store_set = StoreSet(attempt, request.artifact, stores)
    store_set.sweep(spare=attempt.job_id if draft else "")
    stored, small = StreamResult(), dict[str, bytes]()
    if draft:
        attempt.held.expect(draft.facts["size"])
        manifest, stored = StoredImage(origin, store_set).resume(draft)
    else:
        tee = PackageTee()
        chunks = tap(origin.open(), tee) if request.keep_package else origin.open()
        attempt.held.expect(origin.size)
        offered = origin.hasher()
        limits = {"max_bytes": origin.max_bytes, "max_ratio": attempt.settings.download.max_ratio}
        unpacked = unpack(chunks, offered, origin.location, **limits)
        if unpacked.members:
            manifest, small = StoredOva(origin, store_set, tee).store(unpacked.members, offered)
        else:
            tee.drop()
            manifest, stored = StoredImage(origin, store_set).store(unpacked)
    stored.owed.update(store_set.owed)
    property_files = properties(request, manifest)
    manifest = add_small_objects(manifest, property_files, "properties")
    placement = publish(attempt, stores, stored, manifest, small | property_files)
    return _result(manifest) | placement | {"resumptions": origin.resumptions, "reused": False}


def _existing(
    request: Request, attempt: Attempt, expected: Digest | None, stores: dict[str, Store]
) -> dict[str, Any] | None:
    """Return the result of an earlier job that made the same artifact. Raise InvalidRequest for another artifact."""
    primary = next(iter(stores.values()))
    manifest = find_manifest(primary, request.artifact)
    if manifest is None:
        return None
    same_format = request.convert_to in (None, manifest.entries[0].facts["format"])
    same_url = manifest.source.get("fingerprint") == fingerprint(request.url)
    if not same_format or not (str(expected) in manifest.source["digests"] if expected else same_url):
        raise InvalidRequest(
            f"There is another {request.kind} under this id",
            f"{primary.name}:{request.artifact.prefix}",
            "Delete it first (`ssvm delete`), or use a new id",
        )
    placement = find_placement(attempt, stores, request.artifact)
    return _result(manifest) | placement | {"resumptions": 0, "reused": True}


def _result(manifest: Manifest) -> dict[str, Any]:
    image = manifest.entries[0]  # of an OVA, the entry of its descriptor
    package = next((manifest.artifact.key(each.name) for each in manifest.entries if each.role == "package"), None)
    return {
        "key": manifest.artifact.key(image.name),
        "size": sum(each.size for each in manifest.entries if each.role in ("image", "disk")),
        "virtual_size": image.facts["virtual_size"],
        "format": image.facts["format"],
        "digest": image.digest,
        "objects": [each.name for each in manifest.entries],
    } | ({"package": package} if package else {})
