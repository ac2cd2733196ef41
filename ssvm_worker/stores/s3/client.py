"""One bucket and how to reach it: settings, and a client that never crosses a fork."""

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

import botocore.endpoint
import botocore.session
import botocore.utils
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.loaders import Loader

from ssvm_worker.errors import ConfigError, Permanent, StoreAway, StoreUnavailable, WorkerError
from ssvm_worker.net.sockets import TICK, Check, StallWatch
from ssvm_worker.units import MiB

from .errors import asks_to_wait, code_of, is_outage, no_bucket, retry_after, translating
from .signer import sign_by_known_digest
from .stall_watch import call_aside

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Calls for which the server itself moves bytes.
_LONG = ("CompleteMultipartUpload", "UploadPartCopy")
#: Seconds that an abort may take after a cancel, which must take effect within 2.
_AT_ONCE_S = 0.7
#: Seconds of Retry-After that are waited at once.
_FEW_S = 2.0
#: Amazon's rules are narrower; older servers also have capitals and underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")


@dataclass(frozen=True)
class S3Settings:
    """How to reach an S3 service."""

    #: None for Amazon's own.
    endpoint: str | None = None
    region: str = "us-east-1"
    #: None for the machine's own role, or what the SDK finds in the environment.
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    #: Sign nothing: what is public can be read.
    anonymous: bool = False
    #: Where the bucket's name stands in a URL: path, virtual (in the host's name), or auto: path at an endpoint.
    addressing: Literal["auto", "path", "virtual"] = "auto"
    #: Certificates to trust in place of the system's.
    ca_file: str | None = None
    #: http://[user:password@]host:port. The environment's proxies are not used.
    proxy: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 10.0
    #: Seconds without a byte, after which a call is given up.
    stall_s: float = 60.0
    #: Bytes a second, over stall_s seconds, that an object must come with.
    min_rate: float = 1024.0
    #: The same of a call for which the server itself moves bytes: it makes an object of its parts, or copies a part.
    #: Amazon takes minutes for the former ("processing may take several minutes", CompleteMultipartUpload).
    commit_s: float = 600.0
    #: Seconds for which a server may show another state than that of our own last commit.
    late_s: float = 10.0
    #: Tries of one call; the job's own retry comes after them.
    tries: int = 3
    #: Bytes of a part at the least. S3 takes no less than 5 MiB, but for the last part.
    part_size: int = 5 * MiB
    #: Parts under way at once, as far as the memory of an upload allows.
    parallel: int = 5
    #: Where this host keeps what it has found out of servers; None: in each process only.
    notes_dir: str | None = None

    @property
    def account(self) -> tuple[object, ...]:
        """Whose keys at which service: what two buckets must share for the service to copy between them."""
        return self.endpoint, self.access_key, self.secret_key, self.anonymous


class Bucket:
    """A bucket; its client is made when it is first used in a process, so that no socket or lock crosses a fork."""

    def __init__(self, name: str, settings: S3Settings, check: Check = lambda: None, *, ours: bool = False) -> None:
        """*check* is called while a call waits, and raises if the caller must stop.

        *ours*: it is an image store's. The job waits until that answers again, and no attempt is counted.
        """
        if not _BUCKET.fullmatch(name):
            raise ConfigError("That is no name of a bucket", repr(name[:80]), "Give s3://BUCKET or s3://BUCKET/PREFIX")
        if (settings.access_key is None) != (settings.secret_key is None):
            raise ConfigError("Of access_key and secret_key only one is set", name, "Set both, or none")
        self.name = name
        self.settings = settings
        #: For messages.
        self.place = f"bucket {name} at {settings.endpoint or 'Amazon S3'}"
        self._check = check
        self._ours = ours
        #: Of each thread that cleans up, the seconds that its calls may take.
        self._cleaning = threading.local()
        self._client: S3Client | None = None
        self._process = 0
        self._seen = False
        self._lock = threading.Lock()

    @property
    def client(self) -> S3Client:
        """The client of this process; safe in several threads."""
        with self._lock:
            if self._client is None or self._process != os.getpid():
                self._client, self._process = _connect(self.settings, self.place), os.getpid()
                self._client.meta.events.register("before-send.s3", self._send)
            return self._client

    @contextlib.contextmanager
    def cleaning(self) -> Iterator[None]:
        """Within, calls of this thread are made though the caller must stop, but then they must be answered at once."""
        try:
            self._check()
            self._cleaning.stall_s = self.settings.stall_s
        except WorkerError:
            self._cleaning.stall_s = _AT_ONCE_S
        try:
            yield
        finally:
            self._cleaning.stall_s = 0.0

    def watch(self, stall_s: float | None = None, min_rate: float = 0.0) -> StallWatch:
        """Return a watch for one call, or for one body that is read."""
        if short_s := getattr(self._cleaning, "stall_s", 0.0):
            return StallWatch(_unchecked, short_s, min_rate=0.0)
        return StallWatch(self._check, stall_s or self.settings.stall_s, min_rate)

    def wait(self, seconds: float) -> None:
        """Sleep, unless the caller must stop."""
        watch, end = self.watch(seconds + 60), time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
            watch.spent(TICK)

    def _send(self, request: Any, event_name: str, **_: Any) -> Any:
        """Send one request of the SDK, and return the SDK's answer."""
        session = self.client._endpoint.http_session  # type: ignore[attr-defined]
        settings = self.settings
        stall_s = settings.commit_s if event_name.rpartition(".")[2] in _LONG else settings.stall_s
        # A try again reads the body again: what counts is that it moves.
        moved = getattr(request.body, "moved", lambda: 0)
        # A server that is silent behind one proxy may answer behind another.
        server = f"{self.place} by {settings.proxy}"
        return call_aside(server, lambda: session.send(request), self.watch(stall_s), moved)

    @contextlib.contextmanager
    def translating(self, where: str) -> Iterator[None]:
        """Raise our errors in place of the SDK's; StoreAway while an image store serves nobody."""
        try:
            with translating(where):
                yield
        except StoreAway:
            raise
        except StoreUnavailable as error:
            if self._ours and (asks_to_wait(error.__cause__) or (is_outage(error.__cause__) and not self._serves())):
                away = StoreAway(*error.args)
                away.after_s = error.after_s
                raise away from error.__cause__
            raise

    def _serves(self) -> bool:
        """Whether the server answers anything: one call that always fails must not be repeated for ever."""
        try:
            with translating(self.place):
                self.client.head_bucket(Bucket=self.name)
        except StoreUnavailable:
            return False
        except Permanent:
            pass
        return True

    def check(self, again: bool = False) -> None:
        """Raise StoreDenied unless the bucket exists; asks once, or *again*.

        Some servers (SeaweedFS) make a missing bucket at the first write. Where we may not ask, the write will tell.
        """
        if self._seen and not again:
            return
        with self.translating(self.place):
            try:
                self.client.head_bucket(Bucket=self.name)
            except ClientError as error:
                status = code_of(error)[1]
                if status == 404:
                    raise no_bucket(self.place) from error
                if status != 403:
                    raise
        self._seen = True


def _connect(settings: S3Settings, place: str) -> S3Client:
    style = "path" if settings.endpoint and settings.addressing == "auto" else settings.addressing
    config = Config(
        # Said aloud, or presigned URLs for an endpoint are of version 2, which servers refuse.
        signature_version=UNSIGNED if settings.anonymous else "s3v4",
        s3={"addressing_style": style},
        # The SDK's own default since 1.36 adds trailers that many servers refuse.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=settings.connect_timeout_s,
        # The watch is stricter.
        read_timeout=max(settings.stall_s, settings.commit_s),
        proxies={"http": settings.proxy, "https": settings.proxy} if settings.proxy else {},
        retries={"mode": "standard", "total_max_attempts": settings.tries},
        # Several jobs, or copies of one job, may share the client; what is not used is not opened.
        max_pool_connections=16 * settings.parallel,
    )
    try:
        client = _client_of(settings, config)
    except ValueError as error:
        raise ConfigError(f"The endpoint is no URL: {error}", place, "Give http(s)://host:port") from error
    sign_by_known_digest(client)
    client.meta.events.register("before-sign.s3.UploadPart", _send_at_once)
    client.meta.events.register_first("needs-retry.s3", partial(_wait_as_told, settings.tries))  # type: ignore[arg-type]
    return client


def _send_at_once(request: Any, **_: Any) -> None:
    """Do not ask first whether a part may come: the server has said so of the upload. Spares a round trip of each."""
    del request.headers["Expect"]


def _wait_as_told(tries: int, response: Any, attempts: int, **_: Any) -> float | bool | None:
    """Return the seconds to wait that the server asks for, if they are few; False if the job shall rather wait.

    The SDK knows a header of Amazon's only. None: it decides.
    """
    after_s = retry_after(response[1]) if response else 0.0
    if not after_s or response[0].status_code not in (429, 503):
        return None
    return after_s if after_s <= _FEW_S and attempts < tries else False


def _unchecked() -> None:
    """Return: nobody is asked whether to stop."""


def _no_proxies(url: str) -> dict[str, str]:  # noqa: ARG001
    return {}


# Also those that ask for the machine's role make clients, which take no configuration.
botocore.endpoint.get_environ_proxies = botocore.utils.get_environ_proxies = _no_proxies


class _OnlyS3(Loader):
    """Does not look, twice, for the models of 400 services to find that of one: a quarter of a client's making."""

    def list_available_services(self, type_name: str) -> list[str]:  # noqa: ARG002
        return ["s3"]


#: All clients of the process share what it has read, which nobody changes: the second costs a sixth of the first.
_MODELS = _OnlyS3()


def _client_of(settings: S3Settings, config: Config) -> S3Client:
    # boto3 would add its resources and transfers: a tenth of a second at the start, and nothing that is used.
    session = botocore.session.Session()
    session.register_component("data_loader", _MODELS)
    return session.create_client(  # type: ignore[return-value]  # the stubs name it by boto3
        "s3",
        region_name=settings.region,
        endpoint_url=settings.endpoint,
        verify=settings.ca_file,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        config=config,
    )
