"""The checks after a round. They avoid the product's own code where possible."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ssvm_worker import errors
from ssvm_worker.artifacts.layout import DRAFT, MANIFEST, PACKS, Artifact
from ssvm_worker.artifacts.manifest import Manifest
from ssvm_worker.errors import WorkerError
from ssvm_worker.grain_store.map import ROLE
from ssvm_worker.grain_store.reader import extents
from ssvm_worker.ledger.record import Record
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.wiring.assembly import open_quota

from .workload import Content, Workload
from .zone import ChaosZone

#: Errors that any fault may cause. A retry must succeed.
_EXCUSED = {
    "WorkerLost",
    *(each.__name__ for each in (errors.SourceUnavailable, errors.StoreUnavailable, errors.LeaseLost)),
    *(each.__name__ for each in (errors.StoreAway, errors.ResourceBusy, errors.StoreFull, errors.Cancelled)),
}
#: Errors that only some faults may cause. With a wrong clock the vCenter's certificate is not valid.
_EXCUSED_BY = {"the workers' clock is set": {errors.SourceDenied.__name__}}


def unexplained(record: Record, faults: list[str]) -> list[str]:
    """Return the errors of the job's attempts that none of the faults explains."""
    explained = _EXCUSED.union(*(_EXCUSED_BY.get(each, ()) for each in faults))
    found = [each.error for each in record.attempts if each.error] + ([record.error] if record.error else [])
    return [f"{record.job_id}: {each['message']}" for each in found if each["error"] not in explained]


# The ledger

#: Keys that exist only while jobs wait or run: queues, turns, limits, slots.
_TEMPORARY_KEYS = (
    *(f"ledger:{each}" for each in ("queues", "running", "picks", "all:*", "q:*", "places:*", "slots:*")),
    "slots:*",
)


def check_ledger(zone: ChaosZone, records: list[Record]) -> Iterator[str]:
    """Check that each job has one final state and was reported once, and that no claim is left."""
    prefix = f"{zone.site.broker.prefix}ssvm."
    with zone.site.broker.client() as client:
        kept: Any = client
        for index in ("claims", "due"):
            if left := kept.zrange(f"{prefix}ledger:{index}", 0, -1):
                yield f"{index} still has {left}"
        for pattern in _TEMPORARY_KEYS:
            if left := list(kept.scan_iter(prefix + pattern, count=1000)):
                yield f"left in the broker: {left}"
        events = Counter(
            (each["job_id"], each["attempt"])
            for _, each in kept.xrange(f"{prefix}ledger:events")
            if each["state"] == "succeeded"
        )
        states: dict[str, set[str]] = {state: set() for state in _STATES}
        for index in kept.scan_iter(f"{prefix}ledger:in:*", count=1000):
            state = index.removeprefix(f"{prefix}ledger:in:").split(" ")[0]
            states[state].update(kept.zrange(index, 0, -1))
    for record in records:
        yield from _check_record(record, states, events)


_STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def _check_record(record: Record, states: dict[str, set[str]], events: Counter[tuple[str, str]]) -> Iterator[str]:
    listed = [state for state, ids in states.items() if record.job_id in ids]
    if listed != [record.state] or not record.ended:
        yield f"{record.job_id} is {record.state}, but listed as {listed}"
    if any(not each.ended for each in record.attempts):
        yield f"{record.job_id} has ended, but one of its attempts has not"
    ends = sum(count for (job_id, _), count in events.items() if job_id == record.job_id)
    if ends != (record.state == "succeeded"):
        yield f"{record.job_id} is {record.state}, but succeeded {ends} times"


# The stores


def check_stores(zone: ChaosZone, workload: Workload) -> Iterator[str]:
    """Check that each expected artifact is complete, byte for byte, and that the stores have nothing else."""
    for (name, prefix), content in sorted(workload.expected.items()):
        try:
            yield from _check_artifact(zone.stores[name], prefix, content)
        except WorkerError as error:
            yield f"{name}:{prefix} is not complete: {error}"
    yield from find_strays(zone, workload)
    for url, data in workload.uploaded.items():
        if _digest_at(zone, url) != hashlib.sha256(data).digest():
            yield f"the upload to {url} is not complete"


def find_strays(zone: ChaosZone, workload: Workload) -> Iterator[str]:
    """Yield the objects that belong to no expected artifact."""
    for name, keys in (("primary", _files(zone)), ("archive", _objects(zone, zone.bucket))):
        prefixes = {prefix for store, prefix in workload.expected if store == name}
        owners = prefixes | {f"{_family(each)}/{PACKS}" for each in prefixes}
        yield from (f"left on {name}: {each}" for each in sorted(keys) if _owner(each) not in owners)


def _check_artifact(store: Store, prefix: str, content: Content) -> Iterator[str]:
    manifest = Manifest.from_json(read_bytes(store, f"{prefix}/{MANIFEST}"), prefix)
    for entry in manifest.entries:
        data = read_bytes(store, f"{prefix}/{entry.name}")
        if (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") != (entry.size, entry.digest):
            yield f"{store.name}:{prefix}/{entry.name} differs from its manifest"
    extra = {each.key for each in store.list(prefix)} - {f"{prefix}/{each.name}" for each in manifest.entries}
    if extra != {f"{prefix}/{MANIFEST}"}:
        yield f"{store.name}:{prefix} also has {sorted(extra)}"
    if _content(store, manifest) != content.data:
        yield f"{store.name}:{prefix} differs from the data that was sent"


def _content(store: Store, manifest: Manifest) -> tuple[bytes, ...]:
    found = []
    for entry in manifest.entries:
        if entry.role == ROLE:
            raw = bytearray(entry.facts["virtual_size"])
            for offset, data in extents(store, manifest, entry):
                raw[offset : offset + len(data)] = data
            found.append(bytes(raw))
        elif entry.role in ("image", "disk"):
            found.append(read_bytes(store, manifest.artifact.key(entry.name)))
    return tuple(found)


def _owner(key: str) -> str:
    """Return the prefix of the artifact or of the packs that own an object; "" for a part or a draft."""
    family, packed, _ = key.partition(f"/{PACKS}/")
    if packed:
        return f"{family}/{PACKS}"
    prefix, _, name = key.rpartition("/")
    return "" if name.startswith(".") or name == DRAFT else prefix


def _family(prefix: str) -> str:
    return Artifact.of_prefix(prefix).family


def _files(zone: ChaosZone) -> set[str]:
    """Return all files of the directory, including hidden ones."""
    root = zone.site.store
    return {str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()}


def _objects(zone: ChaosZone, bucket: str) -> set[str]:
    """Return all objects of a bucket."""
    pages = zone.s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {each["Key"] for page in pages for each in page.get("Contents", [])}


def _digest_at(zone: ChaosZone, url: str) -> bytes:
    name = url.rpartition("/")[2]
    if not url.startswith("s3://"):
        return hashlib.sha256(zone.publisher.stored.get(f"/{name}", b"")).digest()
    return hashlib.sha256(zone.s3.client().get_object(Bucket=zone.out, Key=name)["Body"].read()).digest()


# Leftovers


def find_leftovers(zone: ChaosZone) -> Iterator[str]:
    """Yield open multipart uploads, snapshots, leases, scratch files, mounts and quota reservations.

    Some of a killed attempt expire by time: leases, and reservations if the next attempt reserved nothing.
    """
    for bucket in (zone.bucket, zone.out):
        uploads = zone.s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        yield from (f"open multipart upload: {bucket}/{each['Key']}" for each in uploads)
    state = zone.vcenter.state()
    yield from (f"snapshot {each}" for each in state["snapshots"] if each.startswith("ssvm-"))
    yield from (f"lease {id_}" for id_, lease in state["leases"].items() if lease["state"] == "open")
    spill = zone.site.directory / "state" / "spill"
    yield from (f"scratch file {each}" for each in spill.rglob("*") if each.is_file())
    for line in open("/proc/mounts"):  # noqa: SIM115
        if "/state/nfs/" in line and str(zone.scratch) in line:
            yield f"mount {line.split()[1]}"
    for usage in open_quota(zone.site.settings).usage():
        if usage.reserved:
            yield f"{usage.reserved} bytes of the quota of {usage.account}"


# Commits


def check_commits(zone: ChaosZone, written: dict[str, int]) -> Iterator[str]:
    """Check that each manifest was written once. *written* counts the directory's; the bucket keeps versions."""
    yield from (f"primary:{prefix} was committed {count} times" for prefix, count in written.items() if count > 1)
    pages = zone.s3.client().get_paginator("list_object_versions").paginate(Bucket=zone.bucket)
    versions: dict[str, set[str]] = {}
    for page in pages:
        for each in page.get("Versions", []):
            if each["Key"].endswith(f"/{MANIFEST}"):
                versions.setdefault(each["Key"], set()).add(each["ETag"])
    # Two versions with the same bytes are from one attempt, whose first response was lost.
    yield from (f"archive:{key} was committed {len(each)} times" for key, each in versions.items() if len(each) > 1)
