"""Links: the holder of a link may fetch one object, or send one image, until the link expires.

A link is an id and a time, signed with a key of the settings (HMAC-SHA256). The server checks the signature first,
and refuses an unsigned link without a request to the ledger. The ledger stores the purpose of a link and its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from ssvm_worker.config.schema import SERVER_PREFIX
from ssvm_worker.errors import ConfigError

GET, PUT = "get", "put"
#: The key for an unknown key id, so that the check takes as long as for a known one.
_UNKNOWN_KEY = secrets.token_bytes(32)


@dataclass(frozen=True)
class Link:
    """A link and its purpose."""

    id: str
    #: get | put
    verb: str
    #: Seconds since the epoch.
    until: int
    #: For a fetch: the object's image store and key. For an upload: its first store, and the artifact's prefix.
    store: str
    key: str
    #: The download request of an upload.
    request: dict[str, Any] = field(default_factory=dict)
    created: int = 0
    by: str = ""

    @property
    def job_id(self) -> str:
        """Return the id of the upload's job."""
        return job_of(self.id)

    @property
    def path(self) -> str:
        """Return the path of its URL. A fetch ends in the object's name, which `curl -O` and `wget` give the file."""
        return object_path(self.id, self.store, self.key) if self.verb == GET else upload_path(self.id)


def new_id() -> str:
    """Return a random id. It cannot be guessed, but it is no secret."""
    return secrets.token_hex(8)


def job_of(link_id: str) -> str:
    """Return the job id of an upload through that link."""
    return link_id if link_id.startswith(SERVER_PREFIX) else f"link-{link_id}"


def server_link(uuid: str) -> str:
    """Return the id of the link, and of the job, for an upload that a management server has allowed."""
    return f"{SERVER_PREFIX}upload-{uuid}"


def link_of(job_id: str) -> str:
    """Return the link id of such a job."""
    return job_id.removeprefix("link-")


def object_path(link_id: str, store: str, key: str) -> str:
    """Return the path to fetch an object from."""
    return f"/{GET}/{link_id}/{quote(store)}/{quote(key)}"


def upload_path(link_id: str) -> str:
    """Return the path to send an image to."""
    return f"/{PUT}/{link_id}"


def local_key(file: Path) -> str:
    """Return the key in that file, and create the file if it is missing. Raise ConfigError if this is impossible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another process may create the file at the same time, so it appears complete or not at all.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".link-key-") as new:  # mode 0600
            new.write(secrets.token_hex(32))
            new.flush()
            with contextlib.suppress(FileExistsError):
                os.link(new.name, file)
        return file.read_text().strip()
    except OSError as error:
        what = f"The key that signs links cannot be stored: {error.strerror}"
        raise ConfigError(what, str(file), "Give [serve.keys.NAME] a secret_file, and serve.key its NAME") from error


class Signer:
    """Signs and checks the paths of links with named keys. *current* names the key for new links."""

    def __init__(self, keys: Mapping[str, str], current: str) -> None:
        if current not in keys:
            known = ", ".join(keys) or "none"
            raise ConfigError(
                f"There is no key {current!r} to sign links with",
                "serve.key",
                f"The settings have: {known}. Add [serve.keys.{current or 'NAME'}] with a secret_file",
            )
        self._keys = {name: key.encode() for name, key in keys.items()}
        self._current = current

    def sign(self, path: str, until: int) -> str:
        """Return the path with a signed query."""
        signature = _signature(self._keys[self._current], self._current, path, until)
        return f"{path}?{urlencode({'until': until, 'key': self._current, 'signature': signature})}"

    def is_signed(self, path: str, query: Mapping[str, str]) -> bool:
        """Return whether one of the keys signed that path and time, expired or not.

        The check takes the same time for any result.
        """
        name, until = query.get("key", ""), query.get("until", "")
        key = self._keys.get(name, _UNKNOWN_KEY)
        # 12 digits reach the year 33658. Python refuses to parse a number of 4300 digits.
        moment = int(until) if until.isascii() and until.isdecimal() and len(until) <= 12 else 0
        expected = _signature(key, name, path, moment)
        return hmac.compare_digest(expected.encode(), query.get("signature", "").encode()) and moment > 0


def _signature(key: bytes, name: str, path: str, until: int) -> str:
    return hmac.new(key, f"ssvm-link-1\n{name}\n{until}\n{path}".encode(), hashlib.sha256).hexdigest()
