"""The state of browser uploads. `ssvm serve` receives them, and the ledger's job has their progress and their end.

The Java agent forgets an upload after its first final answer. The ledger keeps it, so a lost answer can be repeated.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from ssvm_worker.artifacts.layout import check_name
from ssvm_worker.cloudstack.artifacts import find_artifact
from ssvm_worker.cloudstack.messages import UploadStatus, UploadStatusAnswer, UploadStatusCommand
from ssvm_worker.cloudstack.ovf_information import read_information
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest, ObjectNotFound
from ssvm_worker.jobs.download.request import Request as DownloadRequest
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.ledger.links import server_link
from ssvm_worker.ledger.record import Record

#: The name by which the record of a job says who has cancelled it.
_BY = "CloudStack"
#: Time limit in seconds of the read of a manifest.
_MANIFEST_S = 10.0


def upload_status(command: UploadStatusCommand, services: Services) -> UploadStatusAnswer:
    """Return the state of an upload. With ``abort``, end it first."""
    uuid = check_name(command.entity_uuid, "uuid")
    if command.abort:
        _end(uuid, services)
    try:
        record = services.jobs.job(server_link(uuid))
    except ObjectNotFound:
        if command.abort:
            return _failed("The upload was cancelled before it began")
        return _answer(UploadStatus.UNKNOWN)
    if record.state == "succeeded":
        return _completed(record, services)
    if record.state in ("failed", "cancelled") or record.cancel_requested:
        # An attempt of a cancelled job only removes the received bytes.
        return _failed(str((record.error or {}).get("what") or "The upload was cancelled"))
    if record.state == "queued" and record.attempts:
        # No client sends. The service has removed the received bytes. The server deletes the template or the volume,
        # so this upload can never continue.
        _end(uuid, services)
        error = record.attempts[-1].error or {}
        return _failed(str(error.get("what") or "The upload was interrupted"))
    return _running(record, services.web.upload(uuid).length)


def _end(uuid: str, services: Services) -> None:
    """Refuse further requests of this upload, stop its job, and let `ssvm serve` remove the rest of it."""
    services.web.abort_upload(uuid)
    if link := services.links.find(server_link(uuid)):
        services.links.revoke(link)
    with contextlib.suppress(ObjectNotFound, InvalidRequest):  # it has not begun, or it has ended
        services.jobs.cancel(server_link(uuid), by=_BY)


def _running(record: Record, length: int) -> UploadStatusAnswer:
    """Return the progress. The size of the file is that of the request, less a few hundred bytes."""
    moved = int((record.progress or {}).get("moved") or 0)
    percent = min(99, moved * 100 // length) if length else 0
    return _answer(UploadStatus.IN_PROGRESS, physical_size=moved, download_percent=percent)


def _completed(record: Record, services: Services) -> UploadStatusAnswer:
    request = parse_request(DownloadRequest, record.request, record.job)
    store = services.stores.named(request.stores[0])
    found = services.stores.call(store, lambda opened: find_artifact(opened, request.artifact), _MANIFEST_S)
    if not found:
        return _failed("The uploaded file has been deleted")
    more: dict[str, Any] = {}
    if found.path.endswith(".ova"):
        read = partial(read_information, artifact=request.artifact)
        more["ovf_information"] = services.stores.call(store, read, _MANIFEST_S)
    return _answer(
        UploadStatus.COMPLETED,
        **more,
        virtual_size=found.virtual_size,
        physical_size=found.physical_size,
        install_path=found.path,
        download_percent=100,
    )


def _failed(details: str) -> UploadStatusAnswer:
    return _answer(UploadStatus.ERROR, result=False, details=details)


def _answer(status: UploadStatus, **given: Any) -> UploadStatusAnswer:
    """Return an answer with the fields that the Java agent always sends, and the given ones."""
    always = {"result": True, "virtual_size": 0, "physical_size": 0, "download_percent": 0}
    return UploadStatusAnswer(status=status, **(always | given))
