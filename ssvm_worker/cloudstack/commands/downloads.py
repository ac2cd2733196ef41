"""DownloadCommand and DownloadProgressCommand: a download is one of our jobs, and the ledger has its state.

The id of the job is a digest of the store, the path, the URL, the name and the checksum. So the same command attaches
to the same job, after a reconnect and from another management server. All answers are ready within milliseconds: only
a job that has ended is answered from its manifest.

Differences from the Java agent:

- The Java agent answers DownloadCommand after 3 seconds, and forgets its downloads when it ends. Then the server gets
  UNKNOWN, and sets an error. This agent attaches to the job for any job id.
- While the broker is away, the answer is NOT_DOWNLOADED. The server asks again.
- ``checkSum`` is SHA-256 if the server gives no checksum. The Java agent's is SHA-512. It would take longer than the
  download itself, because processors compute only SHA-256 in hardware. The server stores the text, and repeats it as
  ``checksum`` of the next command. Both agents verify with the algorithm of its prefix.
- ``templatePhySicalSize`` is the size of the file in each answer. The Java agent sends the virtual size in the first.
- ``errorString`` names the problem, the place and the remedy.
- After ABORT or PURGE of a download that has not ended, the answer is DOWNLOAD_ERROR. The Java agent's is
  NOT_DOWNLOADED, which looks unfinished. The server ignores both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ssvm_worker.artifacts.checksums import parse_checksum
from ssvm_worker.artifacts.layout import Artifact, check_key
from ssvm_worker.cloudstack.artifacts import FoundArtifact, find_artifact
from ssvm_worker.cloudstack.image_stores import NamedStore
from ssvm_worker.cloudstack.jobs_to_end import BY, job_id_of
from ssvm_worker.cloudstack.keys import parts_of
from ssvm_worker.cloudstack.messages import (
    DownloadAnswer,
    DownloadCommand,
    DownloadProgressCommand,
    DownloadStatus,
    ProgressRequest,
    ResourceType,
)
from ssvm_worker.cloudstack.ovf_information import read_information
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest, ObjectNotFound, ResourceBusy, Retryable, WorkerError
from ssvm_worker.jobs.cloudstack_properties import java_digest
from ssvm_worker.ledger.record import CANCELLED, FAILED, RUNNING, SUCCEEDED, Beside, NewJob, Record
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import printable

#: Time limit in seconds of the read of a manifest.
_MANIFEST_S = 10.0
#: The algorithm of ``checkSum`` if the server gives no checksum: that of every manifest.
_DEFAULT_DIGEST = "sha256"
#: The schemes that a server may use. A worker has more, for its own senders.
_SCHEMES = ("http", "https", "ftp", "sftp", "scp")
_log = logging.getLogger("ssvm.cloudstack")


@dataclass(frozen=True)
class WantedDownload:
    """One download as a server describes it."""

    command: DownloadCommand
    services: Services

    #: The job that downloads it.
    job: ClassVar[str] = "download"

    @cached_property
    def store(self) -> NamedStore:
        """The store that receives the file."""
        return self.services.stores.find(self.command.store, self.command.nfs_version)

    @cached_property
    def artifact(self) -> Artifact:
        """The artifact at the path of the command. Raises InvalidRequest for another path than those of CloudStack."""
        command = self.command
        path = check_key("/".join(each for each in command.install_path.split("/") if each))
        parts = path.split("/")
        is_volume = command.resource_type is ResourceType.VOLUME
        # The path on S3 has the name of the template as another directory.
        found = Artifact.of_prefix("/".join(parts[: 3 if is_volume else 4]))
        if found.kind != ("volume" if is_volume else "template") or len(parts) > 5:
            raise InvalidRequest(f"The path is not one of a {command.resource_type.lower()}", path)
        kind = "iso" if found.kind == "template" and (command.format or "").upper() == "ISO" else found.kind
        return Artifact(kind, found.account, found.id)

    @property
    def place(self) -> str:
        """The directory of the artifact."""
        return self.artifact.prefix

    @cached_property
    def job_id(self) -> str:
        """The id of the job, without a suffix for a repetition."""
        command = self.command
        content = (self.store.place, self.place, self.url, command.name or "", command.checksum or "")
        return job_id_of(self.job, *content)

    @cached_property
    def url(self) -> str:
        """The URL without user and password."""
        parts = urlsplit(self._given_url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @cached_property
    def _given_url(self) -> str:
        given = self.command.url.get_secret_value()
        parts_of(given)
        scheme = given.partition(":")[0].lower()
        if scheme not in _SCHEMES:
            what = f"Downloads from {printable(scheme[:20])}:// are not allowed"
            raise InvalidRequest(what, "url", f"Give one of {', '.join(_SCHEMES)}")
        return given

    @property
    def algorithm(self) -> str:
        """The algorithm of ``checkSum``: that of the given checksum, else that of the manifest."""
        return parse_checksum(self.command.checksum).algorithm if self.command.checksum else _DEFAULT_DIGEST

    def request(self) -> dict[str, Any]:
        """Return the request of the job. It has no secret of the command, apart from a query of the URL."""
        command, artifact = self.command, self.artifact
        description = "".join(
            each if each.isprintable() and each not in "/\\" else "_" for each in command.description or ""
        )
        size = command.max_download_size_in_bytes
        given = {
            "url": self.url,
            "kind": artifact.kind,
            "account": artifact.account,
            "id": artifact.id,
            "name": description[:255].lstrip("."),
            "unique_name": command.name or artifact.id,
            "format": (command.format or "auto").lower(),
            "checksum": command.checksum or None,
            "stores": [self.store.name],
            "max_bytes": size if size and size > 0 else None,
            "keep_package": True,
            "credentials": self.job_id,
        }
        return {name: value for name, value in given.items() if value is not None}

    def connection(self) -> dict[str, Any]:
        """Return the settings of the connection: login, proxy and redirects. They are secret."""
        command, parts = self.command, urlsplit(self._given_url)
        auth, proxy = command.auth, command.proxy
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if auth and auth.user_name:
            user, password = auth.user_name, auth.password.get_secret_value() if auth.password else ""
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        login = {"username": user, "password": password, "hosts": [host], "allow_plaintext": True} if user else {}
        text = ""
        if proxy and proxy.host:
            secret = f":{quote(proxy.password.get_secret_value(), safe='')}" if proxy.password else ""
            login_of_proxy = f"{quote(proxy.user_name, safe='')}{secret}@" if proxy.user_name else ""
            text = f"http://{login_of_proxy}{proxy.host}:{proxy.port or 3128}"
        return {
            "credentials": login,
            "proxy": text or None,
            # Servers before 4.20 do not send the field. Their agents follow redirects.
            "follow_redirects": command.follow_redirects is not False,
        }

    def find(self) -> FoundArtifact | None:
        """Return the artifact on the store, or None. Raise StoreAway if the store does not answer in time."""
        return self.services.stores.call(self.store, lambda store: find_artifact(store, self.artifact), _MANIFEST_S)


@dataclass(frozen=True)
class WantedSnapshot(WantedDownload):
    """The files of a snapshot, from the secondary storage of another zone. The URL has a line for each file.

    The keys are those of the Java agent: a file whose name begins with the name of its directory stays in it.
    """

    job: ClassVar[str] = "fetch"

    @cached_property
    def place(self) -> str:
        """The directory of the volume's snapshots."""
        path = check_key("/".join(each for each in self.command.install_path.split("/") if each))
        if not path.startswith("snapshots/"):
            raise InvalidRequest("The path is not one of a snapshot", path)
        return "/".join(path.split("/")[:3])

    @cached_property
    def url(self) -> str:
        """All URLs without user and password."""
        return "\n".join(self._urls)

    @cached_property
    def _urls(self) -> list[str]:
        found = []
        for line in self.command.url.get_secret_value().split("\n"):
            if line.strip():
                parts = parts_of(line.strip())
                found.append(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))
        return found

    @cached_property
    def _keys(self) -> list[str]:
        keys = []
        for url in self._urls:
            *_, directory, name = ["", *unquote(urlsplit(url).path).split("/")]
            is_named_by_it = name.startswith(directory or "/") and not directory.isdecimal()
            name = name.removesuffix("_temp")  # a hypervisor has converted it for this copy only
            inside = len(self._urls) > 1 or is_named_by_it
            keys.append(check_key(f"{self.place}/{directory}/{name}" if inside else f"{self.place}/{name}"))
        return keys

    def request(self) -> dict[str, Any]:
        """Return the request of the job."""
        given = {"urls": self._urls, "keys": self._keys, "store": self.store.name, "credentials": self.job_id}
        size = self.command.max_download_size_in_bytes
        return given | ({"max_bytes": size} if size and size > 0 else {})

    def find(self) -> FoundArtifact | None:
        """Return the snapshot, or None if a file is missing. Its path has no extension if it has several files."""

        def find(store: Store) -> FoundArtifact | None:
            try:
                size = sum(store.stat(key).size for key in self._keys)
            except ObjectNotFound:
                return None
            descriptors = [each for each in self._keys if each.endswith(".ovf")]
            path = descriptors[0].removesuffix(".ovf") if len(self._keys) > 1 and descriptors else self._keys[0]
            return FoundArtifact(self.command.name or "", self.command.id, path, 0, size)

        return self.services.stores.call(self.store, find, _MANIFEST_S)


def _wanted(command: DownloadCommand, services: Services) -> WantedDownload:
    kind = WantedSnapshot if command.resource_type is ResourceType.SNAPSHOT else WantedDownload
    return kind(command, services)


@dataclass(frozen=True)
class DownloadState:
    """The job of a download, and its artifact if it has succeeded."""

    record: Record
    found: FoundArtifact | None = None


def download(command: DownloadCommand, services: Services) -> DownloadAnswer:
    """Submit the download or attach to it. A failed one is tried again."""
    return _answered(command, "", lambda wanted: _attach(wanted, again=True), services)


def download_all(commands: Sequence[DownloadCommand | None], services: Services) -> list[DownloadAnswer | None]:
    """Submit new downloads with one request to the broker. Return None for every other command.

    ``download`` answers those: their download is known or invalid, or their store needs a call that may take long.
    """
    given: list[WantedDownload] = []
    jobs: list[tuple[NewJob, Beside | None]] = []
    answers: dict[int, DownloadAnswer] = {}
    for command in commands:
        if command and services.stores.is_known(command.store):
            with suppress(WorkerError):
                wanted = _wanted(command, services)
                jobs.append(_job(wanted, wanted.job_id))
                given.append(wanted)
    with suppress(WorkerError):
        for wanted, (record, is_new) in zip(given, services.jobs.submit_or_find(jobs), strict=True):
            if is_new:
                answers[id(wanted.command)] = _answer(wanted, wanted.job_id, DownloadState(record))
    return [answers.get(id(each)) for each in commands]


def progress(command: DownloadProgressCommand, services: Services) -> DownloadAnswer:
    """Answer with the state of a download.

    ABORT and PURGE cancel it if it has not ended: 4.23 sends PURGE when an account has reached its limit. RESTART
    tries a failed one again. Every other request attaches to it, and submits it if it is unknown. The answer has the
    job id of the command, because the server ignores any other.
    """
    again = command.request is ProgressRequest.RESTART
    given = command.job_id or ""
    # This is what a server sends that has lost the job id.
    known = "" if command.request is ProgressRequest.GET_OR_RESTART and given == "jobid0000" else given
    if command.request in (ProgressRequest.ABORT, ProgressRequest.PURGE):
        answer = _answered(command, known, _stopped, services)
        if command.request is ProgressRequest.ABORT and answer.download_status is DownloadStatus.UNKNOWN:
            return _not_yet(command, known, " ")  # there is nothing to cancel, which is no error
        return answer.model_copy(update=_ovf_of(command, answer, services))
    return _answered(command, known, lambda wanted: _attach(wanted, again=again), services)


def _ovf_of(command: DownloadCommand, answer: DownloadAnswer, services: Services) -> dict[str, Any]:
    """Return the field with the OVF of a downloaded OVA. Only the answer to PURGE has it, as with the Java agent."""
    path = answer.install_path or ""
    if answer.download_status is not DownloadStatus.DOWNLOADED or not path.endswith(".ova"):
        return {}
    wanted = _wanted(command, services)
    try:
        read = partial(read_information, artifact=wanted.artifact)
        return {"ovf_information": services.stores.call(wanted.store, read, _MANIFEST_S)}
    except WorkerError as error:
        _log.warning("the OVF is unknown, so a VM cannot be deployed as it is: %s", error)
        return {}


def _answered(command: DownloadCommand, job_id: str, attach: Any, services: Services) -> DownloadAnswer:
    """Return the answer with the state that *attach* returns, or with the reason why there is none."""
    wanted = _wanted(command, services)
    try:
        job_id = job_id or wanted.job_id
        state = attach(wanted)
        return _answer(wanted, job_id, state) if state else _base(command, job_id, DownloadStatus.UNKNOWN, " ")
    except Retryable as error:
        _log.warning("a download waits: %s", error)
        return _not_yet(command, job_id, str(error))
    except WorkerError as error:
        _log.warning("a download is refused: %s", error)
        return _failed(command, job_id, str(error))


def _attach(wanted: WantedDownload, *, again: bool) -> DownloadState:
    """Return the state of the download, and submit it if it is new or its artifact has been deleted.

    *again*: queue a failed job again, and submit a new one after a cancelled one.
    """
    first = None
    if again:  # A hundred such commands may come at once. So most of them ask the broker only once.
        ((first, is_new),) = wanted.services.jobs.submit_or_find([_job(wanted, wanted.job_id)])
        if is_new:
            return DownloadState(first)
    records = _records(wanted, first)
    record = records[-1] if records else None
    if record and record.state == SUCCEEDED and (found := wanted.find()):
        return DownloadState(record, found)
    if record is None or record.state == SUCCEEDED or (again and _is_cancelled(record)):
        ((record, _),) = wanted.services.jobs.submit_or_find([_job(wanted, _id_of(wanted, len(records)))])
        return DownloadState(record)
    if again and record.state == FAILED:
        wanted.services.names.put_beside(_connection(wanted))
        jobs = wanted.services.jobs
        try:
            record = jobs.retry(record.job_id, by=BY)
        except (InvalidRequest, ResourceBusy):  # another agent was faster
            record = jobs.job(record.job_id)
    return DownloadState(record)


def _is_cancelled(record: Record) -> bool:
    """Return whether the job is cancelled, or its attempt only removes what it has written."""
    return record.state == CANCELLED or (record.cancel_requested and not record.ended)


def _stopped(wanted: WantedDownload) -> DownloadState | None:
    """Cancel the download if it has not ended, and return its state.

    Return None if it is unknown, or if its artifact was deleted.
    """
    records = _records(wanted)
    if not records:
        return None
    record = records[-1]
    if not record.ended and not record.cancel_requested:
        with suppress(InvalidRequest):  # it has ended meanwhile
            wanted.services.jobs.cancel(record.job_id, by=BY)
        record = wanted.services.jobs.job(record.job_id)
    found = wanted.find() if record.state == SUCCEEDED else None
    return DownloadState(record, found) if found or record.state != SUCCEEDED else None


def _records(wanted: WantedDownload, first: Record | None = None) -> list[Record]:
    """Return the records of the download: of the first job, and of each repetition after a deletion or a cancel."""
    found: list[Record] = [first] if first else []
    with suppress(ObjectNotFound):
        while not found or found[-1].state == SUCCEEDED or _is_cancelled(found[-1]):
            found.append(wanted.services.jobs.job(_id_of(wanted, len(found))))
    return found


def _id_of(wanted: WantedDownload, number: int) -> str:
    """Return the id of the first job, or of a repetition."""
    return f"{wanted.job_id}.{number}" if number else wanted.job_id


def _job(wanted: WantedDownload, job_id: str) -> tuple[NewJob, Beside]:
    """Return the job with that id, and its connection."""
    return wanted.services.jobs.new_job(wanted.job, wanted.request() | {"job_id": job_id}), _connection(wanted)


def _connection(wanted: WantedDownload) -> Beside:
    keep_s = wanted.services.settings.ledger.keep_days * 86400
    return wanted.services.names.connection_entry(wanted.job_id, wanted.connection(), keep_s)


def _answer(wanted: WantedDownload, job_id: str, state: DownloadState) -> DownloadAnswer:
    command, record = wanted.command, state.record
    if state.found:
        return _downloaded(wanted, job_id, state.found, record)
    if record.state == FAILED or _is_cancelled(record):
        by = f"The download was cancelled by {record.cancelled_by or 'a user'}"
        return _failed(command, job_id, str((record.error or {}).get("message", "")) or by)
    moved, total = _moved(record)
    is_moving = record.state == RUNNING or moved
    status = DownloadStatus.DOWNLOAD_IN_PROGRESS if is_moving else DownloadStatus.NOT_DOWNLOADED
    # The server takes 100 for the end.
    percent = min(99, moved * 100 // total) if total else 0
    return _base(command, job_id, status, " ").model_copy(
        update={"download_pct": percent, "template_physical_size": moved, "install_path": wanted.place}
    )


def _moved(record: Record) -> tuple[int, int]:
    """Return the bytes of the file so far, and its size or 0."""
    progress = record.progress or {}
    if progress.get("stage") not in ("download", "verifying", "committing"):
        return 0, 0
    return int(progress.get("bytes") or 0), int(progress.get("total") or 0)


def _downloaded(wanted: WantedDownload, job_id: str, found: FoundArtifact, record: Record) -> DownloadAnswer:
    digests = {each.partition(":")[0]: each for each in found.digests}
    digest = digests.get(wanted.algorithm) or next(iter(found.digests), "")
    ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.updated))
    text = f"Install completed successfully at {ended}"
    return _base(wanted.command, job_id, DownloadStatus.DOWNLOADED, text).model_copy(
        update={
            "download_pct": 100,
            "install_path": found.path,
            "template_size": found.virtual_size,
            "template_physical_size": found.physical_size,
            "check_sum": java_digest(digest) if digest else None,
        }
    )


def _failed(command: DownloadCommand, job_id: str, text: str) -> DownloadAnswer:
    return _base(command, job_id, DownloadStatus.DOWNLOAD_ERROR, text)


def _not_yet(command: DownloadCommand, job_id: str, text: str) -> DownloadAnswer:
    return _base(command, job_id, DownloadStatus.NOT_DOWNLOADED, text)


def _base(command: DownloadCommand, job_id: str, status: DownloadStatus, text: str) -> DownloadAnswer:
    """Return an answer without progress. A download that has failed has ``result: true`` too, as the Java agent's."""
    path = command.install_path.rstrip("/")
    given: dict[str, Any] = {
        "job_id": job_id or None,
        "download_pct": 0,
        "error_string": text,
        "download_status": status,
        "download_path": path,
        "install_path": path,
        "template_size": 0,
        "template_physical_size": 0,
        "check_sum": command.checksum,
        "result": True,
        "details": text,
    }
    return DownloadAnswer(**{name: value for name, value in given.items() if value is not None})
