"""UploadCommand: an upload to an FTP server, which servers before 4.21 can ask for. This agent refuses it.

The Java agent runs curl. The command names no image store, only a path on the Java agent's disk.
"""

from __future__ import annotations

from ssvm_worker.cloudstack.messages import DownloadStatus, UploadAnswer, UploadCommand
from ssvm_worker.cloudstack.services import Services

_TEXT = "This agent does not upload to FTP servers. Extract with the mode HTTP_DOWNLOAD, and fetch the link"


def refuse_upload(_: UploadCommand, __: Services) -> UploadAnswer:
    """Answer with the state of a failed upload, which ends the server's wait."""
    status = DownloadStatus.UPLOAD_ERROR
    return UploadAnswer(upload_pct=0, error_string=_TEXT, upload_status=status, result=False, details=_TEXT)
