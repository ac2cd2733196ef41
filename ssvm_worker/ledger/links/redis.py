"""The stored links of one broker: the purpose of each link, until it expires or is revoked.

``<prefix>ssvm.links:<id>`` is the JSON of one link. The broker deletes it when the link expires.
``<prefix>ssvm.links`` is a sorted set of all ids by that time. Clean-up removes old entries.
``<prefix>ssvm.links.at`` is the address of the service that started last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ssvm_worker.ledger.connection import BrokerClient, translated
from ssvm_worker.ledger.record import from_json

from . import Link

#: Number of links that one call reads.
_BATCH = 200


class LinkBook(BrokerClient):
    """The links of one broker. Every method raises StoreUnavailable while the broker is away."""

    _NAME = "ssvm.links"

    def add(self, link: Link) -> None:
        """Store a link. From now on it is valid."""
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.set(f"{self._key}:{link.id}", json.dumps(asdict(link)), exat=link.until)
            pipe.zadd(self._key, {f"{link.verb} {link.id}": link.until})
            pipe.execute()

    def find(self, link_id: str) -> Link | None:
        """Return a valid link, or None if it is unknown, expired or revoked."""
        with translated(self._url):
            text = self._redis.get(f"{self._key}:{link_id}")
        return from_json(Link, str(text or ""))

    def all(self) -> Iterator[Link]:
        """Yield the valid links by the time at which they expire."""
        names = self._names()
        for start in range(0, len(names), _BATCH):
            keys = [f"{self._key}:{link_id}" for _, link_id in names[start : start + _BATCH]]
            with translated(self._url):
                texts: Any = self._redis.mget(keys)
            yield from (found for text in texts if (found := from_json(Link, text or "")))

    def revoke(self, link: Link) -> bool:
        """Make a link invalid. Return False if it was invalid already."""
        with translated(self._url):
            return bool(self._redis.delete(f"{self._key}:{link.id}"))

    def gone(self) -> list[tuple[str, str]]:
        """Return verb and id of links that expired or were revoked, and that ``forget`` has not removed."""
        names = self._names()
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            for _, link_id in names:
                pipe.exists(f"{self._key}:{link_id}")
            return [name for name, exists in zip(names, pipe.execute(), strict=True) if not exists]

    def forget(self, verb: str, link_id: str) -> None:
        """Remove the last trace of an invalid link."""
        with translated(self._url):
            self._redis.zrem(self._key, f"{verb} {link_id}")

    def listens(self, url: str) -> None:
        """Store the address of a service that starts, for links that are made without `serve.url`."""
        with translated(self._url):
            self._redis.set(f"{self._key}.at", url)

    def address(self) -> str:
        """Return the address of the service that started last; "" if none did."""
        with translated(self._url):
            return str(self._redis.get(f"{self._key}.at") or "")

    def _names(self) -> list[tuple[str, str]]:
        """Return verb and id of all entries, valid or not."""
        with translated(self._url):
            names: Any = self._redis.zrange(self._key, 0, -1)
        return [(verb, link_id) for verb, _, link_id in (each.partition(" ") for each in names)]
