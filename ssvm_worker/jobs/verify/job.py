"""Read artifacts again: every object is compared with the manifest, and a backup's disks, OVF and .mf judged."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import ArtifactRequest, Prefix
from ssvm_worker.jobs.usage import record_usage
from ssvm_worker.units import parse_rate

from .artifact import ArtifactCheck
from .boot import boot_check
from .scrub import Scrub, Selection

_REMEDY = "Restore it from another store, or delete it and store it again"


class Request(ArtifactRequest):
    """The artifact to read, or which of all, and where."""

    account: str = Field("", description="The account that owns the artifact; absent for many artifacts")
    id: str = Field("", description="The artifact's id within its account (and volume); absent for many artifacts")
    stores: list[str] = Field(["primary"], min_length=1)
    all: bool = Field(False, description="Every artifact of the stores")
    sample: str = Field("", description="So many artifacts of each store, chosen at random: a number, or N%")
    oldest: int = Field(0, ge=0, description="So many of each store, those first that were not verified for longest")
    prefix: Prefix = Field("", description="With all, sample or oldest: below this place only, as snapshots/ACCOUNT")
    boot: bool = Field(False, description="Boot a restored copy of a backup in QEMU, and keep a screenshot")
    rate: str = Field("", description="Bytes a second at the most: 50MiB/s")

    @field_validator("sample")
    @classmethod
    def _sample(cls, value: str) -> str:
        if value and not re.fullmatch(r"(100|[0-9]{1,2}(\.[0-9]{1,9})?)%|[1-9][0-9]{0,17}", value):
            raise ValueError("must be a number, or a percentage as 5%")
        return value

    @field_validator("rate")
    @classmethod
    def _rate(cls, value: str) -> str:
        if value:
            parse_rate(value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Request:
        ways = [bool(self.account and self.id), self.all, bool(self.sample), bool(self.oldest)]
        if sum(ways) != 1:
            raise ValueError("give account and id, or one of all, sample and oldest")
        if self.prefix and ways[0]:
            raise ValueError("prefix goes with all, sample or oldest")
        if self.boot and not (ways[0] and self.kind == "backup"):
            raise ValueError("boot goes with one backup")
        return self


def resource(request: Request) -> str:  # noqa: ARG001 - every job answers
    """Nothing is written."""
    return ""


def discard(request: Request, attempt: Attempt) -> None:
    """Nothing was written."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Read all that is asked for on every store named; CorruptImage lists what differs or contradicts.

    What was found is noted for each artifact, and what a further attempt finds noted already is not read again. What is
    sound is booted then, if that is asked for, from the first store.
    """
    reading = ArtifactCheck(attempt, parse_rate(request.rate) if request.rate else None)
    if not request.id:
        selection = Selection(request.all, request.sample, request.oldest, request.prefix.strip("/"))
        return Scrub(attempt, reading, selection).run(request.stores)
    return _one(request, attempt, reading)


def _one(request: Request, attempt: Attempt, reading: ArtifactCheck) -> dict[str, Any]:
    found: list[str] = []
    checked = size = 0
    for name in request.stores:
        store = attempt.store(name)
        manifest = read_manifest(store, request.artifact)
        attempt.progress.start(f"verify {name}", manifest.size)
        here = reading.findings(store, manifest)
        reading.note(store, request.artifact, here)
        record_usage(attempt, store, manifest)
        found += here
        checked, size = checked + len(manifest.entries), size + manifest.size
    if found:
        what = f"{len(found)} of {checked} objects are damaged: {'; '.join(found)}"
        raise CorruptImage(what, request.artifact.prefix, _REMEDY)
    told = {"objects": checked, "bytes": size, "stores": request.stores, "recorded": reading.recorded}
    if request.boot:
        return told | {"boot": boot_check(attempt, attempt.store(request.stores[0]), request.artifact)}
    return told
