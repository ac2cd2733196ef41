"""The connection to Redis or Valkey, and its errors in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from ssvm_worker.errors import StoreDenied, StoreUnavailable
from ssvm_worker.net.broker_url import Sentinels, redis_url, sentinels, shown

#: Seconds to connect; a submit with the broker down must fail at once.
_CONNECT_S = 3.0
#: Before a script that a full broker shall run: it ends jobs, removes records, or adds little to what is there.
ALLOW_OOM = "#!lua flags=allow-oom\n"
#: Before a script that only reads, which a full broker runs too, unlike MULTI.
READS = "#!lua flags=no-writes\n"
#: The end of the path of the embedded broker's socket.
EMBEDDED = "/broker/valkey.sock"
_REMEDY = "Check broker.url, and that Redis or Valkey runs there"
#: Seconds for one answer. The scripts take less than a millisecond; a broker that is silent for so long is away.
_ANSWER_S = 5.0


def connect(url: str) -> redis.Redis:
    """A client, not connected yet; safe to share between threads. By Sentinels it follows the master.

    One repeat, because the first command after a restart of the broker meets a dead connection of the pool.
    """
    given: dict[str, Any] = {
        "decode_responses": True,
        "socket_connect_timeout": _CONNECT_S,
        "socket_timeout": _ANSWER_S,
        "retry": Retry(NoBackoff(), 1),
        "health_check_interval": 25,
    }
    if found := sentinels(url):
        return _master(found, given)
    if urlsplit(url).scheme not in ("unix", "redis+socket"):
        given["socket_keepalive"] = True
    return redis.Redis.from_url(redis_url(url), **given)


def _master(found: Sentinels, given: dict[str, Any]) -> redis.Redis:
    """A client of whichever server is the master when it connects; a demoted one is left at its first refusal."""
    given |= {"socket_keepalive": True, "db": found.db, "username": found.user, "password": found.password}
    asked = found.sentinel_options | {"socket_connect_timeout": _CONNECT_S, "socket_timeout": _CONNECT_S}
    tls = {"ssl": True, **found.ssl} if found.tls else {}
    manager = Sentinel(found.hosts, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
    client: redis.Redis = manager.master_for(found.master, **given, **tls)  # type: ignore[no-untyped-call]
    return client


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Redis errors become StoreUnavailable or StoreDenied, naming the broker without its password."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise StoreDenied(f"The broker refuses us: {error}", shown(url), "Check broker.url and its ACL") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        embedded = urlsplit(url).path.endswith(EMBEDDED)
        remedy = "Start `ssvm worker`: it runs the embedded broker" if embedded else _REMEDY
        raise StoreUnavailable(f"The broker cannot be reached: {error}", shown(url), remedy) from error
    except redis.RedisError as error:
        raise StoreUnavailable(f"The broker does not serve us: {error}", shown(url), "See its log") from error
