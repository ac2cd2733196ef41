"""A bucket with its settings and its client. A client never crosses a fork."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import boto3
import botocore.endpoint
import botocore.session
import botocore.utils
from botocore import UNSIGNED
from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ssvm_worker.config.schema import S3Section
from ssvm_worker.errors import ConfigError, Permanent, StoreAway, StoreUnavailable, WorkerError
from ssvm_worker.net.sockets import TICK, Check, StallWatch
from ssvm_worker.units import MiB

from .listing import take_objects
from .responses import asks_to_wait, code_of, is_outage, no_bucket, retry_after, translating
from .stall_watch import call_aside

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DEFAULTS = S3Section()
#: Calls during which the server itself copies bytes.
_LONG_CALLS = ("CompleteMultipartUpload", "UploadPartCopy")
#: Time limit in seconds of an abort after a cancel. A cancel must take effect within 2 seconds.
_ABORT_S = 0.7
#: The longest Retry-After in seconds that a call waits. The job waits longer times.
_MAX_WAIT_S = 2.0
#: The delay in seconds before a call is repeated whose error is temporary at some servers only.
_AGAIN_S = 0.2
_REGION = "us-east-1"
#: The SDK's name of signature version 4, and the name of the worker's signer in the SDK's list.
_V4 = "s3v4"
_V4_KNOWN_DIGEST = "ssvm-s3v4"
#: Amazon's rules are stricter. Older servers also allow capitals and underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
#: A bucket whose name can be a part of a host name.
_HOST_LABEL = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class S3Settings:
    """The settings of an S3 service."""

    #: None: Amazon S3.
    endpoint: str | None = None
    #: None: the region of the profile or the environment, else us-east-1.
    region: str | None = None
    #: None: boto3 searches for keys: in the profile, in the environment, at last the role of the machine.
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    #: A profile of the AWS configuration files. None: AWS_PROFILE, else "default".
    profile: str | None = None
    #: Do not sign requests. Only public objects can be read.
    anonymous: bool = False
    #: The place of the bucket's name in a URL: path, virtual (the host name), or auto (path if an endpoint is set).
    addressing: Literal["auto", "path", "virtual"] = "auto"
    #: A file with trusted certificates. It replaces the system's certificates.
    ca_file: str | None = None
    #: http://[user:password@]host:port. The worker ignores proxies of the environment.
    proxy: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 10.0
    #: Time limit of a call in seconds without a transferred byte.
    stall_s: float = DEFAULTS.stall_s
    #: Minimum rate of a download in bytes per second, averaged over stall_s seconds.
    min_rate: float = 1024.0
    #: Time limit in seconds of a call during which the server itself copies bytes: it joins parts, or copies a part.
    #: Amazon needs minutes to join parts ("processing may take several minutes", CompleteMultipartUpload).
    commit_s: float = DEFAULTS.commit_s
    #: Seconds for which a server may show an older state than the worker's last commit.
    late_s: float = 10.0
    #: The number of tries of one call. The job retries after them.
    tries: int = 3
    #: Minimum bytes of a part. S3 rejects smaller parts than 5 MiB, except the last part.
    part_size: int = 5 * MiB
    #: The number of parts in transfer, if the memory of an upload allows it.
    parallel: int = 4
    #: The directory for the detected features of servers. None: each process detects them.
    notes_dir: str | None = None

    @property
    def account(self) -> tuple[object, ...]:
        """The service and the keys. A service can copy between buckets with the same account."""
        return self.endpoint, self.access_key, self.secret_key, self.profile, self.anonymous


class Bucket:
    """A bucket. Each process creates its client on first use, so that no socket or lock crosses a fork."""

    def __init__(
        self, name: str, settings: S3Settings, check: Check = lambda: None, *, is_image_store: bool = False
    ) -> None:
        """Calls of the client run *check* while they wait. *check* raises if the caller must stop.

        *is_image_store*: while the server is unavailable the job waits, and its attempt does not count.
        """
        if not _BUCKET.fullmatch(name):
            raise ConfigError("Invalid bucket name", repr(name[:80]), "Give s3://BUCKET or s3://BUCKET/PREFIX")
        if (settings.access_key is None) != (settings.secret_key is None):
            raise ConfigError("Only one of access_key and secret_key is set", name, "Set both, or none")
        if settings.access_key and settings.profile:
            raise ConfigError("Both access_key and profile are set", name, "Set one of them")
        self.name = name
        self.settings = settings
        #: Bucket and service, for messages.
        self.location = f"bucket {name} at {settings.endpoint or 'Amazon S3'}"
        self._check = check
        self._is_image_store = is_image_store
        #: The time limit in seconds of calls in threads that clean up.
        self._cleaning = threading.local()
        self._client: S3Client | None = None
        self._process = 0
        self._checked = False
        self._lock = threading.Lock()

    @property
    def client(self) -> S3Client:
        """The client of this process. Thread-safe."""
        with self._lock:
            if self._client is None or self._process != os.getpid():
                self._client, self._process = _connect(self.settings, self.name, self.location), os.getpid()
                self._client.meta.events.register("before-send.s3", self._send)
            return self._client

    @contextlib.contextmanager
    def cleaning(self) -> Iterator[None]:
        """Allow calls of this thread after a cancel while the block runs. Such calls have a short time limit."""
        try:
            self._check()
            self._cleaning.stall_s = self.settings.stall_s
        except WorkerError:
            self._cleaning.stall_s = _ABORT_S
        try:
            yield
        finally:
            self._cleaning.stall_s = 0.0

    def watch(self, stall_s: float | None = None, min_rate: float = 0.0) -> StallWatch:
        """Return a watch for one call, or for the read of one body."""
        if cleaning_s := getattr(self._cleaning, "stall_s", 0.0):
            return StallWatch(lambda: None, cleaning_s, min_rate=0.0)
        return StallWatch(self._check, stall_s or self.settings.stall_s, min_rate)

    def wait(self, seconds: float) -> None:
        """Sleep. Raise the error of the check if the caller must stop."""
        watch, end = self.watch(seconds + 60), time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
            watch.spent(TICK)

    def _send(self, request: Any, event_name: str, **_: Any) -> Any:
        """Send one request of the SDK, and return the SDK's answer."""
        session = self.client._endpoint.http_session  # type: ignore[attr-defined]
        settings = self.settings
        stall_s = settings.commit_s if event_name.rpartition(".")[2] in _LONG_CALLS else settings.stall_s
        # A repeated try reads the body again, and these bytes count as progress, too.
        moved = getattr(request.body, "moved", lambda: 0)
        # A server may be silent behind one proxy and answer behind another.
        server = f"{self.location} by {settings.proxy}"
        return call_aside(server, lambda: session.send(request), self.watch(stall_s), moved)

    @contextlib.contextmanager
    def translating(self, location: str) -> Iterator[None]:
        """Translate the SDK's errors while the block runs. Raise StoreAway if an image store is unavailable."""
        try:
            with translating(location):
                yield
        except StoreAway:
            raise
        except StoreUnavailable as error:
            cause = error.__cause__
            if self._is_image_store and (asks_to_wait(cause) or (is_outage(cause) and not self._answers())):
                away = StoreAway(*error.args)
                away.after_s = error.after_s
                raise away from error.__cause__
            raise

    def _answers(self) -> bool:
        """Return whether the server answers at all. If one call always fails, the job must not repeat it endlessly."""
        try:
            with translating(self.location):
                self.client.head_bucket(Bucket=self.name)
        except StoreUnavailable:
            return False
        except Permanent:
            pass
        return True

    def check(self, again: bool = False) -> None:
        """Raise StoreDenied unless the bucket exists. The bucket asks the server once, or *again*.

        Some servers (SeaweedFS) create a missing bucket at the first write. If the keys do not allow this check, the
        write reports the error.
        """
        if self._checked and not again:
            return
        with self.translating(self.location):
            try:
                self.client.head_bucket(Bucket=self.name)
            except ClientError as error:
                status = code_of(error)[1]
                if status == 404:
                    raise no_bucket(self.location) from error
                if status != 403:
                    raise
        self._checked = True


class _Sessions:
    """The sessions of this process. A forked process starts with a new object, because a lock never crosses a fork."""

    def __init__(self) -> None:
        #: boto3's sessions are not thread-safe.
        self.lock = threading.Lock()
        self._for_explicit_keys: boto3.Session | None = None

    def get(self, settings: S3Settings) -> boto3.Session:
        """Return a session. Only a session that must find keys reads the AWS configuration of user and environment.

        Such a session keeps the keys of files. An operator may replace these keys, so each client has its own session.
        All clients with explicit keys share one, and its models: a second client costs a tenth of the first.
        """
        if settings.access_key is None and not settings.anonymous:
            return boto3.Session(profile_name=settings.profile)
        if self._for_explicit_keys is None:
            nothing = (None, None, None, None)
            own = {"profile": nothing, "region": nothing, "config_file": (None, None, os.devnull, None)}
            self._for_explicit_keys = boto3.Session(botocore_session=botocore.session.Session(session_vars=own))
        return self._for_explicit_keys


_SESSIONS = _Sessions()
os.register_at_fork(after_in_child=_SESSIONS.__init__)  # type: ignore[misc]


def _addressing(settings: S3Settings, bucket: str) -> Literal["auto", "path", "virtual"]:
    """Return the SDK's style. With its own choice, ``auto``, links to a bucket of Amazon name no region.

    Amazon redirects such a link for a new bucket, and the redirected link has a wrong signature.
    """
    if settings.addressing != "auto":
        return settings.addressing
    if settings.endpoint:
        return "path"
    # Amazon's certificates do not cover a host with the dots of a bucket.
    return "virtual" if _HOST_LABEL.fullmatch(bucket) else "auto"


def _connect(settings: S3Settings, bucket: str, location: str) -> S3Client:
    config = Config(
        # Explicit, because presigned URLs for an endpoint would otherwise have version 2, which servers reject.
        signature_version=UNSIGNED if settings.anonymous else _V4,
        s3={"addressing_style": _addressing(settings, bucket)},
        # The SDK's default since 1.36 adds trailers that many servers reject.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=settings.connect_timeout_s,
        # The watch is stricter.
        read_timeout=max(settings.stall_s, settings.commit_s),
        proxies={"http": settings.proxy, "https": settings.proxy} if settings.proxy else {},
        retries={"mode": "standard", "total_max_attempts": settings.tries},
        # The worker has checked the endpoint of the settings. AWS_ENDPOINT_URL must not replace it.
        ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]  # the stubs lack it
        # Several jobs, or copies of one job, may share the client. The SDK opens connections only on demand.
        max_pool_connections=16 * settings.parallel,
    )
    try:
        with _SESSIONS.lock:
            session = _SESSIONS.get(settings)
            client: S3Client = session.client(
                "s3",
                region_name=settings.region or session.region_name or _REGION,
                endpoint_url=settings.endpoint,
                verify=settings.ca_file,
                aws_access_key_id=settings.access_key,
                aws_secret_access_key=settings.secret_key,
                config=config,
            )
    except ValueError as error:
        raise ConfigError(f"The endpoint is not a URL: {error}", location, "Give http(s)://host:port") from error
    except BotoCoreError as error:
        remedy = "Correct the store's profile, AWS_PROFILE, or the AWS configuration files"
        raise ConfigError(f"boto3 cannot use the AWS configuration: {error}", location, remedy) from error
    events = client.meta.events
    for call in ("PutObject", "UploadPart"):
        events.register(f"choose-signer.s3.{call}", _choose_signer)
    events.register("before-sign.s3.UploadPart", _send_at_once)
    # botocore runs handlers of this pattern before its own for s3.*, which parses the body of each answer once more.
    events.register("before-parse.*.ListObjectsV2", take_objects)
    events.register_first("needs-retry.s3", partial(_delay_of_retry, settings.tries))  # type: ignore[arg-type]
    return client


def _send_at_once(request: Any, **_: Any) -> None:
    """Do not ask the server before each part: it has accepted the upload. This saves a round trip for each part."""
    del request.headers["Expect"]


def _delay_of_retry(tries: int, response: Any, attempts: int, **_: Any) -> float | bool | None:
    """Return the seconds until the next try of a call. False: no further try. None: the SDK decides.

    - The SDK knows only Amazon's Retry-After. If the time is long, the job waits instead.
    - SeaweedFS answers InvalidRequest to a valid call if the call loses its connection to the filer. The source is
      `filerErrorToS3Error` in SeaweedFS. The SDK does not repeat a call after this error.
    """
    if not response:
        return None
    http, answer = response
    if http.status_code == 400 and answer.get("Error", {}).get("Code") == "InvalidRequest":
        return _AGAIN_S if attempts < tries else False
    after_s = retry_after(answer)
    if not after_s or http.status_code not in (429, 503):
        return None
    return after_s if after_s <= _MAX_WAIT_S and attempts < tries else False


class _KnownDigestSigner(S3SigV4Auth):
    """A signer for bodies that know their SHA-256. The SDK would hash a part again at each try."""

    def payload(self, request: Any) -> str:
        digest: bytes | None = getattr(request.body, "sha256", None)
        return digest.hex() if digest else str(super().payload(request))


AUTH_TYPE_MAPS[_V4_KNOWN_DIGEST] = _KnownDigestSigner


def _choose_signer(signature_version: Any, **_: Any) -> Any:
    """Replace the SDK's signer, but not for presigned URLs and unsigned requests."""
    return _V4_KNOWN_DIGEST if signature_version == _V4 else None


def _no_proxies(url: str) -> dict[str, str]:  # noqa: ARG001
    return {}


# A patch, because clients that fetch the machine's role have no configuration.
botocore.endpoint.get_environ_proxies = botocore.utils.get_environ_proxies = _no_proxies
