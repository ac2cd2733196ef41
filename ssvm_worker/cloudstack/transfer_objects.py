"""The transfer objects of CloudStack: what a command says about stores, templates, volumes and snapshots.

The names of the fields are those of the Java classes, in Python's spelling; an alias has the name on the wire.
``Wire`` is also the base of the commands and answers in ``messages``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic.alias_generators import to_camel


class Wire(BaseModel):
    """Base of everything in a message.

    Reads as CloudStack's JSON library does: unknown fields are ignored, a null is a missing field, and text of a number
    is a number. A value of a wrong type is an error. Values that may contain a secret are masked in every repr.
    """

    model_config = ConfigDict(
        extra="ignore", frozen=True, hide_input_in_errors=True, alias_generator=to_camel, validate_by_name=True
    )

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON, with their secrets. A field that was never set is absent, as in Gson's output."""
        return self.model_dump(by_alias=True, mode="json", exclude_unset=True)


#: Text that logs must not show. The wire has it in clear.
Secret = Annotated[SecretStr, PlainSerializer(lambda value: value.get_secret_value())]
#: Values that logs must not show, by their names.
Secrets = dict[str, Secret]


class StoreRole(StrEnum):
    """The use of a store."""

    PRIMARY = "Primary"
    IMAGE = "Image"
    IMAGE_CACHE = "ImageCache"
    BACKUP = "Backup"
    OBJECT = "Object"


class NfsTO(Wire):
    """An NFS export."""

    url: str = Field("", alias="_url")
    role: StoreRole | None = Field(None, alias="_role")
    uuid: str | None = None
    nfs_version: str | None = None


class S3TO(Wire):
    """A bucket of an S3 service."""

    id: int | None = None
    uuid: str | None = None
    access_key: Secret | None = None
    secret_key: Secret | None = None
    end_point: str | None = None
    bucket_name: str = ""
    signer: str | None = None
    https_flag: bool | None = None
    use_tcp_keep_alive: bool | None = Field(None, alias="useTCPKeepAlive")
    connection_timeout: int | None = None
    max_error_retry: int | None = None
    socket_timeout: int | None = None
    connection_ttl: int | None = None
    created: str | None = None
    enable_rrs: bool | None = Field(None, alias="enableRRS")
    max_single_upload_size_in_bytes: int | None = None


class SwiftTO(Wire):
    """A container of OpenStack Swift."""

    id: int | None = None
    url: str | None = None
    account: str | None = None
    user_name: str | None = None
    key: Secret | None = None
    storage_policy: str | None = None


class PrimaryDataStoreTO(Wire):
    """A primary storage of hypervisors."""

    uuid: str | None = None
    name: str | None = None
    type: str | None = None
    id: int | None = None
    pool_type: Any = None
    host: str | None = None
    path: str | None = None
    port: int | None = None
    url: Secret | None = None
    details: Secrets | None = None
    full_clone_flag: bool | None = None
    disk_provisioning_strictness_flag: bool | None = None
    is_managed: bool | None = None
    parent_pool_type: Any = None


def _unwrapped(value: Any) -> Any:
    """Return the transfer object of a wrapped field: an object whose only key is the class.

    Raise ValueError for an unknown class.
    """
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("is not an object with the class as its only key")
    ((name, content),) = value.items()
    if name not in TRANSFER_OBJECTS:
        raise ValueError(f"has the unknown class {str(name)[:100]!a}")
    return TRANSFER_OBJECTS[name].model_validate(content)


def _wrapped(value: Any) -> Any:
    return value if value is None else {_NAMES[type(value)]: value.fields()}


class _DataObject(Wire):
    """What the transfer objects of templates, volumes and snapshots have in common."""

    #: The place on its store. For a template or volume: its directory, or a file in it.
    path: str | None = None
    id: int | None = None
    account_id: int | None = None
    name: str | None = None
    physical_size: int | None = None
    hypervisor_type: Any = None
    follow_redirects: bool | None = None
    #: What CloudStack's JSON library writes for a new object: the fields of types that have no null.
    NEW: ClassVar[dict[str, Any]] = {"id": 0, "account_id": 0, "follow_redirects": False}

    @classmethod
    def new(cls, **fields: Any) -> Self:
        """Return a new object as the Java agent makes it for an answer."""
        return cls(**(cls.NEW | fields))

    @property
    def store(self) -> NfsTO | S3TO | SwiftTO | PrimaryDataStoreTO | None:
        """Return the store of the object."""
        raise NotImplementedError


DataStore = Annotated[
    NfsTO | S3TO | SwiftTO | PrimaryDataStoreTO | None,
    BeforeValidator(_unwrapped),
    PlainSerializer(_wrapped),
]


class TemplateObjectTO(_DataObject):
    """A template or an ISO."""

    NEW = _DataObject.NEW | dict.fromkeys(("hvm", "bootable", "direct_download", "deploy_as_is"), False)
    orig_url: Secret | None = None
    uuid: str | None = None
    format: str | None = None
    checksum: str | None = None
    hvm: bool | None = None
    display_text: str | None = None
    image_data_store: DataStore = None
    guest_os_type: str | None = None
    size: int | None = None
    bootable: bool | None = None
    unique_name: str | None = None
    direct_download: bool | None = None
    deploy_as_is: bool | None = None
    deploy_as_is_configuration: str | None = None

    @property
    def store(self) -> NfsTO | S3TO | SwiftTO | PrimaryDataStoreTO | None:
        """Return the store of the template."""
        return self.image_data_store


class VolumeObjectTO(_DataObject):
    """A volume."""

    NEW = _DataObject.NEW | dict.fromkeys(("direct_download", "deploy_as_is"), False)
    uuid: str | None = None
    volume_type: str | None = None
    data_store: DataStore = None
    size: int | None = None
    usable_size: int | None = None
    volume_id: int | None = None
    vm_name: str | None = None
    chain_info: str | None = None
    format: str | None = None
    provisioning_type: str | None = None
    pool_id: int | None = None
    device_id: int | None = None
    cache_mode: str | None = None
    direct_download: bool | None = None
    data_store_uuid: str | None = None
    deploy_as_is: bool | None = None
    updated_data_store_uuid: str | None = Field(None, alias="updatedDataStoreUUID")
    v_sphere_storage_policy_id: str | None = Field(None, alias="vSphereStoragePolicyId")
    passphrase: list[int] | None = Field(None, repr=False)
    encrypt_format: str | None = None
    checkpoint_paths: list[str] | None = None
    checkpoint_image_store_urls: list[Secret] | None = None

    @property
    def store(self) -> NfsTO | S3TO | SwiftTO | PrimaryDataStoreTO | None:
        """Return the store of the volume."""
        return self.data_store


class SnapshotObjectTO(_DataObject):
    """A snapshot, on a primary storage or on an image store."""

    NEW = _DataObject.NEW | dict.fromkeys(("kvm_incremental_snapshot", "quiescevm"), False)
    volume: VolumeObjectTO | None = None
    parent_snapshot_path: str | None = None
    data_store: DataStore = None
    image_store: DataStore = None
    kvm_incremental_snapshot: bool | None = None
    vm_name: str | None = None
    quiescevm: bool | None = None
    parents: list[str] | None = None
    parent_store: DataStore = None
    checkpoint_path: str | None = None

    @property
    def store(self) -> NfsTO | S3TO | SwiftTO | PrimaryDataStoreTO | None:
        """Return the store of the snapshot."""
        return self.data_store


class BackupDeltaTO(_DataObject):
    """A backup of a VM (4.23)."""

    data_store_to: DataStore = Field(None, alias="dataStoreTO")
    screenshot_path: str | None = None
    format: str | None = None

    @property
    def store(self) -> NfsTO | S3TO | SwiftTO | PrimaryDataStoreTO | None:
        """Return the store of the backup."""
        return self.data_store_to


Data = Annotated[
    TemplateObjectTO | VolumeObjectTO | SnapshotObjectTO | BackupDeltaTO | None,
    BeforeValidator(_unwrapped),
    PlainSerializer(_wrapped),
]

#: The classes of wrapped fields, by their full Java names.
TRANSFER_OBJECTS: dict[str, type[Wire]] = {
    **{f"com.cloud.agent.api.to.{each.__name__}": each for each in (NfsTO, S3TO, SwiftTO)},
    **{
        f"org.apache.cloudstack.storage.to.{each.__name__}": each
        for each in (TemplateObjectTO, VolumeObjectTO, SnapshotObjectTO, PrimaryDataStoreTO, BackupDeltaTO)
    },
}
_NAMES = {kind: name for name, kind in TRANSFER_OBJECTS.items()}


class TemplateProp(Wire):
    """One entry of a list of templates or volumes."""

    template_name: str
    install_path: str
    #: Bytes as the guest sees them.
    size: int
    #: Bytes of the file.
    physical_size: int
    id: int = 0
    is_public: bool = False
    is_corrupted: bool = False


class DatadiskTO(Wire):
    """One disk of an OVA."""

    path: str | None = None
    virtual_size: int | None = None
    file_size: int | None = None
    bootable: bool | None = None
    disk_id: str | None = None
    is_iso: bool | None = None
    disk_controller: str | None = None
    disk_controller_sub_type: str | None = None
    disk_number: int | None = None
    configuration: str | None = None


class OVFInformationTO(Wire):
    """What the OVF descriptor of an OVA says. The server uses it for templates that are deployed as they are."""

    properties: list[Any] | None = None
    networks: list[Any] | None = None
    disks: list[DatadiskTO] | None = None
    hardware_section: dict[str, Any] | None = None
    eula_sections: list[Any] | None = None
    guest_os_info: dict[str, Any] | None = None


class PortConfig(Wire):
    """An address that may fetch templates of this zone."""

    add: bool | None = None
    source_ip: str = ""
    port: str | None = None
    intf: str | None = None


class Certificates(Wire):
    """The certificate of the web server that serves links."""

    priv_key: Secret | None = None
    priv_cert: str | None = None
    cert_chain: str | None = None
    root_ca_cert: str | None = Field(None, alias="rootCACert")


class Credentials(Wire):
    """The user and the password of a download."""

    user_name: str | None = None
    password: Secret | None = None


class HttpProxy(Wire):
    """The proxy of a download."""

    host: str | None = Field(None, alias="_host")
    port: int | None = Field(None, alias="_port")
    user_name: str | None = Field(None, alias="_userName")
    password: Secret | None = Field(None, alias="_password")
