"""Information of this host about its stores on NFS. No function here touches a mount, because a mount may hang."""

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
    """Return this host's circuit breaker for a store. A store that cannot hang has a closed one."""
    return store.health().breaker if isinstance(store, NfsStore) else CircuitBreaker()


def stores_away(settings: Settings) -> dict[str, str]:
    """Return the stores that this host cannot use, by name: why, and since when. Touches no store."""
    opened = Stores(settings)
    names = [name for name, each in settings.stores.items() if each.url.startswith("nfs://")]
    breakers = {name: breaker_of(opened[name]) for name in names}
    return {name: each.described() for name, each in breakers.items() if each.state != CLOSED}


def nfs_mounts(settings: Settings) -> list[Mounted]:
    """Return the mounts of all stores on NFS. Stores of the same export share one. Mounts nothing."""
    opened = Stores(settings)
    stores = [opened[name] for name, each in settings.stores.items() if each.url.startswith("nfs://")]
    found = {each.mounted.paths.slug: each.mounted for each in stores if isinstance(each, NfsStore)}
    return list(found.values())


def sudoers(settings: Settings, user: str) -> str:
    """Return the sudo rule that lets a worker of that user mount these stores, and nothing else.

    Raise ConfigError if no store needs a rule, and InvalidRequest for an invalid user name.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", user):
        raise InvalidRequest(f"Invalid user name: {user!r}", "--sudoers", "Give the name of the worker's user")
    commands = [command for each in nfs_mounts(settings) for command in each.commands()]
    if not commands:
        raise ConfigError("No store of the settings is on NFS", "stores", "No rule is needed")
    return sudo_rule(user, commands)
