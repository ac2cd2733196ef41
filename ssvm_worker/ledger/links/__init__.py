"""Links: who has one may fetch one object, or send one image, until it expires.

A link is an id and a moment, signed with a key of the settings (HMAC-SHA256). The signature comes first: what is not
signed is refused before anybody is asked. What the link is for, and whether it still stands, is in the ledger.
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

from ssvm_worker.errors import ConfigError

GET, PUT = "get", "put"
#: Nobody's: signs for a key id that is unknown, so that the answer takes as long as for a known one.
_NOBODY = secrets.token_bytes(32)


@dataclass(frozen=True)
class Link:
    """What a link is for."""

    id: str
    #: get | put
    verb: str
    #: Seconds since the epoch.
    until: int
    #: Of the object to fetch: its image store and its key. Of an upload: its first store, and the artifact's prefix.
    store: str
    key: str
    #: The download request that an upload becomes.
    request: dict[str, Any] = field(default_factory=dict)
    created: int = 0
    by: str = ""

    @property
    def job_id(self) -> str:
        """The job that an upload is."""
        return job_of(self.id)

    @property
    def path(self) -> str:
        """Of its URL; a fetched object's ends in its name, so that `curl -O` and `wget` call the file so."""
        return object_path(self.id, self.store, self.key) if self.verb == GET else upload_path(self.id)


def new_id() -> str:
    """An id that nobody can guess, though it is no secret."""
    return secrets.token_hex(8)


def job_of(link_id: str) -> str:
    """The id of the job that an upload by that link is."""
    return f"link-{link_id}"


def link_of(job_id: str) -> str:
    """The id of the link behind such a job."""
    return job_id.removeprefix("link-")


def object_path(link_id: str, store: str, key: str) -> str:
    """Where an object is fetched."""
    return f"/{GET}/{link_id}/{quote(store)}/{quote(key)}"


def upload_path(link_id: str) -> str:
    """Where an image is sent to."""
    return f"/{PUT}/{link_id}"


def local_key(file: Path) -> str:
    """The key in that file, which is made if it is not there; ConfigError if it cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            _make_key(file)
        return file.read_text().strip()
    except OSError as error:
        what = f"No key to sign links with can be kept: {error.strerror}"
        raise ConfigError(what, str(file), "Give [serve.keys.NAME] a secret_file, and serve.key its NAME") from error


def _make_key(file: Path) -> None:
    """Whole or not at all: two may want it at once."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".link-key-") as made:  # mode 0600
        made.write(secrets.token_hex(32))
        made.flush()
        os.link(made.name, file)


class Signer:
    """Signs and checks the paths of links with named keys; *current* names the one for new links."""

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
        """The path with its query."""
        signature = _signature(self._keys[self._current], self._current, path, until)
        return f"{path}?{urlencode({'until': until, 'key': self._current, 'signature': signature})}"

    def is_signed(self, path: str, query: Mapping[str, str]) -> bool:
        """Whether one of the keys signed that path and moment, expired or not; takes the same time for any answer."""
        name, until = query.get("key", ""), query.get("until", "")
        key = self._keys.get(name, _NOBODY)
        # 12 digits are the year 33658; Python refuses to read a number of 4300.
        moment = int(until) if until.isascii() and until.isdecimal() and len(until) <= 12 else 0
        expected = _signature(key, name, path, moment)
        return hmac.compare_digest(expected.encode(), query.get("signature", "").encode()) and moment > 0


def _signature(key: bytes, name: str, path: str, until: int) -> str:
    return hmac.new(key, f"ssvm-link-1\n{name}\n{until}\n{path}".encode(), hashlib.sha256).hexdigest()
