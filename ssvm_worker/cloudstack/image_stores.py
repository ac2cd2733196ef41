"""Image stores of transfer objects: the server names a store in each command, and the agent and all workers use it.

A store has a *place*: ``nfs://HOST/EXPORT`` or ``s3://ENDPOINT/BUCKET``. ``[cloudstack.stores]`` may map a place to a
configured store. Any other place becomes a store named ``cs-`` and a digest of the place, if ``allow_stores`` allows
the place. Its settings, with the keys of S3, are in the ledger, so that every worker can open it by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote

from ssvm_worker.config.schema import SERVER_PREFIX, Settings, StoreSection
from ssvm_worker.errors import ConfigError, InvalidRequest, WorkerError
from ssvm_worker.ledger.cloudstack_web import CloudStackWeb
from ssvm_worker.ledger.server_names import ServerNames
from ssvm_worker.net.nfs_url import parse_export
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.wiring.assembly import open_cloudstack_web
from ssvm_worker.wiring.server_names import server_names
from ssvm_worker.wiring.stores import Stores

from .deadlines import StoreCalls
from .keys import parts_of
from .transfer_objects import S3TO, NfsTO, SwiftTO, Wire

T = TypeVar("T")
_log = logging.getLogger("ssvm.cloudstack")
#: Amazon's names of S3 services. The second group is the region.
_AMAZON = re.compile(r"s3[.-](?:(?:fips|dualstack)[.-])*(?:([a-z]{2}-[a-z0-9-]+)\.)?amazonaws\.com(?:\.cn)?")
#: The shortest time limit in seconds of an S3 call without a byte. A server's default is 50 seconds.
_MIN_STALL_S = 10.0
#: Time limit in seconds of a question to the DNS.
_ADDRESS_S = 5.0
#: Seconds after which the settings of a store are written to the ledger again.
_REPEAT_S = 60.0


@lru_cache
def canonical(url: str) -> str:
    """Return the place of an NFS URL: without a port, a query, and slashes at the end.

    Raise InvalidRequest for a malformed URL.
    """
    parts = parts_of(url)
    path = re.sub("/+", "/", unquote(parts.path)).rstrip("/")
    return f"{parts.scheme.lower()}://{_plain_host(parts.hostname or '')}{path}"


def _plain_host(text: str) -> str:
    """Return a host, perhaps with a port, in lower case. An IPv6 address is in brackets and in its shortest form."""
    address, _, port = text.lower().removeprefix("[").partition("]")
    if address.count(":") < 2:
        return text.lower()
    with contextlib.suppress(ValueError):  # the address of a pattern may have a *
        address = ipaddress.ip_address(address).compressed
    return f"[{address}]{port}"


def place_of(store: Wire | None) -> str:
    """Return the place of a store. Raise InvalidRequest for a store that this agent cannot use."""
    if isinstance(store, NfsTO):
        place = canonical(store.url)
        if not place.startswith("nfs://"):
            raise InvalidRequest("This image store is not an NFS export", place, "Use nfs://HOST/EXPORT")
        return place
    if isinstance(store, S3TO):
        return f"s3://{_host(store)}/{store.bucket_name}"
    if isinstance(store, SwiftTO):
        remedy = "Use an NFS export or an S3 bucket; many Swift servers also speak S3"
        raise InvalidRequest("This agent does not support image stores on Swift", store.url or "", remedy)
    kind = type(store).__name__ if store else "no store"
    raise InvalidRequest("The command names no image store", kind, "Send it to a hypervisor's agent")


def is_allowed(place: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern allows a place.

    A ``*`` in a host matches within one label, or within one group of an IPv6 address. So ``10.0.0.*`` does not match
    ``10.0.0.1.example.org``. A host that is only ``*`` is any host. A pattern without a path allows any path.
    """
    scheme, _, rest = place.partition("://")
    host, _, path = rest.partition("/")
    for pattern in patterns:
        its_scheme, _, its_rest = pattern.strip().partition("://")
        its_host, _, its_path = its_rest.partition("/")
        if (
            its_scheme.lower() == scheme
            and (its_host == "*" or _matches(host, _plain_host(its_host), "[^.:]*"))
            and (not its_path or _matches(path, its_path.rstrip("/"), ".*"))
        ):
            return True
    return False


def _matches(text: str, pattern: str, any_text: str) -> bool:
    return re.fullmatch(any_text.join(re.escape(each) for each in pattern.split("*")), text) is not None


def mount_directory(url: str) -> str:
    """Return the name of the directory in which the Java agent mounts an NFS URL.

    It is the version 3 UUID of ``ADDRESS:PATH`` without a namespace. The server stores it, and sends it as ``parent``.
    Java writes all eight groups of an IPv6 address.
    Raise InvalidRequest if the host has no address.
    """
    parts = parts_of(url)
    try:
        found = socket.getaddrinfo(parts.hostname or "", None, type=socket.SOCK_STREAM)
        # Java prefers IPv4, as the C library's older function does.
        found.sort(key=lambda each: each[0] != socket.AF_INET)
        address = str(found[0][4][0])
        if found[0][0] == socket.AF_INET6:
            address = ":".join(f"{int(each, 16):x}" for each in ipaddress.IPv6Address(address).exploded.split(":"))
    except (OSError, UnicodeError) as error:
        what = f"The address of the NFS server is unknown: {error}"
        raise InvalidRequest(what, canonical(url), "Check the name and the DNS") from error
    digest = hashlib.md5(f"{address}:{parts.path}".encode(), usedforsecurity=False).digest()
    return str(uuid.UUID(bytes=digest, version=3))


def _host(store: S3TO) -> str:
    return _plain_host((store.end_point or "s3.amazonaws.com").rpartition("://")[2].strip("/"))


def described(store: NfsTO | S3TO, nfs_version: str | None = None) -> dict[str, Any]:
    """Return the settings of the store, with its secrets, as in the section of a configured store."""
    if isinstance(store, NfsTO):
        version = store.nfs_version or nfs_version
        query = f"?vers={version}" if version and version != "null" else ""
        parts = parts_of(store.url)
        return {"url": f"nfs://{parts.netloc}{parts.path.rstrip('/') or '/'}{query}", "shared": True}
    host = _host(store)
    amazon = _AMAZON.fullmatch(host)
    given = {
        "url": f"s3://{store.bucket_name}",
        # Without an endpoint the SDK finds the service of the region, and follows its redirects to another one.
        "endpoint": None if amazon else f"{'https' if store.https_flag else 'http'}://{host}",
        "region": amazon[1] if amazon else None,
        "access_key": store.access_key.get_secret_value() if store.access_key else None,
        "secret_key": store.secret_key.get_secret_value() if store.secret_key else None,
        "stall_s": max(_MIN_STALL_S, store.socket_timeout / 1000) if store.socket_timeout else None,
    }
    return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class NamedStore:
    """A store that a command names."""

    #: The name by which jobs and workers know it.
    name: str
    place: str
    #: Returns the opened store.
    open: Callable[[], Store]
    is_s3: bool


class ImageStores:
    """All stores that commands have named. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._calls = StoreCalls()
        self._lock = threading.Lock()
        #: What this process has written to the ledger, and until when it is taken for written.
        self._described: dict[str, tuple[dict[str, Any], float]] = {}
        self._opened: dict[str, tuple[dict[str, Any], Store]] = {}
        self._served: dict[str, str] = {}
        #: When to try again after a failure, by URL.
        self._serve_again: dict[str, float] = {}

    @cached_property
    def _names(self) -> ServerNames:
        return server_names(self._settings)

    @cached_property
    def _web(self) -> CloudStackWeb:
        return open_cloudstack_web(self._settings)

    def find(self, store: Wire | None, nfs_version: str | None = None) -> NamedStore:
        """Return the store of a transfer object, known to all workers from now on.

        Raise InvalidRequest if the settings do not allow it, and ConfigError if its URL is invalid.
        """
        place = place_of(store)
        given = self._settings.cloudstack
        assert isinstance(store, NfsTO | S3TO)
        mapped = {
            canonical(url) if url.startswith("nfs") else url.rstrip("/"): name for url, name in given.stores.items()
        }
        configured = mapped.get(place)
        if configured is not None:
            if configured not in self._settings.stores:
                known = ", ".join(self._settings.stores) or "none"
                what = f"cloudstack.stores names the store {configured!r}, which does not exist"
                raise ConfigError(what, place, f"The settings have: {known}")
            self._tell_service(store, configured)
            return NamedStore(configured, place, lambda: self._open(configured, None), isinstance(store, S3TO))
        if not is_allowed(place, given.allow_stores):
            remedy = f"cloudstack.allow_stores has: {', '.join(given.allow_stores) or 'nothing'}"
            raise InvalidRequest("The settings of the agent do not allow this image store", place, remedy)
        name = SERVER_PREFIX + hashlib.sha256(place.encode()).hexdigest()[:16]
        values = described(store, nfs_version)
        self._publish(name, values)
        self._tell_service(store, name)
        return NamedStore(name, place, lambda: self._open(name, values), isinstance(store, S3TO))

    def is_known(self, store: Wire | None) -> bool:
        """Return whether ``find`` has no question to the DNS for this store, because an earlier command named it."""
        return isinstance(store, S3TO) or (isinstance(store, NfsTO) and store.url in self._served)

    def named(self, name: str) -> NamedStore:
        """Return a store that an earlier command has named. Raise InvalidRequest if there is none."""
        values = None if name in self._settings.stores else self._names.stores().get(name)
        if values is None and name not in self._settings.stores:
            what = "No command has named this image store yet"
            raise InvalidRequest(what, name, "Let the management server set up the agent again")
        url = str(values["url"]) if values else self._settings.stores[name].url
        return NamedStore(name, url, lambda: self._open(name, values), url.startswith("s3://"))

    def _tell_service(self, store: NfsTO | S3TO, name: str) -> None:
        """Let `ssvm serve` find an NFS store by the URL and the directory that the server uses for it."""
        if isinstance(store, S3TO) or self._served.get(store.url) == name:
            return
        url = store.url
        if time.monotonic() < self._serve_again.get(url, 0.0):
            return
        try:
            directory = self._calls.run(f"address of {url}", lambda: mount_directory(url), _ADDRESS_S)
            self._web.add_store(url, directory, name)
            self._served[url] = name
        except WorkerError as error:
            self._serve_again[url] = time.monotonic() + _REPEAT_S
            _log.warning("links to %s do not work yet: %s", name, error)

    def call(self, store: NamedStore, act: Callable[[Store], T], limit_s: float) -> T:
        """Return the result of *act* with the store. Raise StoreAway after *limit_s* seconds.

        A call that hangs keeps its thread. If several calls of a store hang, further ones fail at once. Calls of other
        stores continue.
        """
        return self._calls.run(store.name, lambda: act(store.open()), limit_s)

    def _publish(self, name: str, values: dict[str, Any]) -> None:
        """Store the settings in the ledger if they are new to this process, and again after some time.

        The broker may have lost them, and another agent may have written older ones.
        """
        with self._lock:
            known, until = self._described.get(name, ({}, 0.0))
        if known == values and time.monotonic() < until:
            return
        if values["url"].startswith("nfs://"):
            parse_export(name, values["url"])  # raises ConfigError here, not in every worker
        StoreSection.model_validate(values)
        self._names.put_store(name, values)
        with self._lock:
            self._described[name] = (values, time.monotonic() + _REPEAT_S)

    def _open(self, name: str, values: dict[str, Any] | None) -> Store:
        """Return the store's object. It is kept, because it holds the mount or the client."""
        settings = self._settings
        wanted = values or {}
        with self._lock:
            if name in self._opened and self._opened[name][0] == wanted:
                return self._opened[name][1]
            if values is not None:
                section = StoreSection.model_validate(values)
                settings = settings.model_copy(update={"stores": {name: section}})
            opened = Stores(settings)[name]
            self._opened[name] = (wanted, opened)
            return opened
