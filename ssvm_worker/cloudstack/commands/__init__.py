"""Answer the commands of a management server. A family of commands is a module, and a command is a line in HANDLERS.

A handler gets the typed command and returns the typed answer. It only translates: work that takes long is a job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.messages import (
    MESSAGES,
    Answer,
    CopyCmdAnswer,
    CreateDatadiskTemplateAnswer,
    DownloadCommand,
    GetDatadisksAnswer,
    HandleConfigDriveIsoAnswer,
    QuerySnapshotZoneCopyAnswer,
    UnsupportedAnswer,
    decode,
    encode,
)
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.cloudstack.transfer_objects import Wire
from ssvm_worker.errors import WorkerError
from ssvm_worker.units import printable

from . import (
    checksums,
    config_drives,
    copies,
    datadisks,
    deletes,
    downloads,
    firewall,
    ftp_uploads,
    health,
    links,
    lists,
    setup,
    snapshots,
    uploads,
    volumes,
)

__all__ = ["HANDLERS", "Dispatcher", "Handle"]

#: Answers one command. A WorkerError becomes an answer with its text. Several threads may call it at once.
Handle = Callable[[Any, Services], Wire]

#: All commands that this agent answers, by the name of their class. A new command is a line here.
HANDLERS: dict[str, Handle] = {
    "CheckHealthCommand": health.check_health,
    "CopyCommand": copies.copy,
    "CreateDatadiskTemplateCommand": datadisks.create_datadisk_template,
    "GetDatadisksCommand": datadisks.get_datadisks,
    "HandleConfigDriveIsoCommand": config_drives.handle_config_drive,
    "MoveVolumeCommand": volumes.move_volume,
    "QuerySnapshotZoneCopyCommand": snapshots.query_snapshot,
    "SecStorageSetupCommand": setup.set_up_store,
    "GetStorageStatsCommand": setup.storage_stats,
    "DownloadCommand": downloads.download,
    "DownloadProgressCommand": downloads.progress,
    "ListTemplateCommand": lists.list_templates,
    "ListVolumeCommand": lists.list_volumes,
    "ListDataStoreObjectsCommand": lists.list_objects,
    "DeleteCommand": deletes.delete,
    "DeleteSnapshotsDirCommand": deletes.delete_snapshots,
    "ComputeChecksumCommand": checksums.compute_checksum,
    "SecStorageFirewallCfgCommand": firewall.configure_firewall,
    "SecStorageVMSetupCommand": firewall.set_up_vm,
    "CreateEntityDownloadURLCommand": links.create_link,
    "DeleteEntityDownloadURLCommand": links.delete_link,
    "UploadCommand": ftp_uploads.refuse_upload,
    "UploadStatusCommand": uploads.upload_status,
}

#: The classes of answers that a server expects even of a failure. It gets an Answer for all other commands.
FAILURES: dict[str, type[Answer]] = {
    "CopyCommand": CopyCmdAnswer,
    "CreateDatadiskTemplateCommand": CreateDatadiskTemplateAnswer,
    "GetDatadisksCommand": GetDatadisksAnswer,
    "HandleConfigDriveIsoCommand": HandleConfigDriveIsoAnswer,
    "QuerySnapshotZoneCopyCommand": QuerySnapshotZoneCopyAnswer,
}
#: Entries of a command's context that its answer must repeat: with them the server ends its record of the command.
_REPEATED = ("execid", "checkpoint", "checkpoint2")
_log = logging.getLogger("ssvm.cloudstack")


class Dispatcher:
    """Answers commands. Several threads may call it at once. It never raises."""

    def __init__(self, services: Services, handlers: Mapping[str, Handle] = HANDLERS) -> None:
        self._services = services
        self._handlers = handlers

    def __call__(self, message: RawMessage) -> RawMessage:
        """Return the answer to a command.

        An unknown command gets UnsupportedAnswer. An error gets an Answer with ``result: false`` and one line of text,
        because servers show it to users.
        """
        return self._encoded(message, self._answer(message))

    def answer_together(self, messages: Sequence[RawMessage]) -> list[RawMessage | None]:
        """Answer DownloadCommands of new downloads with one request to the broker. Return None for any other.

        No answer waits for a store or for the DNS.
        """
        commands: list[DownloadCommand | None] = []
        for message in messages:
            command = None
            with suppress(WorkerError):
                command = decode(message)
            commands.append(command if type(command) is DownloadCommand else None)
        answers = downloads.download_all(commands, self._services)
        return [
            self._encoded(message, answer) if answer else None
            for message, answer in zip(messages, answers, strict=True)
        ]

    def _encoded(self, message: RawMessage, reply: Wire) -> RawMessage:
        """Return the answer to a message, with what the server needs of the command's context."""
        answer = encode(reply).completed()
        context = message.content.get("contextMap")
        if isinstance(context, dict):
            repeated = {name: context[name] for name in _REPEATED if name in context}
            answer.content["contextMap"] = answer.content["contextMap"] | repeated
        return answer

    def _answer(self, message: RawMessage) -> Wire:
        handle = self._handlers.get(message.short) if message.name in MESSAGES else None
        if handle is None:
            name = printable(message.name)[:200]
            _log.warning("the server sent %s, which this agent does not know", name)
            text = f"Unsupported command issued: {name}.  Are you sure you got the right type of server?"
            return UnsupportedAnswer(result=False, details=text)
        try:
            return handle(decode(message), self._services)
        except WorkerError as error:
            _log.warning("%s failed: %s", message.short, error)
            return FAILURES.get(message.short, Answer)(result=False, details=str(error))
        except Exception as error:  # noqa: BLE001 - a bug must not end the connection
            _log.exception("%s failed because of a bug", message.short)
            kind = type(error).__name__
            return Answer(result=False, details=f"The agent has a bug ({kind}): see its log for {message.short}")
