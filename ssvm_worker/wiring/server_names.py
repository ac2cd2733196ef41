"""Add the stores and connections that a CloudStack management server has named to the settings of a job.

Then they are stores and credentials like those of the file: the same code opens, mounts, watches and protects them.
The names begin with ``cs-``, which no name of the file may.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ssvm_worker.config.schema import SERVER_PREFIX, CredentialsSection, Settings, StoreSection
from ssvm_worker.config.types import SecretUrl
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.streaming.interfaces import Store

from .broker import broker_url, open_cloudstack_web
from .stores import Stores

if TYPE_CHECKING:
    from ssvm_worker.ledger.server_names import ServerNames

_KEPT: dict[tuple[int, str, str], ServerNames] = {}


def server_names(settings: Settings) -> ServerNames:
    """Return the named stores and connections, over one connection of this process. This does not connect yet."""
    from ssvm_worker.ledger.server_names import ServerNames

    key = (os.getpid(), broker_url(settings), settings.broker.prefix)
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = ServerNames(key[1], prefix=key[2])
    return _KEPT[key]


def with_server_stores(settings: Settings) -> Settings:
    """Return the settings with all stores that a management server has named."""
    found = server_names(settings).stores()
    if not found:
        return settings
    named = {name: StoreSection.model_validate(values) for name, values in found.items()}
    return settings.model_copy(update={"stores": settings.stores | named})


class KnownStores(Mapping[str, Store]):
    """The image stores of the settings, and those that a management server has named by now. Thread-safe.

    Each is opened at its first use, and again if the server changes its settings.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._own = Stores(settings)
        self._opened: dict[str, tuple[StoreSection, Store]] = {}

    def __getitem__(self, name: str) -> Store:
        if not name.startswith(SERVER_PREFIX):
            return self._own[name]
        settings = with_server_stores(self._settings)
        section = settings.stores[name]
        if name not in self._opened or self._opened[name][0] != section:
            self._opened[name] = (section, Stores(settings)[name])
        return self._opened[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(with_server_stores(self._settings).stores)

    def __len__(self) -> int:
        return len(with_server_stores(self._settings).stores)

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in with_server_stores(self._settings).stores


def with_server_names(settings: Settings, job: str, job_id: str, request: Mapping[str, Any]) -> Settings:
    """Return the settings for a job: with all named stores, and with the named connection of its *request*.

    Only jobs of the agent can name them: their ids begin with ``cs-``, and ``new_job`` refuses such an id of anybody
    else. A clean-up sees the stores too, because its request names none. For all other jobs the stores do not exist,
    but URLs may not point into them. Raise InvalidRequest if the connection is too old.
    """
    named = with_server_stores(settings)
    if not (job_id.startswith(SERVER_PREFIX) or job == "cleanup"):
        return settings.guarding(named.stores)
    settings = named
    name = request.get("credentials")
    if not isinstance(name, str) or not name.startswith(SERVER_PREFIX):
        return settings
    values = server_names(settings).connection(name)
    if values is None:
        what = "The connection that the management server named has been forgotten"
        raise InvalidRequest(what, name, "Let the management server send its command again")
    download = settings.download
    given = {
        "allow_networks": (*download.allow_networks, *_networks(settings)),
        # A template that is made of a snapshot comes from the store of the snapshot.
        "allow_stores": (*download.allow_stores, *values.get("allow_stores", ())),
        "proxy": SecretUrl(values["proxy"]) if values["proxy"] else download.proxy,
        "max_redirects": download.max_redirects if values["follow_redirects"] else 0,
    }
    section = CredentialsSection.model_validate(values["credentials"])
    # Opening the source checks the URL of the proxy, which the server may have set wrong.
    copy = download.model_copy(update=given)
    return settings.model_copy(update={"credentials": settings.credentials | {name: section}, "download": copy})


def _networks(settings: Settings) -> Iterator[str]:
    """Yield the server's internal sites that are networks. Downloads may use them in addition to public addresses."""
    with contextlib.closing(open_cloudstack_web(settings)) as web:
        sites = web.internal_sites()
    for each in sites:
        with contextlib.suppress(ValueError):
            yield str(ipaddress.ip_network(each.strip(), strict=False))
