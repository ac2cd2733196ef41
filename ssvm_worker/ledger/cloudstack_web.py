"""What `ssvm agent` and `ssvm serve` share for a CloudStack management server: links, logins, keys, stores.

The agent writes it when the server sends a command, and every service of the zone reads it. It outlives both.

``<prefix>ssvm.cloudstack:<zone>`` is a hash of the zone's values: the upload key, the login of zone copies, …
``<prefix>ssvm.cloudstack:<zone>:stores`` is a hash of the image stores: their name by URL and by directory.
``<prefix>ssvm.cloudstack:<zone>:link:<path>`` is the JSON of one link. The broker deletes it when the link expires.
``<prefix>ssvm.cloudstack:<zone>:links`` is a sorted set of all paths by that time.
``<prefix>ssvm.cloudstack:<zone>:upload:<uuid>`` is the JSON of one browser upload.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ssvm_worker.errors import InvalidRequest
from ssvm_worker.ledger.connection import BrokerClient, translated

#: Seconds for which an upload's length, or its abort, is kept. The server forgets an upload after hours.
_UPLOAD_S = 7 * 86400
#: The directory of links, below the root of the web server.
USERDATA = "userdata"
_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class PublishedLink:
    """A link of the management server: everybody who knows its path may fetch the object until it expires."""

    #: The path below ``/userdata/``: a random directory and a file name.
    path: str
    store: str
    key: str
    #: Seconds since the epoch.
    until: int


@dataclass(frozen=True)
class CopyLogin:
    """The user and the password with which another zone fetches objects."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class WebCertificate:
    """The TLS certificate of the web server, as PEM."""

    key: str = field(repr=False)
    certificate: str
    #: Intermediate certificates.
    chain: str = ""


@dataclass(frozen=True)
class BrowserUpload:
    """What the ledger's job does not say about an upload of a browser."""

    #: Bytes of the HTTP request: the file and a few hundred bytes around it. 0: no request has arrived.
    length: int = 0
    #: Whether the management server has aborted it.
    aborted: bool = False


def check_path(path: str) -> str:
    """Return the path of a link if it is safe as a path below a directory, else raise InvalidRequest.

    A part may contain dots, blanks and any letters. It may not begin with a dot.
    """
    parts = path.split("/")
    for part in parts:
        bad = not part or part.startswith(".") or not part.isprintable() or set(part) & set('\\"')
        if bad or len(part.encode(errors="replace")) > _MAX_NAME_BYTES or len(parts) > 2:
            what = "The path of a link has a part that is empty, hidden, too long or not printable"
            raise InvalidRequest(what, ascii(path[:200]), "Give DIRECTORY/NAME or NAME")
    return path


class CloudStackWeb(BrokerClient):
    """The values of one zone. Every method raises StoreUnavailable while the broker is away."""

    _NAME = "ssvm.cloudstack:"

    def __init__(self, url: str, *, prefix: str = "", zone: str) -> None:
        super().__init__(url, prefix=prefix)
        self._key += zone

    # Image stores

    def add_store(self, url: str, directory: str, name: str) -> None:
        """Record the name of the image store that the server calls by that URL, or by its mount *directory*."""
        with translated(self._url):
            self._redis.hset(f"{self._key}:stores", mapping={f"url {url}": name, f"directory {directory}": name})

    def store_of_url(self, url: str) -> str:
        """Return the name of the image store with that URL; "" if it is unknown."""
        return self._store(f"url {url}")

    def store_of_directory(self, directory: str) -> str:
        """Return the name of the image store with that mount directory; "" if it is unknown."""
        return self._store(f"directory {directory}")

    def stores(self) -> dict[str, str]:
        """Return the names of all image stores by their mount directories."""
        with translated(self._url):
            found: Any = self._redis.hgetall(f"{self._key}:stores")
        named = {each.partition(" ")[::2]: name for each, name in found.items()}
        return {directory: name for (kind, directory), name in named.items() if kind == "directory"}

    def _store(self, field_: str) -> str:
        with translated(self._url):
            return str(self._redis.hget(f"{self._key}:stores", field_) or "")

    # Links

    def publish(self, link: PublishedLink) -> None:
        """Store a link. From now on it is valid."""
        check_path(link.path)
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.set(f"{self._key}:link:{link.path}", json.dumps(asdict(link)), exat=link.until)
            pipe.zadd(f"{self._key}:links", {link.path: link.until})
            pipe.execute()

    def find(self, path: str) -> PublishedLink | None:
        """Return a valid link, or None if it is unknown, expired or revoked."""
        with translated(self._url):
            text = self._redis.get(f"{self._key}:link:{path}")
        return PublishedLink(**json.loads(str(text))) if text else None

    def links(self) -> list[PublishedLink]:
        """Return the valid links."""
        with translated(self._url):
            paths: Any = self._redis.zrange(f"{self._key}:links", 0, -1)
        return [link for path in paths if (link := self.find(path))]

    def revoke(self, path: str) -> PublishedLink | None:
        """Make a link invalid. Return it, or None if it was invalid already."""
        link = self.find(path)
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.delete(f"{self._key}:link:{path}")
            pipe.zrem(f"{self._key}:links", path)
            pipe.execute()
        return link

    def take_expired(self) -> list[str]:
        """Forget the links that have expired, and return their paths."""
        with translated(self._url):
            paths: Any = self._redis.zrangebyscore(f"{self._key}:links", 0, time.time())
            if paths:
                self._redis.zrem(f"{self._key}:links", *paths)
        return list(paths)

    # Browser uploads

    def set_upload_key(self, key: str) -> None:
        """Store the key with which the server signs and encrypts the parameters of uploads."""
        self._set(upload_key=key)

    def upload_key(self) -> str:
        """Return that key; "" if the server has not sent one."""
        return self._get("upload_key")

    def begin_upload(self, uuid: str, length: int) -> bool:
        """Record an upload of *length* bytes. Return False if the server has aborted it."""
        if self.upload(uuid).aborted:
            return False
        self._save_upload(uuid, BrowserUpload(length))
        return True

    def abort_upload(self, uuid: str) -> None:
        """Refuse this upload from now on."""
        self._save_upload(uuid, BrowserUpload(self.upload(uuid).length, aborted=True))

    def upload(self, uuid: str) -> BrowserUpload:
        """Return what is known about an upload."""
        with translated(self._url):
            text = self._redis.get(f"{self._key}:upload:{uuid}")
        return BrowserUpload(**json.loads(str(text))) if text else BrowserUpload()

    def _save_upload(self, uuid: str, upload: BrowserUpload) -> None:
        with translated(self._url):
            self._redis.set(f"{self._key}:upload:{uuid}", json.dumps(asdict(upload)), ex=_UPLOAD_S)

    # Zone copies

    def set_copy_login(self, login: CopyLogin) -> None:
        """Store the login of zone copies."""
        self._set(copy_login=json.dumps(asdict(login)))

    def copy_login(self) -> CopyLogin | None:
        """Return the login of zone copies; None if the server has not sent one."""
        text = self._get("copy_login")
        return CopyLogin(**json.loads(text)) if text else None

    def set_copy_addresses(self, addresses: Iterable[str], *, append: bool) -> None:
        """Replace the addresses that may fetch objects for zone copies, or add some."""
        known = self.copy_addresses() if append else ()
        self._set(copy_addresses=json.dumps(list(dict.fromkeys([*known, *addresses]))))

    def copy_addresses(self) -> tuple[str, ...]:
        """Return the addresses that may fetch objects for zone copies."""
        return tuple(json.loads(self._get("copy_addresses") or "[]"))

    def set_internal_sites(self, networks: Iterable[str]) -> None:
        """Store the internal networks from which the server allows downloads."""
        self._set(internal_sites=json.dumps(list(networks)))

    def internal_sites(self) -> tuple[str, ...]:
        """Return the internal networks from which the server allows downloads."""
        return tuple(json.loads(self._get("internal_sites") or "[]"))

    # TLS

    def set_certificate(self, certificate: WebCertificate) -> None:
        """Store the certificate of the web server."""
        self._set(certificate=json.dumps(asdict(certificate)))

    def certificate(self) -> WebCertificate | None:
        """Return the certificate of the web server; None if the server has not sent one."""
        text = self._get("certificate")
        return WebCertificate(**json.loads(text)) if text else None

    def _set(self, **values: Any) -> None:
        with translated(self._url):
            for name, value in values.items():
                self._redis.hset(self._key, name, value)

    def _get(self, name: str) -> str:
        with translated(self._url):
            return str(self._redis.hget(self._key, name) or "")
