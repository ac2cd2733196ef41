"""What this host knows of its stores on NFS, whose mounts may hang; nothing here touches one."""

from __future__ import annotations

import re

from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import ConfigError, InvalidRequest
from ssvm_worker.stores.nfs.circuit_breaker import CLOSED, CircuitBreaker
from ssvm_worker.stores.nfs.commands import sudo_rule
from ssvm_worker.stores.nfs.mount import Mounted
from ssvm_worker.stores.nfs.store import NfsStore
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.wiring.assembly import Stores


def breaker_of(store: Store) -> CircuitBreaker:
    """The store's circuit breaker, as this host knows it; closed for stores that need none, as they cannot hang."""
    return store.health().breaker if isinstance(store, NfsStore) else CircuitBreaker()


def stores_away(settings: Settings) -> dict[str, str]:
    """Why and since when this host cannot use stores, by name; those that it can are not in it. Touches no store."""
    opened = Stores(settings)
    names = [name for name, each in settings.stores.items() if each.url.startswith("nfs://")]
    breakers = {name: breaker_of(opened[name]) for name in names}
    return {name: each.described() for name, each in breakers.items() if each.state != CLOSED}


def nfs_mounts(settings: Settings) -> list[Mounted]:
    """The mounts of all stores on NFS, one each for those that share one; nothing is mounted yet."""
    opened = Stores(settings)
    stores = [opened[name] for name, each in settings.stores.items() if each.url.startswith("nfs://")]
    found = {each.mounted.places.slug: each.mounted for each in stores if isinstance(each, NfsStore)}
    return list(found.values())


def sudoers(settings: Settings, user: str) -> str:
    """The rule by which a worker of that user may mount these stores, and do nothing else.

    Raises ConfigError where there is none to make, InvalidRequest for what is no user's name.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
        raise InvalidRequest(f"No user is called {user!r}", "--sudoers", "Give the name that the worker runs as")
    commands = [command for each in nfs_mounts(settings) for command in each.commands()]
    if not commands:
        raise ConfigError("No store of the settings is on NFS", "stores", "A rule is not needed")
    return sudo_rule(user, commands)
