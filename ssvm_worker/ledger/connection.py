"""The connection to Redis or Valkey, and the translation of its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ssvm_worker.errors import StoreDenied, StoreUnavailable
from ssvm_worker.net.broker_url import Sentinels, redis_url, sentinels, shown

from .redis_library import redis

#: Seconds to connect. A submit must fail at once while the broker is down.
_CONNECT_S = 3.0
#: The last part of the path of the embedded broker's socket.
EMBEDDED = "/broker/valkey.sock"
#: Seconds to wait for one answer. A script takes less than a millisecond, so a broker that is slower is away.
_ANSWER_S = 5.0
#: The most connections of one client. Other threads wait for a free one. A management server sends a hundred commands
#: at once, and opening a connection takes longer than a command.
_MAX_CONNECTIONS = 8


def connect(url: str) -> redis.Redis:
    """Return a client that is not connected yet and is safe to share between threads.

    A client of Sentinels follows the master. Each command is repeated once: after a restart of the broker, the first
    command uses a dead connection of the pool.
    """
    given: dict[str, Any] = {
        "decode_responses": True,
        "encoding_errors": "replace",  # a record with other bytes must not hide all others
        "socket_connect_timeout": _CONNECT_S,
        "socket_timeout": _ANSWER_S,
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 1),
        "health_check_interval": 25,
    }
    if found := sentinels(url):
        return _connect_master(found, given)
    if urlsplit(url).scheme not in ("unix", "redis+socket"):
        given["socket_keepalive"] = True
    pool = redis.BlockingConnectionPool.from_url(
        redis_url(url), max_connections=_MAX_CONNECTIONS, timeout=_ANSWER_S, **given
    )
    return redis.Redis.from_pool(pool)


def _connect_master(found: Sentinels, given: dict[str, Any]) -> redis.Redis:
    """Return a client of the server that is the master when it connects.

    If a demoted master refuses a command, the client drops that connection.
    """
    given |= {"socket_keepalive": True, "db": found.db, "username": found.user, "password": found.password}
    sentinel_options = found.sentinel_options | {"socket_connect_timeout": _CONNECT_S, "socket_timeout": _CONNECT_S}
    tls = {"ssl": True, **found.ssl} if found.tls else {}
    manager = redis.sentinel.Sentinel(found.hosts, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
    client: redis.Redis = manager.master_for(found.master, **given, **tls)  # type: ignore[no-untyped-call]
    return client


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Raise Redis errors of the block as StoreUnavailable or StoreDenied, without the broker's password."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise StoreDenied(
            f"The broker refuses the worker: {error}", shown(url), "Check broker.url and its ACL"
        ) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        remedy = "Check broker.url, and that Redis or Valkey runs there"
        if urlsplit(url).path.endswith(EMBEDDED):
            remedy = "Start `ssvm worker`: it runs the embedded broker"
        raise StoreUnavailable(f"The broker cannot be reached: {error}", shown(url), remedy) from error
    except redis.RedisError as error:
        raise StoreUnavailable(f"The broker reports an error: {error}", shown(url), "See its log") from error
