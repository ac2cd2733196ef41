"""Stores and connections that a CloudStack management server names in its commands, with their secrets.

The agent stores them here under a name. A job has only the name, so its record shows no secret. Every worker of the
broker reads them.

``<prefix>ssvm.server.stores`` is a hash: the JSON of each store by its name. It stays.
``<prefix>ssvm.server.moves`` is a hash: the number of moves in each store, so that a list notices them.
``<prefix>ssvm.server.connection:<name>`` is the JSON of one connection. The broker deletes it after some time.
"""

from __future__ import annotations

import json
from typing import Any

from .connection import BrokerClient, translated
from .record import Beside


class ServerNames(BrokerClient):
    """The named stores and connections of one broker. Every method raises StoreUnavailable while the broker is away."""

    _NAME = "ssvm.server."

    def put_store(self, name: str, values: dict[str, Any]) -> None:
        """Store the settings of a store. They replace older ones of that name."""
        with translated(self._url):
            self._redis.hset(f"{self._key}stores", name, json.dumps(values))

    def stores(self) -> dict[str, dict[str, Any]]:
        """Return the settings of all stores by name."""
        with translated(self._url):
            found: Any = self._redis.hgetall(f"{self._key}stores")
        return {name: json.loads(text) for name, text in found.items()}

    def note_move(self, store: str) -> None:
        """Count a move of files inside a store, before it begins."""
        with translated(self._url):
            self._redis.hincrby(f"{self._key}moves", store, 1)

    def moves(self, store: str) -> int:
        """Return how many moves inside a store have begun."""
        with translated(self._url):
            return int(str(self._redis.hget(f"{self._key}moves", store) or 0))

    def put_connection(self, name: str, values: dict[str, Any], keep_s: float) -> None:
        """Store the settings of a connection for *keep_s* seconds."""
        self.put_beside(self.connection_entry(name, values, keep_s))

    def put_beside(self, entry: Beside) -> None:
        """Store an entry of ``connection_entry``."""
        with translated(self._url):
            self._redis.set(entry.key, entry.value, ex=entry.seconds)

    def connection_entry(self, name: str, values: dict[str, Any], keep_s: float) -> Beside:
        """Return the settings of a connection as a value that is stored together with a new job."""
        return Beside(f"{self._key}connection:{name}", json.dumps(values), max(1, int(keep_s)))

    def connection(self, name: str) -> dict[str, Any] | None:
        """Return the settings of a connection, or None if it is unknown or too old."""
        with translated(self._url):
            text: Any = self._redis.get(f"{self._key}connection:{name}")
        return json.loads(text) if text else None
