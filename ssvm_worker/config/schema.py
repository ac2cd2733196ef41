"""The settings as values: one model per section, defaults with their reasons. ``config`` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator, model_validator

from ssvm_worker.artifacts.checksums import HEX_LENGTHS
from ssvm_worker.artifacts.layout import ZONE
from ssvm_worker.net.broker_url import check_port, sentinels
from ssvm_worker.net.nfs_url import DEFAULTS as NFS_DEFAULTS
from ssvm_worker.net.nfs_url import check_options
from ssvm_worker.units import GiB, MiB, TiB

from .types import (
    Address,
    Bytes,
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
Addressing = Literal["auto", "path", "virtual"]


def _host(value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        if not each or "/" in each or "@" in each:
            raise ValueError(f"{each!r} is no host: give names such as *.example.com or 10.0.0.5:8443, and no URL")
    return value


def _proxy(value: SecretStr | None) -> SecretStr | None:
    if value and not value.get_secret_value().startswith(("http://", "https://")):
        raise ValueError("must be http://[user:password@]host:port")
    return value


Hosts = Annotated[tuple[str, ...], BeforeValidator(split), AfterValidator(_host)]
S3Proxy = Annotated[SecretStr | None, AfterValidator(_proxy)]


class BrokerSection(SecretFields):
    """Redis or Valkey, which has the ledger of jobs, and who carries the messages."""

    #: redis://[user:password@]host:port/db, rediss://…, redis+socket:///path, sentinel://…, or "embedded".
    url: SecretUrl = SecretUrl("redis://127.0.0.1:6379/0")
    #: amqp://[user:password@]host:port/vhost or amqps://…: RabbitMQ carries the messages; without, url's lists.
    messages: SecretUrl | None = None
    #: Put before every key, channel and queue, where several applications share a broker and ACL rules tell them apart.
    #: A sender must put it before the queue too, so it is empty unless it is needed. RabbitMQ's queues never have it.
    prefix: str = ""
    #: The authority behind their certificates.
    ca_file: Path | None = None
    #: Where Sentinels themselves ask for one.
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
            raise ValueError("must be amqp://… or amqps://…; messages go through broker.url without it")
        return value

    @property
    def embedded(self) -> bool:
        """Whether the worker starts a Valkey of its own."""
        return self.url.get_secret_value() == "embedded"


class WorkerSection(Section):
    """One worker process tree."""

    #: Jobs at once. A transfer keeps about two cores busy.
    concurrency: int = Field(2, ge=1)
    lanes: Annotated[tuple[str, ...], BeforeValidator(split), among(LANES)] = LANES
    #: Seconds that running jobs get at SIGTERM before they are handed over.
    drain_s: Seconds = 60.0
    #: Bytes a second that a store other than the first of a request must take while all others wait for it. A slower
    #: one is left out, and a copy job brings it the artifact later; "unlimited" never leaves one out.
    min_store_rate: Size = 4 * MiB


class LedgerSection(Section):
    """Claims and clean-up of the ledger."""

    #: A worker that does not renew its claim for so long has lost it.
    claim_s: Seconds = 10.0
    #: Seconds between two rounds of the reaper; claim_s + reap_s bounds what a dead worker costs.
    reap_s: Seconds = 2.0
    #: Records of ended jobs are kept for so long.
    keep_days: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0


class RetrySection(Section):
    """How a job that may succeed later is tried again."""

    max_attempts: int = Field(5, ge=1)
    first_delay_s: Seconds = 5.0
    max_delay_s: Seconds = 600.0


class LimitsSection(Section):
    """How many jobs that use the same thing may run at once, by all workers of the broker together; 0: any number."""

    #: One image store of a zone.
    per_store: int = Field(0, ge=0)
    #: The host of a download's URL.
    per_source_host: int = Field(0, ge=0)
    per_account: int = Field(0, ge=0)


class DownloadSection(SecretFields):
    """Where downloads may come from, and how long they may be silent."""

    #: Only public addresses are fetched from, and these.
    allow_networks: Networks = ()
    max_bytes: Bytes = Field(1 * TiB, gt=0)
    max_virtual_size: Bytes = Field(64 * TiB, gt=0)
    #: Bytes that may come out of one that is compressed, once 4 GiB have.
    max_ratio: int = Field(250, ge=1)
    #: Where images are converted, on a local disk.
    scratch_dir: Path | None = None
    connect_timeout_s: Seconds = 10.0
    #: A source that gives less than min_rate bytes a second over so many seconds has stalled.
    stall_s: Seconds = 20.0
    min_rate: Rate = Field(1024, ge=1)
    max_redirects: int = Field(5, ge=0)
    #: How often in a row a stream is taken up again that gives less than 1 MiB, before the attempt fails.
    resumes: int = Field(3, ge=0)
    #: Connections to one server for one download, where it takes ranges and one connection is slow.
    connections: int = Field(4, ge=1, le=16)
    #: Bytes a second of all downloads of this worker together.
    max_rate: Rate | None = Field(None, gt=0)
    #: The kinds of checksums that a request may come with; MD5 and SHA-1 tell damage, but no forgery.
    checksums: Annotated[tuple[str, ...], BeforeValidator(split), among(HEX_LENGTHS)] = tuple(HEX_LENGTHS)
    ca_file: Path | None = None
    #: http://[user:password@]host:port for http and https; names, addresses and networks that are reached without it.
    proxy: SecretUrl | None = None
    no_proxy: Annotated[tuple[str, ...], BeforeValidator(split)] = ()
    #: Public keys for the signatures of checksum files, and whether one that is not signed is refused.
    keyring: Path | None = None
    require_signature: bool = True
    #: file:// URLs may name what lies below these, store: URLs what lies in these.
    allow_directories: Annotated[tuple[Path, ...], BeforeValidator(split)] = ()
    allow_stores: Annotated[tuple[str, ...], BeforeValidator(split)] = ()
    #: Host keys of sftp:// servers.
    known_hosts: Path | None = None


class UploadSection(Section):
    """Where uploads by HTTP may go."""

    #: Uploads go to public addresses only, and to these; those of downloads when absent.
    allow_networks: Networks | None = None
    ca_file: Path | None = None


class StoreSection(SecretFields):
    """One image store. The keys from ``endpoint`` on are S3's."""

    url: Annotated[str, AfterValidator(no_login)]
    #: Of a backup whose primary store it is, unless the request says otherwise.
    backup_mode: Literal["full", "incremental"] = "full"
    endpoint: Annotated[str | None, AfterValidator(no_login)] = None
    region: str = "us-east-1"
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None
    #: Where the bucket's name stands in a URL: path, virtual (in the host's name), or auto: path at an endpoint.
    addressing: Addressing = "auto"
    ca_file: Path | None = None
    #: http://[user:password@]host:port; the environment's proxies are not used.
    proxy: S3Proxy = None
    #: Seconds without a byte, after which a call is given up; of a call that makes an object of its parts, until the
    #: answer.
    stall_s: Seconds = 60.0
    commit_s: Seconds = 600.0


class NfsSection(Section):
    """How this host mounts the exports of stores with an nfs:// URL: docs/nfs.md."""

    #: Where mountpoints, their locks and marks lie; <state_dir>/nfs when absent.
    mount_root: Path | None = None
    #: Mount options of all exports, those of a URL before them.
    options: Annotated[str, BeforeValidator(check_options)] = NFS_DEFAULTS
    #: This host's in the storage network: servers must be reached from it.
    source_address: Address | None = None
    #: The router there, by which servers get a route each where they would be reached from another address.
    gateway: Address | None = None
    #: Seconds that mounting, and unmounting, may take.
    mount_s: Seconds = 30.0
    #: Seconds that a look at an export may take; then its breaker opens, and jobs for it wait.
    probe_s: Seconds = 10.0
    #: Seconds between two looks at those that are mounted.
    probe_every_s: Seconds = 15.0
    #: Seconds that a job may hang in a store that is away; then its process is killed, and the job waits in the queue.
    give_up_s: Seconds = 60.0
    #: Seconds after which a mount that no job has used is unmounted.
    idle_s: Seconds = 900.0


class CredentialsSection(SecretFields):
    """What a job's ``credentials`` names: S3 keys, a user and password, a bearer token, certificates, a key."""

    #: Hosts that may see user, password, token, certificate and private key: names with ``*``, and a port if one is
    #: given. None by default: who sends a request chooses its URL.
    hosts: Hosts = ()
    #: Whether they may also be sent by http:// and ftp://.
    allow_plaintext: bool = False
    #: Buckets that the S3 keys are for, with ``*``; all by default, as the service knows what the keys may do.
    buckets: Annotated[tuple[str, ...], BeforeValidator(split)] = ()
    #: Without keys, use what the SDK finds: the environment's, the machine's role. Needs buckets.
    machine_role: bool = False
    endpoint: Annotated[str | None, AfterValidator(no_login)] = None
    region: str = "us-east-1"
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None
    addressing: Addressing = "auto"
    proxy: S3Proxy = None
    stall_s: Seconds = 60.0
    commit_s: Seconds = 600.0
    username: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None
    ca_file: Path | None = None
    #: Our own certificate with its key, for TLS; a private key for sftp://.
    certificate_file: Path | None = None
    private_key_file: Path | None = None

    @model_validator(mode="after")
    def _role_has_buckets(self) -> CredentialsSection:
        if self.machine_role and (not self.buckets or self.access_key):
            raise ValueError("machine_role needs buckets = [...], and no access_key")
        return self


class VCenterSection(SecretFields):
    """One vCenter or standalone ESXi host; its certificate is checked by ca_file, thumbprint or the system's CAs."""

    host: str
    port: int = 443
    username: str
    password: SecretStr
    ca_file: Path | None = None
    #: SHA-1 or SHA-256 of the certificate, colons or not.
    thumbprint: str | None = None
    #: Seconds for one API call, and for a silent data stream.
    timeout_s: Seconds = 120.0


class BackupSection(Section):
    """How snapshots are exported."""

    #: Ask the guest to bring its file systems to rest; one that cannot is backed up crash-consistently.
    quiesce: bool = True
    #: Seconds that a host may take to get an NFC lease ready.
    lease_ready_s: Seconds = 300.0
    #: Leases for one disk before the attempt fails, and seconds between two of them.
    lease_tries: int = Field(3, ge=1)
    lease_delay_s: Seconds = 15.0
    #: Every Nth grain is inflated and its Adler-32 checked; 0 checks the structure only.
    inflate_every: int = Field(0, ge=0)
    #: Disks of one VM at once, and disks of one ESXi host at once by all workers together.
    parallel_disks: int = Field(2, ge=1)
    per_host: int = Field(2, ge=1)
    #: Hours that the removal of a snapshot, and consolidation, may take.
    remove_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 12.0
    #: Bytes that each disk's stream may have in a scratch file for each store that is slow; 0 for none.
    spill_bytes: Bytes = Field(2 * GiB, ge=0)
    #: Where; <state_dir>/spill when absent.
    spill_dir: Path | None = None


class BootSection(Section):
    """How `ssvm verify --boot` boots a copy of a backup."""

    #: Scratch files and screenshots, on a local disk; <state_dir>/boot when absent.
    dir: Path | None = None
    #: Seconds that a guest gets at the most, and for which its screen must stand still to be done earlier.
    seconds: Seconds = 180.0
    still_s: Seconds = 20.0
    #: Bytes of a guest's memory at the most.
    memory: Bytes = Field(GiB, ge=64 << 20)
    #: KVM runs the guest on the real processor; TCG translates it; auto tries KVM first.
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"


class ScalingSection(Section):
    """How many workers a zone should have: `ssvm scale`, and the metric ssvm_workers_desired."""

    #: Jobs that one worker runs at once; worker.concurrency when absent.
    sessions: int | None = Field(None, ge=1)
    #: Jobs that could begin at once, whatever is running already.
    standby: int = Field(2, ge=0)
    min: int = Field(1, ge=0)
    max: int = Field(10, ge=1)
    #: Seconds of lower demand before there are fewer.
    cool_down_s: Seconds = 600.0

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSection:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}")
        return self


class LinkKey(SecretFields):
    """A key that signs links."""

    secret: SecretStr = Field(min_length=32)


class ServeSection(Section):
    """`ssvm serve`: objects out of directory stores, and uploads in, by signed links."""

    #: HOST:PORT; behind a proxy that speaks TLS, or with the certificate below.
    listen: str = Field("127.0.0.1:8480", pattern=r"^.+:\d{1,5}$")
    #: How others reach it: what links begin with; where it was last started when absent.
    url: str | None = Field(None, pattern=r"^https?://[^?#]+$")
    #: Those that links may be signed with, by name, and the one that signs new links; one of this machine without any.
    keys: dict[str, LinkKey] = Field(default_factory=dict)
    key: str | None = None
    #: Connections at once, and from one address (IPv6: one /64). More close the oldest without a signed request; 503
    #: if there is none.
    max_connections: int = Field(256, ge=1)
    max_per_address: int = Field(32, ge=1)
    #: Proxies before the service: max_per_address does not count their connections, since they are of many clients.
    trusted_proxies: Networks = ()
    #: Whoever takes or gives less than min_rate bytes a second over stall_s seconds is cut off.
    stall_s: Seconds = 60.0
    min_rate: Rate = Field(1024, ge=1)
    #: Seconds that transfers get at SIGTERM.
    drain_s: Seconds = 60.0
    certificate_file: Path | None = None
    private_key_file: Path | None = None


class QuotaSection(Section):
    """Bytes that an account's artifacts may take on all stores together."""

    #: Of every account that is not listed; unlimited when absent.
    default: Size = None
    accounts: dict[str, Size] = Field(default_factory=dict)


class Keep(Section):
    """How many backups of a volume are kept; all 0: every one."""

    keep_last: int = Field(0, ge=0)
    #: The last backup of each of so many days, ISO weeks and months that have one, by UTC.
    keep_daily: int = Field(0, ge=0)
    keep_weekly: int = Field(0, ge=0)
    keep_monthly: int = Field(0, ge=0)


class RetentionSection(Keep):
    """Which backups clean-up keeps: those that any of the numbers keeps."""

    #: In place of all numbers above, for the backups of an account, and for those of a volume ("ACCOUNT/VOLUME").
    accounts: dict[str, Keep] = Field(default_factory=dict)
    volumes: dict[str, Keep] = Field(default_factory=dict)


class LogSection(Section):
    """What is logged, in which form and where. Nothing below info: libraries would tell signed URLs."""

    format: Literal["text", "json", "keyvalue"] = "text"
    level: Literal["info", "warning", "error"] = "info"
    #: unix:///dev/log or udp://host:514, beside standard error.
    syslog: str | None = Field(None, pattern=r"^(unix:///.+|udp://[^/?#@]+/?)$")


class CallbackSection(SecretFields):
    """The POST of the job record at the end."""

    #: Key of the HMAC-SHA256 signature.
    secret: SecretStr | None = None
    #: Seconds for the whole exchange.
    timeout_s: Seconds = 10.0
    max_tries: int = Field(8, ge=1)
    #: Callbacks go to public addresses only, and to these; those of downloads when absent.
    allow_networks: Networks | None = None
    ca_file: Path | None = None


class Settings(Section):
    """All of it."""

    zone: str = Field("zone1", pattern=f"^{ZONE}$")
    state_dir: Path = Path("/var/lib/ssvm")
    broker: BrokerSection = BrokerSection()
    worker: WorkerSection = WorkerSection()
    ledger: LedgerSection = LedgerSection()
    retry: RetrySection = RetrySection()
    limits: LimitsSection = LimitsSection()
    stores: dict[str, StoreSection] = Field(default_factory=dict)
    nfs: NfsSection = NfsSection()
    credentials: dict[str, CredentialsSection] = Field(default_factory=dict)
    download: DownloadSection = DownloadSection()
    upload: UploadSection = UploadSection()
    vcenters: dict[str, VCenterSection] = Field(default_factory=dict)
    backup: BackupSection = BackupSection()
    boot: BootSection = BootSection()
    quota: QuotaSection = QuotaSection()
    retention: RetentionSection = RetentionSection()
    callback: CallbackSection = CallbackSection()
    log: LogSection = LogSection()
    scaling: ScalingSection = ScalingSection()
    serve: ServeSection = ServeSection()

    def networks_of(self, section: UploadSection | CallbackSection) -> Networks:
        """Return the networks that *section* allows beside public addresses; those of downloads if it names none."""
        return self.download.allow_networks if section.allow_networks is None else section.allow_networks
