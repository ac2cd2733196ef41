"""Read artifacts again. Compare every object with the manifest, and check the disks, OVF and .mf of backups."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.errors import CorruptImage
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.request import ArtifactRequest, Prefix
from ssvm_worker.jobs.usage import record_usage
from ssvm_worker.units import RATE, parse_rate

from .artifact import ArtifactCheck
from .boot import boot_check
from .scrub import Scrub, Selection

_REMEDY = "Restore it from another store, or delete it and store it again"


#: A percentage or a number.
_SAMPLE = r"(?:100|[0-9]{1,2}(?:\.[0-9]{1,9})?)%|[1-9][0-9]{0,17}"


class Request(ArtifactRequest):
    """The artifact to read, or a selection of artifacts, and the stores."""

    account: str = Field("", description="The account that owns the artifact. Absent for several artifacts")
    id: str = Field("", description="The artifact's id within its account (and volume). Absent for several artifacts")
    stores: list[str] = Field(["primary"], min_length=1, description="The stores of the artifacts")
    all: bool = Field(False, description="Verify every artifact of the stores")
    sample: str = Field(
        "",
        description="Verify this many random artifacts of each store: a number, or N%",
        json_schema_extra={"pattern": f"^(?:{_SAMPLE})?$"},
    )
    oldest: int = Field(0, ge=0, description="Verify this many artifacts of each store, the longest unverified first")
    prefix: Prefix = Field(
        "", description="With all, sample or oldest: only artifacts below this prefix, such as snapshots/ACCOUNT"
    )
    boot: bool = Field(False, description="Boot a restored copy of a backup in QEMU, and keep a screenshot")
    rate: str = Field(
        "",
        description="The most bytes per second, such as 50MiB/s",
        json_schema_extra={"pattern": f"^$|{RATE}"},
    )

    @field_validator("sample")
    @classmethod
    def _sample(cls, value: str) -> str:
        if value and not re.fullmatch(_SAMPLE, value):
            raise ValueError("must be a number, or a percentage such as 5%")
        return value

    @field_validator("rate")
    @classmethod
    def _rate(cls, value: str) -> str:
        if value:
            parse_rate(value)
        return value

    @model_validator(mode="after")
    def _one_selection(self) -> Request:
        ways = [bool(self.account and self.id), self.all, bool(self.sample), bool(self.oldest)]
        if sum(ways) != 1:
            raise ValueError("give account and id, or one of all, sample and oldest")
        if self.prefix and ways[0]:
            raise ValueError("prefix requires all, sample or oldest")
        if self.boot and not (ways[0] and self.kind == "backup"):
            raise ValueError("boot requires account, volume and id of one backup")
        return self


def resource(request: Request) -> str:  # noqa: ARG001 - every job has this function
    """Return "": this job writes no artifact."""
    return ""


def discard(request: Request, attempt: Attempt) -> None:
    """Do nothing: this job writes no artifact."""


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Read the selected artifacts on every store of the request. Raise CorruptImage with all findings.

    The result of each artifact is recorded. A later attempt at the same job skips the recorded artifacts of ``all``.
    With ``boot``, an intact backup is then booted from the first store.
    """
    check = ArtifactCheck(attempt, parse_rate(request.rate) if request.rate else None)
    if not request.id:
        selection = Selection(request.all, request.sample, request.oldest, request.prefix.strip("/"))
        return Scrub(attempt, check, selection).run(request.stores)
    findings: list[str] = []
    objects = size = 0
    for name in request.stores:
        store = attempt.store(name)
        manifest = read_manifest(store, request.artifact)
        attempt.progress.start(f"verify {name}", manifest.size)
        found = check.findings(store, manifest)
        check.record(store, request.artifact, found)
        record_usage(attempt, store, manifest)
        findings += found
        objects, size = objects + len(manifest.entries), size + manifest.size
    if findings:
        what = f"{len(findings)} of {objects} objects are damaged: {'; '.join(findings)}"
        raise CorruptImage(what, request.artifact.prefix, _REMEDY)
    result = {"objects": objects, "bytes": size, "stores": request.stores, "recorded": check.recorded}
    if request.boot:
        return result | {"boot": boot_check(attempt, attempt.store(request.stores[0]), request.artifact)}
    return result
