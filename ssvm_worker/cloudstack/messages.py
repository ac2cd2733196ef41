"""The commands and answers between a management server and an agent, as typed objects.

``decode`` returns the object of a RawMessage, ``encode`` the reverse. Answers of the Java agent that are plain
``com.cloud.agent.api.Answer`` are ``Answer`` here.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

from pydantic import Field, ValidationError

from ssvm_worker.errors import InvalidRequest

from .frame import RawMessage
from .transfer_objects import (
    Certificates,
    Credentials,
    Data,
    DatadiskTO,
    DataStore,
    HttpProxy,
    OVFInformationTO,
    PortConfig,
    Secret,
    Secrets,
    SnapshotObjectTO,
    TemplateObjectTO,
    TemplateProp,
    Wire,
)

_API, _API_STORAGE = "com.cloud.agent.api.", "com.cloud.agent.api.storage."
_COMMAND = "org.apache.cloudstack.storage.command."


class Command(Wire):
    """Base of all commands."""

    #: May contain the password of a vCenter.
    context_map: Secrets | None = None
    wait: int | None = None
    bypass_host_maintenance: bool | None = None


class Answer(Wire):
    """The answer to a command, and the base of all other answers."""

    result: bool = True
    details: str | None = None
    context_map: Secrets | None = None
    wait: int | None = None
    bypass_host_maintenance: bool | None = None


class UnsupportedAnswer(Answer):
    """The answer to a command that this agent does not know."""


# Setup, statistics, checksums


class SecStorageSetupCommand(Command):
    """Mount a store, and set the certificate of links and the key of uploads."""

    store: DataStore = None
    sec_url: str | None = None
    certs: Certificates | None = None
    post_upload_key: Secret | None = None
    nfs_version: str | None = None


class SecStorageSetupAnswer(Answer):
    """The name of the directory in which the store is mounted."""

    dir: str | None = Field(None, alias="_dir")


class SecStorageFirewallCfgCommand(Command):
    """Say which addresses may fetch templates of this zone."""

    port_configs: list[PortConfig] | None = None
    is_append_a_ip: bool = Field(False, alias="isAppendAIp")


class SecStorageVMSetupCommand(Command):
    """Set the internal sites that downloads may use, and the login of zone copies."""

    allowed_internal_sites: list[str] | None = None
    copy_user_name: str | None = None
    copy_password: Secret | None = None


class GetStorageStatsCommand(Command):
    """Ask for the space of a store."""

    id: str | None = None
    local_path: str | None = None
    pooltype: Any = None
    sec_url: str | None = None
    store: DataStore = None
    nfs_version: str | None = None


class GetStorageStatsAnswer(Answer):
    """The space of a store in bytes."""

    used_bytes: int | None = None
    capacity_bytes: int | None = None


class CheckHealthCommand(Command):
    """Ask whether the agent works."""


class CheckHealthAnswer(Answer):
    """The agent works."""


class ComputeChecksumCommand(Command):
    """Ask for the digest of one file."""

    store: DataStore = None
    template_path: str = ""
    algorithm: str | None = None
    sec_url: str | None = None


# Lists


class ListTemplateCommand(Command):
    """Ask for all templates of a store."""

    store: DataStore = None
    nfs_version: str | None = None


class ListTemplateAnswer(Answer):
    """All templates of a store by their unique names."""

    sec_url: str | None = None
    template_infos: dict[str, TemplateProp] | None = None


class ListVolumeCommand(Command):
    """Ask for all volumes of a store."""

    store: DataStore = None
    sec_url: str | None = None


class ListVolumeAnswer(Answer):
    """All volumes of a store by their ids."""

    sec_url: str | None = None
    template_infos: dict[str, TemplateProp] | None = None


class ListDataStoreObjectsCommand(Command):
    """Ask for one page of a directory."""

    store: DataStore = None
    path: str = ""
    start_index: int = 0
    page_size: int = 0


class ListDataStoreObjectsAnswer(Answer):
    """One page of a directory, as parallel lists."""

    path_exists: bool | None = None
    count: int | None = None
    names: list[str] | None = None
    paths: list[str] | None = None
    abs_paths: list[str] | None = None
    is_dirs: list[bool] | None = None
    sizes: list[int] | None = None
    last_modified: list[int] | None = None


# Downloads


class ResourceType(StrEnum):
    """What a download makes."""

    TEMPLATE = "TEMPLATE"
    VOLUME = "VOLUME"
    SNAPSHOT = "SNAPSHOT"


class DownloadCommand(Command):
    """Download a template, volume or snapshot."""

    hvm: bool | None = None
    description: str | None = None
    checksum: str | None = None
    auth: Credentials | None = None
    proxy: HttpProxy | None = Field(None, alias="_proxy")
    max_download_size_in_bytes: int | None = None
    id: int = 0
    resource_type: ResourceType = ResourceType.TEMPLATE
    install_path: str = ""
    store: DataStore = Field(None, alias="_store")
    cache_store: DataStore = None
    follow_redirects: bool | None = None
    url: Secret
    format: str | None = None
    account_id: int | None = None
    name: str | None = None
    sec_url: str | None = None
    nfs_version: str | None = None


class ProgressRequest(StrEnum):
    """What a server wants of a download."""

    GET_STATUS = "GET_STATUS"
    ABORT = "ABORT"
    RESTART = "RESTART"
    PURGE = "PURGE"
    GET_OR_RESTART = "GET_OR_RESTART"


class DownloadProgressCommand(DownloadCommand):
    """Ask for the state of a download, end it, or start it again."""

    job_id: str | None = None
    request: ProgressRequest = ProgressRequest.GET_STATUS


class DownloadStatus(StrEnum):
    """The state of a download, and of other transfers."""

    UNKNOWN = "UNKNOWN"
    DOWNLOAD_ERROR = "DOWNLOAD_ERROR"
    NOT_DOWNLOADED = "NOT_DOWNLOADED"
    DOWNLOAD_IN_PROGRESS = "DOWNLOAD_IN_PROGRESS"
    DOWNLOADED = "DOWNLOADED"
    ABANDONED = "ABANDONED"
    LIMIT_REACHED = "LIMIT_REACHED"
    UPLOADED = "UPLOADED"
    NOT_UPLOADED = "NOT_UPLOADED"
    UPLOAD_ERROR = "UPLOAD_ERROR"
    UPLOAD_IN_PROGRESS = "UPLOAD_IN_PROGRESS"
    CREATING = "CREATING"
    CREATED = "CREATED"
    CREATE_ERROR = "CREATE_ERROR"
    BYPASSED = "BYPASSED"


class DownloadAnswer(Answer):
    """The state of a download."""

    job_id: str | None = None
    download_pct: int = 0
    error_string: str | None = None
    download_status: DownloadStatus | None = None
    download_path: str | None = None
    install_path: str | None = None
    #: Bytes as the guest sees them.
    template_size: int = 0
    #: Bytes of the file; from 4.23 on, so far.
    template_physical_size: int = Field(0, alias="templatePhySicalSize")
    check_sum: str | None = None
    ovf_information: OVFInformationTO | None = Field(None, alias="ovfInformationTO")


# Deletion, copies, moves


class DeleteCommand(Command):
    """Delete a template, volume, snapshot or backup."""

    data: Data = None
    delete_chain: bool | None = None


class BackupDeleteAnswer(Answer):
    """A backup of KVM is not deleted (4.23)."""

    backup_id: int | None = None


class DeleteSnapshotsDirCommand(Command):
    """Delete all snapshots of a volume."""

    store: DataStore = None
    directory: str = ""


class CopyCommand(Command):
    """Copy data between two stores."""

    src: Data = Field(None, alias="srcTO")
    dest: Data = Field(None, alias="destTO")
    cache: Data = Field(None, alias="cacheTO")
    execute_in_sequence: bool | None = None
    options: dict[str, str] | None = None
    options2: dict[str, str] | None = None


class CopyCmdAnswer(Answer):
    """The copy."""

    new_data: Data = None


class MoveVolumeCommand(Command):
    """Move a volume to another directory of its store."""

    src_path: str = ""
    dest_path: str = ""
    volume_name: str | None = None
    volume_uuid: str | None = None
    datastore_uri: str = ""


class QuerySnapshotZoneCopyCommand(Command):
    """Ask for the files of a snapshot that another zone will fetch."""

    snapshot: SnapshotObjectTO | None = None


class QuerySnapshotZoneCopyAnswer(Answer):
    """The files of a snapshot."""

    files: list[str] | None = None


class GetDatadisksCommand(Command):
    """Ask for the disks of an OVA."""

    data: Data = None
    configuration_id: str | None = None


class GetDatadisksAnswer(Answer):
    """The disks of an OVA."""

    data_disk_details: list[DatadiskTO] | None = None


class CreateDatadiskTemplateCommand(Command):
    """Make a template of one disk of an OVA."""

    data_disk_template: Data = None
    path: str = ""
    file_size: int | None = None
    bootable: bool | None = None
    disk_id: str | None = None


class CreateDatadiskTemplateAnswer(Answer):
    """The template of a disk. This field is not wrapped, and its ``id`` must be that of the command."""

    data_disk_template: TemplateObjectTO | None = None


class HandleConfigDriveIsoCommand(Command):
    """Write or delete a config drive."""

    #: Contains the passwords of guests.
    iso_data: Secret | None = None
    iso_file: str = ""
    create: bool = False
    dest_store: DataStore = None
    use_host_cache_on_unsupported_pool: bool | None = None
    prefer_host_cache: bool | None = None


class HandleConfigDriveIsoAnswer(Answer):
    """The place of a config drive."""

    location: str | None = None


# Links and uploads


class CreateEntityDownloadURLCommand(Command):
    """Make a download link. The server chooses its path, which is the secret of the link."""

    install_path: str = ""
    parent: str | None = None
    filename_in_extract_url: Secret = Field(alias="filenameInExtractURL")
    filepath_in_extract_url: Secret | None = Field(None, alias="filepathInExtractURL")
    data: Data = None
    account_id: int | None = None


class CreateEntityDownloadURLAnswer(Answer):
    """Whether the link works."""


class DeleteEntityDownloadURLCommand(Command):
    """Remove a download link."""

    path: str | None = None
    extract_url: Secret | None = None
    type: str | None = None
    parent_path: str | None = None
    account_id: int | None = None


class UploadStatusCommand(Command):
    """Ask for the state of a browser upload, or end it."""

    entity_uuid: str = ""
    entity_type: str | None = None
    abort: bool | None = None


class UploadStatus(StrEnum):
    """The state of a browser upload."""

    UNKNOWN = "UNKNOWN"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    ERROR = "ERROR"


class UploadStatusAnswer(Answer):
    """The state of a browser upload."""

    status: UploadStatus | None = None
    virtual_size: int = 0
    physical_size: int = 0
    install_path: str | None = None
    download_percent: int = 0
    ovf_information: OVFInformationTO | None = Field(None, alias="ovfInformationTO")


class UploadCommand(Command):
    """Upload an object to an FTP server. Servers from 4.21 on cannot send this command."""


class UploadAnswer(Answer):
    """The state of an upload to an FTP server."""

    job_id: str | None = None
    upload_pct: int = 0
    error_string: str | None = None
    upload_status: DownloadStatus | None = None
    upload_path: str | None = None
    install_path: str | None = None
    template_size: int = 0


_PACKAGES: dict[str, tuple[type[Wire], ...]] = {
    _API: (
        *(Answer, UnsupportedAnswer, SecStorageSetupCommand, SecStorageSetupAnswer, SecStorageFirewallCfgCommand),
        *(SecStorageVMSetupCommand, GetStorageStatsCommand, GetStorageStatsAnswer, CheckHealthCommand),
        *(CheckHealthAnswer, ComputeChecksumCommand, DeleteSnapshotsDirCommand, HandleConfigDriveIsoCommand),
        HandleConfigDriveIsoAnswer,
    ),
    _API_STORAGE: (
        *(ListTemplateCommand, ListTemplateAnswer, ListVolumeCommand, ListVolumeAnswer, DownloadAnswer),
        *(CreateEntityDownloadURLCommand, CreateEntityDownloadURLAnswer, DeleteEntityDownloadURLCommand),
        *(GetDatadisksCommand, GetDatadisksAnswer, CreateDatadiskTemplateCommand, CreateDatadiskTemplateAnswer),
        *(UploadCommand, UploadAnswer),
    ),
    _COMMAND: (
        *(DownloadCommand, DownloadProgressCommand, DeleteCommand, CopyCommand, CopyCmdAnswer, MoveVolumeCommand),
        *(QuerySnapshotZoneCopyCommand, QuerySnapshotZoneCopyAnswer, UploadStatusCommand, UploadStatusAnswer),
        BackupDeleteAnswer,
    ),
    f"{_COMMAND}browser.": (ListDataStoreObjectsCommand, ListDataStoreObjectsAnswer),
}

#: The commands and answers by their full Java names.
MESSAGES = {package + kind.__name__: kind for package, kinds in _PACKAGES.items() for kind in kinds}
_NAMES = {kind: name for name, kind in MESSAGES.items()}


def decode(raw: RawMessage) -> Wire:
    """Return the typed message.

    Raise InvalidRequest for an unknown class, a field of a wrong type, and text with a lone surrogate.
    """
    if raw.name not in MESSAGES:
        raise InvalidRequest("Unknown class of a message", ascii(raw.name[:200]))
    try:
        json.dumps(raw.content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("A text of the command is not Unicode", raw.short) from error
    try:
        return MESSAGES[raw.name].model_validate(raw.content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[:5]
        what = "; ".join(f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in found)
        raise InvalidRequest(f"A field of the command has a wrong value: {what}", raw.short) from error


def encode(message: Wire) -> RawMessage:
    """Return the message for a frame, with its secrets."""
    return RawMessage(_NAMES[type(message)], message.fields())
