"""What must be true when a round is over, seen with other eyes than the product's where that can be."""

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

from .mix import Content, Mix
from .town import Town

#: What a fault may do to a job for good, until somebody retries it.
_EXCUSED = {
    "WorkerLost",
    *(each.__name__ for each in (errors.SourceUnavailable, errors.StoreUnavailable, errors.LeaseLost)),
    *(each.__name__ for each in (errors.ResourceBusy, errors.StoreFull, errors.Cancelled)),
}
#: What only some faults do: by a clock that is wrong, the vCenter's certificate is not valid yet, or no longer.
_EXCUSED_BY = {"the workers' clock is set": {errors.SourceDenied.__name__}}


def unexplained(record: Record, faults: list[str]) -> list[str]:
    """Errors of the job's attempts that none of the faults explains."""
    explained = _EXCUSED.union(*(_EXCUSED_BY.get(each, ()) for each in faults))
    found = [each.error for each in record.attempts if each.error] + ([record.error] if record.error else [])
    return [f"{record.job_id}: {each['message']}" for each in found if each["error"] not in explained]


# The ledger

#: Keys that are there only while jobs wait or run: queues, turns, limits, slots, what is held of a quota.
_PASSING = (
    *(f"ledger:{each}" for each in ("queues", "running", "picks", "all:*", "q:*", "places:*", "slots:*")),
    *("slots:*", "quota:held:*"),
)


def of_ledger(town: Town, records: list[Record]) -> Iterator[str]:
    """Every job is in one final state, told once, and nothing of a claim is left."""
    prefix = f"{town.site.broker.prefix}ssvm."
    with town.site.broker.client() as client:
        kept: Any = client
        for index in ("claims", "due"):
            if left := kept.zrange(f"{prefix}ledger:{index}", 0, -1):
                yield f"{index} still has {left}"
        for pattern in _PASSING:
            if left := list(kept.scan_iter(prefix + pattern, count=1000)):
                yield f"left in the broker: {left}"
        told = Counter(
            (each["job_id"], each["attempt"])
            for _, each in kept.xrange(f"{prefix}ledger:events")
            if each["state"] == "succeeded"
        )
        states: dict[str, set[str]] = {state: set() for state in _STATES}
        for index in kept.scan_iter(f"{prefix}ledger:in:*", count=1000):
            state = index.removeprefix(f"{prefix}ledger:in:").split(" ")[0]
            states[state].update(kept.zrange(index, 0, -1))
    for record in records:
        yield from _one_end(record, states, told)
    for usage in open_quota(town.site.settings).usage():
        if usage.reserved:
            yield f"{usage.account} still holds {usage.reserved} bytes of its quota"


_STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def _one_end(record: Record, states: dict[str, set[str]], told: Counter[tuple[str, str]]) -> Iterator[str]:
    within = [state for state, ids in states.items() if record.job_id in ids]
    if within != [record.state] or not record.ended:
        yield f"{record.job_id} is {record.state}, and listed as {within}"
    if any(not each.ended for each in record.attempts):
        yield f"{record.job_id} has ended, and an attempt of it has not"
    ends = sum(count for (job_id, _), count in told.items() if job_id == record.job_id)
    if ends != (record.state == "succeeded"):
        yield f"{record.job_id} is {record.state}, and has succeeded {ends} times"


# The stores


def of_stores(town: Town, mix: Mix) -> Iterator[str]:
    """What must stand is whole, byte for byte, and nothing else is there."""
    for (name, place), content in sorted(mix.standing.items()):
        try:
            yield from _whole(town.stores[name], place, content)
        except WorkerError as error:
            yield f"{name}:{place} is not whole: {error}"
    for name, keys in (("primary", _files(town)), ("archive", _objects(town, town.bucket))):
        places = {place for store, place in mix.standing if store == name}
        owners = places | {f"{_family(each)}/{PACKS}" for each in places}
        yield from (f"left on {name}: {each}" for each in sorted(keys) if _owner(each) not in owners)
    for url, data in mix.uploaded.items():
        if _arrived(town, url) != hashlib.sha256(data).digest():
            yield f"what was uploaded to {url} is not whole"


def _whole(store: Store, place: str, content: Content) -> Iterator[str]:
    manifest = Manifest.from_json(read_bytes(store, f"{place}/{MANIFEST}"), place)
    for entry in manifest.entries:
        data = read_bytes(store, f"{place}/{entry.name}")
        if (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") != (entry.size, entry.digest):
            yield f"{store.name}:{place}/{entry.name} is not what its manifest says"
    extra = {each.key for each in store.list(place)} - {f"{place}/{each.name}" for each in manifest.entries}
    if extra != {f"{place}/{MANIFEST}"}:
        yield f"{store.name}:{place} also holds {sorted(extra)}"
    if _content(store, manifest) != content.data:
        yield f"{store.name}:{place} is not what was sent"


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
    """The place of the artifact that has the object, or of its volume's packs; of a part or a draft nobody's."""
    family, packed, _ = key.partition(f"/{PACKS}/")
    if packed:
        return f"{family}/{PACKS}"
    place, _, name = key.rpartition("/")
    return "" if name.startswith(".") or name == DRAFT else place


def _family(place: str) -> str:
    return Artifact.of_prefix(place).family


def _files(town: Town) -> set[str]:
    """All files of the directory, hidden ones too."""
    root = town.site.store
    return {str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()}


def _objects(town: Town, bucket: str) -> set[str]:
    """All objects of a bucket."""
    pages = town.s3.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {each["Key"] for page in pages for each in page.get("Contents", [])}


def _arrived(town: Town, url: str) -> bytes:
    name = url.rpartition("/")[2]
    if not url.startswith("s3://"):
        return hashlib.sha256(town.publisher.stored.get(f"/{name}", b"")).digest()
    return hashlib.sha256(town.s3.client().get_object(Bucket=town.out, Key=name)["Body"].read()).digest()


# What nobody may leave


def leftovers(town: Town) -> Iterator[str]:
    """Open multipart uploads, snapshots, leases, scratch files."""
    for bucket in (town.bucket, town.out):
        uploads = town.s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        yield from (f"open multipart upload: {bucket}/{each['Key']}" for each in uploads)
    state = town.vcenter.state()
    yield from (f"snapshot {each}" for each in state["snapshots"] if each.startswith("ssvm-"))
    yield from (f"lease {id_}" for id_, lease in state["leases"].items() if lease["state"] == "open")
    spill = town.site.directory / "state" / "spill"
    yield from (f"scratch file {each}" for each in spill.rglob("*") if each.is_file())
    for line in open("/proc/mounts"):  # noqa: SIM115
        if "/state/nfs/" in line and str(town.scratch) in line:
            yield f"mount {line.split()[1]}"


# Who has committed


def of_commits(town: Town, written: dict[str, int]) -> Iterator[str]:
    """Each manifest was written once: *written* counts those of the directory, and the bucket keeps versions."""
    yield from (f"primary:{place} was committed {count} times" for place, count in written.items() if count > 1)
    pages = town.s3.client().get_paginator("list_object_versions").paginate(Bucket=town.bucket)
    versions: dict[str, set[str]] = {}
    for page in pages:
        for each in page.get("Versions", []):
            if each["Key"].endswith(f"/{MANIFEST}"):
                versions.setdefault(each["Key"], set()).add(each["ETag"])
    # The same bytes twice are one attempt, whose first answer was lost.
    yield from (f"archive:{key} was committed {len(each)} times" for key, each in versions.items() if len(each) > 1)
