"""The jobs of a run, and the artifacts that must exist when the jobs have ended."""

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

from .zone import ChaosZone, MiB

BOTH = ["primary", "archive"]
#: Bytes a second of the publisher on each connection. A transfer takes a second or two, so that faults hit it.
_RATE = 2.0 * MiB
#: Above this number of artifacts the workload includes deletes.
_MAX_ARTIFACTS = 12


@dataclass(frozen=True)
class Content:
    """The expected content of an artifact."""

    #: Complete objects: the image, or the disks as the host sent them. For an incremental backup, the raw disks.
    data: tuple[bytes, ...]
    incremental: bool = False


@dataclass
class SubmittedJob:
    """One submitted job."""

    kind: str
    request: dict[str, Any]
    artifact: Artifact
    content: Content | None = None
    job_id: str = ""
    #: Number of retries by an administrator.
    retries: int = 0


@dataclass
class Workload:
    """Submits jobs, at most one for each artifact at a time, and records the expected artifacts."""

    zone: ChaosZone
    rng: Random
    #: The expected artifacts, by store name and prefix.
    expected: dict[tuple[str, str], Content] = field(default_factory=dict)
    #: The expected uploads, by URL.
    uploaded: dict[str, bytes] = field(default_factory=dict)
    #: The jobs of this round.
    jobs: list[SubmittedJob] = field(default_factory=list)
    #: Bytes of all stored downloads, deleted ones included.
    needed: int = 0
    #: Number of stored artifacts on all stores, deleted ones included, and of uploaded objects.
    made: int = 0
    _number: int = 0

    def __post_init__(self) -> None:
        self._vms = [make_vm(self.zone.vcenter, 6 * GRAIN, 10 * GRAIN) for _ in range(2)]
        self._downloads: list[str] = []

    def begin(self) -> None:
        """Start a round: let the guests write to their disks, and stop serving the last round's downloads."""
        self.jobs.clear()
        for path in self._downloads:
            del self.zone.publisher.paths[path]
        self._downloads.clear()
        for vm in self._vms:
            self._write(vm)

    def ask(self, count: int) -> None:
        """Submit *count* random jobs."""
        for _ in range(count):
            self.submit(self._random_job())

    def submit(self, job: SubmittedJob) -> None:
        """Submit one job."""
        job.job_id = self.zone.site.submit(job.kind, **job.request)
        self.jobs.append(job)

    def _random_job(self) -> SubmittedJob:
        kinds: list[Callable[[], SubmittedJob | None]] = (
            [self.download] * 4 + [self._backup] * 2 + [self._copy, self._upload]
        )
        if len(self.expected) > _MAX_ARTIFACTS:
            kinds += [self._delete] * 6
        return self.rng.choice(kinds)() or self.download()

    def download(self, size: int = 0) -> SubmittedJob:
        """Return a download to one store or both. Some have several S3 parts."""
        self._number += 1
        id_, rng = f"t{self._number}", self.rng
        data = rng.randbytes(size or rng.choice([MiB // 2, MiB, 2 * MiB, 3 * MiB, 12 * MiB]))
        rate = _RATE if len(data) < 4 * MiB else 2 * _RATE
        self.zone.publisher.paths[f"/{id_}"] = Behaviour(data, rate=rate, etag=f'"{id_}"')
        self._downloads.append(f"/{id_}")
        request = {
            "url": self.zone.url(id_),
            "account": "acme",
            "id": id_,
            "format": "raw",
            "stores": rng.choice([["primary"], ["archive"], ["archive"], BOTH]),
        }
        if rng.random() < 0.7:
            request["checksum"] = str(digest_of(data))
        return SubmittedJob("download", request, Artifact("template", "acme", id_), Content((data,)))

    def _backup(self) -> SubmittedJob | None:
        number = self.rng.randrange(len(self._vms))
        vm, incremental = self._vms[number], self.rng.random() < 0.5
        self._number += 1
        artifact = Artifact("backup", "acme", f"b{self._number}", f"vol{number}")
        request = {
            "vcenter": "vc",
            "vm": vm.machine.path,
            "account": artifact.account,
            "volume": artifact.volume,
            "id": artifact.id,
            "mode": "incremental" if incremental else "full",
            "stores": self.rng.choice([["primary"], ["archive"], BOTH]),
        }
        return SubmittedJob(
            "backup", request, artifact, Content(tuple(vm.raws if incremental else vm.streams), incremental)
        )

    def _copy(self) -> SubmittedJob | None:
        prefixes = [prefix for store, prefix in self.expected if store == "primary" and ("archive", prefix) not in self]
        if not (prefix := self._unused(prefixes)):
            return None
        request = _fields(prefix) | {"source": "primary", "stores": ["archive"]}
        return SubmittedJob("copy", request, Artifact.of_prefix(prefix), self.expected["primary", prefix])

    def _delete(self) -> SubmittedJob | None:
        if not (prefix := self._unused([prefix for _, prefix in self.expected])):
            return None
        return SubmittedJob("delete", _fields(prefix) | {"stores": BOTH}, Artifact.of_prefix(prefix))

    def _upload(self) -> SubmittedJob | None:
        found = [prefix for store, prefix in self.expected if store == "primary" and prefix.startswith("template/")]
        if not (prefix := self._unused(found)):
            return None
        self._number += 1
        name, content = f"u{self._number}", self.expected["primary", prefix]
        if self.rng.random() < 0.5:
            more = {"url": f"s3://{self.zone.out}/{name}", "credentials": "lab"}
        else:
            self.zone.publisher.take(name)
            more = {"url": self.zone.url(name)}
        return SubmittedJob("upload", _fields(prefix) | more, Artifact.of_prefix(prefix), content)

    def _unused(self, prefixes: list[str]) -> str:
        """Return an artifact that no job of this round uses; "" if there is none."""
        used = {each.artifact.prefix for each in self.jobs}
        left = sorted(set(prefixes) - used)
        return self.rng.choice(left) if left else ""

    def __contains__(self, where: tuple[str, str]) -> bool:
        return where in self.expected

    def _write(self, vm: TestVM) -> None:
        """Let the guest write to a grain of each disk."""
        for number, disk in enumerate(vm.machine.disks):
            raw = bytearray(vm.raws[number])
            offset = self.rng.randrange(len(raw) // GRAIN) * GRAIN
            raw[offset : offset + GRAIN] = self.rng.randbytes(GRAIN)
            vm.raws[number], vm.streams[number] = bytes(raw), stream_optimized(bytes(raw))
            self.zone.vcenter.upload(disk.file, vm.streams[number], vm.machine.datacenter)

    # Actions of users

    def cancel(self) -> None:
        """Cancel one of the jobs of this round, if it has not ended."""
        job = self.rng.choice(self.jobs)
        if job.kind != "delete":  # a cancelled delete leaves an incomplete artifact, which is not an error
            _try(lambda: self.zone.site.ledger.cancel(job.job_id, "chaos"))

    def retry(self, job: SubmittedJob) -> None:
        """Retry an ended job twice, as by a double click. The ledger must refuse the second retry."""
        self.zone.site.ledger.retry(job.job_id, "chaos")
        assert not _try(lambda: self.zone.site.ledger.retry(job.job_id, "chaos")), "the ledger accepted a second retry"
        job.retries += 1

    # Expected results

    def record_outcome(self, job: SubmittedJob, record: Record) -> list[str]:
        """Record the artifacts that must exist after a job. Return the copy jobs for stores that missed it."""
        prefix = job.artifact.prefix
        if record.state != "succeeded":
            return []
        result = record.result or {}
        if job.kind == "delete":
            for store in BOTH:
                self.expected.pop((store, prefix), None)
        elif job.kind == "upload":
            assert job.content
            self.uploaded[job.request["url"]] = job.content.data[0]
            self.made += 1
        else:
            assert job.content
            for store in result.get("stores", []):
                self._add(store, job)
            self.needed += sum(map(len, job.content.data)) if job.kind == "download" else 0
        return [each["copy_job"] for each in result.get("owed", {}).values()]

    def record_copy(self, job: SubmittedJob) -> None:
        """Record that the copy job for a missed store has ended."""
        self._add("archive", job)

    def _add(self, store: str, job: SubmittedJob) -> None:
        assert job.content
        self.expected[store, job.artifact.prefix] = job.content
        self.made += 1


def _fields(prefix: str) -> dict[str, Any]:
    artifact = Artifact.of_prefix(prefix)
    named = {"kind": artifact.kind, "account": artifact.account, "id": artifact.id}
    return named | ({"volume": artifact.volume} if artifact.volume else {})


def _try(act: Callable[[], object]) -> bool:
    """Return whether the action succeeded. A WorkerError is a valid response."""
    try:
        act()
    except WorkerError:
        return False
    return True
