"""The connection to Redis or Valkey, and its errors in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ssvm_worker.errors import StoreDenied, StoreUnavailable

#: Seconds to connect; a submit with the broker down must fail at once.
_CONNECT_S = 3.0
#: Seconds for one answer. The scripts take less than a millisecond; a broker that is silent for so long is away.
_ANSWER_S = 5.0


def connect(url: str) -> redis.Redis:
    """A client, not connected yet; safe to share between threads.

    One repeat, because the first command after a restart of the broker meets a dead connection of the pool.
    """
    return redis.Redis.from_url(
        redis_url(url),
        decode_responses=True,
        socket_connect_timeout=_CONNECT_S,
        socket_timeout=_ANSWER_S,
        **({} if _is_socket(url) else {"socket_keepalive": True}),
        retry=Retry(NoBackoff(), 1),
        health_check_interval=25,
    )


def celery_url(url: str) -> str:
    """The same broker in the spelling that Celery takes; a certificate is checked unless the URL itself says otherwise.

    kombu does not check any for a bare rediss:// URL, while redis-py does.
    """
    parts = urlsplit(url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in parse_qs(parts.query):
        return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"
    if parts.scheme != "unix":
        return url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.path}?virtual_host={database}"


def shown(url: str) -> str:
    """The URL without user, password and options."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Redis errors become StoreUnavailable or StoreDenied, naming the broker without its password."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise StoreDenied(f"The broker refuses us: {error}", shown(url), "Check broker.url and its ACL") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise StoreUnavailable(
            f"The broker cannot be reached: {error}",
            shown(url),
            "Check broker.url, and that Redis or Valkey runs there",
        ) from error
    except redis.RedisError as error:
        raise StoreUnavailable(f"The broker does not serve us: {error}", shown(url), "See its log") from error


def _is_socket(url: str) -> bool:
    return urlsplit(url).scheme in ("unix", "redis+socket")


def redis_url(url: str) -> str:
    """Celery's spelling of a unix socket in that of redis-py."""
    parts = urlsplit(url)
    if parts.scheme != "redis+socket":
        return url
    options: dict[str, Any] = {key: values[0] for key, values in parse_qs(parts.query).items()}
    return f"unix://{parts.path}?{urlencode({'db': options.get('virtual_host', '0').strip('/') or '0'})}"
