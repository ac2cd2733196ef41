"""Define the settings: one model for each section, with defaults. ``config.load`` fills them."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, SecretStr, field_validator, model_validator

from ssvm_worker.artifacts.checksums import HEX_LENGTHS
from ssvm_worker.artifacts.layout import ZONE
from ssvm_worker.net.broker_url import check_port, sentinels
from ssvm_worker.net.nfs_url import DEFAULTS as NFS_DEFAULTS
from ssvm_worker.net.nfs_url import check_options
from ssvm_worker.net.urls import is_proxy_url
from ssvm_worker.units import GiB, MiB, TiB

from .cloudstack_section import CloudStackSection
from .serve_section import ServeSection
from .types import (
    Address,
    Bytes,
    Directory,
    File,
    HostAddresses,
    MustExist,
    Name,
    Networks,
    Rate,
    Seconds,
    SecretFields,
    SecretUrl,
    Section,
    Size,
    among,
    no_login,
    split,
)

LANES = ("download", "upload", "backup", "maintenance")
#: The version of the documents that other programs exchange with us. Each document has it as ``schema``.
CONTRACT_VERSION = 1
#: How the names of stores and connections begin that a CloudStack management server has named.
SERVER_PREFIX = "cs-"
Addressing = Literal["auto", "path", "virtual"]


def _host(value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        if not each or "/" in each or "@" in each:
            raise ValueError(f"{each!r} is not a host. Give names such as *.example.com or 10.0.0.5:8443, not URLs")
    return value


def _proxy(*schemes: str) -> AfterValidator:
    """Return a validator for the URL of a proxy. Its error does not repeat the URL, which may have a password."""

    def check(value: SecretStr | None) -> SecretStr | None:
        if value and not is_proxy_url(value.get_secret_value(), schemes):
            raise ValueError(f"must be {schemes[0]}://[user:password@]host:port")
        return value

    return AfterValidator(check)


def _visible(value: str) -> str:
    if any(each.isspace() or not each.isprintable() for each in value):
        raise ValueError("may not contain spaces, line breaks or control characters")
    return value


def _server(value: str) -> str:
    """Return a name or an IP address, or raise ValueError. The error names the field of the port."""
    try:
        return str(ipaddress.ip_address(value.strip("[]"))) if ":" in value else _name(value)
    except ValueError:
        name, _, port = value.rpartition(":")
        if port.isdecimal() and "/" not in value:
            raise ValueError(f'has a port. Use the field port: host = "{name}" and port = {port}') from None
        raise ValueError("must be a name or an address, without https:// and path") from None


def _name(value: str) -> str:
    if not value or not _visible(value) or set("/@?#") & set(value):
        raise ValueError(value)
    return value


Hosts = Annotated[tuple[str, ...], BeforeValidator(split), AfterValidator(_host)]
S3Proxy = Annotated[SecretStr | None, _proxy("http", "https")]


class BrokerSection(SecretFields):
    """Redis or Valkey, which stores the ledger of jobs, and the transport of messages."""

    #: redis://[user:password@]host:port/db, rediss://…, redis+socket:///path, sentinel://…, or "embedded".
    url: SecretUrl = SecretUrl("redis://127.0.0.1:6379/0")
    #: amqp://[user:password@]host:port/vhost or amqps://…: RabbitMQ transports the messages. Default: lists in Redis.
    messages: SecretUrl | None = None
    #: Prefix of every key, channel and queue. Needed if several applications share a broker and ACL rules separate
    #: them. Senders must add it to the name of the queue, so it is empty by default. Queues of RabbitMQ never have it.
    prefix: Annotated[str, AfterValidator(_visible)] = ""
    #: CA of the certificates of both servers.
    ca_file: File = None
    #: The password of the Sentinels themselves.
    sentinel_password: SecretStr | None = None

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: SecretUrl) -> SecretUrl:
        url = value.get_secret_value()
        check_port(url)
        if sentinels(url) or url == "embedded":
            return value
        if urlsplit(url).scheme not in ("redis", "rediss", "redis+socket", "unix"):
            raise ValueError('must be redis://…, rediss://…, redis+socket:///path, sentinel://… or "embedded"')
        return value

    @field_validator("messages")
    @classmethod
    def _rabbitmq(cls, value: SecretUrl | None) -> SecretUrl | None:
        if value:
            check_port(value.get_secret_value())
        if value and urlsplit(value.get_secret_value()).scheme not in ("amqp", "amqps"):
            raise ValueError("must be amqp://… or amqps://…. Remove it to send messages through broker.url")
        return value

    @property
    def embedded(self) -> bool:
        """Return whether the worker starts its own Valkey."""
        return self.url.get_secret_value() == "embedded"


class WorkerSection(Section):
    """One worker: a main process with its child processes."""

    #: Concurrent jobs. A transfer uses about two cores.
    concurrency: int = Field(2, ge=1)
    #: Lanes from which the worker takes jobs.
    lanes: Annotated[tuple[str, ...], BeforeValidator(split), among(LANES)] = LANES
    #: Seconds that running jobs get after SIGTERM before they return to the queue.
    drain_s: Seconds = 60.0
    #: The minimum rate in bytes a second of a secondary store while all other stores wait for it. The transfer drops a
    #: slower store, and a copy job copies the artifact to it later. "unlimited": never drop a store.
    min_store_rate: Size = 4 * MiB


class LedgerSection(Section):
    """Claims and clean-up of the ledger."""

    #: Seconds after which a claim expires if its worker does not renew it.
    claim_s: Seconds = 10.0
    #: Seconds between two rounds of the reaper. Jobs of a dead worker wait at most claim_s + reap_s.
    reap_s: Seconds = 2.0
    #: Seconds after which a queued job fails if its zone is unknown: no worker of it was up for a day, and no job of it
    #: has succeeded.
    unknown_zone_s: Seconds = 900.0
    #: Days that records of ended jobs are kept.
    keep_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0


class RetrySection(Section):
    """Retries of jobs with a retryable error."""

    #: Attempts of a job before it fails.
    max_attempts: int = Field(5, ge=1)
    #: The longest delay in seconds before the second attempt. It doubles with each attempt.
    first_delay_s: Seconds = 5.0
    #: The longest delay in seconds.
    max_delay_s: Seconds = 600.0


class LimitsSection(Section):
    """Maximum number of concurrent jobs that share a resource, for all workers of the broker together. 0: no limit."""

    #: Jobs for one image store of a zone.
    per_store: int = Field(0, ge=0)
    #: Downloads from one host.
    per_source_host: int = Field(0, ge=0)
    #: Jobs of one account.
    per_account: int = Field(0, ge=0)


class DownloadSection(SecretFields):
    """Allowed sources and limits of downloads."""

    #: Networks that are allowed in addition to public addresses.
    allow_networks: Networks = ()
    #: The maximum size of a file. A request may set a lower one.
    max_bytes: Bytes = Field(1 * TiB, gt=0)
    #: The maximum size of an image as a guest sees it.
    max_virtual_size: Bytes = Field(64 * TiB, gt=0)
    #: The maximum ratio of decompressed to compressed bytes. It applies above 4 GiB of decompressed bytes.
    max_ratio: int = Field(250, ge=1)
    #: A directory on a local disk for the conversion of images.
    scratch_dir: Directory = None
    #: The timeout in seconds of a connection and its TLS handshake.
    connect_timeout_s: Seconds = 10.0
    #: A source has stalled if it sends less than min_rate during so many seconds.
    stall_s: Seconds = 20.0
    #: The minimum rate in bytes a second of a source.
    min_rate: Rate = Field(1024, ge=1)
    #: The maximum of redirects of one download.
    max_redirects: int = Field(5, ge=0)
    #: Resumptions in a row with less than 1 MiB of progress each. Then the attempt fails.
    resumes: int = Field(3, ge=0)
    #: Parallel connections for one download, if the server supports ranges and one connection is slow.
    connections: int = Field(4, ge=1, le=16)
    #: The maximum rate in bytes a second of all downloads of this worker together.
    max_rate: Rate | None = Field(None, gt=0)
    #: Allowed algorithms of checksums. MD5 and SHA-1 detect damage, but no forgery.
    checksums: Annotated[tuple[str, ...], BeforeValidator(split), among(HEX_LENGTHS)] = tuple(HEX_LENGTHS)
    #: CA of the sources, in addition to those of the system.
    ca_file: File = None
    #: The proxy for http and https: http://[user:password@]host:port.
    proxy: Annotated[SecretUrl | None, _proxy("http")] = None
    #: Names, addresses and networks without the proxy.
    no_proxy: Annotated[tuple[str, ...], BeforeValidator(split)] = ()
    #: Public keys for signatures of checksum files.
    keyring: File = None
    #: Refuse an unsigned checksum file if there is a keyring.
    require_signature: bool = True
    #: Directories that file:// URLs may name.
    allow_directories: Annotated[tuple[Path, ...], BeforeValidator(split), MustExist("directory")] = ()
    #: Image stores that store: URLs may name.
    allow_stores: Annotated[tuple[str, ...], BeforeValidator(split)] = ()
    #: Host keys of sftp:// servers.
    known_hosts: File = None


class UploadSection(Section):
    """Allowed destinations of uploads over HTTP."""

    #: Networks that are allowed in addition to public addresses. Default: download.allow_networks.
    allow_networks: Networks | None = None
    #: CA of the destinations, in addition to those of the system.
    ca_file: File = None


class S3Section(SecretFields):
    """Access to an S3 service."""

    #: The URL of the S3 service. Default: AWS.
    endpoint: Annotated[str | None, AfterValidator(no_login)] = None
    #: The region of the bucket. Default: that of the profile or the environment if boto3 finds the keys there, else
    #: us-east-1.
    region: str | None = None
    #: The S3 access key. Without it, boto3 searches: profile, environment, role of the machine.
    access_key: SecretStr | None = None
    #: The S3 secret key.
    secret_key: SecretStr | None = None
    #: A profile of the AWS configuration files, instead of access_key and secret_key.
    profile: str | None = None
    #: The place of the bucket's name in a URL: in the path, or in the host name (virtual). auto: path if there is an
    #: endpoint, else virtual.
    addressing: Addressing = "auto"
    #: CA of the endpoint, in addition to those of the system.
    ca_file: File = None
    #: http://[user:password@]host:port. The worker ignores proxies of the environment.
    proxy: S3Proxy = None
    #: The timeout in seconds of a call that moves no byte.
    stall_s: Seconds = 60.0
    #: The timeout in seconds of the call that completes a multipart upload.
    commit_s: Seconds = 600.0

    @model_validator(mode="after")
    def _keys_are_a_pair(self) -> Self:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key belong together. Set both, or remove both")
        return self


class StoreSection(S3Section):
    """One image store. All keys but ``url``, ``backup_mode`` and ``shared`` are for S3 only."""

    #: file:///PATH, nfs://SERVER/EXPORT, or s3://BUCKET/PREFIX.
    url: Annotated[str, AfterValidator(no_login)]
    #: The mode of backups whose primary store this is. A request may override it.
    backup_mode: Literal["full", "incremental"] = "full"
    #: Let all users read new files and directories: modes 0644 and 0755 with any umask. Hypervisors and Apache
    #: read the stores of CloudStack. Default: 0640 and 0750. S3 ignores it.
    shared: bool = False


class NfsSection(Section):
    """Mounts of NFS exports on this host: docs/how-to/nfs.md."""

    #: Directory of mount points and their lock files. Default: <state_dir>/nfs.
    mount_root: Path | None = None
    #: Mount options of all exports. Options in a URL take precedence.
    options: Annotated[str, AfterValidator(check_options)] = NFS_DEFAULTS
    #: The address of this host in the storage network. Connections to NFS servers must use it.
    source_address: Address | None = None
    #: The router of the storage network. The worker adds a route for a server if another address would be used.
    gateway: Address | None = None
    #: The timeout in seconds of mount and unmount.
    mount_s: Seconds = 30.0
    #: The timeout in seconds of a check of an export. After it the circuit breaker opens and jobs for the export wait.
    probe_s: Seconds = 10.0
    #: Seconds between two checks of mounted exports.
    probe_every_s: Seconds = 15.0
    #: Seconds that a job may hang in an unavailable store. Then its process is killed and the job returns to the queue.
    give_up_s: Seconds = 60.0
    #: Seconds without a job after which an export is unmounted.
    idle_s: Seconds = 900.0


class CredentialsSection(S3Section):
    """Credentials that a request can name: S3 keys, user and password, bearer token, certificates, private key."""

    #: Hosts that may receive user, password, token, certificate and private key: patterns with ``*`` and an optional
    #: port. Empty by default, because the sender of a request chooses its URL.
    hosts: Hosts = ()
    #: Whether the worker may also send them over http:// and ftp://.
    allow_plaintext: bool = False
    #: Buckets that the S3 keys are valid for, as patterns with ``*``. All by default: the service enforces permissions.
    buckets: Annotated[tuple[str, ...], BeforeValidator(split)] = ()
    #: Without keys: let boto3 find the keys of the machine, as for an image store. Requires buckets.
    machine_role: bool = False
    #: A profile of the AWS configuration files, instead of access_key and secret_key. Requires buckets.
    profile: str | None = None
    #: The user for http, ftp or sftp.
    username: str | None = None
    #: The password of the user.
    password: SecretStr | None = None
    #: The bearer token for http.
    token: SecretStr | None = None
    #: CA of the S3 endpoint or of the hosts, in addition to those of the system.
    ca_file: File = None
    #: A client certificate for TLS.
    certificate_file: File = None
    #: The private key of the client certificate, or for sftp://.
    private_key_file: File = None

    @model_validator(mode="after")
    def _role_has_buckets(self) -> CredentialsSection:
        for name, value in (("machine_role", self.machine_role), ("profile", self.profile)):
            if value and (not self.buckets or self.access_key):
                raise ValueError(f"{name} needs buckets = [...] and excludes access_key")
        return self


class VCenterSection(SecretFields):
    """One vCenter or standalone ESXi host. The worker verifies its certificate by thumbprint, ca_file or system CAs."""

    #: The name or address of the server.
    host: Annotated[str, AfterValidator(_server)]
    #: The port of the API.
    port: int = Field(443, ge=1, le=65535)
    #: The user.
    username: str
    #: The password of the user.
    password: SecretStr
    #: CA of the certificate.
    ca_file: File = None
    #: SHA-1 or SHA-256 of the certificate, with or without colons.
    thumbprint: str | None = None
    #: The timeout in seconds of an API call.
    timeout_s: Seconds = 120.0
    #: The timeout in seconds of a data stream without data. A healthy host is silent while it reads an empty area.
    stream_timeout_s: Seconds = 900.0
    #: Other addresses of ESXi hosts, for a backup network: {"esx1.example" = "10.9.0.11"}. The key is the host's name
    #: in vCenter. The value may have a port. If vCenter gives no thumbprint, the certificate must contain the value.
    hosts: HostAddresses = Field(default_factory=dict)


class BackupSection(Section):
    """Export of snapshots."""

    #: Quiesce the file systems of the guest. if_possible: if that fails, the backup is crash-consistent and has a
    #: warning. required: if that fails, there is no backup. Older settings: true is if_possible, false is no.
    quiesce: Literal["required", "if_possible", "no"] = "if_possible"
    #: Seconds that a host may take to prepare an NFC lease.
    lease_ready_s: Seconds = 300.0
    #: The maximum of leases for one disk in an attempt.
    lease_tries: int = Field(3, ge=1)
    #: Seconds between two leases.
    lease_delay_s: Seconds = 15.0
    #: Inflate every Nth grain and check its Adler-32. 0: check the structure only.
    inflate_every: int = Field(0, ge=0)
    #: If the lease manifest contradicts an intact disk twice: warn keeps the disk with a remark, fail fails the job.
    differing_lease_manifest: Literal["warn", "fail"] = "warn"
    #: Parallel disks of one VM.
    parallel_disks: int = Field(2, ge=1)
    #: Parallel disks of one ESXi host, for all workers together.
    per_host: int = Field(2, ge=1)
    #: VMs with a snapshot of a backup job on one datastore, for all workers together.
    per_datastore: int = Field(4, ge=1)
    #: Percent of free space on the datastores of a VM. Below it, a backup has a warning.
    datastore_warn_percent: float = Field(15.0, ge=0, le=100)
    #: The same. Below it, no backup starts, and a running one ends and removes its snapshot.
    datastore_min_percent: float = Field(10.0, ge=0, le=100)
    #: Seconds without a lease after the VM was switched off, so that it can be switched on. 0: no pause.
    power_off_pause_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    #: The timeout in hours of removing a snapshot, and of consolidation.
    remove_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 12.0
    #: The size in bytes of the scratch file for each disk and each slow store. 0: no scratch files.
    spill_bytes: Bytes = Field(2 * GiB, ge=0)
    #: Directory of the scratch files. Default: <state_dir>/spill.
    spill_dir: Path | None = None

    @field_validator("quiesce", mode="before")
    @classmethod
    def _boolean(cls, value: object) -> object:
        return {"true": "if_possible", "false": "no"}.get(str(value).lower(), value)


class BootSection(Section):
    """Boot of a copied backup by `ssvm verify --boot`."""

    #: Directory on a local disk for scratch files and screenshots. Default: <state_dir>/boot.
    dir: Path | None = None
    #: The maximum of seconds that a guest runs. It ends earlier if its screen is unchanged for still_s seconds.
    seconds: Seconds = 180.0
    #: Seconds without a change of the screen after which the boot has ended.
    still_s: Seconds = 20.0
    #: The maximum of memory of a guest in bytes.
    memory: Bytes = Field(GiB, ge=64 << 20)
    #: KVM runs the guest on the processor. TCG emulates the processor. auto tries KVM first.
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"


class ScalingSection(Section):
    """Desired number of workers in a zone, for `ssvm scale` and the metric ssvm_workers_desired."""

    #: Concurrent jobs of one worker. Default: worker.concurrency.
    sessions: int | None = Field(None, ge=1)
    #: Free capacity for new jobs, in jobs, in addition to the running ones.
    standby: int = Field(2, ge=0)
    #: The minimum number of workers.
    min: int = Field(1, ge=0)
    #: The maximum number of workers.
    max: int = Field(10, ge=1)
    #: Seconds of lower demand before the number of workers decreases.
    cool_down_s: Seconds = 600.0

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSection:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return self


class QuotaSection(Section):
    """Maximum of bytes of the artifacts of an account on all stores together."""

    #: The limit of accounts that are not listed. Default: unlimited.
    default: Size = None
    #: The limit for each account.
    accounts: dict[str, Size] = Field(default_factory=dict)

    def of(self, account: str) -> int | None:
        """Return the limit of an account in bytes. None: no limit."""
        return self.accounts.get(account, self.default)


class RetentionRule(Section):
    """Numbers of backups of a volume that clean-up keeps. If all are 0, it keeps every backup."""

    #: The last backups.
    keep_last: int = Field(0, ge=0)
    #: The last backup of each of so many days (UTC). Only days with a backup count.
    keep_daily: int = Field(0, ge=0)
    #: The same for ISO weeks.
    keep_weekly: int = Field(0, ge=0)
    #: The same for months.
    keep_monthly: int = Field(0, ge=0)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in RetentionRule.model_fields)

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in RetentionRule.model_fields}
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


class RetentionSection(RetentionRule):
    """Rules of clean-up for backups. It keeps a backup if any of the numbers keeps it."""

    #: Numbers for the backups of an account. They replace all numbers above.
    accounts: dict[str, RetentionRule] = Field(default_factory=dict)
    #: Numbers for the backups of a volume ("ACCOUNT/VOLUME"). They replace all numbers above.
    volumes: dict[str, RetentionRule] = Field(default_factory=dict)

    def of(self, account: str, volume: str) -> RetentionRule:
        """Return the rule for the backups of a volume: its own, that of its account, or the default."""
        return self.volumes.get(f"{account}/{volume}", self.accounts.get(account, self))


class LogSection(Section):
    """Level, format and target of logs. There is no debug level, because libraries would log signed URLs."""

    #: text is for people. json and keyvalue have one line for each entry.
    format: Literal["text", "json", "keyvalue"] = "text"
    #: Less important entries are dropped.
    level: Literal["info", "warning", "error"] = "info"
    #: unix:///dev/log or udp://host:514, in addition to standard error.
    syslog: str | None = Field(None, pattern=r"^(unix:///.+|udp://[^/?#@]+/?)$")


class CallbackSection(SecretFields):
    """Callback: the POST of the job record when the job has ended."""

    #: The key of the HMAC-SHA256 signature.
    secret: SecretStr | None = None
    #: The timeout in seconds of the complete request and response.
    timeout_s: Seconds = 10.0
    #: Attempts to deliver a callback.
    max_tries: int = Field(8, ge=1)
    #: Networks that are allowed in addition to public addresses. Default: download.allow_networks.
    allow_networks: Networks | None = None
    #: CA of the receivers, in addition to those of the system.
    ca_file: File = None


class Settings(Section):
    """All settings."""

    #: The zone of this worker. It takes jobs from the queues ssvm.<zone>.<lane>.
    zone: str = Field("zone1", pattern=f"^{ZONE}$")
    #: Directory of the embedded broker, of scratch files and of the state of stores.
    state_dir: Path = Path("/var/lib/ssvm")
    broker: BrokerSection = BrokerSection()
    worker: WorkerSection = WorkerSection()
    ledger: LedgerSection = LedgerSection()
    retry: RetrySection = RetrySection()
    limits: LimitsSection = LimitsSection()
    stores: dict[Name, StoreSection] = Field(default_factory=dict)
    nfs: NfsSection = NfsSection()
    credentials: dict[Name, CredentialsSection] = Field(default_factory=dict)
    download: DownloadSection = DownloadSection()
    upload: UploadSection = UploadSection()
    vcenters: dict[Name, VCenterSection] = Field(default_factory=dict)
    backup: BackupSection = BackupSection()
    boot: BootSection = BootSection()
    quota: QuotaSection = QuotaSection()
    retention: RetentionSection = RetentionSection()
    callback: CallbackSection = CallbackSection()
    log: LogSection = LogSection()
    scaling: ScalingSection = ScalingSection()
    serve: ServeSection = ServeSection()
    cloudstack: CloudStackSection = CloudStackSection()

    #: Stores of a management server. No job of these settings can name them, and no URL may point into them.
    _guarded: dict[str, StoreSection] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_free(self) -> Settings:
        """Refuse names that stores and connections of a management server have."""
        for section, names in (
            ("stores", self.stores),
            ("credentials", self.credentials),
            ("download.allow_stores", self.download.allow_stores),
        ):
            for name in names:
                if name.startswith(SERVER_PREFIX):
                    raise ValueError(
                        f"{section}: {name} may not begin with {SERVER_PREFIX}; the agent makes such names"
                    )
        return self

    @property
    def guarded_stores(self) -> dict[str, StoreSection]:
        """Return the stores into which no URL of a job may point."""
        return self._guarded | self.stores

    def guarding(self, stores: dict[str, StoreSection]) -> Settings:
        """Return the settings with more stores that no URL may point into. No job can name them."""
        guarding = self.model_copy()
        guarding._guarded = stores
        return guarding

    def is_of_cloudstack(self, store: str) -> bool:
        """Return whether a management server uses that store. Then others write there too, without manifests."""
        return store.startswith(SERVER_PREFIX) or store in self.cloudstack.stores.values()

    def networks_of(self, section: UploadSection | CallbackSection) -> Networks:
        """Return the networks that *section* allows in addition to public addresses, or else those of downloads."""
        return self.download.allow_networks if section.allow_networks is None else section.allow_networks

    @property
    def boot_dir(self) -> Path:
        """Return the directory of booted copies and screenshots."""
        return self.boot.dir or self.state_dir / "boot"

    @property
    def spill_dir(self) -> Path:
        """Return the directory of scratch files of backups."""
        return self.backup.spill_dir or self.state_dir / "spill"

    @property
    def mount_root(self) -> Path:
        """Return the directory of NFS mount points."""
        return self.nfs.mount_root or self.state_dir / "nfs"
