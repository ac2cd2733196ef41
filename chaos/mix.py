"""The jobs of a run, and what must be on the stores once they have ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ssvm_worker.artifacts.checksums import digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.record import Record
from tests.images import GRAIN, stream_optimized
from tests.servers.http import Behaviour
from tests.servers.vcenter import TestVM, make_vm

from .town import MiB, Town

BOTH = ["primary", "archive"]
#: Bytes a second of the publisher, on each connection: a transfer takes a second or two, and faults find it.
_RATE = 2.0 * MiB
#: Artifacts that stand; then some are deleted.
_MOST = 12


@dataclass(frozen=True)
class Content:
    """What an artifact must hold."""

    #: Whole objects: the image, or the disks as the host sent them; of an incremental backup the raw disks.
    data: tuple[bytes, ...]
    incremental: bool = False


@dataclass
class Deed:
    """One job that was asked for."""

    job: str
    request: dict[str, Any]
    artifact: Artifact
    content: Content | None = None
    job_id: str = ""
    #: How often somebody has retried it.
    retries: int = 0


@dataclass
class Mix:
    """Asks for jobs, one that writes an artifact at a time, and keeps what must be where."""

    town: Town
    rng: Random
    #: What must stand, by the name of its store and its place.
    standing: dict[tuple[str, str], Content] = field(default_factory=dict)
    #: What must have arrived, by URL.
    uploaded: dict[str, bytes] = field(default_factory=dict)
    #: Of this round.
    deeds: list[Deed] = field(default_factory=list)
    #: Bytes that had to be fetched once for what stands or stood.
    needed: int = 0
    #: Artifacts that stood or stand, on each store, and objects that arrived elsewhere.
    made: int = 0
    _number: int = 0

    def __post_init__(self) -> None:
        self._vms = [make_vm(self.town.vcenter, 6 * GRAIN, 10 * GRAIN) for _ in range(2)]
        self._downloads: list[str] = []

    def begin(self) -> None:
        """A new round: the guests have written to their disks, and what was downloaded need not be served any more."""
        self.deeds.clear()
        for path in self._downloads:
            del self.town.publisher.paths[path]
        self._downloads.clear()
        for vm in self._vms:
            self._write(vm)

    def ask(self, count: int) -> None:
        """Submit so many jobs of any kind."""
        for _ in range(count):
            self.submit(self._any())

    def submit(self, deed: Deed) -> None:
        """Submit one job."""
        deed.job_id = self.town.site.submit(deed.job, **deed.request)
        self.deeds.append(deed)

    def _any(self) -> Deed:
        kinds: list[Callable[[], Deed | None]] = [self.download] * 4 + [self._backup] * 2 + [self._copy, self._upload]
        if len(self.standing) > _MOST:
            kinds += [self._delete] * 6
        return self.rng.choice(kinds)() or self.download()

    def download(self, size: int = 0) -> Deed:
        """A download to one store or both; now and then one that is more than one part of S3."""
        self._number += 1
        id_, rng = f"t{self._number}", self.rng
        data = rng.randbytes(size or rng.choice([MiB // 2, MiB, 2 * MiB, 3 * MiB, 12 * MiB]))
        rate = _RATE if len(data) < 4 * MiB else 2 * _RATE
        self.town.publisher.paths[f"/{id_}"] = Behaviour(data, rate=rate, etag=f'"{id_}"')
        self._downloads.append(f"/{id_}")
        request = {
            "url": self.town.url(id_),
            "account": "acme",
            "id": id_,
            "format": "raw",
            "stores": rng.choice([["primary"], ["archive"], ["archive"], BOTH]),
        }
        if rng.random() < 0.7:
            request["checksum"] = str(digest_of(data))
        return Deed("download", request, Artifact("template", "acme", id_), Content((data,)))

    def _backup(self) -> Deed | None:
        number = self.rng.randrange(len(self._vms))
        vm, incremental = self._vms[number], self.rng.random() < 0.5
        self._number += 1
        it = Artifact("backup", "acme", f"b{self._number}", f"vol{number}")
        request = {
            "vcenter": "vc",
            "vm": vm.machine.path,
            "account": it.account,
            "volume": it.volume,
            "id": it.id,
            "mode": "incremental" if incremental else "full",
            "stores": self.rng.choice([["primary"], ["archive"], BOTH]),
        }
        return Deed("backup", request, it, Content(tuple(vm.raws if incremental else vm.streams), incremental))

    def _copy(self) -> Deed | None:
        places = [place for store, place in self.standing if store == "primary" and ("archive", place) not in self]
        if not (place := self._unused(places)):
            return None
        request = _names(place) | {"source": "primary", "stores": ["archive"]}
        return Deed("copy", request, Artifact.of_prefix(place), self.standing["primary", place])

    def _delete(self) -> Deed | None:
        if not (place := self._unused([place for _, place in self.standing])):
            return None
        return Deed("delete", _names(place) | {"stores": BOTH}, Artifact.of_prefix(place))

    def _upload(self) -> Deed | None:
        found = [place for store, place in self.standing if store == "primary" and place.startswith("template/")]
        if not (place := self._unused(found)):
            return None
        self._number += 1
        name, content = f"u{self._number}", self.standing["primary", place]
        if self.rng.random() < 0.5:
            more = {"url": f"s3://{self.town.out}/{name}", "credentials": "lab"}
        else:
            self.town.publisher.take(name)
            more = {"url": self.town.url(name)}
        return Deed("upload", _names(place) | more, Artifact.of_prefix(place), content)

    def _unused(self, places: list[str]) -> str:
        """One that no job of this round is about."""
        used = {each.artifact.prefix for each in self.deeds}
        left = sorted(set(places) - used)
        return self.rng.choice(left) if left else ""

    def __contains__(self, where: tuple[str, str]) -> bool:
        return where in self.standing

    def _write(self, vm: TestVM) -> None:
        """The guest writes to some grains of each disk."""
        for number, disk in enumerate(vm.machine.disks):
            raw = bytearray(vm.raws[number])
            at = self.rng.randrange(len(raw) // GRAIN) * GRAIN
            raw[at : at + GRAIN] = self.rng.randbytes(GRAIN)
            vm.raws[number], vm.streams[number] = bytes(raw), stream_optimized(bytes(raw))
            self.town.vcenter.upload(disk.file, vm.streams[number], vm.machine.datacenter)

    # What users do

    def cancel(self) -> None:
        """Cancel one of the jobs of this round, if it has not ended."""
        deed = self.rng.choice(self.deeds)
        if deed.job != "delete":  # a delete that is half done is neither whole nor absent, and the user wanted that
            _try(lambda: self.town.site.ledger.cancel(deed.job_id, "chaos"))

    def retry(self, deed: Deed) -> None:
        """Retry an ended job twice, as by a double click; the second one is refused."""
        self.town.site.ledger.retry(deed.job_id, "chaos")
        assert not _try(lambda: self.town.site.ledger.retry(deed.job_id, "chaos")), "a second retry was taken"
        deed.retries += 1

    # What is true then

    def settle(self, deed: Deed, record: Record) -> list[str]:
        """Note what must stand now that the job has ended for good; returns the jobs that owe copies of it."""
        place = deed.artifact.prefix
        if record.state != "succeeded":
            return []
        result = record.result or {}
        if deed.job == "delete":
            for store in BOTH:
                self.standing.pop((store, place), None)
        elif deed.job == "upload":
            assert deed.content
            self.uploaded[deed.request["url"]] = deed.content.data[0]
            self.made += 1
        else:
            assert deed.content
            for store in result.get("stores", []):
                self._stands(store, deed)
            self.needed += sum(map(len, deed.content.data)) if deed.job == "download" else 0
        return [each["copy_job"] for each in result.get("owed", {}).values()]

    def arrived(self, deed: Deed) -> None:
        """The copy that a store was owed has come."""
        self._stands("archive", deed)

    def _stands(self, store: str, deed: Deed) -> None:
        assert deed.content
        self.standing[store, deed.artifact.prefix] = deed.content
        self.made += 1


def _names(place: str) -> dict[str, Any]:
    it = Artifact.of_prefix(place)
    named = {"kind": it.kind, "account": it.account, "id": it.id}
    return named | ({"volume": it.volume} if it.volume else {})


def _try(act: Callable[[], object]) -> bool:
    """Whether it was done; a refusal is an answer."""
    try:
        act()
    except WorkerError:
        return False
    return True
