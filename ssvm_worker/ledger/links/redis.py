"""The book of links: what each is for, until it expires or is revoked.

``<prefix>ssvm.links:<id>`` is the JSON of one link, which the broker drops when it expires; ``<prefix>ssvm.links`` is
a sorted set of all ids by that moment, which clean-up shortens; ``<prefix>ssvm.links.at`` says where a service is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from ssvm_worker.ledger.connection import connect, translated

from . import Link

#: Ids read in one go.
_BATCH = 200
_FIELDS = {each.name for each in fields(Link)}


class LinkBook:
    """The links behind one broker. Every method raises StoreUnavailable while the broker is away."""

    def __init__(self, url: str, *, prefix: str = "") -> None:
        self._url = url
        self._key = f"{prefix}ssvm.links"
        self._redis = connect(url)

    def add(self, link: Link) -> None:
        """Write a link down; from now on it stands."""
        with translated(self._url):
            pipe = self._redis.pipeline()
            pipe.set(self._one(link.id), json.dumps(asdict(link)), exat=link.until)
            pipe.zadd(self._key, {f"{link.verb} {link.id}": link.until})
            pipe.execute()

    def find(self, link_id: str) -> Link | None:
        """The link, if it was written down, has not expired and was not revoked."""
        with translated(self._url):
            text = self._redis.get(self._one(link_id))
        return _link(str(text or ""))

    def all(self) -> Iterator[Link]:
        """Those that stand, by the moment at which they expire."""
        names = self._names()
        for start in range(0, len(names), _BATCH):
            with translated(self._url):
                texts: Any = self._redis.mget([self._one(link_id) for _, link_id in names[start : start + _BATCH]])
            yield from (found for text in texts if (found := _link(text or "")))

    def revoke(self, link: Link) -> bool:
        """Whoever has it is refused from now on; False if it did not stand any more."""
        with translated(self._url):
            return bool(self._redis.delete(self._one(link.id)))

    def gone(self) -> list[tuple[str, str]]:
        """Verb and id of links that expired or were revoked, and are not forgotten yet."""
        names = self._names()
        with translated(self._url):
            pipe = self._redis.pipeline(transaction=False)
            for _, link_id in names:
                pipe.exists(self._one(link_id))
            stand = pipe.execute()
        return [name for name, stands in zip(names, stand, strict=True) if not stands]

    def forget(self, verb: str, link_id: str) -> None:
        """Drop what is left of a link that is gone."""
        with translated(self._url):
            self._redis.zrem(self._key, f"{verb} {link_id}")

    def listens(self, url: str) -> None:
        """Note where a service was started, for links that are made without `serve.url`."""
        with translated(self._url):
            self._redis.set(f"{self._key}.at", url)

    def address(self) -> str:
        """Where the last one was started; "" if none was."""
        with translated(self._url):
            return str(self._redis.get(f"{self._key}.at") or "")

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _names(self) -> list[tuple[str, str]]:
        """Verb and id of all that are not forgotten."""
        with translated(self._url):
            names: Any = self._redis.zrange(self._key, 0, -1)
        return [(verb, link_id) for verb, _, link_id in (each.partition(" ") for each in names)]

    def _one(self, link_id: str) -> str:
        return f"{self._key}:{link_id}"


def _link(text: str) -> Link | None:
    """None for what is no link; a newer version may say more of one."""
    try:
        values = json.loads(text)
        return Link(**{name: value for name, value in values.items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
