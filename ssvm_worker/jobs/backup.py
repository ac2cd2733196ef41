"""Export a VM's snapshot from vCenter to image stores."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ssvm_worker.keys import Artifact
from ssvm_worker.manifest import discard as discard_artifact

from .attempt import Attempt
from .request import JobRequest


class Request(JobRequest):
    """A snapshot to export."""

    vcenter: str = Field(description="The vCenter's name in the settings")
    vm: str = Field(description="Managed object id, instance UUID or inventory path")
    snapshot: str | None = Field(None, description="Managed object id or name; one is made and removed when absent")
    disks: list[str] | None = Field(None, description="Device keys or labels of the disks wanted; all when absent")
    account: str
    volume: str
    id: str
    stores: list[str] = Field(["primary"], min_length=1, description="The first is the primary and must succeed")

    @property
    def artifact(self) -> Artifact:
        """The backup that the request makes."""
        return Artifact("backup", self.account, self.id, self.volume)


def resource(request: Request) -> str:
    """Only one job at a time writes a backup."""
    return request.artifact.prefix


def run(request: Request, attempt: Attempt) -> dict[str, Any]:
    """Store every wanted disk, the OVF descriptor and the checksums; the manifest last."""
    raise NotImplementedError(request, attempt)


def discard(request: Request, attempt: Attempt) -> None:
    """Remove what failed attempts have left on the stores."""
    for name in request.stores:
        discard_artifact(attempt.store(name), request.artifact)
